"""Observations unpacked to tokens, and batches of sequences read in chunks of similar length."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from agents.models.buckets import MAX_PADDING, MIN_BUCKET_TOKENS
from agents.models.observations import unpack_observations
from agents.models.sequences import SequenceBatch
from tests.helpers.models import N_TOKENS, make_policy, make_ppo, observe, tiny


def batch_of(lengths, seed=0, micro_batch_tokens=None) -> tuple[SequenceBatch, torch.Tensor]:
    """Return a batch of random sequences of these lengths, with random transitions in random order, and actions."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    tokens = torch.as_tensor(rng.integers(N_TOKENS, size=(len(lengths), lengths.max())))
    transitions = [(row, col) for row, n in enumerate(lengths) for col in range(n) if rng.random() < 0.5]
    rows, cols = np.array([transitions[i] for i in rng.permutation(len(transitions))]).T
    actions = torch.as_tensor(rng.integers(N_TOKENS, size=len(rows)))
    return SequenceBatch(tokens, lengths, rows, cols, micro_batch_tokens), actions


def test_unpack_by_hand():
    rows = observe([([7, 8], [9]), ([], []), ([0, 0, 0], []), ([1], [0, 2])], length=6)
    ids, lengths = unpack_observations(rows)
    assert ids.tolist() == [[7, 8, 9, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 2, 0, 0]]
    assert lengths.tolist() == [3, 0, 3, 3]
    assert unpack_observations(rows.int())[0].dtype == torch.int64


def test_observations_that_a_wrapper_made_floats_are_refused():
    model = make_ppo()
    model.set_env(VecNormalize(model.get_env(), norm_obs=True))
    with pytest.raises(ValueError, match=r"token ids .*, got float32 of .* VecNormalize<.* needs norm_obs=False"):
        model.learn(48)
    with pytest.raises(ValueError, match=r"token ids, got torch.float32: .* VecNormalize needs norm_obs=False"):
        unpack_observations(torch.zeros(1, 4))
    model.set_env(VecNormalize(model.get_env().unwrapped, norm_obs=False))
    model.learn(48)


@pytest.mark.parametrize("micro_batch_tokens", [None, 1, 100, 1000])
@pytest.mark.parametrize("lengths", [[5], [40, 3, 3, 90, 7, 41], [60] * 30, list(range(1, 80))], ids=len)
def test_chunks_cover_each_transition_once(lengths, micro_batch_tokens):
    batch, _ = batch_of(lengths, micro_batch_tokens=micro_batch_tokens)
    seen = []
    for chunk in batch.chunks():
        n, width = chunk.ids.shape
        for row, col, transition in zip(chunk.rows.tolist(), chunk.cols.tolist(), chunk.transitions):
            assert col == batch.cols[transition]
            assert torch.equal(chunk.ids[row, : col + 1], batch.tokens[batch.rows[transition], : col + 1])
        if micro_batch_tokens is not None:
            assert n == 1 or n * width <= micro_batch_tokens
        seen.extend(chunk.transitions.tolist())
    assert sorted(seen) == list(range(len(batch)))


def test_similar_lengths_are_read_together():
    """Chunks have little padding, and there are few of them."""
    lengths = np.random.default_rng(0).integers(1, 400, size=64)
    batch, _ = batch_of(lengths)
    chunks = list(batch.chunks())
    read = sum(chunk.ids.numel() for chunk in chunks)
    assert len(chunks) < 12
    assert lengths.sum() > (1 - MAX_PADDING) * (read - MIN_BUCKET_TOKENS)


def test_a_slice_keeps_some_transitions():
    """TRPO of sb3-contrib subsamples `rollout_data.observations[::n]`: the kept transitions keep their values."""
    policy = make_policy()
    batch, actions = batch_of([5, 9, 2])
    with torch.no_grad():
        whole, half = policy.evaluate_actions(batch, actions), policy.evaluate_actions(batch[::2], actions[::2])
    assert len(batch[::2]) == (len(batch) + 1) // 2
    for of_all, of_half in zip(whole, half):
        torch.testing.assert_close(of_all[::2], of_half, atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 200])
def test_e1_micro_batches_change_neither_loss_nor_gradient(micro_batch_tokens):
    """Sequences of uneven lengths, split into micro-batches down to one sequence each."""
    policy = make_policy()
    losses, gradients, forwards = [], [], []
    for bound in (None, micro_batch_tokens):
        batch, actions = batch_of([40, 3, 3, 50, 7, 12], micro_batch_tokens=bound)
        values, log_probs, entropy = policy.evaluate_actions(batch, actions)
        loss = (log_probs * torch.linspace(-1, 1, len(actions))).mean() + (values**2).mean() - 0.1 * entropy.mean()
        policy.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
        forwards.append(len(list(batch.chunks())))
    assert forwards[0] == 1 and forwards[1] > 1
    torch.testing.assert_close(losses[0], losses[1])
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-5 * float(gradients[0].abs().max())


def test_values_of_sequences():
    """`predict_values` takes a batch of sequences as well as observations."""
    policy = make_policy()
    batch, actions = batch_of([5, 9, 2])
    with torch.no_grad():
        values = policy.predict_values(batch)
        assert values.shape == (len(batch), 1)
        torch.testing.assert_close(values, policy.evaluate_actions(batch, actions)[0])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_e1_logits_in_parts_change_neither_scores_nor_gradient(family, monkeypatch):
    """Logits computed in parts, and again in the backward, are those of the head in one piece (E1)."""
    policy = make_policy(tiny(family))
    observations = observe([([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([3, 1], [2])])
    actions = torch.tensor([5, 9, 2])
    results = []
    for most in (1 << 24, 2 * policy.lm.backbone.vocab_size):
        monkeypatch.setattr("agents.policies.actor_critic.MAX_LOGITS", most)
        policy.zero_grad()
        scores = policy.evaluate_actions(observations, actions)
        sum((score * score).sum() for score in scores).backward()
        gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])
        results.append([*(score.detach() for score in scores), gradient])
    for whole, parts in zip(*results):
        torch.testing.assert_close(whole, parts, atol=1e-6 * max(1.0, float(whole.abs().max())), rtol=1e-5)
