"""People's answers as the examples of a reward model, worked out by hand."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from agents import Labelled, LearnedReward, Ranking
from agents.errors import CommandError
from agents.supervised.feedback_data import examples_of, read_feedback
from tests.helpers.command import run, small_model
from tests.helpers.people import Rater
from textenv import Preds, Prompt
from textenv.feedback.records import Answer
from textenv.feedback.store import FeedbackStore


def answer(kind, completions, value, rater="ann", prompt="p ", scale=(1.0, 5.0)):
    return Answer(1, 1, kind, rater, prompt, tuple(completions), value=value, scale=scale)


def test_comparisons_and_rankings():
    answers = [
        answer("compare", "ab", 1),
        answer("compare", "cd", "tie"),
        answer("compare", "cd", "both_bad"),
        answer("rank", "abc", (2, 0, 1)),
        answer("skip", "xy", None),
    ]
    assert examples_of(answers) == [Ranking(("b", "a"), "p "), Ranking(("c", "a", "b"), "p ")]


def test_scores_alone_are_labels_with_the_mean_of_their_raters():
    answers = [
        answer("score", "a", (4.0,)),
        answer("score", "a", (2.0,), rater="bob"),
        answer("score", "bc", (1.0, 5.0)),
        answer("skip", "d", None),
    ]
    assert examples_of(answers) == [Labelled("p a", 3.0), Labelled("p b", 1.0), Labelled("p c", 5.0)]


def test_beside_comparisons_scores_of_one_rater_and_prompt_count_as_such():
    answers = [
        answer("compare", "xy", 0),
        answer("score", "a", (4.0,)),
        answer("score", "b", (2.0,)),
        answer("score", "c", (4.0,)),
        answer("score", "d", (5.0,), rater="bob"),
        answer("score", "e", (1.0,), prompt="q "),
        answer("score", "f", (0.0,), scale=(0.0, 1.0)),
    ]
    assert examples_of(answers)[1:] == [Ranking(("a", "b"), "p "), Ranking(("c", "b"), "p ")]


def test_what_says_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="say which text is better, got none in 2 answers"):
        examples_of([answer("compare", "ab", "tie"), answer("skip", "a", None)])
    with pytest.raises(ValueError, match=r"one scale, got scales \(0.0, 1.0\), \(1.0, 5.0\)"):
        examples_of([answer("score", "a", (1.0,)), answer("score", "b", (1.0,), scale=(0.0, 1.0))])
    with pytest.raises(CommandError, match=r"got no file .*nowhere\.db"):
        read_feedback(str(tmp_path / "nowhere.db"))
    assert not (tmp_path / "nowhere.db").exists()


def fill(path, kind, texts, n_prompts=20):
    with FeedbackStore(path, seed=0) as store:
        for number in range(n_prompts):
            store.add(f"prompt {number} ", texts, kind=kind)
        return Rater(store, care=50.0).answer_all()


def test_a_tenth_of_the_prompts_is_held_out_always_the_same(tmp_path):
    path = str(tmp_path / "answers.db")
    assert fill(path, "rank", ["great", "awful", "great awful"]) == 20
    data, held_out = read_feedback(path)
    assert (len(data), len(held_out)) == (18, 2)
    assert not {example.prompt for example in data} & {example.prompt for example in held_out}
    assert all(example.texts == ("great", "great awful", "awful") for example in data + held_out)
    assert read_feedback(path) == (data, held_out)
    assert len(read_feedback(path, everything=True).data) == 20 and not read_feedback(path, everything=True).held_out


def test_labels_that_are_alike_are_not_held_out(tmp_path):
    path = str(tmp_path / "answers.db")
    with FeedbackStore(path) as store:
        for number in range(20):
            store.add(f"prompt {number} ", ["great"])
        while (item := store.next("ann")) is not None:
            store.score(item, [3])
    assert len(read_feedback(path).data) == 18 and read_feedback(path).held_out == []


def test_a_learned_reward_follows_its_answers_and_learns_again(tmp_path):
    reward = LearnedReward(str(small_model(tmp_path / "small")), n_epochs=20, learning_rate=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    preds = [Preds(tokenizer, tokenizer.encode(text)) for text in ("great", "awful")]
    with pytest.raises(RuntimeError, match="Expected `fit` before `score`"):
        reward.score([Prompt("p ")] * 2, preds, [True] * 2)
    for value, is_better in (((0, 1), True), ((1, 0), False)):
        with torch.no_grad():  # as in a rollout
            reward.fit([answer("rank", ("great", "awful"), value)] * 8)
            good, bad = reward.score([Prompt("p ")] * 2, preds, [True] * 2)
        assert (good > bad) is is_better and abs(good + bad) < 0.1 and abs(good - bad) == pytest.approx(2.0, abs=0.1)


def test_the_command_trains_on_feedback(tmp_path, capsys):
    model = small_model(tmp_path / "small")
    fill(tmp_path / "answers.db", "compare", ["great", "awful"])
    words = ["--model", model, "--out", tmp_path / "scorer", "--learning_rate", "0.01", "--n_epochs", "4", "--quiet"]
    assert run("reward-model", "--from-feedback", tmp_path / "answers.db", *words) == 0
    said = capsys.readouterr().out
    assert "18 examples, 2 held out" in said
    assert float(re.search(r"held out: (\d\.\d+) \[", said)[1]) == 1.0
    assert run("reward-model", f"--from-feedback={tmp_path / 'nowhere.db'}", *words) == 2
    assert run("reward-model", "--data", "x.jsonl", "--from-feedback", tmp_path / "answers.db", *words) == 2
    assert run("reward-model", *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert "got no file" in said[0] and "Expected --from-feedback in the place of --data and --task" in said[1]
    assert "Expected --out DIR, and --data or --task or --from_feedback" in said[2]
