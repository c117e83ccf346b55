"""The command in a new process, as a person starts it: every verb, exit codes, stop and resume."""

import json
import re
import signal
import time

import pytest

from agents.cli import main as cli
from tests.helpers.command import ROLLOUT, rows, settings, small_model, start
from textenv import demo

pytestmark = pytest.mark.slow
N_ROLLOUTS = 6


def command(*words, cwd, typed="", **kwargs):
    """Run the command to its end; return exit code, standard output and standard error."""
    with start(*words, cwd=cwd, stdin=-1, **kwargs) as process:
        out, err = process.communicate(typed, timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a finished run, prompts, texts and preferences."""
    folder = tmp_path_factory.mktemp("home")
    small_model(folder / "small")
    (folder / "prompts.txt").write_text("this phone is\nthe lamp was\n")
    (folder / "texts.txt").write_text("\n".join(demo.reviews(16)))
    pairs = [
        {"prompt": f"the {thing} was ", "chosen": "great .", "rejected": "awful ."} for thing in ("lamp", "phone")
    ] * 4
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    labelled = [{"text": f"the lamp was {word} .", "label": word} for word in ("great", "awful")] * 4
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    code, out, err = command("train", *settings("small", "run", N_ROLLOUTS, loggers="[curves]"), cwd=folder)
    assert code == 0, err
    assert re.search(rf"{N_ROLLOUTS * ROLLOUT:,} / {N_ROLLOUTS * ROLLOUT:,} tokens +reward \d", out)
    return folder


CALLS = {  # the words after each verb, a pattern that it prints, and a file that it writes
    "sft": (
        "--model small --data texts.txt --out tuned --n_epochs 1 --quiet",
        r"model: tuned",
        "tuned/model.safetensors",
    ),
    "reward-model": (
        "--model small --data pairs.jsonl --out scorer --quiet",
        r"model: scorer",
        "scorer/model.safetensors",
    ),
    "classifier": (
        "--model small --data labelled.jsonl --out judge --quiet",
        r"judge",
        "judge/model.safetensors",
    ),
    "critic": (
        "run --out critic --rollouts 8 --quiet",
        r"held out: explained variance 0\.000 -> -?\d",
        "critic/critic.safetensors",
    ),
    "tune": (
        'run/config.yml --trials 1 --tune.ranges={"kl.coef":{"low":0.0,"high":0.1}} --tune.max_kl 1e6 --out search',
        r"best",
        "search/best.yml",
    ),
    "evaluate": ("run --metrics [distinct] --n_prompts 4", r"\| reward \|", "run/evaluation.json"),
    "generate": ("run --prompts prompts.txt --max_new_tokens 3", r'^\{"prompt": "this phone is"', None),
    "rate": ("small --prompts prompts.txt --max_new_tokens 3 --db answers.db", r"1 answered, 0 skipped", "answers.db"),
    "chat": ("run --max_new_tokens 3", r"\S", None),
    "show": ("run --prompt 1", r"reward", None),
    "export": ("run exported", r"exported", "exported/model.safetensors"),
    "compare": ("run run --out both.png", r"run", "both.png"),
    "report": ("run --out page.html", r"page\.html", "page.html"),
    "doctor": ("run/config.yml", r"vocabulary", None),
    "tasks": ("", r"perplexity", None),
}


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_each_verb(verb, home):
    words, prints, leaves = CALLS[verb]
    code, out, err = command(verb, *words.split(), cwd=home, typed="3\n" if verb == "rate" else "this phone is\n")
    assert (code == 0 or verb == "doctor") and "Traceback" not in err, err
    assert re.search(prints, out, flags=re.MULTILINE), out
    assert leaves is None or (home / leaves).stat().st_size > 0


def test_help_of_each_verb(home):
    for verb in cli.VERBS:
        code, out, err = command(verb, "--help", cwd=home)
        assert code == 0 and out.startswith(f"usage: textenv {verb}") and not err
    code, out, _ = command(cwd=home)
    assert code == 0 and all(re.search(rf"^  {verb} ", out, flags=re.MULTILINE) for verb in cli.VERBS)


def test_json_is_a_line_of_json_an_iteration(home):
    code, out, err = command("train", *settings("small", "json", 2), "--json", cwd=home)
    assert code == 0 and [json.loads(line)["tokens"] for line in out.splitlines()] == [0, ROLLOUT, 2 * ROLLOUT], err


REWARDS = {
    "infinite": ("return float('inf')", 4, "Expected a reward to be a finite number, got inf"),
    "raises": ("raise KeyError('no')", 4, "raised KeyError: 'no'"),
    "huge": ("return 1e30", 4, "Expected a reward to be at most 1e+15 in size, whose square float32 can hold"),
    "ends": ("raise SystemExit(0)", 4, "raised SystemExit: 0"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_exit_codes_of_rewards(name, home):
    body, expected, message = REWARDS[name]
    (home / f"{name}.py").write_text(f"class Reward:\n    def __call__(self, prompt, preds, done):\n        {body}\n")
    words = settings("small", name, **{"env.reward": f"{name}:Reward", "kl.coef": 0})
    code, _, err = command("train", *words, "--allow", name, "--quiet", cwd=home)
    assert (code, err.count("\n")) == (expected, 1) and message in err, err
    assert "Traceback" in (home / name / "log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--algorithm.learning_rat=1"], "did you mean 'algorithm.learning_rate'?"),
        (["train", "--resume=nowhere"], "Expected the folder of a run, got nowhere"),
        (["train", "--model.name=./nowhere", "--out=none"], "got './nowhere': there is no such folder"),
        (["evaluate", "small"], "Expected the folder of a run, got small"),
    ],
)
def test_refusals_end_with_2(words, message, home):
    code, out, err = command(*words, cwd=home)
    assert code == 2 and message in err and "Traceback" not in err and out in ("", "run: none\n")
    assert not (home / "none").exists(), "what is refused before it has trained leaves nothing"


def test_stop_and_resume_is_the_same_run(home):
    words = settings("small", "stopped", N_ROLLOUTS)
    with start("train", *words, cwd=home) as process:
        while not (home / "stopped" / "metrics.jsonl").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    again = re.search(r"continue with: textenv (.+)", err)[1].split()
    assert len(rows(home / "stopped")) < 1 + N_ROLLOUTS
    code, _, err = command(*again, "--quiet", cwd=home)
    assert code == 0, err
    assert rows(home / "stopped") == rows(home / "run")
    weights = [(home / name / "model" / "model.safetensors").read_bytes() for name in ("run", "stopped")]
    assert weights[0] == weights[1]
