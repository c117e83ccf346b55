"""A run's rows and samples in W&B or trackio, whose packages are alike."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
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
        run: The run's folder, after which it is called; a resumed run goes on there too.
        config: What it shows as the run's configuration.
        sent: The tokens up to which it has been told all; a resumed run makes some rows again, the same.

    Raises:
        ImportError: If the package is missing.
    """

    def __init__(self, named: Named, run: RunFolder, config: TrainConfig, sent: int = -1) -> None:
        check_tracker(named.id)
        self.sent = sent
        os.environ.setdefault("TRACKIO_DIR", str(run.path / "trackio"))
        os.environ.setdefault("WANDB_DIR", str(run.path))
        self.module: Any = importlib.import_module(named.id)
        started = re.sub(r"\D", "", run.read_about()["started"][:19])
        own = f"{run.path.resolve().name}-{started}"  # other runs of the project may have a folder of the same name
        options = {"project": "textenv", "name": own, "config": asdict(config), "resume": "allow"}
        if named.id == "wandb":
            options["id"] = own
        self.module.init(**{**options, **named.args})

    def row(self, row: dict[str, Any]) -> None:
        """Send an iteration's figures."""
        if row["tokens"] <= self.sent:
            return
        values = {name: value for name, value in row.items() if name != "tokens" and value == value}
        self.module.log(values, step=row["tokens"])

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Send samples as a table."""
        if rows[0]["tokens"] <= self.sent:
            return
        table = pandas.DataFrame([{key: value for key, value in row.items() if key != "parts"} for row in rows])
        self.module.log({"samples": self.module.Table(dataframe=table)}, step=rows[0]["tokens"])

    def close(self) -> None:
        """Say that the run is over."""
        self.module.finish()


def check_tracker(name: str) -> None:
    """Raise ImportError, with the cure, where the package of a tracker is missing."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"Expected {name} for the logger of that name: pip install 'textenv[{name}]'.")
