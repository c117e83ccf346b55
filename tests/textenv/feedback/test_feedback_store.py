"""The feedback store: the order of questions, stored answers, undo and refusals."""

import time
from collections import Counter

import pytest

from tests.helpers.feedback import pair
from textenv.feedback import store as store_module
from textenv.feedback.records import Answer, Record
from textenv.feedback.store import FeedbackStore


def see(item, text):
    """Return the index at which a completion is shown."""
    return item.completions.index(text)


def test_scores_are_stored_in_the_order_of_adding(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.75e9)
    number = store.add("It was", ["x", "y", "z"], models=["m1", "m2", "m3"], run="run7", scale=(0, 10))
    shown = store.next("ann")
    assert (shown.id, shown.kind, shown.prompt, shown.scale) == (number, "score", "It was", (0, 10))
    wanted = {"x": 1, "y": 10, "z": 0}
    store.score(shown, [wanted[text] for text in shown.completions], seconds=3.5)
    (answer,) = store.answers()
    assert answer.completions == ("x", "y", "z") and answer.value == (1.0, 10.0, 0.0)
    assert (answer.models, answer.run, answer.rater, answer.seconds) == (("m1", "m2", "m3"), "run7", "ann", 3.5)
    assert answer.order == shown.order and answer.time == 1.75e9
    assert answer.pairs() == [(0, 2), (1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("choice", "pairs"), [("tie", []), ("both_bad", []), (" good.", [(0, 1)]), (" bad.", [(1, 0)])]
)
def test_choices(store, choice, pairs):
    pair(store)
    shown = store.next("ann")
    store.choose(shown, choice if choice in ("tie", "both_bad") else "ab"[see(shown, choice)])
    (answer,) = store.answers()
    assert answer.kind == "compare" and answer.pairs() == pairs


def test_rankings(store):
    texts = ["worst", "best", "middle"]
    store.add("p", texts, kind="rank")
    shown = store.next("ann")
    store.rank(shown, [see(shown, text) for text in ("best", "middle", "worst")])
    (answer,) = store.answers()
    assert [texts[index] for index in answer.value] == ["best", "middle", "worst"]
    assert [(texts[a], texts[b]) for a, b in answer.pairs()] == [
        ("best", "middle"),
        ("best", "worst"),
        ("middle", "worst"),
    ]


def test_the_order_shown_is_drawn_and_stays(path):
    with FeedbackStore(path, seed=0) as store:
        for number in range(40):
            pair(store, f"{number}", raters=2)
        orders = []
        for _ in range(40):
            shown = store.next("ann")
            assert store.next("ann") == shown  # a reloaded page shows the same
            orders.append(shown.order)
            store.skip(shown)
        counts = Counter(orders)
        assert set(counts) == {(0, 1), (1, 0)} and min(counts.values()) >= 10
        theirs = [store.next("bob")]
    with FeedbackStore(path, seed=1) as again:  # the order survives the process
        assert again.next("bob") == theirs[0]


def test_items_are_given_to_the_number_of_raters_they_ask_for(store):
    one, two = pair(store, "one"), pair(store, "two", raters=2)
    store.choose(store.next("ann"), "a")
    assert store.next("bob").id == two
    store.skip(store.next("bob"))
    assert store.next("bob") is None  # a skipped item does not come back
    assert store.next("ann").id == two
    store.choose(store.next("ann"), "a")
    assert store.next("cy").id == two  # a skip is no answer
    store.choose(store.next("cy"), "tie")
    assert store.next("dee") is None
    assert one != two


def test_items_that_another_rater_is_answering_come_last(store, monkeypatch):
    first, second = pair(store, "one"), pair(store, "two")
    assert store.next("ann").id == first
    bobs = store.next("bob")
    assert bobs.id == second
    assert store.next("cy").id == first  # an item may be asked twice, but is never lost
    pair(store, "three")
    monkeypatch.setattr(store_module, "LEASE", -1.0)
    assert store.next("dee").id == first  # the lease has expired


def test_kinds_are_kept_apart(store):
    store.add("p", ["x"])
    pair(store)
    assert store.next("ann", kind="compare").kind == "compare"
    assert store.next("ann", kind="score").kind == "score"
    assert store.next("ann", kind="rank") is None
    assert store.progress("ann", kind="score").left == 1 and store.progress("ann").left == 2


def test_gold_items_come_twice_in_another_order(store):
    gold = pair(store, "gold", gold=True)
    for number in range(15):
        pair(store, f"{number}")
    assert store.progress("ann").left == 17
    seen, orders = [], []
    while (shown := store.next("ann")) is not None:
        seen.append(shown.id)
        orders.append(shown.order)
        store.choose(shown, "a")
        done, skipped, left = store.progress("ann")
        assert (done + left, skipped) == (17, 0)
    assert [index for index, item in enumerate(seen) if item == gold] == [0, 11]
    assert orders[0] != orders[11]
    assert [answer.repeat for answer in store.answers()] == [0] * 11 + [1] + [0] * 5


def test_gold_items_come_at_the_end_where_there_are_few_others(store):
    gold, other = pair(store, "gold", gold=True), pair(store, "other")
    seen = []
    while (shown := store.next("ann")) is not None:
        seen.append(shown.id)
        store.choose(shown, "tie")
    assert seen == [gold, other, gold]


def test_undo_goes_back_step_by_step(store):
    first, second = pair(store, "one"), pair(store, "two")
    a = store.next("ann")
    store.choose(a, "a")
    store.skip(store.next("ann"))
    assert store.progress("ann") == (1, 1, 0)
    assert store.undo("ann").id == second
    assert store.undo("ann") == a and store.next("ann") == a
    assert store.undo("ann") is None and store.undo("bob") is None
    assert store.answers() == [] and store.progress("ann") == (0, 0, 2)
    store.choose(a, "b")
    assert [answer.value for answer in store.answers()] == [a.order[1]]
    assert store.next("ann").id == second
    assert first != second


def test_a_reader_of_new_answers_sees_undone_ones_too(store):
    """Reading only new answers, at any time between writes, gives the same as reading all."""
    for number in range(6):
        pair(store, f"{number}")
    folded, last = {}, 0

    def read():
        nonlocal last
        for answer in store.answers(since=last):
            if answer.kind == "undo":
                del folded[answer.undoes]
            else:
                folded[answer.id] = answer
            last = answer.id
        assert list(folded.values()) == store.answers()

    steps = "aruaraaruuraurauuara"  # answer, undo, read
    for step in steps:
        if step == "r":
            read()
        elif step == "u":
            store.undo("ann")
        else:
            store.choose(store.next("ann"), "a")
    read()
    assert folded


def test_an_answer_sent_twice_counts_once(store):
    pair(store)
    shown = store.next("ann")
    assert store.choose(shown, "a") == store.choose(shown, "a")
    assert len(store.answers()) == 1
    with pytest.raises(ValueError, match=r"Expected an unanswered item, got item 1, answered by ann\. Undo it first"):
        store.choose(shown, "b")


@pytest.mark.parametrize(
    ("kind", "n", "message"),
    [
        ("compare", 3, "Expected 2 completions to compare, got 3"),
        ("rank", 1, "Expected 2 to 8 completions to rank, got 1"),
        ("rank", 9, "Expected 2 to 8 completions to rank, got 9"),
        ("score", 0, "Expected 1 to 8 completions to score, got 0"),
        ("vote", 2, "Expected `kind` to be one of score, compare, rank, got 'vote'"),
    ],
)
def test_bad_questions_are_refused(store, kind, n, message):
    with pytest.raises(ValueError, match=message):
        store.add("p", ["x"] * n, kind=kind)
    assert store.next("ann") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completions": "xy"}, "a list of texts as completions"),
        ({"prompt": None}, "Expected a text as prompt"),
        ({"prompt": "\ud800"}, "Expected texts that UTF-8 can write"),
        ({"models": ["m"]}, "Expected one of `models` for each completion, got 1 of 2"),
        ({"raters": 0}, "Expected `raters` to be 1 or more, got 0"),
        ({"scale": (5, 1)}, "Expected `scale` to be the lowest and the highest score"),
        ({"scale": (0, float("inf"))}, "Expected `scale` to be the lowest and the highest score"),
    ],
)
def test_bad_additions_are_refused(store, options, message):
    with pytest.raises(ValueError, match=message):
        store.add(**{"prompt": "p", "completions": ["x", "y"], **options})
    assert store.next("ann") is None


