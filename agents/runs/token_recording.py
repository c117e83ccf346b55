"""The callback that writes a run's tokens.jsonl: the numbers of each token of a few episodes that were trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from textenv.text.tokenizer import Tokenizer

from ..distributed.collectives import gather
from ..distributed.sharding import gathered
from ..distributed.world import is_main_process, joined
from ..evaluation.token_numbers import Episodes, Likeliest, likeliest, token_rows
from ..policies.lm_policy import LMPolicy
from ..policies.reference import log_probs
from ..policies.surrogates import Surrogate, Terms
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.trained_sequences import TrainedSequences
from ..steps.kl_penalty import KLPenalty
from ..steps.step import tokens_of_rollout
from .folder import RunFolder

N_EPISODES = 4
MOST_TABLES = 32  # in a whole run, and one more after its end: the file is bounded, however long the run is


class Waiting(NamedTuple):
    """What a rollout knows of some episodes, N transitions in all, until the update is done."""

    episodes: Episodes
    likeliest: Likeliest
    advantages: np.ndarray  # (N,) as the loss has them
    kl: np.ndarray | None  # (N,) in nats; None without a reference


class Standing(NamedTuple):
    """What a sequence is chosen by, the same whichever process has it."""

    kind: int  # 0 for a whole episode, 1 for the end of one that an earlier rollout began, 2 for another part
    score: float
    digest: bytes  # of the tokens, so that sequences of one score have an order


class Choice(NamedTuple):
    """A sequence that was chosen: the rank of its process, and its number there."""

    rank: int
    number: int


class TokenRecorder(BaseCallback):
    """Writes the numbers of each token of a few trained episodes into `tokens.jsonl`; does not change training.

    At the rollouts of a run's tables of samples, or fewer, and at the last one, it takes the whole episodes with the
    lowest and the highest score and two between, of all processes; rank 0 writes them. What the rollout knows of them
    is taken as it is (see `token_rows`), when the rollout ends. The update's part is known after it, when the weights
    have changed:

    - `ratio`: the probability of the token after the update over that before, unclipped;
    - `clipped`: whether the loss has no gradient at that ratio: PPO's clip acts, or the surrogate's. Not with A2C and
      TRPO;
    - `kl`: log pi - log pi_ref of the token when it was sampled, in nats. Not without a `KLPenalty`.

    Args:
        run: The run's folder.
        tokenizer: The tokenizer.
        every: The number of rollouts between two tables of samples.
        total: The number of tokens of the whole run.
    """

    def __init__(self, run: RunFolder, tokenizer: Tokenizer, every: int, total: int) -> None:
        super().__init__()
        self.run, self.tokenizer, self.every, self.total = run, tokenizer, every, total
        self.chosen: list[Choice] = []  # the episodes of all processes that wait, in their order
        self.waiting: Waiting | None = None  # those of this process

    def _on_step(self) -> bool:
        return True

    @property
    def buffer(self) -> Any:
        """The model's rollout buffer."""
        return self.model.rollout_buffer  # type: ignore[attr-defined]

    def _is_due(self) -> bool:
        size = tokens_of_rollout(self.model)
        stride = self.every * max(1, math.ceil(self.total / size / self.every / MOST_TABLES))
        now = self.model.num_timesteps
        return (now // size - 1) % stride == 0 or now >= self.total

    def _on_rollout_end(self) -> None:
        if not isinstance(self.buffer, SequenceRolloutBuffer) or not self._is_due():
            return
        self.chosen = by_score(gather("the scores of episodes", standings(self.buffer.trained)), N_EPISODES)
        here = joined()
        own = [number for rank, number in self.chosen if rank == (0 if here is None else here.rank)]
        penalty = self._penalty()
        reference = None if penalty is None else penalty.reference
        with (
            gathered(cast("LMPolicy", self.model.policy).lm),
            nullcontext() if reference is None else gathered(reference),
        ):
            if own:
                self._take(own)

    def _take(self, numbers: Sequence[int]) -> None:
        """Take what the rollout knows of the episodes to write."""
        buffer = self.buffer
        trained, lm = buffer.trained, cast("LMPolicy", self.model.policy).lm
        sequences = [(trained.segment(i), trained.transitions(i)) for i in numbers]
        episodes = Episodes.of(sequences, buffer.token_sets, buffer.device)
        advantages = np.concatenate([part.advantages for part in episodes.parts])
        scaled = (advantages - buffer.advantage_mean) / buffer.advantage_deviation  # as the loss has them
        self.waiting = Waiting(episodes, likeliest(lm, episodes.batch), scaled, self._divergence(episodes))

    def _penalty(self) -> KLPenalty | None:
        return next((step for step in self.buffer.before_returns if isinstance(step, KLPenalty)), None)

    def _divergence(self, episodes: Episodes) -> np.ndarray | None:
        """Return log pi - log pi_ref of each token when it was sampled, (N,); None without a reference."""
        penalty = self._penalty()
        if penalty is None or penalty.reference is None:
            return None
        reference = np.concatenate([part.reference_log_probs for part in episodes.parts])
        if not np.isfinite(reference).all():  # the estimator "exact" does not score the tokens
            lm = cast("LMPolicy", self.model.policy).lm
            reference = log_probs(penalty.reference, lm, episodes.batch, episodes.actions).cpu().numpy()
        return np.concatenate([part.log_probs for part in episodes.parts]) - reference

    def _on_rollout_start(self) -> None:
        self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        if not self.chosen:
            return
        with gathered(cast("LMPolicy", self.model.policy).lm):
            own = [] if self.waiting is None else self._rows(*self.waiting)
        of_ranks = [iter(rows) for rows in gather("the numbers of tokens", own)]
        written = [next(of_ranks[choice.rank]) for choice in self.chosen]
        self.chosen, self.waiting = [], None
        if is_main_process():
            self.run.append(self.run.tokens, [{"tokens": self.model.num_timesteps, **row} for row in written])

    def _rows(
        self, episodes: Episodes, found: Likeliest, scaled: np.ndarray, kl: np.ndarray | None
    ) -> list[dict[str, Any]]:
        with torch.no_grad():
            now = cast("LMPolicy", self.model.policy).lm.log_probs(episodes.batch, episodes.actions)
        before = torch.as_tensor(np.concatenate([part.log_probs for part in episodes.parts]), device=now.device)
        counts = torch.as_tensor([len(part.actions) for part in episodes.parts], device=now.device)
        rows = torch.as_tensor(episodes.batch.rows, device=now.device)
        terms = Terms(now, before, torch.as_tensor(scaled, device=now.device), rows, counts)
        more = {"kl": kl, "ratio": terms.ratios.cpu().numpy(), "clipped": self._clipped(terms)}
        return token_rows(episodes, self.tokenizer, found, more)

    def _clipped(self, terms: Terms) -> np.ndarray | None:
        model, surrogate = self.model, cast("LMPolicy", self.model.policy).surrogate.function
        if not isinstance(model, (PPO, MaskablePPO)):
            return None
        if surrogate is None:
            bound = model.clip_range(model._current_progress_remaining)  # type: ignore[operator]
            up, down = terms.ratios > 1 + bound, terms.ratios < 1 - bound
            return ((terms.advantages > 0) & up | (terms.advantages < 0) & down).cpu().numpy()
        weights = surrogate(terms)
        clipped = surrogate.is_clipped(terms, weights) if isinstance(surrogate, Surrogate) else weights == 0
        return clipped.cpu().numpy()


def standings(trained: TrainedSequences) -> list[Standing]:
    """Return what each sequence of a rollout is chosen by."""
    found = []
    for i in range(len(trained)):
        segment, part = trained.segment(i), trained.transitions(i)
        kind = 2 if not segment.is_finished else int(part.cols[0] != segment.n_prompt - 1)
        digest = hashlib.blake2b(segment.tokens.tobytes() + part.actions[-1:].tobytes(), digest_size=8).digest()
        found.append(Standing(kind, float(part.task_rewards.sum()), digest))
    return found


def by_score(of_ranks: Sequence[Sequence[Standing]], n: int) -> list[Choice]:
    """Return n sequences of those of all processes, evenly spaced from the lowest score to the highest.

    They are whole episodes where there are any, then ends of episodes that an earlier rollout began, then any others.

    Example:
        >>> of_rank_0, of_rank_1 = [Standing(0, 3.0, b"")], [Standing(0, 1.0, b""), Standing(0, 2.0, b"")]
        >>> [tuple(choice) for choice in by_score([of_rank_0, of_rank_1], 2)]
        [(1, 0), (0, 0)]
    """
    found = [(*own, Choice(rank, i)) for rank, rows in enumerate(of_ranks) for i, own in enumerate(rows)]
    best = min((kind for kind, *_ in found), default=0)
    ranked = [choice for *_, choice in sorted(row for row in found if row[0] == best)]
    places = np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)
    return [ranked[place] for place in places]
