"""The continuations of an episode from each of its prefixes: forks of one replay, which the policy writes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from textenv.env import TextEnv
from textenv.lanes.lanes import Lanes
from textenv.lanes.state import Saved
from textenv.prompts.prompts import Prompt

from ..distributed.hangs import note_progress
from ..models.sequences import SequenceBatch, number_prompts
from ..models.token_sets import AllowedTokens, TokenSets
from ..policies.lm_policy import LMPolicy
from .generation import FinalStep, Generation


class Prefixes(NamedTuple):
    """The prefixes of an episode: the states of its lane before each token that the policy wrote."""

    prompt: Prompt
    states: list[Saved]  # T of them
    actions: np.ndarray  # (T,): the token behind each prefix
    cols: np.ndarray  # (T,): the column of the last token of each prefix, without the separator
    ids: np.ndarray  # (L,): the tokens of the episode without the separator, replies included


class Continuations(NamedTuple):
    """B texts that the policy wrote from given prefixes, in S steps."""

    actions: np.ndarray  # (S, B)
    log_probs: np.ndarray  # (S, B), in nats
    cols: np.ndarray  # (S, B): the column after which the token was written, without the separator
    rewards: np.ndarray  # (S, B): the task's
    live: np.ndarray  # (S, B) bool: whether the row was still being written
    allowed: AllowedTokens | None  # of the S * B tokens, row by row of these arrays; None: all tokens
    ends: list[FinalStep]  # B of them
    truncated: np.ndarray  # (B,) bool

    def batch(self, device: torch.device, micro_batch_tokens: int | None) -> tuple[SequenceBatch, torch.Tensor]:
        """Return the texts with a transition for each token that was written, in the order of `live`, and the tokens.

        Args:
            device: The device of the batch.
            micro_batch_tokens: The most tokens of one forward; see `SequenceBatch`.
        """
        n_prompt = np.array([len(end.info["prompt"].ids) for end in self.ends])
        rows = [_without_separator(end.observation, n) for end, n in zip(self.ends, n_prompt, strict=True)]
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        sequences = np.nonzero(self.live)[1]  # (N,)
        batch = SequenceBatch(
            torch.as_tensor(tokens, device=device),
            lengths,
            sequences,
            self.cols[self.live],
            micro_batch_tokens,
            None if self.allowed is None else self.allowed[self.live.ravel()],
            n_prompt,
            number_prompts(rows, n_prompt),
        )
        return batch, torch.as_tensor(self.actions[self.live], device=device)


def replay(env: TextEnv, episode: Generation) -> Prefixes:
    """Run an episode again by its own tokens, and keep the state of its lane before each of them.

    Raises:
        ValueError: If the env ends the episode earlier, or gives other replies.
    """
    lanes = Lanes(env, 1, accepts_dropped=True)
    lanes.reset(0, [episode.prompt])
    prompt, state = lanes.prompts[0], lanes.state
    n_prompt, ids = len(prompt.ids), np.array(episode.ids, dtype=np.int64)
    states, actions, cols = [], [], []
    while not state.idle[0] and (n_behind := int(state.lengths[0]) - n_prompt - 1) < len(ids):
        if not np.array_equal(state.tokens[0, n_prompt + 1 : state.lengths[0]], ids[:n_behind]):
            raise ValueError(
                "Expected the env's replies to be those of the episode, got others: what `respond` returns must follow "
                "from its arguments."
            )
        states.append(state.state_dict())
        actions.append(ids[n_behind])
        cols.append(n_prompt + n_behind - 1)
        if n_behind + 1 == len(ids):  # the last token ends the episode, whose score nobody asks for
            return Prefixes(prompt, states, np.array(actions), np.array(cols), np.concatenate([prompt.ids, ids]))
        lanes.step(np.array([ids[n_behind]]))
    raise ValueError(
        f"Expected an episode of this env, got one of {len(ids)} tokens behind the prompt, of which the env takes "
        f"{len(actions)}: it has other limits, stop ids or replies."
    )


def continue_from(
    policy: LMPolicy, env: TextEnv, prefixes: Prefixes, numbers: Sequence[int], generator: torch.Generator
) -> Continuations:
    """Write on from some prefixes, side by side; equal prefixes are read once, and their keys and values copied.

    Args:
        policy: The policy, in evaluation mode.
        env: The env of the prefixes.
        prefixes: The prefixes of an episode.
        numbers: The number of the prefix of each row, B of them; equal numbers stand together.
        generator: The source of the randomness, on the CPU.
    """
    lanes, lm = Lanes(env, len(numbers), accepts_dropped=True), policy.lm
    observations = lanes.fork([prefixes.states[i] for i in numbers], prefixes.prompt)
    sets, is_masked = TokenSets(lm.backbone.vocab_size), False
    steps: dict[str, list[np.ndarray]] = {"actions": [], "cols": [], "rewards": [], "live": [], "sets": []}
    log_probs: list[torch.Tensor] = []  # (B,) each
    ends: dict[int, FinalStep] = {}  # by row
    truncated = np.zeros(len(numbers), dtype=bool)
    while not lanes.idle.all():
        steps["live"].append(~lanes.idle)
        steps["cols"].append(lanes.state.lengths - 2)  # `lengths` counts the separator
        batch = torch.as_tensor(observations, device=policy.device)
        allowed = torch.as_tensor(lanes.allowed(), device=policy.device) if env.masks else None
        note_progress()
        step = lm.act(batch, False, generator, lm.predict_cache, allowed, False)
        log_probs.append(step.log_probs)
        is_masked |= step.allowed is not None
        steps["sets"].append(_numbers(sets, step.allowed, len(numbers)))
        steps["actions"].append(step.actions.cpu().numpy())
        result = lanes.step(steps["actions"][-1])
        steps["rewards"].append(result.rewards)
        observations, truncated = result.observations, truncated | result.truncated
        ends |= {lane: FinalStep(result.infos[lane], last) for lane, last in result.final_observations.items()}
    if lm.predict_cache is not None:
        lm.predict_cache.drop()
    arrays = {name: np.stack(rows) for name, rows in steps.items()}  # (S, B) each
    of_tokens = AllowedTokens(sets, arrays.pop("sets").ravel())
    by_row = [ends[row] for row in range(len(numbers))]
    scores: Any = torch.stack(log_probs).float().cpu().numpy()  # one copy from the device for all steps
    return Continuations(
        **arrays, log_probs=scores, allowed=of_tokens if is_masked else None, ends=by_row, truncated=truncated
    )


def _numbers(sets: TokenSets, allowed: torch.Tensor | None, n_rows: int) -> np.ndarray:
    """Store which tokens could be sampled, (B, V) or None for all; return the numbers of the sets, (B,)."""
    return np.zeros(n_rows, dtype=np.int32) if allowed is None else sets.add(allowed.cpu().numpy())


def _without_separator(observation: np.ndarray, n_prompt: int) -> np.ndarray:
    """Return the tokens of an observation, (L,), without the separator behind the prompt and without padding."""
    tokens = np.delete(observation, n_prompt)
    return tokens[tokens >= 0]  # padding is negative
