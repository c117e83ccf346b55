"""The configurations in examples/configs: their opening comments, and the commands in them, which run as written."""

import re
import shlex
from pathlib import Path

import pytest

from agents.cli import arguments
from agents.cli import main as cli
from agents.cli.options import ClassifierConfig, EvaluateOptions, RewardModelConfig, SFTConfig
from agents.cli.stages import fresh_config
from tests.helpers.command import ROOT, run
from tests.helpers.task_data import write_data
from textenv import TASKS

CONFIGS = sorted((ROOT / "examples" / "configs").rglob("*.yml"))
STAGES = {"sft": SFTConfig, "classifier": ClassifierConfig, "reward-model": RewardModelConfig}
SEARCHES = [path for path in CONFIGS if path.parent.name == "searches"]
OTHERS = ("_sft", "_classifier", "_reward_model")
TRAINED = [path for path in CONFIGS if not f"_{path.stem}".endswith(OTHERS) and path not in SEARCHES]
LARGE = [path for path in TRAINED if path.stem.endswith("_gpt2") or path.parent.name == "smollm2"]
SMALL = [path for path in TRAINED if path not in LARGE]
DATA = "FOLDER"  # stands for the data set's folder in the commands


def name(path):
    return path.relative_to(ROOT / "examples" / "configs").with_suffix("").as_posix()


def opening(path):
    """Return the comment with which a configuration begins."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def commands(path):
    """Return the commands of the opening comment, each as the words after `textenv`."""
    text = opening(path).replace("\\\n", " ")
    found = [shlex.split(line) for line in text.splitlines() if line.startswith("  textenv ")]
    return [words[1:] for words in found]


def downloads(path):
    """Return the folders of the models that the opening comment's commands write before any other."""
    return set(re.findall(r"^  python examples/real_model\.py (\S+)$", opening(path), flags=re.MULTILINE))


def stage_config(verb, words):
    parser = arguments.make_parser(verb, "[CONFIG.yml]", STAGES[verb], cli.StageOptions)
    return arguments.split(parser, arguments.with_config(words), STAGES[verb], cli.StageOptions)[0]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_opens_with_command_hardware_minutes_and_figure(path):
    text = opening(path)
    own = [words for words in commands(path) if path.relative_to(ROOT).as_posix() in words]
    assert len(own) == 1, "the command that takes it"
    verbs = ["train"] if path in TRAINED else ["tune"] if path in SEARCHES else STAGES
    assert own[0][0] in verbs
    assert re.search(r"\bCPU\b|\bGPU\b", text), "the hardware"
    assert re.search(r"\d (minutes?|hours?)\b|less than a minute|half a minute", text), "the time"
    expected = text.partition("Expect")[2]
    assert re.search(r"\d", expected) or "not measured" in expected, "the figure"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_its_commands_are_understood_and_make_what_the_next_ones_read(path):
    made = downloads(path)
    for verb, *words in commands(path):
        if verb in ("train", "tune"):
            config, options, dumped = cli.train_config(words, verb)
            needed, out = set(re.findall(r"\bruns/[\w/]+", dumped)) - {config.out}, config.out
            assert (DATA in dumped) == (config.env.id in ("Reviews", "DailyDialog", "HH", "ZhReviews"))
            assert config.total_tokens > 0
        elif verb in STAGES:
            config = stage_config(verb, words)
            needed = {name for name in (config.model, vars(config).get("tokenizer")) if str(name).startswith("runs/")}
            out = config.out
            if fresh := vars(config).get("fresh"):
                assert fresh_config(fresh).model_type == fresh["model_type"]
        else:
            parser = arguments.make_parser(verb, "RUN", EvaluateOptions, cli.TrustOptions)
            needed, out = {arguments.parse(parser, words).run}, None
        if path in TRAINED:
            assert needed <= made, "an earlier command makes it"
        made.update((out, f"{out}/model"))  # a run writes its model beside its records


def test_a_key_that_is_none_would_be_noticed(tmp_path):
    (tmp_path / "reviews.yml").write_text("algorithm: {n_env: 4}\n")
    with pytest.raises(cli.CommandError, match=r"did you mean 'algorithm\.n_envs'"):
        cli.train_config([str(tmp_path / "reviews.yml")])
    (tmp_path / "sft.yml").write_text("taks: Reviews\n")
    with pytest.raises(cli.CommandError, match="did you mean 'task'"):
        stage_config("sft", [str(tmp_path / "sft.yml")])


def test_every_task_has_a_small_configuration_and_large_ones_train_adapters():
    tasks = {"demo", *TASKS} - {"Text"}  # "text" is the same task, with a user's own prompts and reward
    small, large = ([cli.train_config([str(path)])[0] for path in paths] for paths in (SMALL, LARGE))
    # A model from scratch cannot read the questions of reasoning-gym.
    assert {config.env.id for config in small} == {*tasks, "text"} - {"ReasoningGym"}
    assert "ReasoningGym" in {config.env.id for config in large}
    assert {config.model.train for config in large} == {"lora"}


def test_the_readme_beside_them_lists_all():
    table = (ROOT / "examples" / "configs" / "README.md").read_text(encoding="utf-8")
    folders = {"smollm2", "searches"}  # names in the others are not repeated
    named = [f"{path.parent.name}/{path.name}" if path.parent.name in folders else path.name for path in CONFIGS]
    named = [name for name in named if not Path(name).stem.endswith(OTHERS)]
    assert [name for name in named if f"`{name}`" not in table] == []


def test_the_demo_configuration_is_what_train_does_alone():
    assert cli.train_config([])[0] == cli.train_config([str(ROOT / "examples" / "configs" / "demo.yml")])[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", SMALL, ids=name)
def test_a_small_configuration_runs_for_a_rollout(path, tmp_path, monkeypatch, capsys):
    """All its commands run as written, except for sizes, on made-up data: a few steps of each stage."""
    if "snownlp" in path.read_text(encoding="utf-8"):
        pytest.importorskip("snownlp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.cli.stage_data.N_RANDOM_TEXTS", 60)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folders = write_data(tmp_path / "data", n=40)
    for words in commands(path):
        if words[0] == "train":
            config = cli.train_config(words[1:])[0]
            size = {"n_envs": 8, "n_steps": 32, "batch_size": 256}  # 32 steps, so that groups of samples are complete
            words += [f"--algorithm.{name}={value}" for name, value in size.items()]
            words += ["--total_tokens=256", "--evaluation.n_prompts=2", "--evaluation.n=1", "--samples=1", "--quiet"]
            task = config.env.id
        elif words[0] in STAGES:
            task = stage_config(words[0], words[1:]).task
            words += ["--n_epochs", "0.05", "--quiet"]
        elif words[0] == "evaluate":
            words += ["--n_prompts", "2", "--n", "1"]
        assert run(*(str(folders[task]) if word == DATA else word for word in words)) == 0, capsys.readouterr().err
    results = [file.read_text() for file in Path("runs").rglob("results.md")]
    n_runs = sum(words[0] == "train" for words in commands(path))
    assert ["| reward |" in text for text in results] == [True] * n_runs
