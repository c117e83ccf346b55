"""The step that shapes scores before the KL penalty: clips, scales, whitens, and lowers those of cut or long texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from textenv.episodes.rules import EndReason

from ..distributed.collectives import Spread, gather, merge_moments, moments
from ..distributed.world import world
from ..rollout.buffer import SequenceRolloutBuffer
from .scores import final_reward
from .step import Order, RolloutStep, text_vec_env

SMALL = 1e-8  # a deviation below this, relative to the mean, is rounding


class RewardShaping(RolloutStep):
    """Changes the score of each episode, on its last token, by the operations that are asked for, in this order.

    1. `clip`: the score is limited to [-clip, clip];
    2. `scale`: it is divided by the standard deviation of all scores so far, this rollout included (Engstrom et al.,
       2020, section 3). The mean is not subtracted. A checkpoint keeps the running figures;
    3. `whiten`: the scores of a rollout get mean 0 and deviation 1;
    4. `missing_eos_penalty` is subtracted if the episode ended at its limit of tokens (end reason "length"): its text
       is not finished;
    5. `overlong_penalty` is subtracted from an episode of its full limit of tokens, and linearly less of it from a
       shorter one, down to 0 if it stayed `overlong_tokens` below the limit: the soft overlong punishment of DAPO (Yu
       et al., 2025, equation 13, where the limit is L_max and `overlong_tokens` L_cache). Unlike 4, it is for the
       length alone: a text that ends by itself on its last token gets it, too.

    Late scores come before these operations and KL penalties after them, whatever the order of the callbacks. Scores
    that are all equal are left alone by 2 and become 0 by 3. The task reward in infos and logs stays untouched. Logged
    are `shaping/score` (the mean of the shaped scores), `shaping/cut` (the share of episodes cut off at the limit) and,
    with `overlong_tokens`, `shaping/overlong` (the mean of the fifth operation's penalty).

    Args:
        clip: The largest absolute score.
        scale: Whether to divide by the running deviation.
        whiten: Whether to normalise over the rollout's episodes.
        missing_eos_penalty: The penalty, in units of the score after the first three operations.
        overlong_tokens: The number of tokens below its limit at which an episode begins to be too long; None for no
            such penalty. The limit is the prompt's own `max_new_tokens`, or the env's.
        overlong_penalty: The penalty at the limit, in the same units.

    Raises:
        ValueError: If `clip` or `overlong_tokens` is not positive, or a penalty is negative. When attached, for the
            first three operations, if the env has rewards for every token or a VecNormalize scales rewards; for the
            fifth, if `overlong_tokens` exceeds the env's limit, or the env has `turn_tokens`.

    Example:
        >>> from agents import KLPenalty, RewardShaping
        >>> callbacks = [RewardShaping(clip=5.0, missing_eos_penalty=1.0), KLPenalty(0.02)]  # learn(callback=callbacks)
        >>> dapo = RewardShaping(overlong_tokens=4096)  # with max_new_tokens=20480
    """

    key = "RewardShaping"
    order = Order.SHAPING

    def __init__(
        self,
        clip: float | None = None,
        scale: bool = False,
        whiten: bool = False,
        missing_eos_penalty: float = 0.0,
        overlong_tokens: int | None = None,
        overlong_penalty: float = 1.0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if clip is not None and clip <= 0:
            raise ValueError(f"Expected `clip` to be positive or None, got {clip}.")
        if missing_eos_penalty < 0:
            raise ValueError(f"Expected `missing_eos_penalty` to be 0 or more, got {missing_eos_penalty}.")
        if overlong_tokens is not None and overlong_tokens < 1:
            raise ValueError(f"Expected `overlong_tokens` to be at least 1 or None, got {overlong_tokens}.")
        if overlong_penalty < 0:
            raise ValueError(f"Expected `overlong_penalty` to be 0 or more, got {overlong_penalty}.")
        self.clip, self.scale, self.whiten = clip, scale, whiten
        self.missing_eos_penalty = missing_eos_penalty
        self.overlong_tokens, self.overlong_penalty = overlong_tokens, overlong_penalty
        # The number and the mean of all scores so far, and the sum of their squared distances to the mean.
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def _changes_scores(self) -> bool:
        return self.clip is not None or self.scale or self.whiten

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that an episode has one score, at its end, and that no wrapper changes it on its way to the buffer."""
        env, normalizer = text_vec_env(model.get_env()), model.get_vec_normalize_env()
        if self._changes_scores and env.env.score_at == "step":
            raise ValueError(
                "Expected an env with score_at='done' or 'rollout_end', got 'step': clip, scale and whiten are of the "
                "one score of an episode."
            )
        if self._changes_scores and normalizer is not None and normalizer.norm_reward:
            raise ValueError(
                "Expected VecNormalize with norm_reward=False, got True: RewardShaping(scale=True) scales in its place."
            )
        rules = env.env.rules
        if self.overlong_tokens is not None and self.overlong_tokens > rules.max_new_tokens:
            raise ValueError(
                f"Expected `overlong_tokens` of at most max_new_tokens={rules.max_new_tokens}, got "
                f"{self.overlong_tokens}: every text would be too long."
            )
        if self.overlong_tokens is not None and rules.turn_tokens is not None:
            raise ValueError(
                "Expected an env without `turn_tokens` with `overlong_tokens`, got one with: its limit counts replies, "
                "too, whose length is not the policy's choice."
            )
        self.env = env
        self.algorithm = model

    def begin(self) -> None:
        """Have the env record the episodes of this rollout."""
        self.env.begin_rollout()

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Change the rewards on the last tokens of the episodes whose score has come."""
        infos = self.env.record.scored
        scores = np.array([info["episode"]["r"] for info in infos.values()])  # (E,)
        is_cut = np.array([info["end_reason"] is EndReason.LENGTH for info in infos.values()], dtype=bool)
        shaped = self._shape_all(scores) if self._changes_scores else scores
        overlong = self._overlong(list(infos.values()))  # (E,)
        penalties = self.missing_eos_penalty * is_cut + overlong
        for place, score, new_score, penalty in zip(infos, scores, shaped, penalties, strict=True):
            reward = final_reward(buffer, self.env, place)
            if reward is None:
                continue
            # The score is replaced within a sum: SB3 `on_policy_algorithm.collect_rollouts` has added gamma * V to the
            # reward of a truncated episode.
            if self._changes_scores:
                reward[:] = (reward - np.float32(score)) + np.float32(new_score)
            reward -= np.float32(penalty)
        figures = {"score": shaped - penalties, "cut": is_cut}
        if self.overlong_tokens is not None:
            figures["overlong"] = overlong
        for name, values in figures.items():
            n, mean, _ = moments(f"shaping/{name}", values)  # over the episodes of all processes
            if n:
                self.algorithm.logger.record(f"shaping/{name}", mean)

    def changes(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Return what a rollout would add to the last reward of finished episodes of the env, (E,).

        `scale` divides by the deviation of the scores so far, which these episodes do not change. Nothing is logged.

        Args:
            infos: The info of the last step of each episode.

        Raises:
            ValueError: With `whiten`, which compares the scores of a rollout with each other.
        """
        if self.whiten:
            raise ValueError(
                "Expected RewardShaping without `whiten`, got whiten=True: what an episode earns then depends on the "
                "others of its rollout, so that a text has no value of its own."
            )
        scores = np.array([info["episode"]["r"] for info in infos])  # (E,)
        is_cut = np.array([info["end_reason"] is EndReason.LENGTH for info in infos], dtype=bool)
        shaped = scores if self.clip is None else scores.clip(-self.clip, self.clip)
        if self.scale and self.count > 0:
            shaped = self._scaled(shaped)
        return shaped - scores - self.missing_eos_penalty * is_cut - self._overlong(infos)

    def _overlong(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Return the penalty for the length of each episode, (E,)."""
        if self.overlong_tokens is None:
            return np.zeros(len(infos))
        limits = np.array([self.env.lanes.turn_limit(info["prompt"]) for info in infos])  # (E,)
        lengths = np.array([info["episode"]["l"] for info in infos])  # (E,)
        above = lengths - (limits - self.overlong_tokens)
        return self.overlong_penalty * (above / self.overlong_tokens).clip(0.0, 1.0)

    def _shape_all(self, scores: np.ndarray) -> np.ndarray:
        """Return the shaped scores of this process, (E,), by means and deviations over all processes."""
        by_process = gather("scores", scores)
        all_scores = np.concatenate(by_process)
        here = world()
        start = sum(map(len, by_process[: 0 if here is None else here.rank]))  # of this process
        return self._shape(all_scores)[start : start + len(scores)] if len(all_scores) else scores

    def _shape(self, scores: np.ndarray) -> np.ndarray:
        if self.clip is not None:
            scores = scores.clip(-self.clip, self.clip)
        if self.scale:
            self._update(scores)
            scores = self._scaled(scores)
        if self.whiten:
            shifted = scores - scores[0]  # makes equal scores exactly 0
            scores = (shifted - shifted.mean()) / (shifted.std() + SMALL)
        return scores

    def _scaled(self, scores: np.ndarray) -> np.ndarray:
        deviation = math.sqrt(self.squares / self.count)
        return scores / deviation if deviation > SMALL * max(1.0, abs(self.mean)) else scores

    def _update(self, scores: np.ndarray) -> None:
        """Add scores to the running figures."""
        before = Spread(self.count, self.mean, self.squares)
        self.count, self.mean, self.squares = merge_moments(before, Spread.of(scores))

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the running figures."""
        return {}, {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Restore the running figures."""
        self.count, self.mean, self.squares = meta["count"], meta["mean"], meta["squares"]
