"""`fit_score_head` and `train_reward_model(train="head")`: the minimum, the penalty, learning, the body."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import AutoModelForSequenceClassification

from agents import Labelled, score_texts, train_reward_model
from agents.supervised.ranking_data import Example
from agents.supervised.reward_losses import loss_at_last
from agents.supervised.score_head_fit import PENALTIES, fit_score_head

from .test_reward_model import TOKENIZER, merit, small, some_pairs, some_texts

PAIR = Example([[1], [2]], [(0, 1)])


def states_of(n, width, signal, seed=0):
    """Return states of `n` pairs, (2 n, width): noise, and `signal` in the first part of the better text's."""
    states = np.random.default_rng(seed).normal(size=(2 * n, width))
    states[::2, 0] += signal
    return torch.tensor(states, dtype=torch.float32)


def test_the_weights_are_the_minimum_that_scipy_finds():
    states = states_of(40, 3, 1.0) * torch.tensor([1.0, 5.0, 0.1])
    weights, loss, penalty = fit_score_head(states, [PAIR] * 40)
    scale = states.double().numpy().std(axis=0, ddof=1)
    differences = (states[::2] - states[1::2]).double().numpy() / scale

    def objective(w):
        return np.logaddexp(0, -differences @ w).mean() + penalty * w @ w

    expected = minimize(objective, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(weights, expected / scale, atol=1e-5)
    assert loss == pytest.approx(np.logaddexp(0, -differences @ expected).mean(), abs=1e-6)


def test_noise_is_penalised_more_than_a_signal():
    _, _, of_signal = fit_score_head(states_of(60, 10, 4.0), [PAIR] * 60)
    weights, loss, of_noise = fit_score_head(states_of(60, 10, 0.0), [PAIR] * 60)
    assert of_signal < of_noise
    assert of_noise == max(PENALTIES)
    assert loss > 0.6  # close to log 2: nothing was learned by heart


def test_a_single_ranking_is_fitted_with_the_largest_penalty():
    _, loss, penalty = fit_score_head(states_of(1, 3, 1.0), [PAIR])
    assert penalty == max(PENALTIES)
    assert loss < 0.6931


def test_rankings_of_three_weigh_as_much_as_pairs():
    states = states_of(20, 4, 1.0)[:35]
    examples = [Example([[1], [2], [3]], [(0, 1), (0, 2), (1, 2)]), *[PAIR] * 16]
    weights, loss, _ = fit_score_head(states, examples)
    assert loss == pytest.approx(float(loss_at_last(states @ weights, examples)), abs=1e-5)


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """Return the folder of a model whose body has learned to count, and whose score head is random again."""
    folder = tmp_path_factory.mktemp("body") / "model"
    options = {"n_epochs": 5, "learning_rate": 1e-2, "progress_bar": False}
    train_reward_model(small("llama"), TOKENIZER, some_pairs(200), folder, **options)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def test_the_head_learns_pairs_and_the_body_stays(body, tmp_path):
    options = {"train": "head", "progress_bar": False, "held_out": some_pairs(100, 1)}
    trained = train_reward_model(str(body), TOKENIZER, some_pairs(100, 2), tmp_path / "head", **options)
    assert trained.held_out.low > 0.7
    before, after = (AutoModelForSequenceClassification.from_pretrained(path) for path in (body, trained.folder))
    for ours, theirs in zip(after.base_model.parameters(), before.base_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    wholes = [text for pair in some_pairs(100, 2) for text in pair.texts]
    assert trained.stats.mean == pytest.approx(score_texts(after, TOKENIZER, wholes).mean(), abs=1e-4)
    noise = train_reward_model(str(body), TOKENIZER, some_pairs(100, 2, noise=True), tmp_path / "noise", **options)
    assert noise.held_out.accuracy < trained.held_out.low


def test_the_head_learns_labels(body, tmp_path):
    texts = [text for same in some_texts(100).values() for text in same]
    texts = [str(text) for text in np.random.default_rng(0).permutation(texts)[:150]]
    data = [Labelled(text, merit(text)) for text in texts]
    trained = train_reward_model(str(body), TOKENIZER, data[:100], tmp_path / "m", train="head", progress_bar=False)
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder)
    scores = score_texts(model, TOKENIZER, texts[100:])
    assert np.corrcoef(scores, [merit(text) for text in texts[100:]])[0, 1] > 0.8


def test_the_head_goes_with_the_loss_at_the_last_token_alone(tmp_path):
    with pytest.raises(ValueError, match='Expected loss "last" with train="head"'):
        train_reward_model(small(), TOKENIZER, some_pairs(4), tmp_path / "m", train="head", loss="tokens")
    with pytest.raises(ValueError, match="train"):
        train_reward_model(small(), TOKENIZER, some_pairs(4), tmp_path / "m", train="body")
