"""Answers as lines of JSON and back."""

import json

import pytest

from textenv.feedback.exchange import export, import_rows, rows_of
from textenv.feedback.store import FeedbackStore


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db", seed=0) as opened:
        yield opened


@pytest.fixture
def filled(store):
    """One choice (y over x), one tie, one ranking (z, x, y), one scoring (x 4, y 2), and a skip."""
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


@pytest.mark.parametrize("form", ["pairs", "rankings", "scores"])
def test_what_is_exported_is_imported_the_same(filled, tmp_path, form):
    path, again = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    n = export(filled, path, form)
    with FeedbackStore(tmp_path / "other.db") as other:
        assert import_rows(other, path) == n
        assert export(other, again, form) == n
        assert other.next("ann") is None and other.next("bob") is None

    def without_number(path):
        return [{name: value for name, value in row.items() if name != "answer"} for row in read(path)]

    assert without_number(path) == without_number(again)


def test_texts_keep_their_lines_and_letters(store, tmp_path):
    text = 'a\nb\r\u2028"\t你好\\n'
    store.record([])
    import_rows(store, [{"prompt": text, "chosen": text, "rejected": ""}])
    path = tmp_path / "pairs.jsonl"
    export(store, path, "pairs")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 2 and "你好" in lines[0]
    import_rows(store, path)
    assert [answer.completions for answer in store.answers()] == [(text, "")] * 2


def test_dialogues_of_hh_are_split(store):
    shared = "\n\nHuman: Hi\n\nAssistant:"
    import_rows(store, [{"chosen": shared + " Hello", "rejected": shared + " Go"}])
    (answer,) = store.answers()
    assert (answer.prompt, answer.completions, answer.value) == (shared, (" Hello", " Go"), 0)
    assert answer.rater == "imported"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "Expected row 2 to have chosen and rejected, or ranking, or label"),
        ("x", "Expected row 2 to be an object"),
        ({"prompt": "p", "chosen": "x", "rejected": 3}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"chosen": "x", "rejected": "y"}, "Expected the dialogues of row 2 to share the opening"),
        ({"prompt": "p", "ranking": ["x"]}, "Record 2: Expected 2 to 8 completions to rank, got 1"),
        ({"prompt": "p", "ranking": "xy"}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"prompt": "p", "ranking": 5}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"text": "x", "label": 9}, "Record 2: Expected scores from 1 to 5"),
        ({"text": "x", "label": "3"}, "Record 2: Expected scores from 1 to 5"),
        ({"text": "x", "label": 3, "scale": 5}, "Record 2: Expected `scale`"),
        ({"text": "x", "label": 3, "seconds": "5"}, "Record 2: Expected `seconds` to be 0 or more"),
        ({"text": "x", "label": 3, "time": -5}, "Record 2: Expected `time` to be 0 or more"),
        ({"text": "x", "label": 3, "model": ["m"]}, "Record 2: Expected names of models and runs to be texts"),
        ({"text": "x", "label": 3, "rater": 5}, "Record 2: Expected a rater's name"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(store, row, message):
    with pytest.raises(ValueError, match=message):
        import_rows(store, [{"text": "x", "label": 3}, row])
    assert store.answers() == []


def test_scales_of_scores(store):
    import_rows(store, [{"text": "x", "label": 0}, {"text": "x", "label": 50, "scale": [0, 100]}], scale=(-1, 1))
    assert [answer.scale for answer in store.answers()] == [(-1, 1), (0, 100)]


def test_unknown_forms_are_refused(store):
    with pytest.raises(ValueError, match="Expected `form` to be one of pairs, rankings, scores, got 'xml'"):
        list(rows_of(store.answers(), "xml"))


def test_reward_models_read_pairs_and_scores(filled, tmp_path):
    from agents.preferences import Labelled, Ranking
    from agents.stage_data import read_preferences
    from agents.verb_config import RewardModelConfig

    export(filled, tmp_path / "pairs.jsonl", "pairs")
    export(filled, tmp_path / "scores.jsonl", "scores")
    first = Ranking(("y", "x"), "compare0")
    for name, expected in (("pairs", first), ("scores", Labelled("scorex", 4.0))):
        assert read_preferences(RewardModelConfig(data=str(tmp_path / f"{name}.jsonl"))).train[0] == expected
