"""Whole iterations, of ours and of TRL's trainers in a process of their own, in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from work import Pairs, Row, largest, timed


class Done(NamedTuple):
    """The work of an iteration, and its seconds."""

    tokens: int
    optimizer_steps: int
    seconds: float
    peak: float | None = None  # GB by which it raised the peak of CUDA's memory; None on a CPU
    completions: int = 0  # that ended in it
    score: float | None = None  # their mean reward; None if none has ended


class Scores(BaseCallback):
    """Collects the scores of the episodes that end."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []

    def _on_step(self) -> bool:
        self.scores += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True


def ours(model: PPO, device: str) -> Callable[[], Done]:
    """Return a function that runs one iteration by `learn`."""
    updates: list[None] = []
    model.policy.optimizer.register_step_post_hook(lambda *_: updates.append(None))

    def iteration() -> Done:
        tokens, steps = model.num_timesteps, len(updates)
        size, ended = model.n_steps * model.n_envs, Scores()
        cost = timed(lambda: model.learn(size, ended, reset_num_timesteps=False, log_interval=None) and 0, device)
        work = model.num_timesteps - tokens, len(updates) - steps
        score = statistics.fmean(ended.scores) if ended.scores else None
        return Done(*work, cost.seconds, cost.peak, len(ended.scores), score)

    return iteration


def alternate(a: Callable[[], Done], b: Callable[[], Done], n_pairs: int) -> tuple[Pairs, Done]:
    """Run A B A B ... after one warm-up of each, make sure that both do the same, and compare their speeds."""
    a(), b()
    speeds: list[tuple[float, float]] = []
    peaks: list[tuple[float | None, float | None]] = []
    for _ in range(n_pairs):
        of_a, of_b = a(), b()
        assert of_a[:2] == of_b[:2], f"Expected the same tokens and optimizer steps, got {of_a[:2]} and {of_b[:2]}."
        speeds.append((of_a.tokens / of_a.seconds, of_b.tokens / of_b.seconds))
        peaks.append((of_a.peak, of_b.peak))
    medians = [statistics.median(side) for side in zip(*speeds, strict=True)]
    return Pairs(*medians, [x / y for x, y in speeds], largest(*zip(*peaks, strict=True))), of_a


def trl_row(claim: str, result: Pairs, done: Done, theirs: str, must: float) -> Row:
    """Return the row of the table for the speeds of ours and of TRL's trainer; `theirs` says more of the latter."""
    ours_text = f"{result.a:,.0f} tokens/s; {done.tokens:,} tokens, {done.optimizer_steps} optimizer steps each"
    texts = ours_text, f"{result.b:,.0f} tokens/s{theirs}"
    return Row(claim, *texts, result.ratio, result.spread, f">= {must}x", result.ratio >= must)


def time_row(claim: str, result: Pairs, most: float | None) -> Row:
    """Return the row of the table for the time of B against that of A; `most` is the largest ratio that is wanted."""
    return Row(
        claim,
        f"{1e6 / result.b:,.1f} µs/token",
        f"{1e6 / result.a:,.1f} µs/token",
        result.ratio,
        result.spread,
        "-" if most is None else f"<= {most}x (less is better)",
        None if most is None else result.ratio <= most,
        result.peaks and result.peaks[::-1],
    )


def has_trl(python: str, version: str) -> bool:
    """Return whether this interpreter exists and has the version of TRL that is asked for."""
    code = f"from importlib.metadata import version; assert version('trl') == '{version}'"
    try:
        return bool(python) and subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


@contextmanager
def trl(python: str, script: str, task: dict[str, Any]) -> Iterator[Callable[[], Done]]:
    """Start a script with a trainer of TRL, and yield a function that makes it run one iteration."""
    command = [python, str(Path(__file__).with_name(script)), json.dumps(task)]
    quiet = {"PYTHONWARNINGS": "ignore", "WANDB_DISABLED": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **quiet}
    environment.pop("PYTHONPATH", None)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def iteration() -> Done:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("next\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"TRL ended with exit code {process.wait()}; its own message is above.")
            report = json.loads(line)
            return Done(**{name: report[name] for name in Done._fields if name in report})

        yield iteration  # leaving `Popen` closes stdin, which ends the peer, and waits for it
