"""Learning with each surrogate and aggregation: from chance to over 0.9, and not with the reward off (E11)."""

import pytest

from agents import CISPO, GSPO, ClipHigher, DualClip, SoftGate
from tests.learning.test_learning import TASKS, build, learn

pytestmark = pytest.mark.slow


def fading(terms):
    """A surrogate of one's own."""
    return terms.ratios * (1 - (terms.ratios - 1).abs() / 0.5).clamp(min=0)


# GSPO's own bounds, 3e-4 and 4e-4, are those of a large model with small steps.
SURROGATES = [ClipHigher(), DualClip(), CISPO(), GSPO(0.1, 0.15), SoftGate(), fading]
WAYS = [*((surrogate, "token") for surrogate in SURROGATES), (None, "sequence"), (None, "constant")]
WAYS += [(GSPO(0.1, 0.15), "sequence"), (ClipHigher(), "constant")]


def trained(task, surrogate, aggregation, **kwargs):
    options = {"policy_kwargs": {"surrogate": surrogate}, "rollout_buffer_kwargs": {"aggregation": aggregation}}
    return learn(build(task, **options, **kwargs), task)


@pytest.mark.parametrize(("surrogate", "aggregation"), WAYS)
def test_e11_each_surrogate_and_aggregation_learns_and_not_with_the_reward_off(surrogate, aggregation):
    task = TASKS["always"]
    before, after = trained(task, surrogate, aggregation)
    assert before < 0.35 and after > 0.9
    before, after = trained(task, surrogate, aggregation, reward=lambda prompt, preds, done: 0.0)
    assert after < 0.35 and abs(after - before) < 0.15
