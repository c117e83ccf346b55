"""Importance weights for texts that another distribution sampled: the policy gradient by enumeration of all texts."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from agents import EngineRollouts
from agents.rollout.importance import Correction, effective_share
from agents.rollout.transitions import Transitions, joined
from tests.helpers.engines import Scripted
from tests.helpers.models import randomise_critic
from tests.helpers.training import tiny_agent, tiny_config
from textenv import CharTokenizer, TextEnv

pytestmark = pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")
LETTERS = CharTokenizer("ab")
V, CAP = len(LETTERS), 1.3
LOW, HIGH = 0.4, 2.5
PROMPT = [1, 2]
REWARDS = np.random.default_rng(3).normal(size=(V, V)) * 2
# The engine's distributions of the first token and of the second: far from the policy, which is nearly uniform.
FIRST = np.array([0.6, 0.3, 0.1])
SECOND = np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])
TEXTS = {length: list(itertools.product(range(V), repeat=length)) for length in (1, 2)}


def behaviour(text):
    """Return the engine's probability of each token of a text."""
    return np.array([FIRST[text[0]], *(SECOND[text[0]][text[i]] for i in range(1, len(text)))])


def reward_of(text):
    return REWARDS[text[0], text[-1]]


def scored(prompt, preds, done):
    return float(reward_of(preds.ids)) if done else 0.0


def build(length):
    """Return an agent of one lane whose update is one step of gradient descent at rate 1 on the policy's loss."""
    env = TextEnv([PROMPT], LETTERS, reward=scored, max_new_tokens=length, stop_ids=())
    model = tiny_agent(
        env,
        n_envs=1,
        n_steps=2,
        lm=tiny_config(vocab_size=V, initializer_range=0.5),
        batch_size=2,
        n_epochs=1,
        learning_rate=1.0,
        max_grad_norm=1e9,
        vf_coef=0.0,
        gae_lambda=1.0,
        policy_kwargs={"optimizer_class": torch.optim.SGD},
        rollout_buffer_kwargs={"normalize_advantage": False},
    )
    randomise_critic(model.policy)
    return model


@cache
def started(length):
    """Return an agent and the weights with which it starts."""
    model = build(length)
    return model, {name: weight.clone() for name, weight in model.policy.state_dict().items()}


def step_of(length, text, correction):
    """Return the sum of a text's token gradients: the change of weights by an update on it, times its length."""
    model, start = started(length)
    model.policy.load_state_dict(start)
    before = flat(model)
    step = EngineRollouts(Scripted(text, np.log(behaviour(text))))
    step.correction = correction
    model.learn(2, callback=step)
    return (flat(model) - before) * length


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.policy.backbone.parameters()]).double()


def estimate(length, correction):
    """Return the expected step over the engine's texts, by enumeration."""
    return sum(behaviour(text).prod() * step_of(length, text, correction) for text in TEXTS[length])


class Off(Correction):
    """The control: all importance weights are 1."""

    def weights(self, log_probs, behaviour_log_probs, rows):
        return np.ones_like(log_probs)


class Exact:
    """Gradients from their definitions by autograd, for the same initial weights."""

    def __init__(self, length):
        self.model, self.length = build(length), length
        self.weights = list(self.model.policy.backbone.parameters())
        logits = {(): self.logits([]), **{(a,): self.logits([a]) for a in range(V)}}
        self.log_pi = {prefix: torch.log_softmax(of_prefix, -1) for prefix, of_prefix in logits.items()}
        values = self.model.policy.lm
        self.value = {prefix: float(self.value_of(values, list(prefix))) for prefix in logits}

    def logits(self, written):
        return self.model.policy.backbone.model(input_ids=torch.tensor([PROMPT + written])).logits[0, -1, :V]

    def value_of(self, lm, written):
        hidden = lm.backbone.model.base_model(input_ids=torch.tensor([PROMPT + written])).last_hidden_state[0, -1:]
        return lm.critic(hidden).detach()

    def of(self, text):
        """Return the policy's log-probability of each token of a text."""
        return torch.stack([self.log_pi[tuple(text[:i])][text[i]] for i in range(len(text))])

    def gradient(self, objective):
        grads = torch.autograd.grad(objective, self.weights, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(weight) for weight in self.weights]
        grads = [zero if grad is None else grad for grad, zero in zip(grads, zeros)]
        return torch.cat([grad.flatten() for grad in grads]).double()

    def policy_gradient(self):
        """Return the gradient of the expected reward under the policy."""
        return self.gradient(sum(self.of(text).sum().exp() * reward_of(text) for text in TEXTS[self.length]))

    def weighted(self, weight):
        """Return the engine's expectation of weight * advantage * grad log pi; `weight` maps ratios to weights."""
        total = 0.0
        for text in TEXTS[self.length]:
            ours, mu = self.of(text), behaviour(text)
            weights = weight(ours.detach().exp().numpy() / mu)
            advantages = np.array([reward_of(text) - self.value[tuple(text[:i])] for i in range(len(text))])
            total = total + mu.prod() * (torch.as_tensor(weights * advantages) * ours).sum()
        return self.gradient(total)


def apart(first, second):
    """Return the distance of two gradients relative to the second."""
    return float((first - second).norm() / second.norm())


