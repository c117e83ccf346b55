"""The SQLite file of a feedback store: its tables, and transactions that are safe across threads and processes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

APPLICATION = 0x74786662  # "txfb" in ASCII: the application id in SQLite's header
VERSION = 3
# An item is a question; a showing is one display of an item to a rater. Columns whose names do not tell their meaning:
# - items: `low` and `high` are the ends of the scale, `raters` is the number of raters who are to answer, `messages`
#   has the messages of a prompt that is a chat (JSON);
# - showings: `places` is the order of the completions (JSON), `handed` the time of the showing, `owed` the number of
#   answers to come, and `due` the number of the answer after which a gold item waits for its second showing, or 0;
# - answers: `stands` is 1 until the answer is undone.
SCHEMA = (
    """CREATE TABLE items (
        id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, prompt TEXT NOT NULL, run TEXT,
        low REAL NOT NULL, high REAL NOT NULL, raters INTEGER NOT NULL, gold INTEGER NOT NULL, time REAL NOT NULL,
        answered INTEGER NOT NULL DEFAULT 0, messages TEXT)""",
    "CREATE INDEX open_by_kind ON items (kind, id) WHERE answered < raters",
    """CREATE TABLE completions (
        item INTEGER NOT NULL REFERENCES items, place INTEGER NOT NULL, text TEXT NOT NULL, model TEXT,
        PRIMARY KEY (item, place)) WITHOUT ROWID""",
    """CREATE TABLE showings (
        id INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL REFERENCES items, rater TEXT NOT NULL,
        kind TEXT NOT NULL, repeat INTEGER NOT NULL, places TEXT NOT NULL, handed REAL NOT NULL,
        is_open INTEGER NOT NULL DEFAULT 1, due INTEGER NOT NULL DEFAULT 0, owed INTEGER NOT NULL DEFAULT 0,
        UNIQUE (item, rater, repeat))""",
    "CREATE INDEX open_showings ON showings (rater, kind, handed, id) WHERE is_open",
    "CREATE INDEX due_showings ON showings (rater, kind, due) WHERE due > 0",
    # AUTOINCREMENT never reuses numbers, and there is one writer at a time: so a reader who asks for the answers after
    # a number misses none
    """CREATE TABLE answers (
        id INTEGER PRIMARY KEY AUTOINCREMENT, showing INTEGER NOT NULL REFERENCES showings, rater TEXT NOT NULL,
        kind TEXT NOT NULL, value TEXT NOT NULL, seconds REAL, time REAL NOT NULL, stands INTEGER NOT NULL,
        undoes INTEGER UNIQUE REFERENCES answers)""",
    "CREATE UNIQUE INDEX one_standing_answer ON answers (showing) WHERE stands",
    "CREATE INDEX standing_answers ON answers (rater, id) WHERE stands",
    # The counts that `queues.py` keeps up to date; gold items count twice in the columns n, owed and seen.
    "CREATE TABLE open_items (kind TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE raters (
        rater TEXT NOT NULL, kind TEXT NOT NULL, last INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0,
        skipped INTEGER NOT NULL DEFAULT 0, owed INTEGER NOT NULL DEFAULT 0, seen INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (rater, kind)) WITHOUT ROWID""",
    """CREATE TABLE passed (
        rater TEXT NOT NULL, kind TEXT NOT NULL, item INTEGER NOT NULL REFERENCES items,
        PRIMARY KEY (rater, kind, item)) WITHOUT ROWID""",
    "CREATE INDEX passed_items ON passed (item)",
)


class Database:
    """The connection of all threads of a process to a file that several processes may use.

    A transaction is on the disk when it ends (a write-ahead log, synchronous=FULL). A file of version 2, which had no
    messages, becomes one of this version when it is opened.

    Args:
        path: The file; it is created if it does not exist.
        timeout: The longest wait for a locked file, in seconds.

    Raises:
        ValueError: If the file is not a feedback store, or one of another version.
        sqlite3.OperationalError: If the file cannot be opened, or stays locked.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self._lock = threading.Lock()  # a server calls from many threads, which share one connection
        # isolation_level=None: transactions are opened by `writing` and `reading`, not by sqlite3 on its own.
        self._connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        try:
            self._prepare()
        except BaseException as error:
            self._connection.close()
            if type(error) is sqlite3.DatabaseError:
                raise ValueError(f"Expected a store of feedback or a new file, got {self.path}: {error}.") from error
            raise

    def _prepare(self) -> None:
        if self._tables() and self._header("application_id") != APPLICATION:
            raise ValueError(f"Expected a store of feedback, got {self.path}, a database of another kind.")
        self._use_write_ahead_log()
        self.execute("PRAGMA synchronous=FULL")  # some builds default to NORMAL, which does not sync at each commit
        self.execute("PRAGMA foreign_keys=ON")
        with self.writing():
            if not self._tables():
                for statement in SCHEMA:
                    self.execute(statement)
                self.execute(f"PRAGMA application_id={APPLICATION}")
                self.execute(f"PRAGMA user_version={VERSION}")
            elif self._header("user_version") == 2:
                self.execute("ALTER TABLE items ADD COLUMN messages TEXT")
                self.execute(f"PRAGMA user_version={VERSION}")
        version = self._header("user_version")
        if version != VERSION:
            raise ValueError(f"Expected a store of version {VERSION}, got version {version} in {self.path}.")

    def _tables(self) -> int:
        return int(self.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

    def _header(self, name: str) -> int:
        return int(self.execute(f"PRAGMA {name}").fetchone()[0])

    def _use_write_ahead_log(self) -> None:
        end = time.monotonic() + self._timeout
        while True:  # SQLite's own timeout does not apply when two processes open a new file at once
            try:
                self.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Run the block as one transaction: all of it is written or none, and no other process writes meanwhile."""
        with self._lock:
            # IMMEDIATE takes the write lock at once. A transaction that reads first and writes later would fail with
            # "locked", without a wait, if another process wrote in between.
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Run the block on one snapshot of the file, whatever other processes write meanwhile."""
        with self._lock:
            self.execute("BEGIN")
            try:
                yield
            finally:
                self.execute("COMMIT")

    def execute(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        """Run a statement, inside `writing` or `reading`."""
        return self._connection.execute(statement, values)

    def insert(self, table: str, **row: Any) -> int:
        """Insert a row and return its number, inside `writing`."""
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        cursor = self.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))
        return int(cursor.lastrowid or 0)

    def close(self) -> None:
        """Close the file; the last process to do so removes the write-ahead log."""
        with self._lock:
            self._connection.close()
