"""The commands of the README and of examples/people.md, run in their order with small budgets.

With `-s`, each is printed with its exit code. The commands of the ready configurations run in test_configs.py, the
scripts in test_examples.py, test_example_*.py and test_benchmarks.py.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from agents import word_tokenizer
from tests.helpers import documented
from tests.helpers.command import ROOT, environment, run
from tests.helpers.people import Rater
from textenv import demo
from textenv.feedback.store import FeedbackStore

pytestmark = pytest.mark.slow

SIZE = {"total_tokens": 512, "algorithm.n_envs": 8, "algorithm.n_steps": 32, "algorithm.batch_size": 256, "samples": 1}
BUDGETS = {
    "train": [f"--{name}={value}" for name, value in SIZE.items()]
    + ["--evaluation.n_prompts=2", "--evaluation.n=1", "--quiet"],
    "tune": [f"--{name}={value}" for name, value in SIZE.items()]
    + ["--evaluation.n_prompts=2", "--trials=1", "--tune.ranges={kl.coef: {low: 0.0, high: 0.1}}", "--tune.max_kl=1e6"]
    + ["--out=runs/search", "--quiet"],
    "evaluate": ["--n_prompts", "2"],
    "reward-model": ["--n_epochs", "2", "--quiet"],
    "critic": ["--algorithm.n_envs=8", "--rollouts=1", "--quiet"],
    "rate": ["--max_new_tokens", "8"],
    "doctor": [],
}
STAND_INS = {
    "RUN": "runs/mine",
    "RUN|MODEL": "runs/mine",
    "FILE": "prompts.txt",
    "DIR": "exported",
    "NAME": "gpt2",
    "[CONFIG.yml]": "examples/configs/demo.yml",
    "CONFIG.yml": "examples/configs/demo.yml",
}
TYPED = {"chat": "this phone is\n/exit\n", "rate": "q\n"}
# An upload, an option of runs with LoRA (tests/agents/cli/test_cli_verbs.py), and the placeholder for any option.
ELSEWHERE = ("--to_hub", "--adapter", "--key")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder with the examples, a model called gpt2, and the prompts that examples/people.md makes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(demo.vocabulary())
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    (script,) = [words[1:] for words in blocks("examples/people.md") if words[:2] == ("python", "-c")]
    with open("prompts.txt", "w") as file:
        subprocess.run([sys.executable, *script], env=environment(), stdout=file, check=True)
    return tmp_path


def blocks(page):
    return documented.of_blocks((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def start(here, monkeypatch, capsys):
    """Run documented commands; a rater answers their questions. At the end, print all with their exit codes."""
    codes = []

    def start(words):
        if words[0] != "textenv" or set(ELSEWHERE) & set(words):
            return
        typed = " ".join(words)
        verb, *rest = (STAND_INS.get(word, word) for word in words[1:] if word != "--web")  # it waits for a browser
        monkeypatch.setattr("sys.stdin", io.StringIO("5\n4\n3\n2\nq\n" if "--train" in rest else TYPED.get(verb, "")))
        code = run(verb, *rest, *BUDGETS.get(verb, ()))
        captured = capsys.readouterr()
        codes.append(f"exit {code}  ran: {typed}")
        # The doctor's 1 says that it has found something in so short a run.
        assert code == 0 or (verb == "doctor" and code == 1), f"{typed}: {captured.err or captured.out}"
        if verb == "rate" and Path("ratings.db").exists():
            with FeedbackStore("ratings.db") as store:
                Rater(store).answer_all()

    yield start
    print("", *codes, sep="\n")


def test_the_commands_of_the_readme_and_of_its_guide_run(start, here):
    for words in blocks("README.md"):
        if words != ("textenv", "train"):  # the first command, which .ci/run runs with its own budget
            start(words)
    table = documented.of_tables((ROOT / "docs/guides/command.md").read_text(encoding="utf-8"))
    commands = [words for words in table if words[1] not in ("sft", "classifier", "reward-model", "rate")]
    for words in commands:
        start(words)
    assert (here / "exported" / "model.safetensors").is_file() and len(commands) > 9


def test_the_commands_of_people_run(start, here):
    for words in blocks("examples/people.md"):
        start(words)
    assert (here / "run" / "model" / "model.safetensors").is_file() and (here / "hand" / "model").is_dir()


def test_two_models_are_compared_as_people_says(here):
    page = (ROOT / "examples" / "people.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(snippet, first := {})
    with FeedbackStore("ratings.db") as store:
        shown = store.next("ann")
        store.choose(shown, "ab"[shown.completions.index("好看")])
    exec(snippet, later := {})
    assert (first["wins"], later["wins"]) == ([], ["after"])