@pytest.mark.parametrize("ranking", [[0, 0, 1], [0, 1], [0, 1, 3], [1, 2, 3], [0, 1, 2, 2], [True, 0, 2], "012", 0])
def test_bad_rankings_are_refused(store, ranking):
    store.add("p", ["x", "y", "z"], kind="rank")
    with pytest.raises(ValueError, match="Expected"):
        store.rank(store.next("ann"), ranking)
    assert store.answers() == []


@pytest.mark.parametrize("scores", [[1], [1, 6], [0, 1], [1, float("nan")], [1, "2"], [1, True], [1, None], "12", 3])
def test_bad_scores_are_refused(store, scores):
    store.add("p", ["x", "y"])
    with pytest.raises(ValueError, match="Expected"):
        store.score(store.next("ann"), scores)
    assert store.answers() == []


def test_bad_answers_are_refused(store):
    pair(store)
    shown = store.next("ann")
    with pytest.raises(ValueError, match="Expected one of a, b, tie, both_bad, got 'c'"):
        store.choose(shown, "c")
    with pytest.raises(ValueError, match="Expected an answer to compare item 1, got one to rank"):
        store.rank(shown, [0, 1])
    store.add("p", ["x"])
    with pytest.raises(ValueError, match="Expected an answer to score item 2, got one to compare"):
        store.choose(store.next("bob", kind="score"), "a")
    with pytest.raises(ValueError, match="Expected `seconds` to be 0 or more"):
        store.choose(shown, "a", seconds=-1)
    with pytest.raises(ValueError, match="Expected the number of something that bob was shown"):
        store.showing(shown.showing, "bob")
    for rater in ("", "  ", "x" * 65, "a\nb"):
        with pytest.raises(ValueError, match="Expected a rater's name"):
            store.next(rater)
    assert store.showing(shown.showing, "ann") == shown and store.answers() == []


