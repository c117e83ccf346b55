"""What a rollout consists of: segments, their transitions in numbers, and minibatches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .sequences import SequenceBatch


class Segment(NamedTuple):
    """A run of one lane inside one episode inside one rollout."""

    lane: int
    start: int  # first step
    end: int  # behind the last step
    tokens: np.ndarray  # (T,) int32: context and actions up to, not including, the last action
    is_finished: bool  # whether the episode ended with it
    n_prompt: int  # how many of the tokens are the prompt's


class Transitions(NamedTuple):
    """The transitions of one sequence in numbers, each array (n,)."""

    cols: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    values: np.ndarray
    log_probs: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray  # advantages + values, before any normalisation (invariant D1)
    allowed: np.ndarray  # int32: which of the buffer's token sets it was sampled from
    behaviour_log_probs: np.ndarray  # by what sampled: `log_probs` itself, in the same memory, unless an engine did

    @property
    def is_by_policy(self) -> bool:
        """Whether the policy itself has sampled: there is one array of log-probabilities."""
        return np.may_share_memory(self.log_probs, self.behaviour_log_probs)


def joined(parts: Sequence[Transitions]) -> Transitions:
    """Return transitions one behind the other, in new arrays; with as few of them as the parts have."""
    names = Transitions._fields
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names[:-1]}
    if all(part.is_by_policy for part in parts):
        return Transitions(**arrays, behaviour_log_probs=arrays["log_probs"])
    return Transitions(**arrays, behaviour_log_probs=np.concatenate([part.behaviour_log_probs for part in parts]))


class SequenceSamples(NamedTuple):
    """A minibatch, with the fields of SB3's `RolloutBufferSamples`; N transitions of whole sequences."""

    observations: SequenceBatch
    actions: Tensor  # (N,) int64
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    action_masks: None = None  # what MaskablePPO passes on; the sequences carry them


class RolloutView(NamedTuple):
    """The rollout as whole sequences, and where each of the N transitions stands in the buffer's arrays."""

    batch: SequenceBatch
    actions: Tensor  # (N,)
    steps: np.ndarray  # (N,)
    lanes: np.ndarray  # (N,)
