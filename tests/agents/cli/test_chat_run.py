"""The verbs that write texts with a run of adapters on a chat model: generate, chat and rate."""

import io
import json
import re

import pytest
from transformers import GPT2LMHeadModel

from agents.cli import chat
from agents.supervised.feedback_data import read_feedback
from tests.helpers.command import ROLLOUT, run, settings
from tests.helpers.models import tiny
from tests.textenv.prompts.test_chat import CHATML, END, tokenizer_with
from textenv import Preds
from textenv.feedback.records import Record
from textenv.feedback.store import FeedbackStore
from textenv.prompts.prompts import PromptReader
from textenv.rewards.preference import Preference

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


@pytest.mark.parametrize(
    "words", [["--kind", "compare"], ["--kind", "rank"], ["--kind", "score"], ["--train", "--updates", "1"]]
)
def test_rate_shows_a_chat_as_its_messages_and_keeps_what_the_template_wrote(
    trained, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO({"compare": "a", "rank": "1 2 3 4"}.get(words[-1], "4") + "\n"))
    out = ["--out", tmp_path / "hand"] if "--train" in words else []
    usual = ["--prompts", trained / "chats.jsonl", "--db", tmp_path / "r.db", "--max_new_tokens", "4"]
    assert run("rate", trained / "run", *usual, *words, *out) == 0
    said = capsys.readouterr().out
    assert re.search(r"│ user +│\n│   hello there +│\n╰", said) and TEMPLATE not in said
    with FeedbackStore(tmp_path / "r.db") as store:
        [answer] = store.answers()
    assert answer.messages == tuple(ASKED)
    assert answer.prompt == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"


def test_a_reward_model_of_answers_about_chats_reads_them_as_in_its_training(trained, tmp_path):
    """As text, which the policy's template wrote, although its own tokenizer has a template as well."""
    tokenizer = tokenizer_with(CHATML)
    prompt = PromptReader(tokenizer).read(ASKED)
    with FeedbackStore(tmp_path / "r.db") as store:
        store.record([Record("compare", str(prompt), ["good", "bad"], 0, "ann", messages=prompt.messages)])
    words = ["--from-feedback", tmp_path / "r.db", "--model", trained / "model", "--out", tmp_path / "scorer"]
    assert run("reward-model", *words, "--quiet") == 0
    reward = Preference(tmp_path / "scorer")
    preds = Preds(tokenizer, tokenizer.encode("good", add_special_tokens=False))
    [pair] = read_feedback(str(tmp_path / "r.db")).data
    assert reward.text(prompt, preds) == pair.wholes()[0] == str(prompt) + "good"


def test_a_terminal_is_told_that_a_model_is_being_loaded(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("chat", trained / "run") == 0
    assert f"textenv: loading {trained / 'run'}\n" in capsys.readouterr().err