SAME = 1e-4


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a13_of_one_token_the_weighted_gradient_is_the_policy_gradient(per):
    exact = Exact(1)
    assert apart(estimate(1, Correction(math.inf, per)), exact.policy_gradient()) < SAME
    truncated = estimate(1, Correction(CAP, per))
    assert apart(truncated, exact.weighted(lambda ratios: np.minimum(ratios, CAP))) < SAME
    assert apart(truncated, exact.policy_gradient()) > 0.05, "truncation pulls towards the engine"
    assert apart(estimate(1, Off()), exact.policy_gradient()) > 0.3, "the negative control: no weights"


def test_a13_of_two_tokens_a_weight_a_sequence_gives_the_policy_gradient_and_one_a_token_comes_near():
    exact = Exact(2)
    target = exact.policy_gradient()
    assert apart(estimate(2, Correction(math.inf, "sequence")), target) < SAME
    by_token, without = estimate(2, Correction(math.inf, "token")), estimate(2, Off())
    assert apart(by_token, exact.weighted(lambda ratios: ratios)) < SAME
    assert apart(without, exact.weighted(np.ones_like)) < SAME
    assert 0.01 < apart(by_token, target) < 0.8 * apart(without, target), "the engine's states stay"


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a13_of_two_tokens_truncated_weights_are_the_formula(per):
    whole = {"token": lambda ratios: ratios, "sequence": lambda ratios: np.full_like(ratios, ratios.prod())}[per]
    expected = Exact(2).weighted(lambda ratios: np.minimum(whole(ratios), CAP))
    assert apart(estimate(2, Correction(CAP, per)), expected) < SAME


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a13_masked_weights_are_the_formula(per):
    """Ratios outside the band weigh 0, those inside the ratio; the band leaves some texts on each side."""
    whole = {"token": lambda ratios: ratios, "sequence": lambda ratios: np.full_like(ratios, ratios.prod())}[per]

    def masked(ratios):
        return np.where((whole(ratios) >= LOW) & (whole(ratios) <= HIGH), whole(ratios), 0.0)

    exact, estimated = Exact(2), estimate(2, Correction(math.inf, per, band=(LOW, HIGH)))
    assert apart(estimated, exact.weighted(masked)) < SAME
    assert apart(estimated, exact.weighted(whole)) > 0.05, "the control: some are outside"


def test_the_band_and_the_effective_share_by_hand():
    """Ratios 4, 1, 0.25 and 0.1: between 0.25 and 2 are the second and third, up to rounding of the limits."""
    ours, theirs, rows = np.log([0.8, 0.3, 0.1, 0.05]), np.log([0.2, 0.3, 0.4, 0.5]), np.array([0, 0, 1, 1])
    expected = [0.0, 1.0, pytest.approx(0.25), 0.0]
    assert Correction(band=(0.24, 2.0)).weights(ours, theirs, rows).tolist() == expected
    assert Correction(band=(0.0, 2.0)).weights(ours, theirs, rows).tolist()[2:] == [
        pytest.approx(0.25),
        pytest.approx(0.1),
    ]
    # Truncation is of what the band has left; of sequences, the ratios are 4 * 1 and 0.25 * 0.1.
    assert Correction(1.5, band=(0.24, 5.0)).weights(ours, theirs, rows).tolist()[0] == 1.5
    by_sequence = Correction(math.inf, "sequence", band=(0.5, 5.0)).weights(ours, theirs, rows)
    np.testing.assert_allclose(by_sequence, [4.0, 4.0, 0.0, 0.0], rtol=1e-6)
    assert effective_share(np.ones(5)) == 1.0 and effective_share(np.zeros(5)) == 0.0
    assert effective_share(np.array([3.0, 1.0, 0.0, 0.0])) == pytest.approx(16 / 40)


def test_weights_are_bounded_and_finite():
    log_probs, behaviour = np.array([0.0, -1.0, -500.0, 0.0]), np.array([-900.0, -1.0, 0.0, -0.5])
    rows = np.array([0, 0, 1, 1])
    assert Correction(2.0).weights(log_probs, behaviour, rows).tolist() == [2.0, 1.0, 0.0, pytest.approx(math.exp(0.5))]
    assert np.isfinite(Correction(math.inf, "sequence").weights(log_probs, behaviour, rows)).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"truncation": 0.5}, "`truncation` of at least 1, got 0.5"),
        ({"truncation": math.nan}, "`truncation` of at least 1, got nan"),
        ({"per": "word"}, r"`per` to be one of \['token', 'sequence'\], got 'word'"),
        ({"band": (1.5, 2.0)}, r"`band` to be \(low, high\) with 0 <= low <= 1 <= high, got \(1.5, 2.0\)"),
        ({"band": (-0.5, 2.0)}, "0 <= low <= 1 <= high"),
    ],
)
def test_what_is_no_correction_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Correction(**kwargs)


def test_log_probabilities_of_what_sampled_cost_nothing_where_it_is_the_policy():
    """They share memory with the policy's, in the rollout and in segments that wait for the rest of their episode."""
    model = tiny_agent(n_steps=6, rollout_buffer_kwargs={"complete_episodes": True}, batch_size=24)
    model.learn(24)
    buffer = model.rollout_buffer
    assert buffer.behaviour_log_probs is buffer.log_probs and buffer.waiting
    assert all(part.behaviour_log_probs is part.log_probs for part in buffer.waiting.values())
    own = next(iter(buffer.waiting.values()))
    theirs = Transitions(*own)._replace(behaviour_log_probs=own.log_probs + 1)
    both = joined([own, theirs])
    assert not both.is_by_policy
    expected = np.concatenate([own.log_probs, own.log_probs + 1])
    assert np.array_equal(both.behaviour_log_probs, expected)
