"""The cost of a rollout that an engine in a second process writes, against the policy's own.

    python benchmarks/engine.py [--quick] [--device cuda] [--smoke] [--json FILE]

The same work, weights and lanes, in turns. The engine is a `LocalEngine`, which decodes as the policy does and so gains
nothing: the difference is the cost of the seam, which is sending new weights before each rollout, texts written ahead
that no lane takes, and one forward per sequence at the end. tokens/s are by wall clock; in brackets the CPU seconds of
both processes per 1,000 tokens. `ratio` is the engine's tokens per second over the policy's own.

The last row is of whole iterations, of a rollout by the engine and one epoch of an update: with the texts of the next
rollout written during the update (`ahead`) against texts written when the rollout begins. It needs two free cores: with
OMP_NUM_THREADS=1 the engine has one of them, and the trainer the other.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch
from rollout import CAP, MEAN
from stable_baselines3 import PPO
from work import Row, Settings, Work, rollout, run_script

from agents import EngineRollouts, LocalEngine


def measure(settings: Settings) -> list[Row]:
    """Measure the rows."""
    work = settings.work()
    ragged = settings.work(new_tokens=CAP)
    stop_ids = list(range(1, max(2, ragged.vocab_size // MEAN)))
    with LocalEngine(ragged.config(), ragged.vocab_size, device=settings.device, n_rows=work.n_lanes) as engine:
        assert engine._process is not None, "started"
        pid = engine._process.pid
        assert pid is not None, "started"
        take_a_core_each(pid)
        claim = f"equal lengths, {work.new_tokens} tokens an episode and a rollout"
        rows = [row(claim, engine, pid, settings, work, [], work.new_tokens)]
        claim = f"ended by EOS (mean {MEAN}, cap {ragged.new_tokens}), rollouts of {2 * ragged.new_tokens} steps"
        rows.append(row(claim, engine, pid, settings, ragged, stop_ids, 2 * ragged.new_tokens))
        return [*rows, row_of_ahead(engine, pid, settings, work)]


def take_a_core_each(pid: int) -> None:
    """Pin this process and the engine's to a core each, where both compute in one thread and there are two (Linux)."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1 and torch.get_num_threads() == 1:
        os.sched_setaffinity(0, cores[:1])
        os.sched_setaffinity(pid, cores[1:2])


def row(
    claim: str, engine: LocalEngine, pid: int, settings: Settings, work: Work, stop_ids: list[int], n_steps: int
) -> Row:
    """Alternate rollouts by the engine and by the policy, after one warm-up of each; return the row."""
    own, written = (work.agent(stop_ids=stop_ids, n_steps=n_steps) for _ in range(2))
    EngineRollouts(engine).attach(written)
    timed(written, pid), timed(own, pid)
    pairs = [(timed(written, pid), timed(own, pid)) for _ in range(settings.n_pairs)]
    return as_row(f"rollout by an engine, {claim}, against its own", pairs)


def row_of_ahead(engine: LocalEngine, pid: int, settings: Settings, work: Work) -> Row:
    """Alternate whole iterations with texts written ahead and without, after one of each; return the row."""
    ahead, plain = (work.agent(n_epochs=1) for _ in range(2))
    EngineRollouts(engine, ahead=True).attach(ahead)
    EngineRollouts(engine).attach(plain)

    def learned(model: PPO, n_iterations: int = 2) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time() + cpu_of(pid)
        n_tokens = n_iterations * model.n_steps * model.n_envs
        # The end of `learn` waits for the texts of a next rollout, so that the other side has the engine for itself.
        step = next(step for step in model.rollout_buffer.before_returns if isinstance(step, EngineRollouts))
        model.learn(n_tokens, callback=step, reset_num_timesteps=False)
        seconds = time.perf_counter() - start, time.process_time() + cpu_of(pid) - cpu
        return seconds[0] / n_tokens, seconds[1] / n_tokens

    learned(ahead), learned(plain)
    return as_row(
        f"iterations with texts written ahead, equal lengths of {work.new_tokens} tokens, 1 epoch, against without",
        [(learned(ahead), learned(plain)) for _ in range(settings.n_pairs)],
    )


def as_row(claim: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> Row:
    """Return the row of pairs of seconds per token, by wall clock and by CPU time."""
    ratios = [theirs[0] / ours[0] for ours, theirs in pairs]
    sides = []
    for side in zip(*pairs, strict=True):
        wall, cpu = (statistics.median(seconds) for seconds in zip(*side, strict=True))
        sides.append(f"{1 / wall:,.0f} tokens/s ({1000 * cpu:.2f} s)")
    return Row(claim, *sides, statistics.median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}", "-", None)


def timed(model: PPO, pid: int) -> tuple[float, float]:
    """Return the seconds of a rollout per token, by wall clock and by the CPU time of both processes."""
    model._n_updates += 1  # PPO.train counts updates here; a new count makes `EngineRollouts` send the weights
    start, cpu = time.perf_counter(), time.process_time() + cpu_of(pid)
    n_tokens = rollout(model)
    seconds = time.perf_counter() - start, time.process_time() + cpu_of(pid) - cpu
    return seconds[0] / n_tokens, seconds[1] / n_tokens


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that another process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_script(__doc__, measure)
