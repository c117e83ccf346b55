"""Missing extras: a feature that needs one says so before any work, and the command ends with exit code 6."""

import importlib
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig

from agents import LoRA, Pretrained, RewardCurves, train_classifier
from agents.checkpoints.adapter_export import write_adapter
from agents.cli.compare import compare
from agents.configuration.config import Named, TrainConfig, default_loggers
from agents.errors import Exit
from agents.evaluation.curves import draw_curves
from agents.models.pretrained import build_model
from agents.runs.exit_codes import as_command_error
from agents.runs.loggers import check_loggers
from agents.runs.study import load_optuna
from agents.runs.trackers import MLflowTracker, Tracker
from agents.supervised.sft import tune
from agents.zoo import main as zoo
from tests.helpers.command import ROOT, run, settings
from tests.helpers.models import tiny
from textenv import GrammarMask, JSONSchemaMask, RegexMask, read_dataset
from textenv.adapters.gem import GemGame
from textenv.adapters.reasoning_gym import ReasoningScore
from textenv.adapters.textarena import TextArenaGame
from textenv.adapters.verifiers import VerifiersGame
from textenv.checks.extras import MissingExtraError, check_extra, needs
from textenv.checks.trust import Trust
from textenv.feedback.agreement import agreement
from textenv.feedback.records import Answer
from textenv.lanes.rendering import picture
from textenv.metrics import overlap as metrics
from textenv.rewards import ChatJudge, HTTPJudge, overlap
from textenv.rewards.chinese import SnowNLP
from textenv.rewards.lexicon import Vader
from textenv.rewards.similarity import Similarity
from textenv.tasks.demo import Demo


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed, and forget modules that have imported them."""

    def take(*packages, and_forget=()):
        for name in [name for name in sys.modules if name.split(".")[0] in packages or name in and_forget]:
            monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return take


PAGE = ("textenv.feedback.web", "textenv.feedback.guard")
TASK = SimpleNamespace(data=SimpleNamespace(idx=0, prompt="a", system_prompt=None))
VOTES = [Answer(0, item, "score", rater, "", ("x",), (item,)) for rater in ("ann", "bob") for item in (1, 2)]


def logger(name):
    return lambda: check_loggers([name], Trust())


def verifiers_turn():
    game = object.__new__(VerifiersGame)
    game.task = TASK
    game.step("a")


def adapter_without_peft():
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.Module()
    write_adapter(SimpleNamespace(model=layer), Path("never"))


GUARDS = {
    "a picture": ("plot", "PIL", lambda: Demo(render_mode="rgb_array")),
    "a picture itself": ("plot", "PIL", lambda: picture("a")),
    "the curves": ("plot", "matplotlib", logger("curves")),
    "drawing them": ("plot", "matplotlib", lambda: draw_curves("never.png", {})),
    "compare": ("plot", "matplotlib", lambda: compare(["never"], "never.png")),
    "RewardCurves": ("plot", "matplotlib", lambda: RewardCurves("never.png")._on_training_start()),
    "TensorBoard": ("plot", "tensorboard", logger("tensorboard")),
    "wandb": ("wandb", "wandb", logger("wandb")),
    "trackio": ("trackio", "trackio", logger("trackio")),
    "mlflow": ("mlflow", "mlflow", logger("mlflow")),
    "the tracker": ("trackio", "trackio", lambda: Tracker(Named("trackio"), None, TrainConfig())),
    "its MLflow": ("mlflow", "mlflow", lambda: MLflowTracker(Named("mlflow"), None, TrainConfig())),
    "a search": ("tune", "optuna", load_optuna),
    "rl_zoo3": ("zoo", "rl_zoo3", zoo.register),
    "LoRA": ("lora", "peft", lambda: build_model(tiny(), LoRA())),
    "its folder": ("lora", "peft", adapter_without_peft),
    "sft": ("sft", "accelerate", lambda: tune(tiny(), ["a text"], "never")),
    "a classifier": ("sft", "accelerate", lambda: train_classifier(tiny(), None, ["a", "b"], [0, 1], "never")),
    "device_map": ("sft", "accelerate", lambda: Pretrained("never", device_map="auto").build()),
    "quantisation": (
        "sft", "accelerate", lambda: Pretrained("never", quantization_config=BitsAndBytesConfig()).build()
    ),
    "a GGUF file": ("gguf", "gguf", lambda: Pretrained("never.gguf").build()),
    "a GGUF model": ("gguf", "accelerate", lambda: Pretrained("someone/never", cache_dir=".", gguf_file="a").build()),
    "a GGUF tokenizer": ("gguf", "gguf", lambda: Demo(tokenizer="never.gguf")),
    "the metric ROUGE": ("overlap", "rouge_score", metrics.ROUGE),
    "the metric METEOR": ("overlap", "nltk", metrics.METEOR),
    "the metric BLEU": ("overlap", "nltk", metrics.BLEU),
    "the metric SacreBLEU": ("overlap", "sacrebleu", metrics.SacreBLEU),
    "the metric ChrF": ("overlap", "sacrebleu", metrics.ChrF),
    "the reward METEOR": ("overlap", "nltk", overlap.METEOR),
    "the reward ROUGE": ("overlap", "rouge_score", overlap.ROUGE),
    "the reward BLEU": ("overlap", "nltk", overlap.BLEU),
    "the reward SacreBLEU": ("overlap", "sacrebleu", overlap.SacreBLEU),
    "the reward ChrF": ("overlap", "sacrebleu", overlap.ChrF),
    "Vader": ("sentiment", "vaderSentiment", Vader),
    "SnowNLP": ("chinese", "snownlp", SnowNLP),
    "Similarity": ("similarity", "sentence_transformers", lambda: Similarity("never", text="a")),
    "HTTPJudge": ("judge", "httpx", lambda: HTTPJudge("https://judge.example")),
    "ChatJudge": ("judge", "httpx", lambda: ChatJudge("https://judge.example", model="m", question="{completion}?")),
    "a regex": ("grammar", "llguidance", lambda: RegexMask("a")),
    "a schema": ("grammar", "llguidance", lambda: JSONSchemaMask({})),
    "a grammar": ("grammar", "llguidance", lambda: GrammarMask('start: "a"')),
    "a data set": ("hub", "datasets", lambda: read_dataset("some/name")),
    "agreement": ("feedback", "krippendorff", lambda: agreement(VOTES)),
    "the page": ("feedback", "uvicorn", lambda: importlib.import_module(PAGE[0])),
    "its templates": ("feedback", "jinja2", lambda: importlib.import_module(PAGE[0])),
    "its guard": ("feedback", "starlette", lambda: importlib.import_module(PAGE[1])),
    "GEM": ("gem", "gem", lambda: GemGame("never")),
    "TextArena": ("textarena", "textarena", lambda: TextArenaGame("never").reset(seed=0)),
    "verifiers": ("verifiers", "verifiers", verifiers_turn),
    "reasoning-gym": ("reasoning", "reasoning_gym", lambda: ReasoningScore("never")),
}  # fmt: skip


@pytest.mark.parametrize("feature", GUARDS)
def test_each_guard_names_its_extra(feature, without, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra, package, use = GUARDS[feature]
    # starlette keeps whether jinja2 was found
    without(package, and_forget=(*PAGE, *(name for name in sys.modules if name.startswith("starlette."))))
    with pytest.raises(MissingExtraError) as caught:
        use()
    words = str(caught.value)
    assert re.fullmatch(rf'Expected .*{package}\b.* for .+, got .+: pip install "textenv\[{extra}\]"\.', words), words
    assert "\n" not in words and not list(tmp_path.iterdir())
    refused = as_command_error(caught.value, Path())
    assert (str(refused), refused.code) == (words, Exit.MISSING)


def test_every_guard_of_the_packages_is_tried():
    """A new guard belongs into the table above."""
    named = set()
    for folder in ("textenv", "agents"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r'(?:needs|check_extra)\("(\w+)", "(\w+)"', path.read_text(encoding="utf-8")))
    assert len(named) > 15 and named - {(extra, package) for extra, package, _ in GUARDS.values()} == set()


@pytest.mark.parametrize(
    ("words", "extra", "package"),
    [
        (["--loggers=[curves]"], "plot", "matplotlib"),
        (["--loggers=[wandb]"], "wandb", "wandb"),
        (["--model.train=lora"], "lora", "peft"),
        (["--env.id=text", "--env.prompts=lines.txt", "--env.reward=vader"], "sentiment", "vaderSentiment"),
        (["--env.masks=[{id: regex, args: {pattern: a}}]", "--algorithm.name=maskable_ppo"], "grammar", "llguidance"),
    ],
)
def test_the_command_ends_with_the_code_of_a_missing_package(
    words, extra, package, without, model, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("a b\nb a\n")
    without(package)
    assert run("train", *settings(model, "run"), *words) == Exit.MISSING == 6
    out, err = capfd.readouterr()
    assert err.startswith(f"textenv: Expected {package} for ") and err.endswith(f'pip install "textenv[{extra}]".\n')
    assert err.count("\n") == 1 and not Path("run").exists()  # so that the same command works after the installation


def test_stages_and_the_rating_page_name_the_extra_before_the_work(without, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a b\nb a\n")
    Path("labels.csv").write_text("text,label\na,x\nb,y\n")
    without("accelerate", "starlette")
    assert run("sft", "--model", model, "--data", "texts.txt", "--out", "tuned") == Exit.MISSING
    assert run("classifier", "--model", model, "--data", "labels.csv", "--out", "judge") == Exit.MISSING
    assert run("rate", model, "--prompts", "texts.txt", "--web") == Exit.MISSING
    err = capfd.readouterr().err
    for extra in ("sft", "sft", "feedback"):
        index = err.index(f'pip install "textenv[{extra}]".\n')
        err = err[index + 1 :]
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "labels.csv"}


def test_without_plot_a_run_trains_and_names_what_is_missing(without, model, tmp_path, capfd):
    assert default_loggers() == ["tensorboard", "curves"]  # this environment has them
    without("tensorboard", "matplotlib")
    assert default_loggers() == [] == TrainConfig().loggers
    words = [word for word in settings(model, tmp_path / "run", rollouts=2) if not word.startswith("--loggers")]
    assert run("train", *words) == Exit.DONE
    assert 'without tensorboard and curves, which pip install "textenv[plot]" brings' in capfd.readouterr().out
    assert "loggers: []" in (tmp_path / "run" / "config.yml").read_text()
    assert not (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "tensorboard").exists()


def test_an_error_within_is_one_line_and_travels_between_processes():
    with pytest.raises(MissingExtraError, match=r"got it broke: pip") as caught, needs("plot", "a", "b"):
        raise ImportError("\nit broke")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ZeroDivisionError), needs("plot", "a", "b"):  # other errors pass through
        _ = 1 / 0
    check_extra("plot", "json", "what is there")
