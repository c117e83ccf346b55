"""The cost of a rollout that an engine in a second process writes, against the policy's own.

    python benchmarks/engine.py [--quick] [--device cuda] [--smoke] [--json FILE]

The same work, weights and lanes, in turns. The engine is a `LocalEngine`, which decodes as the policy does and so gains
nothing: the difference is the cost of the seam, which is sending new weights before each rollout, texts written ahead
that no lane takes, and one forward per sequence at the end. tokens/s are by wall clock; in brackets the CPU seconds of
both processes per 1,000 tokens. `ratio` is the engine's tokens per second over the policy's own.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from rollout import CAP, MEAN
from stable_baselines3 import PPO
from work import Row, Settings, Work, rollout, run_script

from agents import EngineRollouts, LocalEngine


def measure(settings: Settings) -> list[Row]:
    """Measure both rows."""
    work = settings.work()
    ragged = settings.work(new_tokens=CAP)
    stop_ids = list(range(1, max(2, ragged.vocab_size // MEAN)))
    with LocalEngine(ragged.config(), ragged.vocab_size, device=settings.device, n_rows=work.n_lanes) as engine:
        pid = engine._process.pid
        assert pid is not None, "started"
        claim = f"equal lengths, {work.new_tokens} tokens an episode and a rollout"
        rows = [row(claim, engine, pid, settings, work, [], work.new_tokens)]
        claim = f"ended by EOS (mean {MEAN}, cap {ragged.new_tokens}), rollouts of {2 * ragged.new_tokens} steps"
        return [*rows, row(claim, engine, pid, settings, ragged, stop_ids, 2 * ragged.new_tokens)]


def row(
    claim: str, engine: LocalEngine, pid: int, settings: Settings, work: Work, stop_ids: list[int], n_steps: int
) -> Row:
    """Alternate rollouts by the engine and by the policy, after one warm-up of each; return the row."""
    own, written = (work.agent(stop_ids=stop_ids, n_steps=n_steps) for _ in range(2))
    EngineRollouts(engine).attach(written)
    timed(written, pid), timed(own, pid)
    pairs = [(timed(written, pid), timed(own, pid)) for _ in range(settings.n_pairs)]
    ratios = [theirs[0] / ours[0] for ours, theirs in pairs]
    sides = []
    for side in zip(*pairs, strict=True):
        wall, cpu = (statistics.median(seconds) for seconds in zip(*side, strict=True))
        sides.append(f"{1 / wall:,.0f} tokens/s ({1000 * cpu:.2f} s)")
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    return Row(f"rollout by an engine, {claim}, against its own", *sides, statistics.median(ratios), spread, "-", None)


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
