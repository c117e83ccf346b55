"""All benchmarks in turn, printed as one table.

    python benchmarks/run.py [--quick] [--smoke] [--device cuda] [--model FOLDER] [--json FILE]

A benchmark that raises becomes a row that says so, and the exit code is 1. `README.md` explains the rows.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from work import Row, Settings, arguments, finish, prepare, settings

SCRIPTS = (
    *("rollout", "update", "iteration", "adapters", "masks", "late_scores", "overhead", "memory", "growth"),
    *("feedback", "groups", "grpo"),
)
LIBRARIES = ("torch", "transformers", "stable-baselines3", "gymnasium", "numpy")


def main() -> int:
    """Run all scripts in turn, and print one table."""
    args = arguments(__doc__).parse_args()
    prepare()
    rows: list[Row] = []
    failed = False
    for name in SCRIPTS:
        start = time.perf_counter()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        try:
            rows += measure(name, settings(args))
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        except Exception as error:
            traceback.print_exc()
            rows.append(Row.missing(name, f"raised {describe(error)}", "-"))
            failed = True
    print(header(args.device), end="\n\n")
    finish(rows, args.json)
    return int(failed)


def measure(name: str, settings: Settings) -> list[Row]:
    """Measure the rows of one script, or say that it is not there."""
    if not Path(__file__).with_name(f"{name}.py").is_file():
        return [Row.missing(name, f"no {name}.py here", "-")]
    return importlib.import_module(name).measure(settings)


def describe(error: Exception) -> str:
    """Return an error in a table's cell."""
    return f"{type(error).__name__}: {error}".replace("|", "/").replace("\n", " ")[:200]


def header(device: str) -> str:
    """Return commit, versions and machine in a line."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    machine = f"{os.cpu_count()} cores of {processor()}, {torch.get_num_threads()} thread"
    if device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    return f"Commit {commit()}; Python {platform.python_version()}, {versions}; {machine}."


def commit() -> str:
    """Return the short hash of the commit, where this is a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Return the model of the CPU; Linux alone says more than the architecture."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
