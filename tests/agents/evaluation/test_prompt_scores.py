"""The file of each prompt's scores: what is written is read, and what a file cannot name is linearised."""

import json
import math

import numpy as np
import pytest

from agents import Evaluate, PromptScores
from agents.evaluation.prompt_scores import linearised, read_scores, write_scores
from tests.helpers.training import TOKENIZER, tiny_agent
from textenv.metrics import ChrF, Distinct, Scores, mean_of
from textenv.metrics.bootstrap import estimate
from textenv.metrics.model import perplexity
from textenv.metrics.scores import ratio


def test_what_is_written_is_read(tmp_path):
    rows = np.random.default_rng(0).random((4, 2)) + 0.1
    scores = {
        "reward": mean_of([0.1, math.nan, 3.0, math.inf]),
        "kl_token": Scores(rows),
        "perplexity": Scores(rows, perplexity),
        "distinct_2": Scores(np.zeros((4, 0)), whole=1 / 3),
        "distinct_9": Scores(np.zeros((4, 0)), whole=math.nan),
    }
    write_scores(
        tmp_path / "scores.json", {0: PromptScores(["a", "b\u2028", "我", ""], scores), 64: PromptScores([], {})}
    )
    read = read_scores(tmp_path / "scores.json")
    assert list(read) == [0, 64] and read[0].prompts == ["a", "b\u2028", "我", ""] and read[64] == ([], {})
    for name in ("kl_token", "perplexity"):
        np.testing.assert_array_equal(read[0].scores[name].rows, rows)
        assert estimate(read[0].scores[name]) == estimate(scores[name]), "to the last bit"
    assert read[0].scores["perplexity"].figure is perplexity and read[0].scores["kl_token"].figure is ratio
    np.testing.assert_array_equal(read[0].scores["reward"].rows[:, 0], [0.1, math.nan, 3.0, math.nan])
    assert read[0].scores["distinct_2"].value == 1 / 3 and math.isnan(read[0].scores["distinct_9"].value)


def test_a_linearised_mean_is_the_mean():
    values = np.random.default_rng(1).random(9)
    np.testing.assert_allclose(linearised(mean_of(values)).rows, mean_of(values).rows, atol=1e-12)
    assert linearised(mean_of([3.0])).value == 3.0


def test_a_linearised_ratio_is_the_delta_method():
    """The influence of a row on a ratio of sums x / y is n (x_i - r y_i) / y to first order."""
    rng = np.random.default_rng(2)
    rows = np.stack([rng.random(100), 1 + rng.random(100)], axis=1)
    scores = Scores(rows, lambda sums: sums[0] / sums[1])
    influence = 100 * (rows[:, 0] - scores.value * rows[:, 1]) / rows[:, 1].sum()
    np.testing.assert_allclose(linearised(scores).rows[:, 0], scores.value + influence, atol=0.02)
    assert linearised(scores).value == pytest.approx(scores.value, abs=1e-12)


def test_a_corpus_score_keeps_its_figure_and_nearly_its_interval(tmp_path):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "the", "dog", "who", "sat", "on", "the", "cat"]
    rng = np.random.default_rng(3)
    texts, references = ([" ".join(rng.choice(words, size=8)) for _ in range(60)] for _ in range(2))
    scores = ChrF()([""] * 60, texts, [[reference] for reference in references])["chrf"]
    write_scores(tmp_path / "scores.json", {8: PromptScores([""] * 60, {"chrf": scores})})
    read = read_scores(tmp_path / "scores.json")[8].scores["chrf"]
    whole, kept = estimate(scores), estimate(read)
    assert kept.value == pytest.approx(whole.value, abs=1e-12)
    width = whole.high - whole.low
    assert kept.low == pytest.approx(whole.low, abs=0.1 * width)
    assert kept.high == pytest.approx(whole.high, abs=0.1 * width)


def test_a_training_keeps_the_scores_of_its_first_and_its_newest_evaluation(tmp_path):
    words = {"reward": lambda prompt, preds, done: len(preds.ids) * done, "max_new_tokens": 2, "n": 3}
    callback = Evaluate(["a", "bc"], TOKENIZER, [Distinct([1])], every=16, folder=tmp_path, **words)
    tiny_agent().learn(48, callback=callback)
    assert list(callback.history) == [0, 16, 32, 48]
    kept = read_scores(tmp_path / "scores.json")
    assert list(kept) == [0, 48]
    for at, evaluation in kept.items():
        assert evaluation.prompts == ["a", "bc"] and len(evaluation.scores["reward"].rows) == 2
        assert {name: scores.value for name, scores in evaluation.scores.items()} == callback.history[at]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "Expected pairs of sums and the name of a figure for reward in "),
        ({"figure": "os.system", "rows": [[1, 1]]}, "Expected pairs of sums and the name of a figure"),
        ({"figure": "ratio", "rows": [[1]]}, "Expected pairs of sums and the name of a figure"),
        ({"figure": "ratio", "rows": 3}, "Expected a list"),
        ({"whole": "big"}, "Expected a number"),
    ],
)
def test_a_damaged_file_is_refused(reward, message, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps([{"num_timesteps": 0, "prompts": ["a"], "scores": {"reward": reward}}]))
    with pytest.raises(ValueError, match=message):
        read_scores(file)
