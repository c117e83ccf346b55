"""The task HH: reading and refusing preference pairs, the held-out part, and the environment."""

import gzip
import json
import os
from pathlib import Path

import gymnasium
import pytest

from textenv import CharTokenizer, check_text_env
from textenv.tasks import hh
from textenv.tasks.hh import HH, HUMAN, Pair, hold_out, read_pairs

LETTERS = "abcdefghijklmnopqrstuvwxyzAHY"
TOKENIZER = CharTokenizer("\n :?." + LETTERS)
FIRST = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: tea?\n\nAssistant:"
SECOND = "\n\nHuman: cake?\n\nAssistant:"
ROWS = [
    {"chosen": FIRST + " Here you are.", "rejected": FIRST + " Hm."},
    {"chosen": SECOND + " A slice?", "rejected": SECOND + ""},
]
PAIRS = [Pair(FIRST, " Here you are.", " Hm."), Pair(SECOND, " A slice?", "")]


def write(folder, name, *lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)


def test_a_folder_is_read_plain_and_packed_in_the_order_of_names(tmp_path):
    write(tmp_path, "b.jsonl.gz", ROWS[1])
    write(tmp_path, "a.jsonl", ROWS[0], "\n")
    write(tmp_path, "notes.txt", "no pairs")
    assert read_pairs(tmp_path) == PAIRS == read_pairs(str(tmp_path))


def test_a_data_set_of_the_hub_is_read_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(hh, "read_dataset", lambda name, split: asked.append((name, split)) or ROWS)
    assert read_pairs("Anthropic/hh-rlhf", split="test") == PAIRS
    assert asked == [("Anthropic/hh-rlhf", "test")]
    monkeypatch.setattr(hh, "read_dataset", lambda name, split: [ROWS[0], {"text": "a"}])
    with pytest.raises(ValueError, match=r"row 1 of 'Anthropic/hh-rlhf' to have the texts .* got \['text'\]"):
        read_pairs("Anthropic/hh-rlhf")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{no json\n", "Expected JSON on line 2 of '.*b.jsonl'"),
        ({"chosen": FIRST}, r"line 2 of '.*b.jsonl' to have the texts 'chosen' and 'rejected', got \['chosen'\]"),
        ({"chosen": FIRST, "rejected": 3}, "line 2 of '.*b.jsonl' to have the texts 'chosen' and 'rejected'"),
        (["a", "b"], "line 2 of '.*b.jsonl' to have the texts 'chosen' and 'rejected', got list"),
        ({"chosen": FIRST, "rejected": SECOND}, "dialogues of line 2 of '.*b.jsonl' to share the opening"),
    ],
)
def test_malformed_rows_are_refused_by_file_and_line(tmp_path, row, message):
    write(tmp_path, "a.jsonl", ROWS[0])
    write(tmp_path, "b.jsonl", ROWS[1], row if isinstance(row, str) else json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path)


def test_a_folder_without_pairs_is_refused(tmp_path):
    write(tmp_path, "pairs.json", ROWS[0])
    with pytest.raises(ValueError, match=r"files that end in \.jsonl or \.jsonl\.gz in .*, got none"):
        read_pairs(tmp_path)


def test_dialogues_of_one_first_turn_are_held_out_together():
    pairs = [
        Pair(f"\n\nHuman: {i // 3}\n\nAssistant:" + f" a{HUMAN} b\n\nAssistant:" * (i % 2), "", "") for i in range(30)
    ]
    train, held_out = hold_out(pairs, 8)
    firsts = [{pair.prompt.partition("\n\nAssistant:")[0] for pair in part} for part in (train, held_out)]
    assert not firsts[0] & firsts[1] and sorted(train + held_out) == sorted(pairs)
    assert len(held_out) == 9 and (train, held_out) == hold_out(pairs, 8) != hold_out(pairs, 8, seed=1)
    for n in (0, 30):
        with pytest.raises(ValueError, match=f"leave pairs on both sides, got {n} of 30 pairs"):
            hold_out(pairs, n)


def test_the_env_has_the_shared_dialogue_as_prompt_and_stops_where_the_human_speaks(tmp_path):
    write(tmp_path, "pairs.jsonl", *ROWS)
    seen = []

    def reward(prompt, preds, done):
        seen.append((str(prompt), preds.text, prompt.row["rejected"], prompt.references))
        return float(done)

    env = gymnasium.make(
        "textenv/HH-v0",
        data=tmp_path,
        tokenizer=TOKENIZER,
        reward=reward,
        max_new_tokens=16,
        max_prompt_tokens=20,
        order="sequential",
    )
    observation, _ = env.reset(seed=0)
    ids = TOKENIZER.encode(FIRST)
    assert observation[:20].tolist() == ids[-20:]  # the last turns are kept
    reply = TOKENIZER.encode(" ok" + HUMAN)
    for token in reply[:-1]:
        assert not any(env.step(token)[2:4])
    _, total, terminated, _, info = env.step(reply[-1])
    assert terminated and total == 1.0 and (info["end_reason"], info["text"]) == ("stop", " ok")
    assert seen[-1] == (FIRST, " ok", " Hm.", [" Here you are."])


def test_the_env_takes_pairs_and_keeps_to_the_rules_of_text_envs():
    check_text_env(HH(PAIRS, TOKENIZER, reward={"name": "length", "target": 3}, max_new_tokens=4))


@pytest.mark.skipif("TEXTENV_DATA" not in os.environ, reason="needs the data sets' folders in TEXTENV_DATA")
def test_real_pairs_are_read():
    pairs = read_pairs(Path(os.environ["TEXTENV_DATA"]) / "hh_rlhf")
    assert len(pairs) == 1800
    assert all(pair.prompt.startswith(HUMAN) and pair.prompt.endswith("\n\nAssistant:") for pair in pairs)
    train, held_out = hold_out(pairs, 500)
    assert (len(train), len(held_out)) == (1300, 500)
