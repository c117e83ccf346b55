"""The folder of a run: its creation, its lock and its text files. Importing this does not load torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from textenv.checks.json_files import NOTHING, Shape, parse_json, read_json

from ..checkpoints.storage import size
from ..errors import CommandError, is_full
from ..files import clear_leftovers, naming, write_text

FORMAT = 1  # the version of a run's folder
SEED = "seed_"  # with the seed behind it, the folder of one of several seeds
# The files that a run leaves behind if it ends before its first checkpoint.
EVALUATIONS = ("history.json", "scores.json")  # as `Evaluate` writes them
LOGGED = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "tensorboard", "report.html")
LEFT = ("run.json", "vocabulary.json", *LOGGED, *EVALUATIONS, "best")
# The shapes of a row of metrics.jsonl, of tokens.jsonl and of samples.jsonl, of run.json and of results.json.
AGGREGATION = "train/aggregation"  # the one value of a row that is a name
ROW = {"tokens": int, AGGREGATION: (str, NOTHING), str: (float, None)}
NUMBERS = [(float, bool, None)]
TOKENS = {"tokens": int, "prompt": str, "pieces": [str], "alternatives": [([[(str, float)]], None)], str: NUMBERS}
SAMPLE = {"tokens": int, "prompt": str, "text": str, "end_reason": str, "reward": float, "parts": {str: float}}
ABOUT = {"started": str, "versions": {str: str}, "git": {str: (str, None)}}
RESULTS = {"after": {"num_timesteps": int, "figures": {str: (float, None)}}}
# The packages whose versions influence the figures of a run; run.json notes them.
PACKAGES = ("torch", "transformers", "stable_baselines3", "sb3_contrib", "gymnasium", "numpy", "peft")


class RunFolder:
    """The folder of a run: `config.yml`, `run.json`, figures, samples, tokens, `log.txt`, checkpoints, models.

    Args:
        path: Its path.

    Attributes:
        waiting: By file, the rows that wait to be written, since the disk was full.
        is_of_seeds: Whether `--seeds` made the run: the same command then continues it, and its other seeds.

    Example:
        >>> RunFolder("runs/demo").metrics.as_posix()
        'runs/demo/metrics.jsonl'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yml"
        self.about = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.tokens = self.path / "tokens.jsonl"
        self.log = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.best = self.path / "best"
        self.results = self.path / "results.json"
        self.was_empty, self.is_of_seeds = False, False
        self.waiting: dict[Path, str] = {}

    @classmethod
    def create(cls, out: str | None, name: str) -> RunFolder:
        """Make the folder of a new run.

        A run that ended before its first checkpoint does not count; `clear` removes its files.

        Args:
            out: A new or empty folder; None makes one below runs/.
            name: The name of the task and model, for the folder below runs/.

        Raises:
            CommandError: If the folder has other files or a run with a checkpoint, or cannot be written to.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        base = "".join(char if char.isalnum() else "-" for char in name)[:40]  # "org/model" must not make a folder
        # Two runs may start in the same second: the random digits tell them apart.
        run = cls(out or Path("runs") / f"{base}-{stamp}-{secrets.token_hex(2)}")
        try:
            run.path.mkdir(parents=True, exist_ok=out is not None)
            others = sorted(path.name for path in run.path.iterdir() if path.name != "lock")
        except OSError as error:
            raise CommandError(f"Expected a folder to write to, got {run.path}: {error.strerror}.") from error
        if run.about.is_file():
            if run.has_checkpoint():
                raise CommandError(f"Expected a new folder, got the run {out}: continue with --resume {out}.")
            return run
        run.was_empty = not others
        if any(not name.startswith(".") and name not in ("config.yml", "log.txt") for name in others):
            raise CommandError(f"Expected a new or empty folder, got {out} with {', '.join(others[:3])}.")
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Return the folder of an existing run.

        Raises:
            CommandError: If it is not the folder of a run, or of a newer format.
        """
        run = cls(path)
        if not run.about.is_file():
            if any(run.path.glob(f"{SEED}*/run.json")):
                raise CommandError(
                    f"Expected the folder of a run, got {path}, which has one run for each seed: name one of them, or "
                    "repeat the command that made them with --resume."
                )
            raise CommandError(
                f"Expected the folder of a run, got {path}, which has no run.json: `textenv train --out DIR` makes one."
            )
        run.read_about()
        return run

    def read_about(self) -> dict[str, Any]:
        """Return the content of `run.json`: format, start, command, and versions and commits of the code.

        Raises:
            CommandError: If the file is damaged, or of a newer format.
        """
        try:
            about: dict[str, Any] = read_json(self.about, {"format": int, "versions": {str: str}})
            if about["format"] > FORMAT:
                version = about["versions"].get("textenv")
                raise CommandError(
                    f"Expected a run of format {FORMAT} or older, got {about['format']} in {self.path}: install "
                    f"{'a newer textenv' if version is None else f'textenv {version} or newer'}."
                )
            return dict(read_json(self.about, ABOUT))
        except ValueError as error:
            raise CommandError(str(error)) from error

    def begin(self, config: str, textenv_version: str) -> None:
        """Write `config.yml`, and then `run.json`, which marks the folder as a run.

        Args:
            config: The configuration as YAML.
            textenv_version: The version of textenv.
        """
        write_text(self.config, config)
        about = {
            "format": FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv[1:],
            "git": {"textenv": _commit(Path(__file__).parent), "here": _commit(Path.cwd())},
            "versions": {"textenv": textenv_version, "python": sys.version.split()[0], **versions()},
        }
        write_text(self.about, json.dumps(about, indent=1) + "\n")

    def has_checkpoint(self) -> bool:
        """Return whether the run has a checkpoint to resume from."""
        return any(self.checkpoints.glob("step_*"))

    @property
    def resumed_by(self) -> str:
        """The command that continues the run."""
        return "the same command with --resume" if self.is_of_seeds else f"textenv train --resume {self.path}"

    def how_to_go_on(self) -> str:
        """Return the advice after a stop: resume the run, or start again if it has no checkpoint."""
        if self.has_checkpoint() or self.is_of_seeds:
            return f"continue with: {self.resumed_by}"
        return f"nothing was saved yet in {self.path}: the same command starts again"

    def clear(self) -> None:
        """Remove the files of a run without a checkpoint, except its log and config.yml, which may be the user's."""
        for name in LEFT:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Remove a run that never trained, except its log, so that the same command can start anew."""
        self.clear()
        if self.was_empty:
            self.config.unlink(missing_ok=True)
        if not any(path.name != "lock" for path in self.path.iterdir()):
            shutil.rmtree(self.path)

    def is_finished(self) -> bool:
        """Return whether the run has trained to its end: its results are written last, and removed when it goes on."""
        return self.results.is_file()

    def read_results(self) -> dict[str, Any]:
        """Return the last evaluation of a finished run: `num_timesteps` and `figures`, with None for NaN.

        Raises:
            ValueError: If the file is damaged.
        """
        after: dict[str, Any] = read_json(self.results, RESULTS)["after"]
        return after

    def changed_versions(self) -> list[str]:
        """Return the packages with another version than at the run's start, each as "name old -> new"."""
        then, now = self.read_about()["versions"], versions()
        return [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]

    def check_vocabulary(self, tokens: Mapping[str, int]) -> None:
        """Write the hash of a new run's vocabulary, or check that of a resumed one.

        Args:
            tokens: The tokenizer's vocabulary, from token to id.

        Raises:
            CommandError: If the vocabulary differs from that at the run's start.
        """
        file = self.path / "vocabulary.json"
        own = {"size": len(tokens), "sha256": hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()}
        if not file.is_file():
            write_text(file, json.dumps(own) + "\n")
        elif (kept := read_json(file, {"size": int, "sha256": str})) != own:
            raise CommandError(
                f"Expected the tokenizer that {self.path} was started with, of {kept['size']} tokens, got another, of "
                f"{own['size']} tokens: give the first one as model.tokenizer."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, lock the folder for this process. The kernel frees the lock when the process ends or is killed.

        Raises:
            CommandError: If another process holds the lock, or the folder cannot be written to.
        """
        try:  # "a+" does not truncate: until the lock is ours, the file names the process that holds it
            stream = (self.path / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"Expected a folder to write to, got {self.path}: {error.strerror}.") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # LOCK_NB: raise instead of waiting for the lock
            except BlockingIOError:
                stream.seek(0)
                raise CommandError(f"{self.path} is in use by {stream.read().strip() or 'another process'}.") from None
            stream.truncate(0)
            stream.write(f"pid {os.getpid()} since {datetime.now().astimezone().isoformat(timespec='seconds')}\n")
            stream.flush()
            for folder in (self.path, self.checkpoints):
                clear_leftovers(folder)  # a killed process left them: the lock shows that nobody is writing them
            yield

    def check_space(self, needed: int) -> None:
        """Check that the disk has enough free space, in bytes.

        Raises:
            CommandError: If it has less.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CommandError(f"The run needs {size(needed)}, {size(free)} free at {self.path}.")

    def cut(self, tokens: int) -> None:
        """Remove the rows after a number of tokens, which a resumed run makes again; -1 also removes the best model."""
        for file, shape in ((self.metrics, ROW), (self.samples, SAMPLE), (self.tokens, TOKENS)):
            if file.is_file():
                rows = [row for row in read_rows(file, shape) if row["tokens"] <= tokens]
                write_text(file, "".join(to_line(row) for row in rows))
        if tokens < 0:
            shutil.rmtree(self.best, ignore_errors=True)
            for name in EVALUATIONS:
                (self.path / name).unlink(missing_ok=True)

    def append(self, file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to a file of the folder; while the disk is full they stay in `waiting`."""
        # Behind the rows that wait already, to keep their order.
        self.waiting[file] = self.waiting.get(file, "") + "".join(map(to_line, rows))
        try:
            self.write_waiting()
        except OSError as error:
            if not is_full(error):
                raise

    def write_waiting(self) -> None:
        """Write the waiting rows.

        Raises:
            OSError: If the disk is still full; the rows stay in `waiting`.
        """
        for file, text in list(self.waiting.items()):
            append_text(file, text)
            del self.waiting[file]

    def keep_traceback(self) -> bool:
        """Append the traceback of the current exception to the log; return whether that worked."""
        try:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n{traceback.format_exc()}\n")
        except OSError:
            return False
        return True


def to_line(row: Mapping[str, Any]) -> str:
    r"""Return a row as a line of JSON, with null for NaN and infinity, which JSON does not have.

    Example:
        >>> to_line({"tokens": 4, "loss": float("nan")})
        '{"tokens": 4, "loss": null}\n'
    """
    # value - value is 0 for a finite number, and NaN for NaN and infinity.
    plain = {name: None if isinstance(value, float) and value - value != 0 else value for name, value in row.items()}
    return json.dumps(plain, ensure_ascii=False) + "\n"


def append_text(file: Path, text: str) -> None:
    """Append to a file, all or nothing: on return the text is on the disk, after an error the file is unchanged."""
    content = text.encode()
    with naming(file), file.open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            while content:  # an unbuffered write may take only a part, as on a disk that is nearly full
                content = content[stream.write(content) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(before)  # removes a half-written row
            raise


def read_rows(file: Path, shape: Shape = ROW) -> list[dict[str, Any]]:
    """Return the rows of a file, without a last line that a kill has cut off.

    Args:
        file: The file; if it does not exist, it has no rows.
        shape: The keys and types of a row.

    Raises:
        CommandError: If any other line is not such a row.
    """
    if not file.is_file():
        return []
    try:
        *lines, _ = file.read_text(encoding="utf-8").split("\n")  # `splitlines` would also split at U+2028 within texts
        return [parse_json(line, shape, f"line {number} of {file}") for number, line in enumerate(lines, 1)]
    except UnicodeDecodeError as error:
        raise CommandError(f"Expected lines of JSON in {file}, got bytes that are no UTF-8.") from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def versions() -> dict[str, str]:
    """Return the versions of the packages that influence the figures of a run."""
    names = [name for name in PACKAGES if _is_installed(name)]
    return {name: metadata.version(name) for name in names}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder, with "+" if files differ from it; None outside of git."""
    # --exclude=* leaves out all tags, so that --always prints the commit itself.
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
