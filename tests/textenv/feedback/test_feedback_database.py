"""The file of a feedback store: threads and processes share it, and an acknowledged answer is never lost."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from tests.helpers.command import ROOT
from tests.helpers.feedback import pair
from textenv.feedback.records import Record
from textenv.feedback.store import FeedbackStore


@pytest.mark.parametrize("content", [b"This is no database." * 100, "other"])
def test_other_files_are_refused_and_left_alone(path, content):
    if content == "other":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE films (name TEXT)")
        db.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Expected a store of feedback"):
        FeedbackStore(path)
    assert path.read_bytes() == before


def test_later_versions_are_refused(path):
    FeedbackStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(ValueError, match="Expected a store of version 3, got version 9"):
        FeedbackStore(path)


def test_a_write_waits_for_another(path):
    with FeedbackStore(path, timeout=10) as store:
        pair(store)
        shown = store.next("ann")
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        ended = []

        def end():
            ended.append(True)
            other.execute("COMMIT")

        release = threading.Timer(0.3, end)
        release.start()
        store.choose(shown, "a")
        assert ended  # the write waited for the commit
        release.join()
        other.close()
        assert len(store.answers()) == 1


def test_a_lock_that_stays_is_an_error_and_nothing_is_written(path):
    with FeedbackStore(path, timeout=0.1) as store:
        pair(store)
        shown = store.next("ann")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            store.choose(shown, "a")
        other.execute("COMMIT")
        other.close()
        assert store.answers() == []
        store.choose(shown, "a")


def test_every_answer_is_synchronised_with_the_disk(store):
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_threads_share_a_store(store):
    for number in range(40):
        pair(store, f"{number}")
    failures = []

    def work(rater):
        try:
            while (shown := store.next(rater)) is not None:
                store.choose(shown, "a")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"rater{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and {answer.item for answer in store.answers()} == set(range(1, 41))


RATE = """
import sys
from textenv.feedback.store import FeedbackStore
store = FeedbackStore(sys.argv[1])
while (shown := store.next(sys.argv[2])) is not None:
    store.choose(shown, "a")
    print(shown.id, flush=True)
"""


def rating(path, rater):
    arguments = [sys.executable, "-c", RATE, str(path), rater]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_processes_share_a_store_and_a_killed_one_loses_nothing(path):
    store = FeedbackStore(path)
    for number in range(80):
        pair(store, f"{number}", raters=2)
    processes = [rating(path, rater) for rater in ("ann", "bob")]
    printed = [processes[0].stdout.readline() for _ in range(10)]
    processes[0].send_signal(signal.SIGKILL)
    printed += processes[0].communicate()[0].splitlines(keepends=True)
    acknowledged = {int(line) for line in printed if line.endswith("\n")}
    processes[1].communicate()
    assert processes[1].returncode == 0
    items = {rater: {answer.item for answer in store.answers() if answer.rater == rater} for rater in ("ann", "bob")}
    assert 10 <= len(acknowledged) < 80 and acknowledged <= items["ann"]
    assert len(items["ann"] - acknowledged) <= 1  # one may be written, but not yet printed
    assert items["bob"] == set(range(1, 81))
    assert store.next("ann").id not in items["ann"]
    store.close()


def test_two_processes_make_one_file(path):
    processes = [rating(path, f"rater{n}") for n in range(2)]
    assert [process.wait() for process in processes] == [0] * 2
    for process in processes:
        process.stdout.close()
    with FeedbackStore(path) as store:
        assert store.answers() == []


def steps_of_sqlite(path, n):
    """Return the steps of SQLite's virtual machine, in tens, for a rater's next item in a store with n answers."""
    steps = []
    with FeedbackStore(path) as store:
        store.record(Record("compare", f"{number}", ["x", "y"], 0, "ann") for number in range(n))
        pair(store, gold=True)
        store._db._connection.set_progress_handler(lambda: steps.append(1), 10)
        assert store.next("ann") is not None and store.progress("ann").done == n
        assert len(store.answers(since=n - 10)) == 10
    return len(steps)


def test_ten_times_the_answers_take_ten_times_the_work(tmp_path):
    """Without an index, it would be a hundred times: each row of one table would scan the other."""
    few, many = (steps_of_sqlite(tmp_path / f"{n}.db", n) for n in (300, 3000))
    assert few > 100 and many < 12 * few


def test_values_are_json_in_the_file(store, path):
    store.add("p", ["x", "y"], kind="rank")
    store.rank(store.next("ann"), [1, 0])
    with sqlite3.connect(path) as db:
        (value,) = db.execute("SELECT value FROM answers").fetchone()
    db.close()
    assert sorted(json.loads(value)) == [0, 1]