def test_texts_come_back_as_they_were(store):
    texts = ["<script>alert(1)</script>", "a\0b", "'; DROP TABLE items; --", "你好 🎬", "", "\r\n\t x "]
    for text in texts:
        store.add(text, [text])
    for text in texts:
        shown = store.next("ann")
        store.score(shown, [1])
        assert (shown.prompt, shown.completions) == (text, (text,))
    assert [answer.prompt for answer in store.answers()] == texts


def test_records_from_elsewhere_are_all_written_or_none(store):
    good = Record("compare", "p", ["x", "y"], 1, "ann", models=["m", "n"], time=5.0, seconds=2.0)
    assert store.record([good, good._replace(kind="rank", value=[1, 0])]) == [1, 2]
    first, second = store.answers()
    assert (first.value, first.time, first.models, second.value) == (1, 5.0, ("m", "n"), (1, 0))
    with pytest.raises(ValueError, match="Record 2: Expected each of the places 0 to 1 once"):
        store.record([good, good._replace(kind="rank", value=[1, 1])])
    assert len(store.answers()) == 2 and store.next("bob") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completions": ["x", 3]}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"completions": "xy"}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"completions": 5}, "Record 2: Expected a text as prompt and a list of texts"),
        ({"kind": "rank", "completions": ["x"]}, "Record 2: Expected 2 to 8 completions to rank, got 1"),
        ({"value": [1, 9]}, "Record 2: Expected scores from 1 to 5"),
        ({"value": [1, "3"]}, "Record 2: Expected scores from 1 to 5"),
        ({"scale": 5}, "Record 2: Expected `scale`"),
        ({"seconds": "5"}, "Record 2: Expected `seconds` to be 0 or more"),
        ({"time": -5}, "Record 2: Expected `time` to be 0 or more"),
        ({"models": ["m", ["n"]]}, "Record 2: Expected names of models and runs to be texts"),
        ({"rater": 5}, "Record 2: Expected a rater's name"),
    ],
)
def test_bad_records_are_refused_and_nothing_is_written(store, changes, message):
    good = Record("score", "p", ["x", "y"], [1, 3], "ann")
    with pytest.raises(ValueError, match=message):
        store.record([good, good._replace(**changes)])
    assert store.answers() == []


def test_records_keep_their_scale(store):
    scores = Record("score", "p", ["x"], [50], "ann", scale=(0, 100))
    store.record([scores, scores._replace(value=[0], scale=(-1, 1))])
    assert [(answer.value, answer.scale) for answer in store.answers()] == [((50.0,), (0, 100)), ((0.0,), (-1, 1))]


def test_undecided_answers_have_no_pairs():
    assert Answer(1, 1, "skip", "ann", "p", ("x", "y")).pairs() == []
    assert Answer(1, 1, "score", "ann", "p", ("x", "y"), (2.0, 2.0)).pairs() == []
