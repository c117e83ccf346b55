"""Logits of -inf, and those that become it: entropies, scores and gradients are finite, and right by hand."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from agents import doctor
from agents.models.sampling import Sampling, TokenDistribution, score_tokens
from tests.helpers.training import tiny_agent, tiny_config, tiny_env

LOWEST = torch.finfo(torch.float32).min
FILLS = [-math.inf, LOWEST]
SUPPRESSED = 5


@pytest.mark.parametrize("allowed", [None, torch.tensor([[True] * 3])], ids=["no mask", "mask"])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 3.0), (0.5, 9.0), (2.0, 3.0**0.5), (1e-3, math.inf)])
def test_entropy_and_gradients_by_hand(fill, temperature, odds, allowed):
    """Of the logits 0, log 3 and `fill`, the second token has 3 ** (1 / temperature) times the first's probability."""
    second = 1.0 if odds == math.inf else odds / (1 + odds)
    p = np.array([1 - second, second, 0.0])
    log_p = np.log(np.where(p > 0, p, 1))  # 0 where a token adds nothing
    entropy = -(p * log_p).sum()
    # d log p(second) / d logits = onehot - p, and d entropy / d logits = -p (log p + entropy); / temperature.
    by_hand = (np.array([0, 1, 0]) - p + 0.5 * -p * (log_p + entropy)) / temperature
    for is_lean in (True, False):
        logits = torch.tensor([[0.0, math.log(3), fill]], requires_grad=True)
        no_tokens = torch.zeros(1, 0, dtype=torch.long)
        adjusted = Sampling(temperature=temperature).adjust(logits, no_tokens.clone, torch.tensor([0]))
        own = TokenDistribution(adjusted, allowed)
        action = torch.tensor([1])
        log_prob, entropies = (
            score_tokens(adjusted, action, allowed) if is_lean else (own.log_prob(action), own.entropy())
        )
        (log_prob + 0.5 * entropies).sum().backward()
        assert float(entropies.detach()) == pytest.approx(entropy, abs=1e-6)
        assert float(log_prob.detach()) == pytest.approx(log_p[1], abs=1e-6)
        np.testing.assert_allclose(logits.grad[0], by_hand, atol=1e-5)


@pytest.mark.parametrize("fill", FILLS)
def test_the_score_of_a_suppressed_token_is_finite(fill):
    """It has probability 0: no draw finds it, and its gradient is that of the logarithm, onehot - p."""
    logits = torch.tensor([[0.0, 0.0, fill]], requires_grad=True)
    log_prob, entropy = score_tokens(logits / 0.5, torch.tensor([2]))
    assert float(log_prob.detach()) <= -1e30 and log_prob.isfinite()
    assert float(entropy.detach()) == pytest.approx(math.log(2))
    (log_prob + entropy).sum().backward()
    assert logits.grad.isfinite().all()
    distribution = TokenDistribution(logits.detach().expand(200, 3))
    assert set(distribution.sample(torch.Generator().manual_seed(0)).tolist()) == {0, 1}
    assert distribution.distribution.probs[0].tolist() == pytest.approx([0.5, 0.5, 0])


def test_finite_logits_have_the_same_figures_bit_for_bit():
    logits = (30 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))).requires_grad_()
    logits.data[:, 7] = -1e4
    actions = torch.arange(50) % 40
    expected = logits.log_softmax(dim=-1)  # (N, V)
    own = TokenDistribution(logits)
    assert torch.equal(own.log_probabilities, expected)
    assert torch.equal(own.entropy(), -(expected.exp() * expected).sum(dim=-1))
    log_probs, entropies = score_tokens(logits, actions)
    assert torch.equal(log_probs, expected.gather(1, actions[:, None])[:, 0])
    assert torch.equal(entropies, own.entropy())
    plain_sum = expected.gather(1, actions[:, None]).sum() - (expected.exp() * expected).sum()
    [plain] = torch.autograd.grad(plain_sum, logits)
    [ours] = torch.autograd.grad(own.log_prob(actions).sum() + own.entropy().sum(), logits)
    assert torch.equal(ours, plain)


class Suppressing:
    """The spec of a model that sets the logit of one token, as Chameleon does those of its image tokens."""

    def __init__(self, fill):
        self.fill = fill

    def build(self):
        fill = self.fill

        class Model(GPT2LMHeadModel):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits[..., SUPPRESSED] = fill
                return output

        torch.manual_seed(0)
        return Model(tiny_config(initializer_range=0.3))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_training_is_that_with_a_logit_of_probability_zero(temperature):
    """With -1e4 a token has probability 0 as well, and all numbers are finite: the weights are the same bit for bit."""
    trained = []
    for fill in (-1e4, *FILLS):
        model = tiny_agent(tiny_env(), lm=Suppressing(fill), ent_coef=0.1, policy_kwargs={"temperature": temperature})
        report = doctor.check(model)
        assert not [finding for finding in report.findings if finding.status == "failed"], fill
        model.learn(32)
        trained.append(torch.cat([weight.flatten() for weight in model.policy.parameters()]))
    assert trained[0].isfinite().all()
    assert all(torch.equal(trained[0], weights) for weights in trained[1:])
