"""The commands other than `train`: the output, files and refusals of each."""

import configparser
import io
import json
import re
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, XLNetConfig

from agents.cli import main as cli
from agents.cli import trained_model as verbs
from agents.runs.live_screen import LiveScreen
from agents.runs.screens import warnings_on
from tests.agents.report.made_runs import data_of
from tests.helpers.command import ROLLOUT, ROOT, run, settings
from textenv import demo


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run that trained LoRA adapters."""
    out = tmp_path_factory.mktemp("runs") / "done"
    words = settings(model, out, rollouts=2, **{"model.train": "lora", "model.lora_r": 2})
    judge = ("--evaluation.judge", "{id: length, args: {target: 3}}")
    assert run("train", *words, *judge, "--quiet") == 0
    return out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        run(verb, "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: textenv {verb}")


def test_the_version_is_the_one_that_is_installed(capsys):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert run("--version") == 0
    assert capsys.readouterr().out == f"textenv {setup['metadata']['version']}\n"
    assert run() == run("--help") == 0
    assert capsys.readouterr().out.count("`textenv --version` prints the version") == 2


def test_tasks_has_a_line_each(capsys):
    assert run("tasks") == 0
    said = capsys.readouterr().out
    for name in ("demo", "vader", "classifier", "rouge", "perplexity", "intent_accuracy", "regex", "grammar", "curves"):
        assert re.search(rf"^  {name} +[A-Z].{{20}}", said, flags=re.MULTILINE), name


def test_evaluate_prints_before_and_after(done, capsys):
    assert run("evaluate", done, "--metrics", "[distinct, {id: words}]", "--n_prompts", "8") == 0
    said = capsys.readouterr().out
    assert "| figure | before | after | difference |" in said and "| reward |" in said and "distinct" in said
    judged = [row["figures"]["judge"] for row in json.loads((done / "history.json").read_text())]
    assert "| judge |" in said and judged and 0 <= min(judged) <= max(judged) <= 1
    assert run("evaluate", done, "--judge", "{id: length, args: {target: 9999}}", "--n_prompts", "8") == 0
    assert "| judge | 0.00" in capsys.readouterr().out
    assert json.loads((done / "evaluation.json").read_text())["n_prompts"] == 8


def test_generate_streams_json(done, model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("this phone is\nthe lamp was\n")
    for source in (done, model):
        words = ["--prompts", tmp_path / "prompts.txt", "--n", "2", "--max_new_tokens", "4"]
        assert run("generate", source, *words) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == ["this phone is"] * 2 + ["the lamp was"] * 2
        assert all(line["text"] for line in lines)
    assert run("generate", model, "--prompts", "nowhere.txt") == 2
    assert "Expected prompts in nowhere.txt" in capsys.readouterr().err


def test_export_merges_adapters_and_generates_the_same(done, tmp_path, capsys):
    assert run("export", done, tmp_path / "model") == 0
    assert "generates the same" in capsys.readouterr().out
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert not [name for name in names if "lora" in name]
    assert (tmp_path / "model" / "README.md").is_file()


def test_export_of_a_run_that_goes_on_after_its_end(done, tmp_path, capsys):
    """Its results are removed until it ends again; the table of its first end is older than the model."""
    copy = shutil.copytree(done, tmp_path / "copy")
    (copy / "results.json").unlink()
    assert run("export", copy, tmp_path / "model") == 0, capsys.readouterr().err
    assert "Not evaluated yet." in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
def test_export_writes_the_adapter_alone_too(done, model, tmp_path, capsys):
    assert run("export", done, tmp_path / "model", "--adapter") == 0
    assert f"{tmp_path / 'model' / 'adapter'}: the adapter alone, for {model}" in capsys.readouterr().out
    base, ids = AutoModelForCausalLM.from_pretrained(model), torch.arange(8)[None]
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    assert run("export", done, tmp_path / "model", "--adapter", "--overwrite") == 0, "an earlier export with an adapter"


def test_an_adapter_of_a_run_without_lora_is_refused(model, tmp_path, capsys):
    assert run("train", *settings(model, tmp_path / "run", rollouts=1), "--quiet") == 0
    assert run("export", tmp_path / "run", tmp_path / "model", "--adapter") == 2
    assert "Expected a model with LoRA to write its adapter" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_an_exported_model_that_writes_otherwise_is_said(done, model, tmp_path, monkeypatch, capsys):
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.normal_(other.get_input_embeddings().weight, std=3.0)
    other.save_pretrained(tmp_path / "other")
    make = verbs.make_policy
    monkeypatch.setattr(verbs, "make_policy", lambda name, *rest, **more: make(str(tmp_path / "other"), *rest, **more))
    assert run("export", done, tmp_path / "model") == 1
    assert "another text at prompt" in capsys.readouterr().err


def test_damage_is_refused(done, tmp_path, capsys):
    copy = shutil.copytree(done, tmp_path / "copy")
    file = max((copy / "checkpoints").iterdir()) / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for words in (["evaluate", copy], ["export", copy, tmp_path / "model"]):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert "policy.safetensors: " in error and f"newest intact: step {ROLLOUT}" in error
    assert not (tmp_path / "model").exists()


def test_compare_draws_and_prints(done, tmp_path, capsys):
    assert run("compare", done, done, "--out", tmp_path / "both.png") == 0
    assert "| run | tokens | first reward | reward/task |" in (said := capsys.readouterr().out)
    assert said.count(f"| {2 * ROLLOUT} |") == 2
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert run("compare", "nowhere") == 2


def test_show_has_a_line_a_token(done, capsys):
    assert run("show", done, "--prompt", "1") == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^'.+' +(-?\d\.\d+) +(-?\d+\.\d+) +(-?\d\.\d+)$", said, flags=re.MULTILINE)
    assert 1 <= len(rows) <= 8
    total = float(re.search(r"reward (\d\.\d+)", said.splitlines()[-1])[1])
    assert sum(float(row[0]) for row in rows) == pytest.approx(total, abs=1e-3)
    assert run("show", done, "--prompt", "400") == 2


def test_a_judge_chooses_the_best_model_and_its_gap_is_written(done):
    """Here all texts of the start have one length and one score of the judge, so that no gap is known."""
    assert re.search(r"^  best: judge$", (done / "config.yml").read_text(), flags=re.MULTILINE)
    assert json.loads((done / "best" / "best.json").read_text())["figure"] == "judge"
    history = json.loads((done / "history.json").read_text())
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["eval/gap"] for row in rows if "eval/gap" in row]
    assert gaps == [row["figures"]["gap"] for row in history] == [None] * len(gaps) and len(gaps) >= 2


def test_a_run_that_its_judge_stops_says_so(model, tmp_path, capsys):
    words = settings(model, tmp_path / "run", rollouts=4, **{"evaluation.every": 1, "evaluation.patience": 1})
    assert run("train", *words, "--evaluation.judge", "zero") == 0
    assert "stopped early: no better judge since 0 tokens (evaluation.patience 1)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "history.json").read_text())[-1]["num_timesteps"] == ROLLOUT


def test_show_writes_the_credit_of_a_few_episodes(done, capsys):
    assert run("show", done, "--prompt", "1", "--credit", "2", "--continuations", "3") == 0
    said = capsys.readouterr().out
    assert re.search(r"^\| all \| \d+ \| (-?\d\.\d\d|nan) \| [+-]\d.* ± \d", said, flags=re.MULTILINE), said
    rows = json.loads((done / "credit.json").read_text(encoding="utf-8"))
    assert len(rows) == 2 and list(rows[0]) == ["prompt", "tokens", "critic", "monte_carlo", "low", "high"]
    assert len({len(rows[0][name]) for name in list(rows[0])[1:]}) == 1
    for low, value, high in zip(rows[0]["low"], rows[0]["monte_carlo"], rows[0]["high"], strict=True):
        assert low <= value <= high
    assert run("show", done, "--prompt", "399", "--credit", "2") == 2
    assert "Expected --prompt and --credit of prompts up to number" in capsys.readouterr().err
    assert run("show", done, "--credit", "2", "--html") == 2
    assert "Expected --html or --credit, got both" in capsys.readouterr().err


def test_show_writes_the_episode_of_the_terminal_as_a_page(done, capsys):
    assert run("show", done, "--prompt", "1") == 0
    said = re.findall(r"^'(.+)' +(-?\d\.\d+) +(-?\d+\.\d+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert run("show", done, "--prompt", "1", "--html") == 0
    assert capsys.readouterr().out == f"page: {done / 'episode.html'}\n"
    data = data_of(done / "episode.html")
    row = data["runs"][0]["episodes"]["tables"][0]["episodes"][0]
    assert data["kind"] == "episode" and [piece.strip() for piece in row["pieces"]] == [
        text.strip() for text, *_ in said
    ]
    for name, column in (("reward", 1), ("value", 2)):
        assert row[name] == pytest.approx([float(line[column]) for line in said], abs=6e-4)
    # The divergence is that of the sampled token, and the penalty the default's, 0.05 per nat.
    assert row["penalty"] == pytest.approx([0.05 * kl for kl in row["kl"]], rel=1e-3, abs=1e-6)
    following, advantage = 0.0, 0.0
    for i in reversed(range(len(said))):  # gamma 1, lambda 0.95
        advantage = row["reward"][i] - row["penalty"][i] + following - row["value"][i] + 0.95 * advantage
        following = row["value"][i]
        assert row["advantage"][i] == pytest.approx(advantage, abs=1e-3)
        assert row["return"][i] == pytest.approx(advantage + following, abs=1e-3)
    assert "ratio" not in row and all(len(one) == 5 for one in row["alternatives"])


def test_chat_remembers(model, monkeypatch, capsys):
    from agents.cli import chat

    asked = []
    original = chat.generate
    monkeypatch.setattr(
        chat,
        "generate",
        lambda policy, prompts, *rest, **kwargs: asked.append(prompts) or original(policy, prompts, *rest, **kwargs),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("this phone is\nand the lamp\n/reset\nthis phone is\n/exit\nno\n"))
    assert run("chat", model, "--max_new_tokens", "3", "--greedy", "true") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]
    assert len(asked[1][0]) > len(asked[0][0]) + 3 and asked[2] == asked[0]


def test_doctor_reports(model, capsys):
    code = run("doctor", *[word for word in settings(model) if "--samples" not in word])
    said = capsys.readouterr().out
    assert code in (0, 1) and "vocabulary" in said and ("failed" in said) == (code == 1)


@pytest.mark.slow
def test_doctor_says_the_row_of_one_model_by_its_config_alone(tmp_path, capsys):
    GPT2Config(n_layer=24, n_embd=4096).save_pretrained(tmp_path)  # 5 GB of weights that are not there
    for name in (tmp_path, tmp_path / "config.json"):
        assert run("doctor", "--model", name) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"{name}: GPT2Config" and "result     exact" in said
    assert "LoRA       c_attn, c_fc, c_proj" in said
    XLNetConfig().save_pretrained(tmp_path)
    assert run("doctor", f"--model={tmp_path}") == 1
    assert "result     refused" in capsys.readouterr().out
    assert run("doctor", "--model", tmp_path / "nothing") == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_dry_run_estimates_and_writes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", *settings(model), "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(rf"rollout of {ROLLOUT} tokens: \d+\.\d\d s; its update: \d+\.\d\d s", said)
    assert re.search(r"the whole run, 256 tokens: about 0:00:\d\d", said) and "memory at most: " in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_groups_says_how_many_tokens_are_read(model, capsys):
    words = settings(model, **{"env.args": "{samples_per_prompt: 4}", "algorithm.advantage": "grpo"})
    assert run("train", *words, "--dry-run") == 0
    said = re.search(r"equal prompts are read once: (\d+) of (\d+) in the rollout", capsys.readouterr().out)
    read, whole = map(int, said.groups())
    assert read < 0.6 * whole


def test_a_configuration_has_the_estimates_of_advantages(model, capsys):
    options = {"algorithm.critic_lambda": 1, "algorithm.lambda_alpha": 0.2}
    assert run("train", *settings(model, **options), "--dry-run") == 0
    capsys.readouterr()
    assert run("train", *settings(model, **{"algorithm.advantage": "reinforce++", **options}), "--dry-run") == 2
    assert "Expected critic_lambda=None with advantage='reinforce++', got 1" in capsys.readouterr().err
    assert run("train", *settings(model, **{"algorithm.critic_lambda": 2}), "--dry-run") == 2
    assert "critic_lambda" in capsys.readouterr().err


def test_the_live_view_shows_figures_and_harmless_samples():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    screen = LiveScreen(1000, 300, console)
    screen.say("hello")
    screen.row({"tokens": 0, "eval/reward": 0.25})
    screen.row(
        {"tokens": 500, "reward/task": 0.5, "reward/mood": 0.125, "kl/sequence": 1.5, "train/entropy_loss": -2.0}
    )
    screen.samples([{"prompt": "this is ", "text": "\x1b[2Jbad [red]", "reward": 1.0}])
    screen.close()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    for part in ("hello", "500 / 1,000 tokens", "0.500", "0.125", "1.50", "2.00", "0.250", "\\x1b[2Jbad [red]", "left"):
        assert part in shown, part
    assert "\x1b[2J" not in console.file.getvalue()


def test_the_live_view_shows_the_end_of_a_long_prompt():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    screen = LiveScreen(1000, 300, console)
    screen.samples([{"prompt": "a" * 200 + " the question is ", "text": "good", "reward": 1.0}])
    screen.close()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    assert "…" + "a" * 43 + " the question is good" in shown and "a" * 60 not in shown


def test_warnings_of_a_run_go_to_its_screen_and_what_showed_them_before_is_back_afterwards(monkeypatch):
    console, others = Console(file=io.StringIO(), width=120), []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: others.append(str(message)))
    before, filters = warnings.showwarning, list(warnings.filters)
    with pytest.raises(ArithmeticError), warnings_on(LiveScreen(10, 10, console)):
        warnings.simplefilter("always")
        warnings.warn("the reward is constant", stacklevel=1)
        assert "warning: the reward is constant" in console.file.getvalue(), "at once, and not when the run ends"
        raise ArithmeticError
    assert (warnings.showwarning, list(warnings.filters), others) == (before, filters, [])
    with pytest.warns(UserWarning, match="of nobody's run"):
        warnings.warn("of nobody's run", stacklevel=1)
    assert "of nobody's run" not in console.file.getvalue()


@pytest.mark.slow
def test_sft_and_reward_model_make_folders_that_the_next_stage_takes(model, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(demo.reviews(32)))
    pairs = [
        {"prompt": f"the {thing} was ", "chosen": "great .", "rejected": "awful ."} for thing in ("lamp", "phone")
    ] * 8
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "sft.yml").write_text(f"data: {tmp_path / 'texts.txt'}\nmodel: {model}\nlearning_rate: 0.01\n")
    words = ["--held_out", tmp_path / "texts.txt", "--out", tmp_path / "tuned", "--n_epochs", "3", "--quiet"]
    assert run("sft", tmp_path / "sft.yml", *words) == 0
    before, after = re.search(r"held out: loss (\S+) -> (\S+),", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    words = ["--model", tmp_path / "tuned", "--data", tmp_path / "pairs.jsonl", "--learning_rate", "0.01"]
    words += ["--held_out", tmp_path / "pairs.jsonl", "--n_epochs", "4", "--out", tmp_path / "scorer", "--quiet"]
    assert run("reward-model", *words) == 0
    assert "held out: " in capsys.readouterr().out
    reward = {"id": "preference", "args": {"model": str(tmp_path / "scorer")}}
    words = settings(tmp_path / "tuned", tmp_path / "run", rollouts=1, **{"env.reward": json.dumps(reward)})
    critic = ["--model.critic", "reward_model", "--model.critic_model", tmp_path / "scorer"]
    assert run("train", *words, *critic, "--quiet") == 0


def test_stages_say_what_their_files_lack(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    for verb, words in (("sft", "prompt and reference, or text"), ("reward-model", "chosen and rejected, or text")):
        assert run(verb, "--model", model, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out") == 2
        assert f"Expected {words}" in capsys.readouterr().err
        assert run(verb) == 2
        assert re.search("Expected --out DIR, and --data or --task", capsys.readouterr().err)
