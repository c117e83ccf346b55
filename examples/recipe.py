"""Shared parts of the longer examples: stages that are skipped once finished, and a PPO run that resumes.

python examples/recipe.py runs nothing by itself: see examples/reviews.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import Checkpoints, EpisodeMetrics, RewardCurves, latest_checkpoint, load_checkpoint


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all: a stage whose file exists is taken for finished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """End with an error if the folder holds a run with other settings."""
    file = out / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{out} holds a run with other settings, {file.read_text()}: give another --out.")
    write(file, json.dumps(settings))


def read_data(read: Callable[..., Any], data: str | Path) -> Any:
    """Return the data that a task's reader finds in --data, or end with a line that says what is wrong."""
    try:
        return read(data)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from error


def stage(file: Path, run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a stage and write its result to `file`, unless an earlier run has finished it."""
    if file.is_file():
        print(f"{file.stem}: found in {file.parent}")
    else:
        start = time.process_time()
        result = run(*args)
        write(file, json.dumps({**result, "cpu_seconds": round(time.process_time() - start)}, indent=1) + "\n")
    figures = json.loads(file.read_text(encoding="utf-8"))
    print(f"{file.stem}: {figures}")
    return figures


def train(model: PPO, n_tokens: int, out: Path, title: str, callbacks: Sequence[BaseCallback]) -> None:
    """Train up to `n_tokens` in all, from the last checkpoint if there is one; draw the curves from there on."""
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
        print(f"PPO: continues from {checkpoint}")
    done = model.num_timesteps
    if done < n_tokens:
        curves = RewardCurves(out / "curves.png", title=title)
        all_callbacks = [*callbacks, EpisodeMetrics(), curves, Checkpoints(out / "checkpoints", every=10)]
        model.learn(n_tokens - done, callback=all_callbacks, progress_bar=True, reset_num_timesteps=done == 0)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
