"""The gradients of estimators of the divergence, by enumeration of all texts of 4 tokens of a vocabulary of 3."""

import pytest
import torch

from agents.steps.kl_penalty import estimate

SAME = 1e-12


def all_texts():
    return torch.cartesian_prod(*[torch.arange(3)] * 4)  # (81, 4)


def nodes(texts):
    """Return the number of the beginning that each token of a text follows: 0 for none, 1 to 3 for one token, ..."""
    before = [sum(3**j for j in range(t)) + (texts[:, :t] * 3 ** torch.arange(t)).sum(-1) for t in range(4)]
    return torch.stack(before, dim=1)  # (81, 4)


def scores(logits, texts):
    """Return the log-probability of each token of each text, (81, 4)."""
    return torch.log_softmax(logits, -1)[nodes(texts), texts]


def expected_gradient(logits, reference, estimator, sampled_by=None):
    """Return the mean, over all texts that a policy writes, of the gradient of an estimator as a loss of tokens."""
    texts, free = all_texts(), logits.clone().requires_grad_()
    by = logits if sampled_by is None else sampled_by
    mass = scores(by, texts).sum(-1, keepdim=True).exp()  # (81, 1), without a graph: the texts are samples
    ratio = scores(free, texts) - scores(reference, texts)
    return torch.autograd.grad((mass * estimator(ratio)).sum(), free)[0]


def divergences_of(logits, reference):
    own, other = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    return (own.exp() * (own - other)).sum(-1)  # (40,): of each beginning


def fixed_text_gradient(logits, reference, sampled_by=None, swap=False):
    """Return the gradient of the sum of the divergences at the tokens of a text, the texts being fixed."""
    texts, free = all_texts(), logits.clone().requires_grad_()
    mass = scores(logits if sampled_by is None else sampled_by, texts).sum(-1, keepdim=True).exp()
    kl = divergences_of(reference, free) if swap else divergences_of(free, reference)
    return torch.autograd.grad((mass * kl[nodes(texts)]).sum(), free)[0]


@pytest.fixture
def tables():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(40, 3, generator=rng, dtype=torch.float64) for _ in range(3)]


def test_e14_k2_has_the_gradient_of_the_divergence_and_k1_and_k3_have_not(tables):
    """k1 has 0, and k3 that of the divergence of the reference from the policy."""
    policy, reference, _ = tables
    right = fixed_text_gradient(policy, reference)
    k1, k2, k3 = (expected_gradient(policy, reference, lambda r, k=k: estimate(r, k)) for k in ("k1", "k2", "k3"))
    assert (k2 - right).abs().max() < SAME < 0.1 < right.abs().max()
    assert k1.abs().max() < SAME
    assert (k3 - fixed_text_gradient(policy, reference, swap=True)).abs().max() < SAME
    assert (k3 - right).norm() > 0.5 * right.norm()


def test_e14_of_tokens_of_an_older_policy_k2_needs_the_ratio(tables):
    """The divergence is then that at the states of the older policy. k3 times a ratio with a gradient does as well."""
    policy, reference, older = tables
    right = fixed_text_gradient(policy, reference, older)
    texts = all_texts()

    def ratios(r):  # of new to old probability, with the gradient of the former
        return (r + scores(reference, texts) - scores(older, texts)).exp()

    def by_ratio(r):
        return ratios(r).detach() * estimate(r, "k2")

    def by_deepseek(r):  # arXiv 2512.02556, equation 7
        return ratios(r) * estimate(r, "k3")

    assert (expected_gradient(policy, reference, by_ratio, older) - right).abs().max() < SAME
    assert (expected_gradient(policy, reference, by_deepseek, older) - right).abs().max() < SAME
    plain = expected_gradient(policy, reference, lambda r: estimate(r, "k2"), older)
    assert (plain - right).norm() > 0.5 * right.norm()


def test_e14_it_is_not_the_whole_gradient_of_the_divergence_of_texts(tables):
    """A penalty of rewards (k1) has the rest, too: a token leads to texts with other divergences."""
    policy, reference, _ = tables
    texts, free = all_texts(), policy.clone().requires_grad_()
    own = scores(free, texts).sum(-1)  # (81,)
    whole = torch.autograd.grad((own.exp() * (own - scores(reference, texts).sum(-1))).sum(), free)[0]
    assert (whole - fixed_text_gradient(policy, reference)).norm() > 0.2 * whole.norm()
    as_reward = expected_gradient(policy, reference, lambda r: r * r.detach().flip(-1).cumsum(-1).flip(-1))
    assert (as_reward - whole).abs().max() < SAME
