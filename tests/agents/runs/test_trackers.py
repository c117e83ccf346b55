"""Trackers and TensorBoard: they get the rows and samples of each step once, after a resume too."""

import importlib.machinery
import json
import shutil
import sqlite3
import sys
import types
from collections import namedtuple
from types import SimpleNamespace

import pytest

from agents.configuration.config import Named, TrainConfig
from agents.runs.folder import RunFolder
from agents.runs.loggers import SamplePages
from agents.runs.trackers import MLflowTracker
from tests.helpers.command import ROLLOUT, rows, run, settings, start


class FakeTracker(types.ModuleType):
    """A stand-in with the functions that W&B and trackio share; it keeps all values that it is sent."""

    def __init__(self):
        super().__init__("trackio")
        self.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
        self.sent, self.names, self.is_over = [], [], False

    def init(self, project, name, config, resume, **more):
        self.names.append(name)
        self.config, self.more = config, more
        assert resume == "allow"

    def log(self, values, step):
        self.sent.append((step, values))

    def Table(self, columns, data):
        assert data and {len(row) for row in data} == {len(columns)}
        return columns

    def finish(self):
        self.is_over = True


@pytest.mark.slow
def test_a_tracker_gets_rows_and_samples_once(model, tmp_path, monkeypatch):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    words = settings(model, tmp_path / "run", rollouts=2, loggers="[{id: trackio, args: {space: mine}}]")
    assert run("train", *words, "--quiet") == 2, "it may send figures, and the user's keys, to any space"
    assert run("train", *words, "--allow=trackio", "--quiet") == 0
    assert tracker.more == {"space": "mine"} and tracker.config["seed"] == 0 and tracker.is_over
    figures = [(step, values["reward/task"]) for step, values in tracker.sent if "reward/task" in values]
    assert figures == [(row["tokens"], row["reward/task"]) for row in rows(tmp_path / "run")[1:]]
    tables = [step for step, values in tracker.sent if values.get("samples", [None])[0] == "tokens"]
    assert tables == [0, 2 * ROLLOUT]
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # so that the last iteration is repeated
    n_sent = len(tracker.sent)
    assert run("train", f"--resume={tmp_path / 'run'}", "--allow=trackio", "--quiet") == 0
    assert len(tracker.sent) == n_sent and len(set(tracker.names)) == 1 and len(tracker.names) == 2


class FakeMLflow(types.ModuleType):
    """A stand-in for the parts of MLflow that are called: module, client, store and run in one object."""

    Metric = namedtuple("Metric", ["key", "value", "timestamp", "step"])
    Param = namedtuple("Param", ["key", "value"])

    def __init__(self):
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.entities = self
        self.address, self.experiments, self.runs = None, {}, {}

    def MlflowClient(self, tracking_uri):
        self.address = tracking_uri
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location):
        self.experiments[name] = SimpleNamespace(experiment_id=str(len(self.experiments)), place=artifact_location)
        return self.experiments[name].experiment_id

    def create_run(self, experiment_id, run_name, tags=None):
        made = SimpleNamespace(name=run_name, status="RUNNING", metrics=[], params={}, tables=[], tags=tags)
        self.runs[f"run-{len(self.runs)}"] = made
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(self.runs) - 1}"))

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def set_terminated(self, run_id):
        self.runs[run_id].status = "FINISHED"

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[run_id].metrics += [(metric.step, metric.key, metric.value) for metric in metrics]
        self.runs[run_id].params |= dict(params)

    def log_table(self, run_id, data, artifact_file):
        assert artifact_file == "samples.json"
        self.runs[run_id].tables += [dict(zip(data, row)) for row in zip(*data.values())]


def begun(folder):
    run_folder = RunFolder.create(str(folder), "run")
    run_folder.begin("", "0")
    return run_folder


def sample(tokens, text="good", prompt="a film"):
    return {"tokens": tokens, "prompt": prompt, "text": text, "end_reason": "eos", "reward": 0.5, "parts": {"x": 0.5}}


def test_mlflow_gets_rows_and_samples_once_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    mlflow, folder, config = FakeMLflow(), begun(tmp_path / "run"), TrainConfig()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = MLflowTracker(Named("mlflow", {"tags": {"team": "mine"}}), folder, config)
    assert mlflow.address == f"sqlite:///{folder.path.resolve()}/mlflow.db"
    assert mlflow.experiments["textenv"].place == f"file://{folder.path.resolve()}/mlflow"
    names = {"train/aggregation": "token", "train/loss": float("nan")}  # a name and no number
    first.row({"tokens": 64, "reward/task": 0.5, "reward/a+b": 0.25, **names})
    first.samples([sample(64), sample(64, "bad")])
    # As if killed here: the resumed run repeats the rows up to 64, and later ones are new.
    again = MLflowTracker(Named("mlflow"), folder, config, sent=64)
    for tokens in (64, 128):
        again.row({"tokens": tokens, "reward/task": tokens / 128})
        again.samples([sample(tokens)])
    [(run_id, made)] = mlflow.runs.items()
    assert json.loads((folder.path / "mlflow.json").read_text())["run_id"] == run_id
    assert made.metrics == [(64, "reward/task", 0.5), (64, "reward/a_b", 0.25), (128, "reward/task", 1.0)]
    assert made.params["algorithm.n_envs"] == str(config.algorithm.n_envs) and made.params["seed"] == "0"
    assert made.tags == {"team": "mine"} and made.name.startswith("run-")
    assert [(row["tokens"], row["text"]) for row in made.tables] == [(64, "good"), (64, "bad"), (128, "good")]
    assert "parts" not in made.tables[0] and made.status == "RUNNING"
    again.close()
    assert made.status == "FINISHED"


