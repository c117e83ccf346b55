"""A simulation of the schedule of several processes: rollout, reward, reference, update and traffic.

    python benchmarks/schedule.py calibrate --json costs.json [--processes 1 2 4] [--smoke]
    python benchmarks/scale.py --weights copies --reference --json rows.json
    python benchmarks/schedule.py check costs.json rows.json --cores 2

`calibrate` measures, in processor seconds, the share of the work that one of W processes has, and the traffic of W
processes. W copies of the share run at once, without a word to each other: on one chip they share caches and the
memory's bandwidth, and so each is slower than it would be by itself. The simulation puts W such processes on the cores,
which they share equally, and lets each wait for the others where training does. `check` compares the seconds of an
iteration with those that `scale.py` has measured on free cores, and ends with 1 if they are more than a fifth apart.
Processor seconds are compared as well. `calibrate` needs the same cores free as `scale.py`. `scale_on_paper.py` runs
the same simulation with computed costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scale import LANES, iteration, launch, n_bytes
from work import Settings, prepare

from agents import is_main_process
from agents.distributed.collectives import gather

TOLERANCE = 0.2  # the largest difference from a measurement, as a share of it
N_ROUNDS = 20  # of traffic, measured together


@dataclass(frozen=True)
class Costs:
    """What each of W processes does in an iteration, in seconds of one core or GPU.

    Attributes:
        rollout: Decoding, with the prompts' tokens.
        reward: The reward.
        reference: The reading of the rollout by the reference.
        step: An optimizer step, with forward and backward.
        n_steps: The number of optimizer steps.
        meeting: An agreement about a few numbers.
        traffic: The gradients or shards of an optimizer step.
        gathering: The gathering of shards for the rollout.
        is_sent_by_core: Whether traffic takes a core (gloo), not a link beside it (NCCL).
    """

    rollout: float
    step: float
    n_steps: int
    reward: float = 0.0
    reference: float = 0.0
    meeting: float = 0.0
    traffic: float = 0.0
    gathering: float = 0.0
    is_sent_by_core: bool = False


@dataclass(frozen=True)
class Task:
    """A piece of a process's schedule: seconds on a core or beside it, which begin when all processes are there."""

    phase: str
    seconds: float
    needs_core: bool = True
    waits_for_all: bool = False


def schedule(costs: Costs, slowness: float = 1.0) -> Iterator[Task]:
    """Yield the tasks of one iteration; `slowness` stretches this process's rollout and reward."""
    beside: dict[str, bool] = {"needs_core": costs.is_sent_by_core, "waits_for_all": True}
    yield Task("traffic", costs.gathering, **beside)
    yield Task("rollout", costs.rollout * slowness)
    yield Task("reward", costs.reward * slowness)
    yield Task("reference", costs.reference)
    yield Task("meeting", costs.meeting, **beside)  # about the advantages
    for _ in range(costs.n_steps):
        yield Task("update", costs.step)
        yield Task("meeting", costs.meeting, **beside)
        yield Task("traffic", costs.traffic, **beside)
    yield Task("meeting", costs.meeting, **beside)  # about the log; nobody begins the next rollout before


def simulate(costs: Costs, size: int, cores: float, slowness: Sequence[float] | None = None) -> dict[str, float]:
    """Return the seconds of an iteration by phase, of the process that ends last, with its waits and their sum.

    Args:
        costs: What each process does.
        size: The number of processes.
        cores: The number of cores, which running processes share equally; one each if there are enough.
        slowness: By process, the factor of its rollout and reward; 1 for each by default.

    Example:
        >>> costs = Costs(rollout=2.0, step=1.0, n_steps=2, traffic=0.5)
        >>> simulate(costs, size=2, cores=2)["seconds"], simulate(costs, size=2, cores=1)["seconds"]
        (5.0, 9.0)
    """
    queues = [list(schedule(costs, factor)) for factor in (slowness or [1.0] * size)]
    left = [0.0] * size  # seconds of the task that a process is in
    current: list[Task | None] = [None] * size
    spent: list[dict[str, float]] = [{} for _ in range(size)]
    now, ends = 0.0, [0.0] * size
    while True:
        # All have the same tasks, so that all wait for all at the same one.
        at_meeting = all(current[r] is None and queues[r] and queues[r][0].waits_for_all for r in range(size))
        for r in range(size):
            if current[r] is None and queues[r] and (at_meeting or not queues[r][0].waits_for_all):
                current[r] = queues[r].pop(0)
                left[r] = current[r].seconds
        running = [r for r in range(size) if current[r] is not None]
        if not running:
            break
        n_on_core = sum(current[r].needs_core for r in running)
        speed = {r: min(1.0, cores / n_on_core) if current[r].needs_core else 1.0 for r in running}
        passed = min(left[r] / speed[r] for r in running)
        now += passed
        for r in range(size):
            task = current[r]
            phase = "waits" if task is None else task.phase
            if task is not None or queues[r]:
                spent[r][phase] = spent[r].get(phase, 0.0) + passed
            if task is not None:
                left[r] -= passed * speed[r]
                if left[r] <= 1e-12:
                    current[r], ends[r] = None, now
    last = max(range(size), key=ends.__getitem__)
    return {**spent[last], "seconds": now}


