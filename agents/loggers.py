"""Where a run's figures go besides its own rows: TensorBoard, trackers, and writers of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat

from textenv.trust import Kind, Trust

from .callbacks import page_text
from .config import Named, TrainConfig
from .curves import check_matplotlib
from .names import LOGGERS, build, find
from .refusal import CommandError
from .run_folder import RunFolder
from .trackers import TRACKERS, MLflowTracker, Tracker, check_tracker, check_tracker_arguments

LOGGER = Kind("logger", "a KVWriter of Stable-Baselines3", lambda found: issubclass(found, KVWriter))
COLUMNS = ("prompt", "text", "end_reason", "reward")


def named(logger: Named | str) -> Named:
    """Return a logger of a configuration with its arguments, none where it is a bare name."""
    return Named(logger) if isinstance(logger, str) else logger


def check_loggers(loggers: list[Named | str], trust: Trust) -> None:
    """Raise CommandError for a logger that is not known, and ImportError, with the cure, for one not installed."""
    for one in map(named, loggers):
        if one.id not in LOGGERS and ":" not in one.id:
            raise CommandError(f"Expected a logger among {', '.join(LOGGERS)} or module:Class, got {one.id!r}.")
        if ":" in one.id:
            find(one.id, LOGGER, trust)
        if one.id == "curves":
            check_matplotlib()
        if one.id == "tensorboard" and find_spec(one.id) is None:
            raise ImportError("Expected tensorboard for the logger of that name: pip install 'textenv[plot]'.")
        if one.id in TRACKERS:
            check_tracker(one.id)
            check_tracker_arguments(one, trust)
        elif one.id in LOGGERS and one.args:
            raise CommandError(f"Expected no arguments of the logger {one.id!r}, got {sorted(one.args)}.")


def make_loggers(run: RunFolder, config: TrainConfig, trust: Trust, done: int = 0) -> list[KVWriter]:
    """Return the writers that the configuration names, beside the run's own rows.

    Args:
        run: The run's folder.
        config: Its configuration.
        trust: What the command line allows.
        done: Tokens that the run has behind it: TensorBoard forgets what it was told of later ones.

    Raises:
        CommandError: If a user's own class has other arguments.
    """
    made: list[KVWriter] = []
    for one in map(named, config.loggers):
        if one.id == "tensorboard":
            made.append(_tensorboard(str(run.path / "tensorboard"), done))
        elif ":" in one.id:
            made.append(build(one, {}, LOGGER, trust))
    return made


def _tensorboard(folder: str, done: int) -> KVWriter:
    from torch.utils.tensorboard import SummaryWriter  # optional

    made = TensorBoardOutputFormat(folder)
    made.writer.close()
    # TensorBoard forgets what is after a start only where it has seen one before: the first run says so too.
    made.writer = SummaryWriter(folder, purge_step=done + 1 if done else 0)
    return made


class SamplePages:
    """Shows a run's samples among the texts of TensorBoard, under the key `samples`, as a table.

    Args:
        output: What writes the run's scalars: the texts go into the same file.
    """

    def __init__(self, output: TensorBoardOutputFormat) -> None:
        self.output = output

    def row(self, row: dict[str, Any]) -> None:
        """There is nothing to do: the writer itself takes figures from the logger."""

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write samples as a page of Markdown."""
        cells = [[page_text(str(row[name])).replace("\n", "<br>") for name in COLUMNS] for row in rows]
        lines = ["|".join(line) for line in [COLUMNS, ["---"] * len(COLUMNS), *cells]]
        self.output.writer.add_text("samples", "\n".join(f"|{line}|" for line in lines), rows[0]["tokens"])
        self.output.writer.flush()  # after training nothing else would


def make_trackers(run: RunFolder, config: TrainConfig, sent: int) -> list[Tracker | MLflowTracker]:
    """Return the runs of W&B, trackio or MLflow that the configuration names.

    Args:
        run: The run's folder.
        config: Its configuration.
        sent: The tokens up to which they have been told all.
    """
    chosen = [one for one in map(named, config.loggers) if one.id in TRACKERS]
    return [(MLflowTracker if one.id == "mlflow" else Tracker)(one, run, config, sent) for one in chosen]
