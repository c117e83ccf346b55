"""The gain of several processes: the same script on 1, 2 and 4 of them, each with its share of the lanes.

    python benchmarks/scale.py [--processes 1 2 4] [--weights copies sharded lock-step] [--iterations 3]
                               [--reference] [--device cuda] [--smoke] [--json FILE]

On a CPU (gloo) each process has one thread, so that there is nothing to gain beyond the cores that are free; on CUDA
(NCCL) each has a GPU. One iteration comes first and is not counted. `schedule.py` compares the rows with a simulation.
Columns:

- tokens/s: of all processes, rollout and update, by wall clock; speed-up and efficiency are against one process.
- CPU: process-CPU seconds of all processes per token, over those of one process: the cost of being several, which
  shows where cores are not free, too.
- rollout: its share of the wall time.
- kept: weights and optimizer of one process, in MB.
- moved a step: the bytes that one process sends in an optimizer step by rings, in units of (W - 1) / W times the bytes
  of the trained weights: 2 for an all-reduce of gradients; 3 with shards, which gather weights twice and
  reduce-scatter gradients. Beside it, on Linux and a CPU: all bytes of the loopback device, rollouts included, per
  process and step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from work import Settings, prepare

from agents import KLPenalty, Sharded
from agents.distributed.collectives import gather
from agents.distributed.sharding import local

LANES = 64
WAYS: dict[str, dict[str, bool] | None] = {"copies": None, "sharded": {"gather": True}, "lock-step": {"gather": False}}


class TimedPenalty(KLPenalty):
    """A penalty that notes how many processor seconds its reference has taken, from the second rollout on."""

    def __init__(self) -> None:
        super().__init__(0.05)
        self.n_calls, self.used = 0, 0.0

    def __call__(self, buffer: Any) -> None:
        """Read the reference."""
        start = time.process_time()
        super().__call__(buffer)
        self.n_calls += 1
        if self.n_calls > 1:
            self.used += time.process_time() - start


class Clock(BaseCallback):
    """A callback that times rollouts and whole iterations, from the second one on."""

    def _on_training_start(self) -> None:
        self.rollouts, self.rollout_seconds, self.rollout_used = 0, 0.0, 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.rollouts == 1:
            self.start, self.cpu_start, self.lo_start = time.perf_counter(), time.process_time(), loopback()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def _on_rollout_end(self) -> None:
        if self.rollouts > 0:
            self.rollout_seconds += time.perf_counter() - self.began
            self.rollout_used += time.process_time() - self.cpu_began
        self.rollouts += 1


def iteration(model: PPO, tokens: int, n_iterations: int) -> dict[str, Any]:
    """Return the processor seconds of an iteration of one process by phase, as `schedule.Costs` names them."""
    clock, penalty = Clock(), TimedPenalty()
    model.learn((1 + n_iterations) * tokens, callback=[clock, penalty], log_interval=None)
    used, n_steps = time.process_time() - clock.cpu_start, model.n_epochs * (tokens // model.batch_size)
    return {
        "rollout": (clock.rollout_used - penalty.used) / n_iterations,
        "reference": penalty.used / n_iterations,
        "step": (used - clock.rollout_used) / n_iterations / n_steps,
        "n_steps": n_steps,
    }


def loopback() -> int:
    """Return the bytes that the loopback device has received, or 0 without /proc/net/dev."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def work(settings: Settings, n_iterations: int, weights: str, with_reference: bool = False) -> dict[str, Any]:
    """Train for some iterations; return the figures of all processes, which rank 0 collects."""
    prepare()
    job = settings.work(n_lanes=8 if settings.smoke else LANES)
    options = WAYS[weights]
    shard = None if options is None else Sharded(**options, device=settings.device)
    model, clock = job.agent(policy_kwargs={"shard": shard}), Clock()
    tokens = job.n_lanes * job.new_tokens
    callbacks = [clock, KLPenalty(0.05)] if with_reference else [clock]
    model.learn((1 + n_iterations) * tokens, callback=callbacks, log_interval=None)
    seconds = gather("the time", time.perf_counter() - clock.start)
    steps = n_iterations * model.n_epochs * (tokens // model.batch_size)
    size = len(seconds)
    trained = [weight for weight in model.policy.parameters() if weight.requires_grad]
    moments = [moment for state in model.policy.optimizer.state.values() for moment in state.values()]
    return {
        "processes": size,
        "weights": weights,
        "kept": n_bytes([local(tensor) for tensor in (*trained, *moments)]),
        "seconds": max(seconds) / n_iterations,
        "tokens_per_second": n_iterations * tokens / max(seconds),
        "cpu_per_token": sum(gather("CPU time", time.process_time() - clock.cpu_start)) / (n_iterations * tokens),
        "rollout_share": clock.rollout_seconds / max(seconds),
        "moved": (2 if shard is None else 3) * (size - 1) / size * n_bytes(trained),
        "seen": (loopback() - clock.lo_start) / size / steps,
    }


def n_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def launch(script: str, n: int, words: list[str]) -> dict[str, Any]:
    """Run a script in `n` processes and return what the first one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        start = command if n > 1 else [sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, script, *words, "--result", str(result)], check=True, env=environment)
        return json.loads(result.read_text(encoding="utf-8"))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| processes | weights | tokens/s | speed-up | efficiency | CPU | rollout | kept | moved a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        gain = row["tokens_per_second"] / first["tokens_per_second"]
        cost = row["cpu_per_token"] / first["cpu_per_token"]
        lines.append(
            f"| {row['processes']} | {row['weights']} | {row['tokens_per_second']:,.0f} | {gain:.2f} | "
            f"{gain * first['processes'] / row['processes']:.0%} | {cost:.2f} | "
            f"{row['rollout_share']:.0%} | {row['kept'] / 1e6:.1f} MB | "
            f"{row['moved'] / 1e6:.1f} MB ({row['seen'] / 1e6:.1f} seen) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each number of processes in turn, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="their numbers (default: 1 2 4)")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=list(WAYS),
        choices=list(WAYS),
        help="how several processes hold them (default: each way in turn)",
    )
    parser.add_argument("--iterations", type=int, default=3, help="rollouts and updates that are timed (default: 3)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the models run (default: cpu)")
    parser.add_argument("--reference", action="store_true", help="with the divergence from a reference")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # given to the processes that this one starts
    args = parser.parse_args()
    if args.result is not None:
        row = work(Settings(1, args.device, args.smoke), args.iterations, args.weights[0], args.reference)
        if os.environ.get("RANK", "0") == "0":
            args.result.write_text(json.dumps(row), encoding="utf-8")
        return
    flags = [f"--{name}" for name in ("smoke", "reference") if getattr(args, name)]
    words = [f"--iterations={args.iterations}", f"--device={args.device}", *flags]
    n_devices = torch.cuda.device_count() if args.device == "cuda" else max(args.processes)
    if n_devices < max(args.processes):  # NCCL refuses two processes on one GPU
        parser.error(f"expected a GPU for each of {max(args.processes)} processes, got {n_devices}: fewer --processes")
    kinds = [(n, way) for n in args.processes for way in (args.weights if n > 1 else ["copies"])]
    rows = [launch(__file__, n, [*words, f"--weights={way}"]) for n, way in kinds]
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
