"""The callback that writes a run's tokens.jsonl: the numbers of each token of a few episodes that were trained."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from textenv.text.tokenizer import Tokenizer

from ..distributed.sharding import gathered
from ..distributed.world import is_main_process
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


class TokenRecorder(BaseCallback):
    """Writes the numbers of each token of a few trained episodes into `tokens.jsonl`; does not change training.

    Of several processes, rank 0 takes its own episodes.

    At the rollouts of a run's tables of samples, or fewer, and at the last one, it takes the whole episodes with the
    lowest and the highest score and two between. What the rollout knows of them is taken as it is (see `token_rows`),
    when the rollout ends. The update's part is known after it, when the weights have changed:

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
        self.waiting: Waiting | None = None
        self.is_waiting = False  # in all processes: whether rank 0 may have something that waits

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
        self.is_waiting = isinstance(self.buffer, SequenceRolloutBuffer) and self._is_due()
        if not self.is_waiting:
            return
        with gathered(cast("LMPolicy", self.model.policy).lm):  # a collective: rank 0 then has whole weights
            if is_main_process() and len(self.buffer.trained):
                self._take()

    def _take(self) -> None:
        """Take what the rollout knows of the episodes to write."""
        buffer = self.buffer
        trained, lm = buffer.trained, cast("LMPolicy", self.model.policy).lm
        sequences = [(trained.segment(i), trained.transitions(i)) for i in by_score(trained, N_EPISODES)]
        episodes = Episodes.of(sequences, buffer.token_sets, buffer.device)
        advantages = np.concatenate([part.advantages for part in episodes.parts])
        scaled = (advantages - buffer.advantage_mean) / buffer.advantage_deviation  # as the loss has them
        self.waiting = Waiting(episodes, likeliest(lm, episodes.batch), scaled, self._divergence(episodes))

    def _divergence(self, episodes: Episodes) -> np.ndarray | None:
        """Return log pi - log pi_ref of each token when it was sampled, (N,); None without a reference."""
        penalty = next((step for step in self.buffer.before_returns if isinstance(step, KLPenalty)), None)
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
        if self.is_waiting:
            self.is_waiting = False
            with gathered(cast("LMPolicy", self.model.policy).lm):
                if self.waiting is not None:
                    self._write_rows(*self.waiting)
            self.waiting = None

    def _write_rows(self, episodes: Episodes, found: Likeliest, scaled: np.ndarray, kl: np.ndarray | None) -> None:
        with torch.no_grad():
            now = cast("LMPolicy", self.model.policy).lm.log_probs(episodes.batch, episodes.actions)
        before = torch.as_tensor(np.concatenate([part.log_probs for part in episodes.parts]), device=now.device)
        counts = torch.as_tensor([len(part.actions) for part in episodes.parts], device=now.device)
        rows = torch.as_tensor(episodes.batch.rows, device=now.device)
        terms = Terms(now, before, torch.as_tensor(scaled, device=now.device), rows, counts)
        more = {"kl": kl, "ratio": terms.ratios.cpu().numpy(), "clipped": self._clipped(terms)}
        written = token_rows(episodes, self.tokenizer, found, more)
        self.run.append(self.run.tokens, [{"tokens": self.model.num_timesteps, **row} for row in written])

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


def by_score(trained: TrainedSequences, n: int) -> list[int]:
    """Return the numbers of n sequences, evenly spaced from the lowest score to the highest.

    They are whole episodes where there are any, then ends of episodes that an earlier rollout began, then any others.
    """
    ended = [i for i in range(len(trained)) if trained.segment(i).is_finished]
    whole = [i for i in ended if trained.transitions(i).cols[0] == trained.segment(i).n_prompt - 1]
    ranked = sorted(
        whole or ended or range(len(trained)), key=lambda i: float(trained.transitions(i).task_rewards.sum())
    )
    places = np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)
    return [ranked[place] for place in places]
