"""The parts of a rollout: segments, their transitions in numbers, and minibatches of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.sequences import SequenceBatch, number_prompts, pad_sequences
from ..models.token_sets import AllowedTokens


class Segment(NamedTuple):
    """A run of steps of one lane, inside one episode and one rollout.

    An episode that spans several rollouts has a segment in each of them.
    """

    lane: int
    start: int  # the first step
    end: int  # one more than the last step
    # (T,) int32: the row before the first step, then all actions but the last, after which nothing is predicted
    tokens: np.ndarray
    is_finished: bool  # whether the segment ends its episode
    n_prompt: int  # the number of tokens of the prompt


class Transitions(NamedTuple):
    """The numbers of the transitions of one sequence, (n,) each; the fields have the names of the buffer's arrays."""

    cols: np.ndarray  # int32: the column of the sequence at which logits and value are read
    actions: np.ndarray  # int32
    task_rewards: np.ndarray  # without penalties
    penalties: np.ndarray  # in reward, to be subtracted
    values: np.ndarray  # in units of reward
    log_probs: np.ndarray  # in nats, by the policy
    advantages: np.ndarray
    returns: np.ndarray  # values + advantages by the critic's lambda, before any normalisation (invariant D1)
    allowed: np.ndarray  # int32: the number of the token set that the action was sampled from; 0 is the vocabulary
    # In nats, by the reference of a `KLPenalty`; infinity, as of no probability, without one.
    reference_log_probs: np.ndarray
    # In nats, by the model that sampled: in the memory of `log_probs`, unless another engine sampled.
    behaviour_log_probs: np.ndarray

    @property
    def is_by_policy(self) -> bool:
        """Whether the policy itself sampled: there is one array of log-probabilities."""
        return np.may_share_memory(self.log_probs, self.behaviour_log_probs)


def joined(parts: Sequence[Transitions]) -> Transitions:
    """Return the transitions of all parts, one after the other, in new arrays.

    `log_probs` and `behaviour_log_probs` stay one array if they are one array in all parts.
    """
    names = Transitions._fields[:-1]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}  # (N,) each
    if all(part.is_by_policy for part in parts):
        return Transitions(**arrays, behaviour_log_probs=arrays["log_probs"])
    return Transitions(**arrays, behaviour_log_probs=np.concatenate([part.behaviour_log_probs for part in parts]))


def batch_of(
    segments: Sequence[Segment],
    rows: np.ndarray,
    cols: np.ndarray,
    micro_batch_tokens: int | None,
    allowed: AllowedTokens | None,
    device: torch.device | str,
) -> SequenceBatch:
    """Return the sequences of segments, (S,), with N transitions; the other arguments are those of `SequenceBatch`."""
    tokens, lengths = pad_sequences([segment.tokens for segment in segments], device)  # (S, T), (S,)
    n_prompt = np.array([segment.n_prompt for segment in segments])
    prompts = number_prompts([segment.tokens for segment in segments], n_prompt)
    return SequenceBatch(tokens, lengths, rows, cols, micro_batch_tokens, allowed, n_prompt, prompts)


class SequenceSamples(NamedTuple):
    """A minibatch of N transitions of whole sequences.

    The fields are those of SB3 `type_aliases.RolloutBufferSamples`, which `PPO.train` and `A2C.train` read.
    """

    observations: SequenceBatch
    actions: Tensor  # (N,) int64
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    action_masks: None = None  # sb3-contrib `MaskablePPO.train` passes it on to the policy; the sequences carry masks


class RolloutView(NamedTuple):
    """A rollout of N transitions as whole sequences, with each transition's index in the buffer's (T, B) arrays."""

    batch: SequenceBatch
    actions: Tensor  # (N,)
    steps: np.ndarray  # (N,): the first index
    lanes: np.ndarray  # (N,): the second index
