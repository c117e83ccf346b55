"""Trackers: a run's rows and samples in W&B or trackio, which share an interface, or in MLflow."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from textenv.checks.extras import check_extra, needs
from textenv.checks.json_files import read_json
from textenv.checks.signatures import check_arguments
from textenv.checks.trust import Trust

from ..configuration.config import Named, TrainConfig
from ..errors import CommandError
from ..files import write_text
from .folder import AGGREGATION, RunFolder

# By tracker: the arguments that any configuration may have. Others could send figures and API keys to another server.
TRACKERS = {
    "wandb": ("project", "entity", "group", "job_type", "tags", "notes", "mode"),
    "trackio": ("project", "group"),
    "mlflow": ("experiment_name", "tags"),
}
EXPERIMENT = "textenv"
# MLflow's limits, from `mlflow.utils.validation`.
MLFLOW_NAME = re.compile(r"[^\w\-. :/]", flags=re.ASCII)  # characters that a metric's name may not have
MLFLOW_CHARS = 6000  # the longest value of a parameter
MLFLOW_PARAMETERS = 100  # the most parameters in one call

Row = dict[str, Any]


class Tracker:
    """A run of W&B or trackio, which receives each row and each table of samples; its files go into the run's folder.

    Args:
        named: "wandb" or "trackio", with further arguments of its `init` such as `project` or `mode`.
        run: The run's folder, which gives it its name; a resumed run continues it.
        config: The run's configuration.
        sent: The number of tokens up to which it has all rows: a resumed run makes some rows again, which are not sent
            twice.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If its `init` does not take an argument.
    """

    def __init__(self, named: Named, run: RunFolder, config: TrainConfig, sent: int = -1) -> None:
        check_tracker(named.id)
        self.sent = sent
        # Both packages read their folder from the environment, where a user's own value stays.
        os.environ.setdefault("TRACKIO_DIR", str(run.path / "trackio"))
        os.environ.setdefault("WANDB_DIR", str(run.path))
        with needs(named.id, named.id, "the logger of that name"):
            self.module: Any = importlib.import_module(named.id)
        name = _unique_name(run)
        options = {"project": EXPERIMENT, "name": name, "config": asdict(config), "resume": "allow"}
        if named.id == "wandb":
            options["id"] = name  # W&B resumes by the id, trackio by the name
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
        """End the tracker's run."""
        self.module.finish()


class MLflowTracker:
    """A run of MLflow: rows become metrics, samples a table `samples.json`, and the configuration parameters.

    MLflow's store is a SQLite file in the run's folder, with its artifacts beside it, unless `tracking_uri` or the
    environment variable MLFLOW_TRACKING_URI names another. The id of MLflow's run is kept in `mlflow.json`, by which a
    resumed run continues it. Characters that MLflow does not allow in a name become "_".

    Args:
        named: "mlflow", with the arguments `tracking_uri`, `experiment_name` and those of `MlflowClient.create_run`.
        run: The run's folder.
        config: The run's configuration.
        sent: The number of tokens up to which it has all rows.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If `create_run` does not take an argument.
    """

    def __init__(self, named: Named, run: RunFolder, config: TrainConfig, sent: int = -1) -> None:
        check_tracker(named.id)
        self.sent = sent
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with needs("mlflow", "mlflow", "the logger of that name"):
            self.mlflow: Any = importlib.import_module("mlflow")
        options = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI"), "run_name": _unique_name(run), **named.args}
        experiment, address = options.pop("experiment_name", EXPERIMENT), options.pop("tracking_uri")
        artifacts = None if address else (run.path / "mlflow").resolve().as_uri()  # a server has a store of its own
        self.client = self.mlflow.MlflowClient(address or f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
        check_arguments(self.client.create_run, {"experiment_id", *options}, "the logger 'mlflow'")
        kept = run.path / "mlflow.json"
        if kept.is_file():
            self.run_id = read_json(kept, {"run_id": str})["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            known = self.client.get_experiment_by_name(experiment)
            number = self.client.create_experiment(experiment, artifacts) if known is None else known.experiment_id
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
        now, step = int(time.time() * 1000), row["tokens"]  # MLflow's timestamps are in milliseconds
        metric = self.mlflow.entities.Metric
        figures = [metric(MLFLOW_NAME.sub("_", name), value, now, step) for name, value in _figures(row).items()]
        self.client.log_batch(self.run_id, metrics=figures)

    def samples(self, rows: Sequence[Row]) -> None:
        """Append samples to the table."""
        if rows[0]["tokens"] > self.sent:
            self.client.log_table(self.run_id, _columns(rows), "samples.json")

    def close(self) -> None:
        """End the tracker's run."""
        self.client.set_terminated(self.run_id)


def check_tracker_arguments(named: Named, trust: Trust) -> None:
    """Check that a configuration gives a tracker no arguments that need `--allow`.

    Raises:
        CommandError: If it does, and the command line does not allow the tracker.
    """
    others = sorted(named.args.keys() - set(TRACKERS[named.id]), key=str)
    if others and named.id not in trust.modules:
        raise CommandError(
            f"Expected the arguments {', '.join(TRACKERS[named.id])} of the logger {named.id!r}, got {others}, which "
            f"may send figures and keys anywhere: if you trust the configuration, add --allow {named.id}."
        )


def check_tracker(name: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        ImportError: If it is not; the message has the cure.
    """
    check_extra(name, name, "the logger of that name")


def _unique_name(run: RunFolder) -> str:
    """Return the folder's name and the time of the run's start: the folders of two runs may have the same name."""
    started = re.sub(r"\D", "", run.read_about()["started"][:19])
    return f"{run.path.resolve().name}-{started}"


def _figures(row: Row) -> Row:
    """Return the figures of a row without NaN, which is the only value that differs from itself, and without names."""
    return {name: value for name, value in row.items() if name not in ("tokens", AGGREGATION) and value == value}


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return samples by column, as plain lists, which all three trackers take without pandas."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "parts"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Row:
    """Return the values of nested mappings by dotted key."""
    flat: Row = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
