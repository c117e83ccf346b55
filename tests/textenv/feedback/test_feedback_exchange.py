"""The export of answers as JSON lines: pairs, rankings and scores."""

import json

import pytest

from textenv import CharTokenizer
from textenv.feedback.exchange import export, rows_of
from textenv.feedback.records import Record
from textenv.feedback.store import FeedbackStore


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db", seed=0) as opened:
        yield opened


@pytest.fixture
def filled(store):
    """Fill the store with a choice (y over x), a tie, a ranking (z, x, y), a scoring (x 4, y 2) and a skip."""
    models = {"models": ["m1", "m2"], "run": "run7"}
    for number in range(3):
        store.add(f"compare{number}", ["x", "y"], kind="compare", **models)
    store.add("rank", ["x", "y", "z"], kind="rank")
    store.add("score", ["x", "y"], **models)
    shown = store.next("ann")
    store.choose(shown, "ab"[shown.completions.index("y")], seconds=2.0)
    store.choose(store.next("ann"), "tie")
    store.skip(store.next("ann"))
    shown = store.next("ann")
    store.rank(shown, [shown.completions.index(text) for text in "zxy"])
    shown = store.next("ann")
    store.score(shown, [{"x": 4, "y": 2}[text] for text in shown.completions])
    return store


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs(filled, tmp_path):
    path = tmp_path / "pairs.jsonl"
    assert export(filled, path, "pairs") == 5
    rows = read(path)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("compare0", "y", "x"),
        ("rank", "z", "x"),
        ("rank", "z", "y"),
        ("rank", "x", "y"),
        ("score", "x", "y"),
    ]
    first = dict(rows[0])
    assert first.pop("time") > 0
    assert first == {
        **{"prompt": "compare0", "chosen": "y", "rejected": "x", "chosen_model": "m2", "rejected_model": "m1"},
        **{"answer": 1, "rater": "ann", "run": "run7", "seconds": 2.0},
    }


def test_rankings(filled, tmp_path):
    path = tmp_path / "rankings.jsonl"
    assert export(filled, path, "rankings") == 2
    assert [(row["prompt"], row["ranking"], row.get("models")) for row in read(path)] == [
        ("compare0", ["y", "x"], ["m2", "m1"]),
        ("rank", ["z", "x", "y"], None),
    ]


def test_scores(filled, tmp_path):
    path = tmp_path / "scores.jsonl"
    assert export(filled, path, "scores") == 2
    assert [(row["prompt"], row["completion"], row["text"], row["label"], row["model"]) for row in read(path)] == [
        ("score", "x", "scorex", 4.0, "m1"),
        ("score", "y", "scorey", 2.0, "m2"),
    ]


def test_texts_keep_their_lines_and_letters(store, tmp_path):
    text = 'a\nb\r\u2028"\t你好\\n'
    store.record([Record("compare", text, [text, ""], 0, "ann")])
    path = tmp_path / "pairs.jsonl"
    export(store, path, "pairs")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 2 and "你好" in lines[0]
    row = json.loads(lines[0])
    assert (row["prompt"], row["chosen"], row["rejected"]) == (text, text, "")


def test_unknown_forms_are_refused(store):
    with pytest.raises(ValueError, match="Expected `form` to be one of pairs, rankings, scores, got 'xml'"):
        list(rows_of(store.answers(), "xml"))


def test_reward_models_read_pairs_and_scores(filled, tmp_path):
    from agents.cli.options import RewardModelConfig
    from agents.cli.stage_data import read_preferences
    from agents.supervised.preferences import Labelled, Ranking

    export(filled, tmp_path / "pairs.jsonl", "pairs")
    export(filled, tmp_path / "scores.jsonl", "scores")
    first = Ranking(("y", "x"), "compare0")
    for name, expected in (("pairs", first), ("scores", Labelled("scorex", 4.0))):
        config = RewardModelConfig(data=str(tmp_path / f"{name}.jsonl"))
        assert read_preferences(config, CharTokenizer()).train[0] == expected