def test_mlflow_goes_where_it_is_told(tmp_path, monkeypatch):
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    options = {"experiment_name": "mine"}
    MLflowTracker(Named("mlflow", options), begun(tmp_path / "a"), TrainConfig())
    assert mlflow.address == "http://there" and mlflow.experiments["mine"].place is None
    options["tracking_uri"] = "http://elsewhere"
    MLflowTracker(Named("mlflow", options), begun(tmp_path / "b"), TrainConfig())
    assert mlflow.address == "http://elsewhere" and len(mlflow.runs) == 2 and len(mlflow.experiments) == 1


def test_tensorboard_shows_samples_as_text_and_not_as_markup():
    written = []
    output = SimpleNamespace(write=lambda values, excluded, step: written.append((*values.items(), step)))
    hostile = "<script>|a|\n![x](http://y) *b* \x1b[31m"
    SamplePages(output).samples([sample(64), sample(64, hostile)])
    [((tag, page), step)] = written
    assert (tag, step) == ("samples", 64)
    lines = page.splitlines()
    assert lines[:3] == ["|prompt|text|end_reason|reward|", "|---|---|---|---|", "|a film|good|eos|0.5|"]
    assert lines[3] == (
        "|a film|&lt;script&gt;&#124;a&#124;<br>!&#91;x&#93;(http://y) &#42;b&#42; &#92;x1b&#91;31m|eos|0.5|"
    )
    assert len(lines) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_the_trackers_themselves_take_what_they_are_sent(name, model, tmp_path):
    """Offline, in a new process, since the trackers keep threads and set folders of their own."""
    pytest.importorskip(name, reason=f"needs {name}, an extra that the tests' environment does not have")
    if name == "mlflow":
        pytest.importorskip("sqlalchemy", reason="needs sqlalchemy, which mlflow brings and mlflow-skinny does not")
    logger = "{id: wandb, args: {mode: offline}}" if name == "wandb" else name
    words = settings(model, tmp_path / "run", rollouts=2, loggers=f"[{logger}]")
    process = start("train", *words, "--quiet", cwd=tmp_path)
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    if name == "wandb":
        assert next((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")).stat().st_size > 1000
    elif name == "mlflow":
        more = [f"--resume={tmp_path / 'run'}", f"--total_tokens={3 * ROLLOUT}", "--change=total_tokens"]
        assert run("train", *more, "--quiet") == 0
        with sqlite3.connect(tmp_path / "run" / "mlflow.db") as database:
            found = database.execute("select step, value from metrics where key = 'reward/task' order by step")
            assert list(found) == [(row["tokens"], row["reward/task"]) for row in rows(tmp_path / "run")[1:]]
        [table] = (tmp_path / "run" / "mlflow").glob("*/artifacts/samples.json")
        told = [row[0] for row in json.loads(table.read_text())["data"]]
        assert told == [row["tokens"] for row in rows(tmp_path / "run", "samples.jsonl")] and max(told) == 3 * ROLLOUT
    else:
        with sqlite3.connect(tmp_path / "run" / "trackio" / "textenv.db") as database:
            found = database.execute("select step from metrics where cast(metrics as text) like '%reward/task%'")
            steps = [step for (step,) in found]
        assert steps == [ROLLOUT, 2 * ROLLOUT]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def scalars(run_folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_tensorboard_has_each_step_once_after_a_resume(model, tmp_path, capfd):
    """The run loses all checkpoints but its first, and so repeats iterations that were already logged."""
    out = tmp_path / "run"
    assert run("train", *settings(model, out, 4, loggers="[tensorboard]"), "--quiet") == 0
    first = scalars(out, "reward/task")
    for checkpoint in sorted((out / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert len(list((out / "checkpoints").iterdir())) == 1
    assert run("train", f"--resume={out}", "--quiet") == 0
    assert len(first) == 4 and scalars(out, "reward/task") == first
    from tensorboard.backend.event_processing.plugin_event_accumulator import (
        EventAccumulator,  # as TensorBoard's page does
    )

    texts = EventAccumulator(str(out / "tensorboard")).Reload().Tensors("samples/text_summary")
    steps = sorted({row["tokens"] for row in rows(out, "samples.jsonl")})
    assert [event.step for event in texts] == steps and len(steps) > 1
    assert "|prompt|text|end_reason|reward|" in texts[0].tensor_proto.string_val[0].decode()