def share_of_work(smoke: bool, size: int) -> dict[str, Any]:
    """Measure the share of one of `size` processes in processor seconds; return it with the bytes of its gradients."""
    prepare()
    settings = Settings(1 if smoke else 2, "cpu", smoke)
    lanes = 8 if smoke else LANES
    job = settings.work(n_lanes=lanes // size)
    batch_size = settings.work(n_lanes=lanes).agent().batch_size // size
    model = job.agent(batch_size=batch_size)
    portions = iteration(model, job.n_lanes * job.new_tokens, settings.n_pairs)
    return {**portions, "n_bytes": n_bytes([weight for weight in model.policy.parameters() if weight.requires_grad])}


def shares_at_once(smoke: bool, size: int) -> dict[str, Any]:
    """Run `share_of_work` in `size` processes at once; return the means of what they measure."""
    words = [sys.executable, __file__, "share", str(size), *(["--smoke"] if smoke else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    copies = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(size)]
    printed = [copy.communicate()[0] for copy in copies]
    if any(copy.returncode for copy in copies):
        sys.exit("A share of the work could not be measured: its error is above.")
    shares = [json.loads(text.splitlines()[-1]) for text in printed]
    return {name: statistics.mean(share[name] for share in shares) for name in shares[0]}


def measure_traffic(n_bytes: int) -> dict[str, float]:
    """Return the processor seconds of this process for an all-reduce of its gradients, and for an agreement."""
    prepare()
    gradients = torch.ones(n_bytes // 4)
    gather("ready", None)
    results = {}
    for name, call in (("traffic", lambda: dist.all_reduce(gradients)), ("meeting", lambda: gather("a meeting", None))):
        call()
        start = time.process_time()
        for _ in range(N_ROUNDS):
            call()
        results[name] = max(gather(name, (time.process_time() - start) / N_ROUNDS))
    return results


def calibrate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the costs for each number of processes."""
    rows = []
    for size in args.processes:
        portions = shares_at_once(args.smoke, size)
        portions["n_steps"], sent_bytes = round(portions["n_steps"]), round(portions.pop("n_bytes"))
        sent = launch(__file__, size, ["traffic", str(sent_bytes)]) if size > 1 else {}
        rows.append({"processes": size, **asdict(Costs(**portions, **sent, is_sent_by_core=True))})
    return rows


def compare(costs: list[dict[str, Any]], measured: list[dict[str, Any]], cores: float) -> tuple[str, bool]:
    """Return a table of simulated and measured iterations, and whether they are within `TOLERANCE` everywhere."""
    lines = [
        "| processes | simulated | measured | simulated / measured | rollout, simulated | rollout, measured "
        "| processor seconds, simulated / measured |",
        "|---|---|---|---|---|---|---|",
    ]
    by_size = {row["processes"]: Costs(**{key: row[key] for key in row if key != "processes"}) for row in costs}
    is_close = True
    for row in measured:
        if row["weights"] != "copies" or row["processes"] not in by_size:
            continue
        result = simulate(by_size[row["processes"]], row["processes"], cores)
        own = (result["rollout"] + result.get("reward", 0.0) + result.get("reference", 0.0)) / result["seconds"]
        # On one core, all that the processes do comes one after the other.
        used = simulate(by_size[row["processes"]], row["processes"], 1)["seconds"]
        measured_use = row["cpu_per_token"] * row["tokens_per_second"] * row["seconds"]
        ratio = result["seconds"] / row["seconds"]
        is_close &= abs(ratio - 1) <= TOLERANCE
        lines.append(
            f"| {row['processes']} | {result['seconds']:.2f} s | {row['seconds']:.2f} s | {ratio:.2f} | {own:.0%} "
            f"| {row['rollout_share']:.0%} | {used / measured_use:.2f} |"
        )
    return "\n".join(lines), is_close and len(lines) > 2


def main() -> None:
    """Calibrate, check, or be one of the processes whose traffic is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("calibrate", help="measure what each of several processes does")
    verb.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="their numbers (default: 1 2 4)")
    verb.add_argument("--smoke", action="store_true", help="a tiny model: only to see that it runs")
    verb.add_argument("--json", type=Path, required=True, help="write the costs to this file")
    verb = verbs.add_parser("check", help="compare the simulation with measurements of scale.py")
    verb.add_argument("costs", type=Path, help="the file that calibrate has written")
    verb.add_argument("rows", type=Path, help="the file that scale.py has written")
    verb.add_argument("--cores", type=float, default=os.cpu_count(), help="cores that were free (default: all)")
    verb = verbs.add_parser("share")  # of the processes that calibrate starts, as is the next
    verb.add_argument("size", type=int)
    verb.add_argument("--smoke", action="store_true")
    verb = verbs.add_parser("traffic")
    verb.add_argument("n_bytes", type=int)
    verb.add_argument("--result", type=Path)
    args = parser.parse_args()
    if args.verb == "calibrate":
        rows = calibrate(args)
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows, indent=1))
    elif args.verb == "check":
        table, is_close = compare(*(json.loads(path.read_text()) for path in (args.costs, args.rows)), args.cores)
        print(table)
        sys.exit(0 if is_close else 1)
    elif args.verb == "share":
        print(json.dumps(share_of_work(args.smoke, args.size)))
    else:
        result = measure_traffic(args.n_bytes)
        if is_main_process():
            args.result.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
