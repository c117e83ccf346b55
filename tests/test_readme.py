"""The README's snippets run, in order, on a tiny model and a short rollout."""

import re
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from textenv import CharTokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
    assert len(blocks) >= 5
    names = {"tokenizer": CharTokenizer(ALPHABET), "lm": tiny(vocab_size=40)}
    torch.manual_seed(0)
    for block in blocks:
        for long, short in SMALL.items():
            block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), names)


def test_every_log_key_is_in_the_table():
    folder = Path(__file__).parents[1] / "agents"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    keys = re.findall(r'logger\.record\(\s*f?"([^"{]+)"', source)
    assert len(keys) > 8
    assert [key for key in keys if f"`{key}`" not in README] == []
