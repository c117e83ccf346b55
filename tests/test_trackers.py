"""Where a run's figures go besides its folder: trackers and TensorBoard, told of each step once."""

import importlib.machinery
import shutil
import sqlite3
import sys
import types

import pytest

from tests.command import ROLLOUT, rows, run, settings, small_model, start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("models") / "small")


class FakeTracker(types.ModuleType):
    """What W&B and trackio have in common; their packages are not needed to see what they are sent."""

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

    def Table(self, dataframe):
        return list(dataframe.columns)

    def finish(self):
        self.is_over = True


@pytest.mark.slow
def test_a_tracker_gets_rows_and_samples_once(model, tmp_path, monkeypatch):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    words = settings(model, tmp_path / "run", rollouts=2, loggers="[{id: trackio, args: {space: mine}}]")
    assert run("train", *words, "--quiet") == 0
    assert tracker.more == {"space": "mine"} and tracker.config["seed"] == 0 and tracker.is_over
    figures = [(step, values["reward/task"]) for step, values in tracker.sent if "reward/task" in values]
    assert figures == [(row["tokens"], row["reward/task"]) for row in rows(tmp_path / "run")[1:]]
    tables = [step for step, values in tracker.sent if values.get("samples", [None])[0] == "tokens"]
    assert tables == [0, 2 * ROLLOUT]
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # so that the last iteration is made again
    told = len(tracker.sent)
    assert run("train", f"--resume={tmp_path / 'run'}", "--quiet") == 0
    assert len(tracker.sent) == told and len(set(tracker.names)) == 1 and len(tracker.names) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_trackers_themselves_take_what_they_are_sent(name, model, tmp_path):
    """Offline, in a process of its own, since both keep threads and set their own folders."""
    pytest.importorskip(name, reason=f"needs {name}, an extra that the tests' environment does not have")
    given = "{id: wandb, args: {mode: offline}}" if name == "wandb" else "trackio"
    words = settings(model, tmp_path / "run", rollouts=2, loggers=f"[{given}]")
    process = start("train", *words, "--quiet", cwd=tmp_path)
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    if name == "wandb":
        assert next((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")).stat().st_size > 1000
    else:
        with sqlite3.connect(tmp_path / "run" / "trackio" / "textenv.db") as database:
            found = database.execute("select step from metrics where cast(metrics as text) like '%reward/task%'")
            steps = [step for (step,) in found]
        assert steps == [ROLLOUT, 2 * ROLLOUT]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(("logger", "extra"), [("wandb", "wandb"), ("tensorboard", "plot")])
def test_a_logger_that_is_not_there_is_refused_before_the_run(logger, extra, model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("agents.loggers.find_spec", lambda name: None)
    assert run("train", *settings(model, tmp_path / "run", loggers=f"[{logger}]")) == 2
    assert f"pip install 'textenv[{extra}]'" in capfd.readouterr().err and not (tmp_path / "run").exists()


def scalars(run_folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_tensorboard_has_each_step_once_after_a_resume(model, tmp_path, capfd):
    """The run is killed some iterations behind its last checkpoint: those it makes again."""
    out = tmp_path / "run"
    assert run("train", *settings(model, out, 4, loggers="[tensorboard]"), "--quiet") == 0
    first = scalars(out, "reward/task")
    for checkpoint in sorted((out / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert len(list((out / "checkpoints").iterdir())) == 1
    assert run("train", f"--resume={out}", "--quiet") == 0
    assert len(first) == 4 and scalars(out, "reward/task") == first
