"""Learning from rollouts of another engine: a real one in 16 bits, and one with another temperature."""

import numpy as np
import pytest

from agents import EngineRollouts, LocalEngine
from tests.helpers.engines import Background, InProcess
from tests.helpers.training import tiny_config
from tests.learning.test_learning import TASKS, TOKENIZER, build, learn

SEEDS = (2, 3)
pytestmark = pytest.mark.slow


def model_of():
    return tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)


def test_it_learns_through_an_engine_in_16_bits_and_not_with_the_reward_switched_off():
    task = TASKS["always"]
    with LocalEngine(model_of(), vocab_size=len(TOKENIZER), autocast="bfloat16") as engine:
        before, after = learn(build(task, seed=SEEDS[0]), task, callback=EngineRollouts(engine))
        assert before < 0.35 and after > 0.9
        off = build(task, reward=lambda prompt, preds, done: 0.0, seed=SEEDS[0])
        before, after = learn(off, task, callback=EngineRollouts(engine))
        assert after < 0.35 and abs(after - before) < 0.15


@pytest.mark.parametrize("heat", [0.7, 2.0])
def test_it_learns_from_an_engine_that_samples_at_another_temperature(heat):
    """The mismatch does not break learning; test_importance.py shows by enumeration that the weights are right."""
    task, results = TASKS["always"], []
    for seed in SEEDS:
        model = build(task, seed=seed)
        step = EngineRollouts(InProcess(model_of(), len(TOKENIZER), heat=heat))
        before, after = learn(model, task, callback=step)
        results.append(after)
        assert before < 0.35
    assert np.min(results) > 0.8


def test_it_learns_from_texts_that_are_one_update_old_and_not_with_the_reward_switched_off():
    task = TASKS["always"]
    engine = Background(model_of(), len(TOKENIZER))
    before, after = learn(build(task, seed=SEEDS[0]), task, callback=EngineRollouts(engine, ahead=True))
    assert before < 0.35 and after > 0.9
    off = build(task, reward=lambda prompt, preds, done: 0.0, seed=SEEDS[0])
    before, after = learn(off, task, callback=EngineRollouts(Background(model_of(), len(TOKENIZER)), ahead=True))
    assert after < 0.35 and abs(after - before) < 0.15
