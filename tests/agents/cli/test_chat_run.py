"""The verbs that write texts with a run of adapters on a chat model: generate, chat and rate."""

import io
import json

import pytest
from transformers import GPT2LMHeadModel

from agents.cli import chat
from tests.helpers.command import ROLLOUT, run, settings
from tests.helpers.models import tiny
from tests.textenv.prompts.test_chat import CHATML, END, tokenizer_with

ASKED = [{"role": "user", "content": "hello there"}]
TEMPLATE = "<|im_start|>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has trained adapters on chats, and a file of a chat."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = tokenizer_with(CHATML)
    config = tiny("gpt2", vocab_size=len(tokenizer), n_positions=256, eos_token_id=END, bos_token_id=END)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text(json.dumps({"prompt": ASKED}) + "\n")
    options = {
        "env.id": "text",
        "env.prompts": folder / "chats.jsonl",
        "env.reward": "{id: length, args: {target: 4}}",
        "env.args": f"{{stop_ids: [{END}]}}",
        "model.train": "lora",
        "model.lora_r": 2,
    }
    words = settings(folder / "model", folder / "run", rollouts=1, **options)
    assert run("train", *words, "--quiet") == 0
    assert json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"] == ROLLOUT
    return folder


@pytest.mark.parametrize("file", [False, True])
def test_generate_writes_a_chat_as_it_was_given(trained, file, tmp_path, capsys):
    """Not as the template renders it, so that the lines are prompts again."""
    words = ["--prompts", trained / "chats.jsonl"] if file else []
    assert run("generate", trained / "run", *words, "--n", "2") == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [ASKED] * (2 if file else len(lines)) and TEMPLATE not in out
    (tmp_path / "again.jsonl").write_text(out)
    assert run("generate", trained / "run", "--prompts", tmp_path / "again.jsonl") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["prompt"] == ASKED


def test_chat_renders_the_conversation_and_shows_the_answers_alone(trained, monkeypatch, capsys):
    prompts, original = [], chat.generate

    def noted(policy, rows, *rest, **more):
        prompts.extend(rows)
        return original(policy, rows, *rest, **more)

    monkeypatch.setattr(chat, "generate", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    assert run("chat", trained / "run") == 0
    said = capsys.readouterr()
    assert TEMPLATE not in said.out and "assistant" not in said.out and said.err == ""
    tokenizer = tokenizer_with(CHATML)
    first, second = (tokenizer.decode(ids) for ids in prompts)
    assert first == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert second.startswith(first) and second.endswith("<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")


def test_rate_asks_about_the_texts_of_the_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    assert run("rate", trained / "run", "--prompts", trained / "chats.jsonl", "--db", tmp_path / "r.db") == 0
    out = capsys.readouterr().out
    assert f"1 new questions in {tmp_path / 'r.db'}" in out and "hello there" in out


def test_a_terminal_is_told_that_a_model_is_being_loaded(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("chat", trained / "run") == 0
    assert f"textenv: loading {trained / 'run'}\n" in capsys.readouterr().err
