"""Scores in parts: a reference's without entropies, and gradients that are summed over parts in float32."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from agents.models.token_sets import AllowedTokens, TokenSets
from agents.policies import actor_critic
from tests.agents.models.test_sequences import batch_of
from tests.helpers.models import N_TOKENS, make_policy, tiny

LENGTHS = [40, 3, 3, 50, 7, 12]
ROUNDED = 1e-3  # of the largest number: sums in bfloat16 differ by more, sums in float32 by less than 1e-5


def supported(batch, actions):
    """Give each transition of a batch a random support that holds its action."""
    allowed = np.random.default_rng(4).random((len(actions), N_TOKENS)) < 0.5
    allowed[np.arange(len(actions)), actions] = True
    sets = TokenSets(N_TOKENS)
    batch.allowed = AllowedTokens(sets, sets.add(allowed))
    return batch


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("has_support", [False, True])
def test_a_references_scores_are_those_of_an_update_without_its_entropies(family, has_support, monkeypatch):
    """To the last bit, in parts, with temperature, penalty, supports, a soft cap (gemma2) and logits of -inf."""
    policy = make_policy(tiny(family), temperature=0.7, repetition_penalty=1.3).lm
    batch, actions = batch_of(LENGTHS)
    if has_support:
        batch = supported(batch, actions)
    if family == "gpt2":
        original = policy.backbone.logits
        monkeypatch.setattr(policy.backbone, "logits", lambda hidden: without_seven(original(hidden)))
    monkeypatch.setattr(actor_critic, "MAX_LOGITS", 5 * N_TOKENS)
    with torch.no_grad():
        expected = policy.evaluate(batch, actions)[1]
        monkeypatch.setattr(actor_critic, "score_tokens", None)  # which computes entropies, too
        scores = policy.log_probs(batch, actions)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
    assert ((scores < -1e29) == (actions == 7)).all() or family == "gemma2"


def without_seven(logits):
    return logits.index_fill(1, torch.tensor(7), -torch.inf)


def gradients(policy, batch, actions, outer):
    """Return the gradients of all weights, for gradients `outer` of the log-probabilities, (N,)."""
    policy.zero_grad()
    policy.lm.evaluate(batch, actions)[1].backward(outer)
    return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}


def largest_error(got, expected):
    return max(float((got[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def total(pieces, dtype):
    """Return the sums of gradients, computed and rounded in a type."""
    sums = {name: gradient.to(dtype) for name, gradient in pieces[0].items()}
    for piece in pieces[1:]:
        sums = {name: sums[name] + piece[name].to(dtype) for name in sums}
    return {name: gradient.double() for name, gradient in sums.items()}


@pytest.mark.parametrize(
    "surrounding", [pytest.param(nullcontext, marks=pytest.mark.slow), lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_parts_of_the_head_are_summed_in_float32_under_autocast(surrounding, monkeypatch):
    """Also where a caller's autocast surrounds the update; each transition is a part here."""
    policy = make_policy(tiny(tie_word_embeddings=False), autocast="bfloat16")
    batch, actions = batch_of(LENGTHS)
    outer = torch.randn(len(actions), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(actor_critic, "MAX_LOGITS", N_TOKENS)
    with surrounding():
        got = gradients(policy, batch, actions, outer)
    pieces = [gradients(policy, batch, actions, piece) for piece in torch.diag(outer)]
    head = [{"head": piece["lm.backbone.model.lm_head.weight"]} for piece in pieces]
    exact = total(head, torch.float64)
    assert largest_error({"head": got["lm.backbone.model.lm_head.weight"].double()}, exact) < 1e-5
    assert largest_error(total(head, torch.bfloat16), exact) > ROUNDED


def test_micro_batches_are_summed_in_float32_under_autocast():
    policy = make_policy(autocast="bfloat16")
    batch, actions = batch_of(LENGTHS, micro_batch_tokens=40)
    outer = torch.randn(len(actions), generator=torch.Generator().manual_seed(1))
    chunks = [torch.as_tensor(chunk.transitions) for chunk in batch.chunks()]
    assert len(chunks) > 3
    got = {name: gradient.double() for name, gradient in gradients(policy, batch, actions, outer).items()}
    pieces = [gradients(policy, batch, actions, outer * torch.isin(torch.arange(len(outer)), own)) for own in chunks]
    exact = total(pieces, torch.float64)
    assert largest_error(got, exact) < 1e-5
    assert largest_error(total(pieces, torch.bfloat16), exact) > ROUNDED


def test_scores_under_autocast_are_float32():
    policy = make_policy(autocast="bfloat16")
    batch, actions = batch_of(LENGTHS)
    assert {scores.dtype for scores in policy.lm.evaluate(batch, actions)[1:]} == {torch.float32}
