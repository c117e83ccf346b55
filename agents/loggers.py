"""Where a run's figures go besides its own rows: TensorBoard, trackers, and writers of the user's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat

from textenv.extras import check_extra, needs
from textenv.printable import page_text
from textenv.trust import Kind, Trust, check_written

from .config import Named, TrainConfig
from .curves import check_matplotlib
from .names import LOGGERS, build, find
from .refusal import CommandError
from .run_folder import RunFolder
from .storage import is_full
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
        if one.id == "tensorboard":
            check_extra("plot", "tensorboard", "the logger of that name")
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
            made.append(TensorBoard(str(run.path / "tensorboard"), done))
        elif ":" in one.id:
            made.append(build(one, {}, LOGGER, trust))
    return made


class TensorBoard(TensorBoardOutputFormat):
    """What SB3 writes for TensorBoard; while the disk is full, it waits and goes into a new file of events afterwards.

    Args:
        folder: Where the files of events are; of a configuration, below the current folder.
        done: Tokens that the run has behind it: TensorBoard forgets what it was told of later ones.
    """

    def __init__(self, folder: str, done: int = 0) -> None:
        check_written(folder)
        super().__init__(folder)
        self.writer.close()
        self.folder, self.is_broken = folder, False
        # TensorBoard forgets what is after a start only where it has seen one before: the first run says so too.
        self._open(purge_step=done + 1 if done else 0)
        self.waiting: deque[tuple[dict[str, Any], dict[str, Any], int]] = deque()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        """Write figures and texts, or keep them where the disk is full."""
        self.waiting.append((dict(key_values), dict(key_excluded), step))
        try:
            self._send()
        except OSError as error:
            if not is_full(error):
                raise
            self.is_broken = True  # its thread has ended

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
        """Send what waits, and close the file.

        Raises:
            OSError: If the disk is still full.
        """
        self._send()
        super().close()


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
        page = "\n".join(f"|{line}|" for line in lines)
        self.output.write(
            {"samples": page}, {"samples": ()}, rows[0]["tokens"]
        )  # and flushed: after training nothing is


def make_trackers(run: RunFolder, config: TrainConfig, sent: int) -> list[Tracker | MLflowTracker]:
    """Return the runs of W&B, trackio or MLflow that the configuration names.

    Args:
        run: The run's folder.
        config: Its configuration.
        sent: The tokens up to which they have been told all.
    """
    chosen = [one for one in map(named, config.loggers) if one.id in TRACKERS]
    return [(MLflowTracker if one.id == "mlflow" else Tracker)(one, run, config, sent) for one in chosen]
