"""The dry run: one rollout and one update, which test a configuration and give an estimate of the whole run."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import replace
from typing import cast

import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger

from ..callbacks.finite_updates import FiniteUpdates
from ..checkpoints.storage import size
from ..configuration.config import RunOptions, TrainConfig
from ..distributed.sharding import gathered
from ..distributed.world import is_main_process, world
from ..errors import Exit
from ..evaluation.evaluation import evaluate_together
from ..models.prefix_cache import PrefixCache
from ..models.sequences import count_tokens
from ..policies.lm_policy import LMPolicy
from ..steps.step import sequence_buffer, tokens_of_rollout
from .assemble import Parts, assemble, training_callbacks, trust_of
from .checkpoints import needed
from .remaining import clock


class Stopwatch(BaseCallback):
    """A callback that notes when the rollout ended, in seconds of a monotonic clock, and what it shares.

    Attributes:
        end: The time.
        tokens: By part of training, the tokens that are read, and those of rows that read everything themselves.
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.end = time.monotonic()
        lm, self.tokens = cast("LMPolicy", self.model.policy).lm, {}
        if lm.use_cache and isinstance(lm.rollout_cache, PrefixCache):
            n_read = lm.rollout_cache.prefill_tokens
            self.tokens["the rollout"] = (n_read, n_read + lm.rollout_cache.shared_tokens)
        was_training = lm.training
        chunks = lm.train(True).chunks(sequence_buffer(self.model).view().batch)
        self.tokens["an epoch of the update"] = count_tokens(chunks)
        lm.train(was_training)


def dry_run(config: TrainConfig, options: RunOptions, n_runs: int = 1) -> int:
    """Train for one iteration, evaluate once, and print an estimate of the whole run's cost; write no file.

    The estimate includes what equal prompts save (`samples_per_prompt`), since the iteration is a real one. With
    dynamic sampling it is that of a run without, whose updates train more groups.

    Args:
        config: The configuration.
        options: The options of the command line.
        n_runs: The number of runs with that configuration, one for each seed.

    Returns:
        The exit code.
    """
    trust = trust_of(options)
    parts = assemble(config, trust, progress_bar=not options.quiet and is_main_process())
    agent, watch = parts.agent, Stopwatch()
    agent.set_logger(Logger(None, []))  # without outputs: figures go nowhere
    # Without dynamic sampling, the one update trains on all groups of its rollout: neither none of them nor a few.
    as_usual = replace(config, algorithm=replace(config.algorithm, min_groups=None))
    start = time.monotonic()
    tokens = tokens_of_rollout(agent)
    agent.learn(tokens, callback=CallbackList([*training_callbacks(as_usual, trust), FiniteUpdates(), watch]))
    end = time.monotonic()
    with gathered(cast("LMPolicy", agent.policy).lm):
        evaluation = _seconds_of_evaluation(parts)
    if not is_main_process():  # rank 0 prints
        return Exit.DONE
    n_iterations = math.ceil(config.total_tokens / tokens)
    # One before training, and one at most after each rollout.
    n_evaluations = 1 + math.ceil(config.total_tokens / max(config.evaluation.every, tokens))
    total = (end - start) * n_iterations + evaluation * n_evaluations
    print(f"rollout of {tokens:,} tokens: {watch.end - start:.2f} s; its update: {end - watch.end:.2f} s")
    shared = [f"{n_read:,} of {n:,} in {part}" for part, (n_read, n) in watch.tokens.items() if n_read < n]
    if shared:
        print(f"tokens read, since equal prompts are read once: {', '.join(shared)}")
    print(f"evaluation: {evaluation:.2f} s, {n_evaluations} times")
    print(f"the whole run, {config.total_tokens:,} tokens: about {clock(total)} (h:mm:ss)")
    if n_runs > 1:
        print(f"all {n_runs} seeds, one after the other: about {clock(total * n_runs)}")
    here = world()
    print(f"memory at most: {_memory(parts)}{'' if here is None else f' in each of {here.size} processes'}")
    # Old checkpoints are removed only after a new one is complete: for a while there is one more.
    print(f"disk: about {size(needed(agent) * (config.keep_checkpoints + 1) * n_runs)}")
    return Exit.DONE


def _seconds_of_evaluation(parts: Parts) -> float:
    start = time.monotonic()
    prompts = list(parts.held_out.prompts)[: parts.config.evaluation.n_prompts]
    options = {"env": parts.held_out, "judge": parts.judge, "n": parts.config.evaluation.n}
    evaluate_together(parts.agent, prompts, parts.tokenizer, parts.metrics, **options)  # type: ignore[arg-type]
    return time.monotonic() - start


def _memory(parts: Parts) -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # `ru_maxrss` is in bytes on macOS, in KiB on Linux
    main = size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if parts.agent.device.type != "cuda":
        return main
    return f"{size(torch.cuda.max_memory_allocated(parts.agent.device))} on the device, {main} in main memory"
