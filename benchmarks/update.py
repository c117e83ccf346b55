"""Claim 3: the time of an update against a hand-written one on the same minibatches.

    python benchmarks/update.py [--quick]

Ours is `PPO.train()` of Stable-Baselines3, unmodified. The floor gets ready-made minibatches and does the least work
for the same gradient: a forward of the trunk, the head on response positions only, the clipped surrogate and the
value loss, backward, clipping, AdamW; no entropy, no log. One rollout is collected and used throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from torch import Tensor
from torch.nn.functional import mse_loss
from work import Row, Settings, pairs, rollout, run_script, timed

from agents.rollout.transitions import SequenceSamples

LIMITS = (8, 128)  # tokens of a ragged completion, uniform
EPOCHS = (1, 4)
MINIBATCHES = 4  # an epoch: about 16 sequences each
RAGGED_LANES = 32
LEARNING_RATE = 1e-12  # the same rollout is used again and again: the weights must not move, in 32 bits
MOST = 1.10  # the target: at most 10 % slower than the floor
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 1e-2  # between the losses of the two sides


class Chunk(NamedTuple):
    """Padded sequences of one forward, and the positions whose hidden states are used."""

    ids: Tensor  # (S, T)
    rows: Tensor  # (N,)
    cols: Tensor  # (N,)


class Step(NamedTuple):
    """A minibatch, ready for the floor; the numbers are in the order of the chunks."""

    chunks: list[Chunk]
    actions: Tensor  # (N,)
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    return [row for is_ragged in (False, True) for row in compare(settings, is_ragged)]


def compare(settings: Settings, is_ragged: bool) -> list[Row]:
    """Return a row for each number of epochs."""
    work, rows, kind = settings.work(), None, "equal lengths"
    if is_ragged:
        work = settings.work(new_tokens=LIMITS[1], n_lanes=RAGGED_LANES)
        low, high = (2, 8) if settings.smoke else LIMITS
        limits = np.random.default_rng(1).integers(low, high + 1, 4096)
        rows = [{"prompt": p, "max_new_tokens": int(n)} for p, n in zip(work.prompts(), limits, strict=True)]
        kind = f"limits of {low} to {high} tokens"
    batch_size = work.n_lanes * work.new_tokens // (1 if settings.smoke else MINIBATCHES)
    model = work.agent(rows, learning_rate=LEARNING_RATE, batch_size=batch_size)
    rollout(model)
    return [compare_epochs(model, settings, n_epochs, kind) for n_epochs in EPOCHS]


def compare_epochs(model: PPO, settings: Settings, n_epochs: int, kind: str) -> Row:
    """Time both sides on the minibatches that the buffer draws from one state of its generator."""
    buffer = model.rollout_buffer
    n_tokens = n_epochs * model.n_steps * model.n_envs
    start = buffer.rng.bit_generator.state
    minibatches = [samples for _ in range(n_epochs) for samples in buffer.get(model.batch_size)]
    floor = fastest_floor(model, minibatches, settings.device)
    losses: list[float] = []

    def ours() -> int:
        buffer.rng.bit_generator.state = start
        model.n_epochs = n_epochs
        model.train()
        return n_tokens

    def theirs() -> int:
        losses.append(floor())
        return n_tokens

    result = pairs(theirs, ours, settings.n_pairs, settings.device)  # so that the ratio is our time / the floor's
    figures = [f"{1e6 / speed:,.1f} µs/token" for speed in (result.b, result.a)]
    claim = f"update, {kind}, {n_epochs} epoch{'s' * (n_epochs > 1)}, time against the floor"
    tolerance = TOLERANCE if model.policy.lm.autocast is None else TOLERANCE_16_BIT
    check_loss(model.logger.name_to_value["train/loss"], losses[-1], tolerance)
    target, peaks = f"<= {MOST:.2f}x (less is better)", result.peaks and result.peaks[::-1]
    return Row(claim, *figures, result.ratio, result.spread, target, result.ratio <= MOST, peaks)


def check_loss(ours: float, theirs: float, tolerance: float) -> None:
    """Raise an error if the losses of the two sides' last minibatches differ, as the work would not be the same."""
    if abs(ours - theirs) > tolerance * max(1.0, abs(theirs)):
        raise RuntimeError(f"Expected the floor's loss {theirs} from the update, got {ours}: they do different work.")


def fastest_floor(model: PPO, minibatches: Sequence[SequenceSamples], device: str) -> Callable[[], float]:
    """Return the faster floor on this machine: one forward per minibatch, or one per bucket of similar lengths."""
    layouts = [[step(samples, bucketed) for samples in minibatches] for bucketed in (False, True)]
    trials = [floor(model, steps[:MINIBATCHES]) for steps in layouts]
    for trial in trials:
        trial()
    seconds = [timed(trial, device)[0] for trial in trials]
    return floor(model, layouts[seconds.index(min(seconds))])


def step(samples: SequenceSamples, bucketed: bool) -> Step:
    """Lay out a minibatch: in the buffer's buckets, or padded to its longest sequence."""
    batch, device = samples.observations, samples.actions.device
    if bucketed:
        chunks = list(batch.chunks())
        own_chunks = [Chunk(chunk.ids, chunk.rows, chunk.cols) for chunk in chunks]
        order = torch.as_tensor(np.concatenate([chunk.transitions for chunk in chunks]), device=device)
    else:
        rows, cols = (torch.as_tensor(indices, device=device).long() for indices in (batch.rows, batch.cols))
        own_chunks = [Chunk(batch.tokens, rows, cols)]
        order = torch.arange(len(batch), device=device)
    numbers = (samples.actions, samples.old_log_prob, samples.advantages, samples.returns)
    return Step(own_chunks, *(tensor[order] for tensor in numbers))


def floor(model: PPO, steps: list[Step]) -> Callable[[], float]:
    """Return a function that takes the optimizer steps by hand and returns the last loss."""
    lm, critic = model.policy.lm.backbone.model, model.policy.lm.critic
    trunk, head, weights = lm.base_model, lm.get_output_embeddings(), list(model.policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    clip = model.clip_range(1.0)

    def read(ids: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        with model.policy.lm._precision():
            return trunk(input_ids=ids, use_cache=False).last_hidden_state[rows, cols]

    def score(hidden: Tensor, actions: Tensor) -> Tensor:
        with model.policy.lm._precision():
            logits = head(hidden)
        return torch.log_softmax(logits.float(), dim=-1).gather(-1, actions[:, None])[:, 0]  # (N, V) to (N,)

    def run() -> float:
        for minibatch in steps:
            hidden = torch.cat([read(*chunk) for chunk in minibatch.chunks])  # (N, H)
            ratio = (score(hidden, minibatch.actions) - minibatch.old_log_prob).exp()
            surrogate = minibatch.advantages * ratio
            clipped = minibatch.advantages * ratio.clamp(1 - clip, 1 + clip)
            loss = -surrogate.minimum(clipped).mean() + model.vf_coef * mse_loss(critic(hidden), minibatch.returns)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, model.max_grad_norm)
            optimizer.step()
        return loss.item()

    return run


if __name__ == "__main__":
    run_script(__doc__, measure)
