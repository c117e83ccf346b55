"""A run's rows and samples in W&B or trackio, whose packages are alike, and in MLflow."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from textenv.extras import check_extra, needs
from textenv.json_files import read_json
from textenv.signatures import check_arguments
from textenv.trust import Trust

from .config import Named, TrainConfig
from .files import write_text
from .refusal import CommandError
from .run_folder import RunFolder

# With the arguments that a configuration may give: others say where the figures go, and keys of the user with them.
TRACKERS = {
    "wandb": ("project", "entity", "group", "job_type", "tags", "notes", "mode"),
    "trackio": ("project", "group"),
    "mlflow": ("experiment_name", "tags"),
}
EXPERIMENT = "textenv"
MLFLOW_NAME = re.compile(r"[^\w\-. :/]", flags=re.ASCII)  # what it refuses in the name of a figure
MLFLOW_CHARS = 6000  # of the value of a parameter
MLFLOW_PARAMETERS = 100  # in one call

Row = dict[str, Any]


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
        with needs(named.id, named.id, "the logger of that name"):
            self.module: Any = importlib.import_module(named.id)
        own = _own_name(run)
        options = {"project": EXPERIMENT, "name": own, "config": asdict(config), "resume": "allow"}
        if named.id == "wandb":
            options["id"] = own
        options |= named.args
        check_arguments(self.module.init, options, f"the logger {named.id!r}")
        self.module.init(**options)

    def row(self, row: Row) -> None:
        """Send an iteration's figures."""
        if row["tokens"] > self.sent:
            self.module.log(_figures(row), step=row["tokens"])

    def samples(self, rows: Sequence[Row]) -> None:
        """Send samples as a table."""
        if rows[0]["tokens"] > self.sent:
            table = _columns(rows)
            data = [list(row) for row in zip(*table.values(), strict=True)]
            self.module.log({"samples": self.module.Table(columns=list(table), data=data)}, step=rows[0]["tokens"])

    def close(self) -> None:
        """Say that the run is over."""
        self.module.finish()


class MLflowTracker:
    """Sends rows as metrics, samples as the table `samples.json` and the configuration as parameters to MLflow.

    Its store is a SQLite file in the run's folder, and its artifacts lie beside it, unless `tracking_uri` or the
    environment variable MLFLOW_TRACKING_URI says otherwise. The id of its run is kept in `mlflow.json`, by which a
    resumed run goes on there. A character that MLflow has no room for in a name becomes "_".

    Args:
        named: "mlflow", and as arguments `tracking_uri`, `experiment_name` and those of `MlflowClient.create_run`.
        run: The run's folder.
        config: The run's configuration.
        sent: The tokens up to which it has been told all.

    Raises:
        ImportError: If the package is missing.
    """

    def __init__(self, named: Named, run: RunFolder, config: TrainConfig, sent: int = -1) -> None:
        check_tracker(named.id)
        self.sent = sent
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with needs("mlflow", "mlflow", "the logger of that name"):
            self.mlflow: Any = importlib.import_module("mlflow")
        options = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI"), "run_name": _own_name(run), **named.args}
        experiment, address = options.pop("experiment_name", EXPERIMENT), options.pop("tracking_uri")
        place = None if address else (run.path / "mlflow").resolve().as_uri()
        self.client = self.mlflow.MlflowClient(address or f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
        check_arguments(self.client.create_run, {"experiment_id", *options}, "the logger 'mlflow'")
        kept = run.path / "mlflow.json"
        if kept.is_file():
            self.run_id = read_json(kept, {"run_id": str})["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            found = self.client.get_experiment_by_name(experiment)
            number = self.client.create_experiment(experiment, place) if found is None else found.experiment_id
            self.run_id = self.client.create_run(number, **options).info.run_id
            parameters = [
                self.mlflow.entities.Param(MLFLOW_NAME.sub("_", key), str(value)[:MLFLOW_CHARS])
                for key, value in _flat(asdict(config)).items()
            ]
            for start in range(0, len(parameters), MLFLOW_PARAMETERS):
                self.client.log_batch(self.run_id, params=parameters[start : start + MLFLOW_PARAMETERS])
            write_text(kept, json.dumps({"run_id": self.run_id}) + "\n")

    def row(self, row: Row) -> None:
        """Send an iteration's figures."""
        if row["tokens"] <= self.sent:
            return
        now, step = int(time.time() * 1000), row["tokens"]
        metric = self.mlflow.entities.Metric
        figures = [metric(MLFLOW_NAME.sub("_", name), value, now, step) for name, value in _figures(row).items()]
        self.client.log_batch(self.run_id, metrics=figures)

    def samples(self, rows: Sequence[Row]) -> None:
        """Append samples to the table."""
        if rows[0]["tokens"] > self.sent:
            self.client.log_table(self.run_id, _columns(rows), "samples.json")

    def close(self) -> None:
        """Say that the run is over."""
        self.client.set_terminated(self.run_id)


def check_tracker_arguments(named: Named, trust: Trust) -> None:
    """Raise CommandError for arguments of a tracker that only a configuration which is trusted may give."""
    others = sorted(named.args.keys() - set(TRACKERS[named.id]), key=str)
    if others and named.id not in trust.modules:
        raise CommandError(
            f"Expected the arguments {', '.join(TRACKERS[named.id])} of the logger {named.id!r}, got {others}, which "
            f"may send figures and keys anywhere: if you trust the configuration, add --allow {named.id}."
        )


def check_tracker(name: str) -> None:
    """Raise ImportError, with the cure, where the package of a tracker is missing."""
    check_extra(name, name, "the logger of that name")


def _own_name(run: RunFolder) -> str:
    """Return what the run is called: other runs of the project may have a folder of the same name."""
    started = re.sub(r"\D", "", run.read_about()["started"][:19])
    return f"{run.path.resolve().name}-{started}"


def _figures(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "tokens" and value == value}


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return samples by column: all three trackers take plain lists, so that none needs pandas from here."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "parts"}


def _flat(values: Mapping[str, Any], above: str = "") -> Row:
    """Return what is in a configuration by dotted key."""
    found: Row = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
