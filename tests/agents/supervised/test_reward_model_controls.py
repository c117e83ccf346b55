"""Reward models: nothing is learned from shuffled pairs, `centring` centres scores, and Ctrl-C can be resumed."""

import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from agents import Ranking, train_reward_model, word_tokenizer
from agents.models.critic import score_head
from agents.supervised import reward_model
from agents.supervised.accuracy import wilson_interval
from agents.supervised.reward_model import build_reward_model
from tests.helpers.models import tiny

# So many words that chance agreement on a few of them hardly matters on held-out texts.
WORDS = [f"good{i}" for i in range(60)] + [f"bad{i}" for i in range(60)]
TOKENIZER = word_tokenizer(WORDS)
CONFIG = tiny(vocab_size=len(TOKENIZER), initializer_range=0.1)
OFFSET = 2.0


def some_pairs(n, seed, shuffled=False):
    """Return pairs of texts of 8 words, the one with more good words first, or with `shuffled` in a random order."""
    rng = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < n:
        texts = [rng.choice(WORDS, 8) for _ in range(2)]
        merits = [sum(word.startswith("good") for word in text) for text in texts]
        if merits[0] != merits[1]:
            order = rng.permutation(2) if shuffled else np.argsort(merits)[::-1]
            pairs.append(Ranking(tuple(" ".join(texts[i]) for i in order)))
    return pairs


def train(data, folder, lm=CONFIG, **kwargs):
    settings = {"n_epochs": 4, "learning_rate": 1e-2, "progress_bar": False, **kwargs}
    return train_reward_model(lm, TOKENIZER, data, folder, **settings)


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_pairs_in_the_epochs_that_true_ones_take(tmp_path):
    test, right = some_pairs(300, 100), []
    true = train(some_pairs(500, 0), tmp_path / "true", held_out=test).held_out
    assert true.low > 0.85
    for seed in range(3):
        trained = train(some_pairs(500, seed, shuffled=True), tmp_path / f"shuffled{seed}", held_out=test)
        assert trained.losses[-10:].mean() < 0.67  # the training pairs are memorised
        right.append(trained.held_out.accuracy)
    low, high = wilson_interval(float(np.mean(right)), len(test))
    assert low < 0.5 < high and high < true.low, right


@pytest.mark.slow
def test_centring_brings_the_mean_score_to_zero_and_keeps_the_accuracy(tmp_path):
    model = build_reward_model(CONFIG)
    weight = score_head(model).weight.detach()[0]
    with torch.no_grad():  # raise all scores, which a loss on pairs alone does not correct
        model.transformer.ln_f.bias.add_(OFFSET * weight / weight.square().sum())
    model.save_pretrained(tmp_path / "start")
    plain, centred = (
        train(
            some_pairs(500, 0), tmp_path / f"m{c}", str(tmp_path / "start"), held_out=some_pairs(300, 100), centring=c
        )
        for c in (0.0, 0.01)
    )
    assert plain.stats.mean > OFFSET and abs(centred.stats.mean) < OFFSET / 4
    assert plain.held_out.low > 0.85
    assert plain.held_out.low <= centred.held_out.accuracy <= plain.held_out.high


def press_ctrl_c(monkeypatch, step, times=1):
    """Send SIGINT while the loss of a step is computed; return a list that grows with each step."""
    real, asked = reward_model._loss, []

    def loss(*args):
        asked.append(args[1])
        if len(asked) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(reward_model, "_loss", loss)
    return asked


def weights_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_e8_after_ctrl_c_it_goes_on_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    data = some_pairs(160, 0)
    whole = train(data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step=15)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 15; `resume=True` continues"):
            train(data, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    for other in ({"data": data[1:]}, {"data": data, "centring": 0.1}, {"data": data, "lm": tiny(vocab_size=200)}):
        with pytest.raises(ValueError, match="arguments and data of the interrupted run"):
            train(folder=tmp_path / "parts", resume=True, **other)
    with monkeypatch.context() as patch:
        asked = press_ctrl_c(patch, step=99)
        parts = train(data, tmp_path / "parts", resume=True)
    assert len(asked) == 25 and len(parts.losses) == 40  # the first 15 were not computed again
    np.testing.assert_array_equal(parts.losses, whole.losses)
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first) and parts.stats == whole.stats
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_without_resume_an_interrupted_run_is_begun_anew(tmp_path, monkeypatch):
    data = some_pairs(64, 0)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step=3)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "m")
    with monkeypatch.context() as patch:
        asked = press_ctrl_c(patch, step=99)
        train(data, tmp_path / "m", n_epochs=1)
    assert len(asked) == 4


def test_a_second_ctrl_c_stops_at_once_and_the_handler_is_given_back(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    asked = press_ctrl_c(monkeypatch, step=3, times=2)
    with pytest.raises(KeyboardInterrupt) as error:
        train(some_pairs(64, 0), tmp_path / "m")
    assert len(asked) == 3 and not str(error.value) and signal.getsignal(signal.SIGINT) is before
