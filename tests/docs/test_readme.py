"""The README: its snippets run in order on a tiny model, and its names exist. The page of log keys has all of them."""

import re

import pytest
import torch

from tests.helpers import documented
from tests.helpers.command import ROOT
from tests.helpers.documented_names import DOTTED, FILES, is_there, unknown_names
from tests.helpers.models import tiny
from textenv import CharTokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
ALPHABET = "abcdefghijklmnopqrstuvwxyz TF"
SMALL = {
    '"gpt2"': "lm",
    "100_000": "1",
    "max_new_tokens=32": "max_new_tokens=4",
    "n_envs=64": "n_envs=16",
    "n_steps=64": "n_steps=4",
    "batch_size=512": "batch_size=32",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sequences in")
def test_the_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 1
    names = {"tokenizer": CharTokenizer(ALPHABET), "lm": tiny(vocab_size=40)}
    torch.manual_seed(0)
    for block in blocks:
        for long, short in SMALL.items():
            block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), names)


# Names that the reader defines: methods, a class and a spec.
OWN = ("get_reward", "get_rewards", "respond", "Class", "YourSpec")


def test_the_readmes_names_can_be_imported_from_where_it_says():
    assert unknown_names(README, OWN) == []


@pytest.mark.parametrize(
    ("page", "unknown"),
    [
        ("| `FeedbackStore(path).add(prompt)` |", ["FeedbackStore"]),
        ("```python\nfrom textenv.feedback.store import FeedbackStore\n```\n`FeedbackStore(path)`", []),
        ("```python\nfrom textenv.feedback import FeedbackStore\n```\n`FeedbackStore(path)`", ["FeedbackStore"]),
        (
            "`textenv.feedback.exchange.export(store)`, `TextEnv`, `env.py`, `KLPenalty(coef=1.0)`, `k1`, `dict(a=1)`",
            [],
        ),
        ("`textenv.feedback.exchange.exports`", ["textenv.feedback.exchange.exports"]),
    ],
)
def test_names_that_cannot_be_imported_are_reported(page, unknown):
    assert unknown_names(page) == unknown


def test_dotted_names_exist_on_all_pages_and_in_all_docstrings():
    patterns = (*documented.PAGES, *documented.CODE)
    pages = {path: path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)}
    spans = [(path, span) for path, text in pages.items() for span in re.findall(r"`([^`\n]+)`", text)]
    named = {name: path.name for path, span in spans for name in DOTTED.findall(span) if not span.endswith(FILES)}
    assert len(named) > 40
    assert [f"{page}: {name}" for name, page in named.items() if not is_there(name)] == []


def test_every_log_key_is_in_the_table():
    page = (ROOT / "docs/reference/log_keys.md").read_text(encoding="utf-8")
    folder = ROOT / "agents"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    keys = re.findall(r'logger\.record\(\s*f?"([^"{]+)"', source)
    assert len(keys) > 8
    assert [key for key in keys if f"`{key}`" not in page] == []
