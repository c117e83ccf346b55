"""A run's rows and samples in W&B or trackio, whose packages are alike."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas

from .config import Named, TrainConfig
from .run_folder import RunFolder

TRACKERS = ("wandb", "trackio")


class Tracker:
    """Sends each row and each table of samples; what it writes on the disk goes into the run's folder.

    Args:
        named: "wandb" or "trackio", and other arguments of its `init`, as `project` or `mode`.
        run: The run's folder, after which it is called.
        config: What it shows as the run's configuration.

    Raises:
        ImportError: If the package is missing.
    """

    def __init__(self, named: Named, run: RunFolder, config: TrainConfig) -> None:
        check_tracker(named.id)
        os.environ.setdefault("TRACKIO_DIR", str(run.path / "trackio"))
        os.environ.setdefault("WANDB_DIR", str(run.path))
        self.module: Any = importlib.import_module(named.id)
        self.module.init(**{"project": "textenv", "name": run.path.name, "config": asdict(config), **named.args})

    def row(self, row: dict[str, Any]) -> None:
        """Send an iteration's figures."""
        values = {name: value for name, value in row.items() if name != "tokens" and value == value}
        self.module.log(values, step=row["tokens"])

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Send samples as a table."""
        table = pandas.DataFrame([{key: value for key, value in row.items() if key != "parts"} for row in rows])
        self.module.log({"samples": self.module.Table(dataframe=table)}, step=rows[0]["tokens"])

    def close(self) -> None:
        """Say that the run is over."""
        self.module.finish()


def check_tracker(name: str) -> None:
    """Raise ImportError, with the cure, where the package of a tracker is missing."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"Expected {name} for the logger of that name: pip install 'textenv[{name}]'.")
