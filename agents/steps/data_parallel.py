"""The step that lets several processes train one policy: settings that agree, one log, common counts."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, cast

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from ..distributed.collectives import gather, raise_together
from ..distributed.gradients import AgreedTarget
from ..distributed.world import world
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import DATA_PARALLEL, SequenceRolloutBuffer
from ..rollout.explained_variance import explained_variance
from .step import Order, RolloutStep, sequence_buffer, text_vec_env

SETTINGS = (
    "n_steps",
    "batch_size",
    "n_epochs",
    "gamma",
    "gae_lambda",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "target_kl",
)
BUFFER_SETTINGS = ("advantage", "critic_lambda", "lambda_alpha", "normalize_advantage", "aggregation")
# Counts are added up; other figures are averaged.
SUMMED = (
    *("time/prefill_tokens", "time/shared_tokens", "groups/dropped", "groups/trained", "groups/extra_tokens"),
    "engine/calls",
)
EXPLAINED_VARIANCE = "train/explained_variance"
ROLLOUT_SECONDS = "time/rollout_seconds"
WAITED_SECONDS = "time/waited_seconds"
SLOWEST_RANK = "time/slowest_rank"


class DataParallel(RolloutStep):
    """Lets an unmodified algorithm train one policy in the processes that `torchrun` or `accelerate launch` started.

    `make_agent` attaches it; pass it as a callback to an algorithm that is built by hand. With one process it does
    nothing. The settings of a script are those of the whole job: `n_envs` lanes, `batch_size` transitions and
    `total_timesteps` are divided among the processes, so that the same script makes the same updates on any number of
    them. `num_timesteps` counts the tokens of all processes.

    Rank 0 logs the means over the processes (counts of groups and of prompts' tokens are added up); `EpisodeMetrics`
    computes its means from the episodes of all, and the explained variance is that of the tokens of all.
    `time/rollout_seconds` is the time of the slowest process, and `time/rollout_seconds/rank_<r>` that of each.
    `time/waited_seconds` is the longest that a process has waited for others since the last row, and
    `time/slowest_rank` the rank of the process that waited least.

    Raises:
        ValueError: When attached, if the processes have different settings, or if the algorithm normalises advantages
            within the minibatches of each process.

    Example:
        >>> from agents import DataParallel
        >>> callbacks = [DataParallel()]  # PPO(LMPolicy, TextVecEnv(env, 64), ...).learn(100_000, callback=callbacks)
    """

    key = DATA_PARALLEL
    order = Order.PROCESSES
    is_kept = False  # a model that was trained in several processes may be trained further in one

    def attach(self, model: BaseAlgorithm) -> None:
        """Put the step before the buffer's other steps, if there are several processes."""
        if world() is not None:
            super().attach(model)

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the settings of all processes agree."""
        raise_together(_refusal(model))
        shards = cast("LMPolicy", model.policy).lm.shards
        self.algorithm = model
        settings = {name: repr(vars(model).get(name)) for name in SETTINGS}
        settings.update({name: _name_of(getattr(sequence_buffer(model), name)) for name in BUFFER_SETTINGS})
        settings["shard"] = "" if shards is None else f"{shards.spec} on {shards.device}"
        settings["weights"] = str([tuple(w.shape) for w in model.policy.parameters() if w.requires_grad])
        for rank, other_settings in enumerate(gather("the settings", settings)):
            unlike = [name for name in settings if settings[name] != other_settings[name]]
            if unlike:
                raise ValueError(f"Expected the same settings in all processes, got others in rank {rank}: {unlike}.")

    def begin(self) -> None:
        """Share the log, the break of an update and the table of prompts among the processes; start the clock."""
        text_vec_env(self.algorithm.get_env()).agree_on_prompts()
        self._clock = time.perf_counter()
        logger = vars(self.algorithm).get("_logger")  # none before the first `learn`
        if logger is not None and not isinstance(logger, SharedLogger):
            # Not by `set_logger`: after it, SB3 `base_class._setup_learn` makes no new logger for the next `learn`.
            self.algorithm._logger = SharedLogger(logger, sequence_buffer(self.algorithm))
        target, shared = vars(self.algorithm).get("target_kl"), cast("LMPolicy", self.algorithm.policy).shared
        assert shared is not None, "several processes"
        shared.target = None if target is None else AgreedTarget(target)
        if target is not None:
            self.algorithm.target_kl = shared.target  # type: ignore[attr-defined]

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Count the tokens of the other processes, and record how long this process took for its rollout."""
        here = world()
        assert here is not None, "set when attached"
        self.algorithm.logger.record(ROLLOUT_SECONDS, time.perf_counter() - self._clock)
        # SB3 `on_policy_algorithm.collect_rollouts` has counted the tokens of this process.
        self.algorithm.num_timesteps += (here.size - 1) * buffer.buffer_size * buffer.n_envs


class SharedLogger(Logger):
    """A logger whose `dump`, called in all processes, writes the figures of all in the process of rank 0.

    Args:
        logger: The logger of this process.
        buffer: The rollout buffer of this process.
    """

    def __init__(self, logger: Logger, buffer: SequenceRolloutBuffer) -> None:
        here, self.buffer = world(), buffer
        super().__init__(logger.dir, logger.output_formats if here is None or here.rank == 0 else [])
        self.level = logger.level
        self.name_to_value.update(logger.name_to_value)
        self.name_to_excluded.update(logger.name_to_excluded)

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Record a figure; for the critic's explained variance, that of the tokens of all processes."""
        if key == EXPLAINED_VARIANCE:  # SB3 `ppo.PPO.train` computes it from the tokens of this process alone
            value = explained_variance(self.buffer.values.ravel(), self.buffer.returns.ravel())
        super().record(key, value, exclude)

    def dump(self, step: int = 0) -> None:
        """Write the means over the processes; for values that are not numbers, write those of rank 0."""
        here = world()
        if here is not None and ROLLOUT_SECONDS in self.name_to_value:
            self.record(WAITED_SECONDS, here.watch.take_waited())
        rows = gather("the log", (dict(self.name_to_value), dict(self.name_to_excluded)))
        merged = merge([values for values, _ in rows])
        # In reverse, so that rank 0's entries overwrite the others.
        excluded = {key: formats for _, row in reversed(rows) for key, formats in row.items()}
        self.name_to_value.clear()
        for key, value in merged.items():
            super().record(key, value, excluded.get(key))
        super().dump(step)


def merge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the rows that several processes have recorded into one row of the log.

    Example:
        >>> merge([{"train/loss": 1.0}, {"train/loss": 2.0, "groups/dropped": 3}])
        {'train/loss': 1.5, 'groups/dropped': 3.0}
    """
    by_key: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            by_key[key].append(value)
    merged: dict[str, Any] = {}
    for key, values in by_key.items():
        if not all(isinstance(value, (int, float, np.number)) for value in values):
            merged[key] = values[0]
        elif key == ROLLOUT_SECONDS:
            merged[key] = max(values)
            merged.update({f"{key}/rank_{rank}": row[key] for rank, row in enumerate(rows) if key in row})
        elif key == WAITED_SECONDS:
            merged.update({key: max(values), SLOWEST_RANK: int(np.argmin(values))})
        elif all(value == values[0] for value in values) and key not in SUMMED:
            merged[key] = values[0]  # a whole number stays whole, where a mean would make it a float
        else:
            merged[key] = float(np.sum(values) if key in SUMMED else np.mean(values))
    return merged


def _name_of(setting: Any) -> str:
    """Return what a setting is, in words that are the same in all processes: a function's `repr` has its address."""
    return getattr(setting, "__qualname__", type(setting).__qualname__) if callable(setting) else repr(setting)


def _refusal(model: BaseAlgorithm) -> ValueError | None:
    """Return the error of settings with which several processes cannot train; None where they can."""
    shards = cast("LMPolicy", model.policy).lm.shards
    if shards is not None and shards.device.type != model.device.type:
        return ValueError(f"Expected Sharded(device={model.device.type!r}), as the algorithm's, got {shards.spec}.")
    if vars(model).get("normalize_advantage"):
        return ValueError(
            "Expected normalize_advantage=False of the algorithm in several processes, got True, which normalises "
            "within the minibatches of each: pass rollout_buffer_kwargs=dict(normalize_advantage=True), which "
            "normalises over all processes."
        )
    return None
