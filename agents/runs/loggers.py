"""The loggers of a run besides metrics.jsonl: TensorBoard, trackers, and a user's own writers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat

from textenv.checks.extras import check_extra, needs
from textenv.checks.trust import Kind, Trust, check_written
from textenv.text.printable import page_text

from ..configuration.config import Named, TrainConfig
from ..configuration.names import LOGGERS, build, find
from ..errors import CommandError, is_full
from ..evaluation.curves import check_matplotlib
from .folder import RunFolder
from .trackers import TRACKERS, MLflowTracker, Tracker, check_tracker, check_tracker_arguments

LOGGER = Kind("logger", "a KVWriter of Stable-Baselines3", lambda cls: issubclass(cls, KVWriter))
COLUMNS = ("prompt", "text", "end_reason", "reward")


def named(logger: Named | str) -> Named:
    """Return a logger of a configuration with its arguments; a bare name has none."""
    return Named(logger) if isinstance(logger, str) else logger


def check_loggers(loggers: list[Named | str], trust: Trust) -> None:
    """Check that all loggers exist, that their packages are installed, and that they may have their arguments.

    Raises:
        CommandError: If a logger does not exist, or has arguments that it may not have.
        ImportError: If the package of a logger is not installed; the message has the cure.
    """
    for logger in map(named, loggers):
        if logger.id not in LOGGERS and ":" not in logger.id:
            raise CommandError(f"Expected a logger among {', '.join(LOGGERS)} or module:Class, got {logger.id!r}.")
        if ":" in logger.id:
            find(logger.id, LOGGER, trust)
        if logger.id == "curves":
            check_matplotlib()
        if logger.id == "tensorboard":
            check_extra("plot", "tensorboard", "the logger of that name")
        if logger.id in TRACKERS:
            check_tracker(logger.id)
            check_tracker_arguments(logger, trust)
        elif logger.id in LOGGERS and logger.args:
            raise CommandError(f"Expected no arguments of the logger {logger.id!r}, got {sorted(logger.args)}.")


def make_loggers(run: RunFolder, config: TrainConfig, trust: Trust, done: int = 0) -> list[KVWriter]:
    """Return the writers for SB3's logger that a configuration names: TensorBoard's and a user's own.

    Args:
        run: The run's folder.
        config: Its configuration.
        trust: The permissions of the command line.
        done: The number of tokens at which a run is resumed; TensorBoard discards the figures of later tokens.

    Raises:
        CommandError: If a user's own class does not take its arguments.
    """
    writers: list[KVWriter] = []
    for logger in map(named, config.loggers):
        if logger.id == "tensorboard":
            writers.append(TensorBoard(str(run.path / "tensorboard"), done))
        elif ":" in logger.id:
            writers.append(build(logger, {}, LOGGER, trust))
    return writers


class TensorBoard(TensorBoardOutputFormat):
    """SB3's writer for TensorBoard, which survives a full disk: figures wait, and go into a new event file afterwards.

    Args:
        folder: The folder of event files; a configuration can only name one below the current folder.
        done: The number of tokens at which a run is resumed; TensorBoard discards the figures of later tokens.
    """

    def __init__(self, folder: str, done: int = 0) -> None:
        check_written(folder)
        super().__init__(folder)
        # SB3 `logger.TensorBoardOutputFormat` opened a SummaryWriter without `purge_step`: `_open` replaces it.
        self.writer.close()
        self.folder, self.is_broken = folder, False
        # TensorBoard purges the steps of earlier event files only if those had a `purge_step` too, so a new run has 0.
        self._open(purge_step=done + 1 if done else 0)
        self.waiting: deque[tuple[dict[str, Any], dict[str, Any], int]] = deque()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        """Write figures and texts, or keep them while the disk is full."""
        self.waiting.append((dict(key_values), dict(key_excluded), step))
        try:
            self._send()
        except OSError as error:
            if not is_full(error):
                raise
            self.is_broken = True  # the error has ended the thread of the SummaryWriter

    def _open(self, purge_step: int | None = None) -> None:
        with needs("plot", "tensorboard", "the logger of that name"):
            from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=purge_step)

    def _send(self) -> None:
        if self.is_broken:
            self._open()
            self.is_broken = False
        while self.waiting:
            super().write(*self.waiting[0])
            self.waiting.popleft()

    def close(self) -> None:
        """Write the waiting figures, and close the file.

        Raises:
            OSError: If the disk is still full.
        """
        self._send()
        super().close()


class SamplePages:
    """Writes a run's samples as a table into TensorBoard's texts, under the key `samples`.

    Args:
        output: The writer of the run's figures, into whose file the texts go, too.
    """

    def __init__(self, output: TensorBoardOutputFormat) -> None:
        self.output = output

    def row(self, row: dict[str, Any]) -> None:
        """Do nothing: SB3's logger passes the figures to the writer."""

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write samples as a page of Markdown."""
        cells = [[page_text(str(row[name])).replace("\n", "<br>") for name in COLUMNS] for row in rows]
        lines = ["|".join(line) for line in [COLUMNS, ["---"] * len(COLUMNS), *cells]]
        page = "\n".join(f"|{line}|" for line in lines)
        # SB3 `logger.TensorBoardOutputFormat.write` flushes, which matters for the samples at the end of training.
        self.output.write({"samples": page}, {"samples": ()}, rows[0]["tokens"])


def make_trackers(run: RunFolder, config: TrainConfig, sent: int) -> list[Tracker | MLflowTracker]:
    """Return the trackers (W&B, trackio, MLflow) that a configuration names.

    Args:
        run: The run's folder.
        config: Its configuration.
        sent: The number of tokens up to which the trackers already have the rows of a resumed run; -1 for none.
    """
    chosen = [logger for logger in map(named, config.loggers) if logger.id in TRACKERS]
    return [(MLflowTracker if logger.id == "mlflow" else Tracker)(logger, run, config, sent) for logger in chosen]
