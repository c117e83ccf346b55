"""Processes that hang without dying: named in time, with the place; waits for people are no hang."""

import re
import subprocess
import sys

import pytest

from agents import Sharded
from agents.distributed.hangs import ProcessLost, State, pause, timeout_from_environment, verdict
from agents.steps.data_parallel import merge
from tests.helpers.command import ROOT
from tests.helpers.processes import launch, train

TIMEOUT, SLEEP = 2.0, 8  # seconds
TORCHS = 10  # seconds: the timeout of the first rollout, and half of it more in torch's collectives
SOON = {rank: {"TEXTENV_TIMEOUT": str(TORCHS)} for rank in (0, 1)}
AT_WORK = State(9, 0.5, None, 0.0, "train.py:3 in step")
STUCK = State(9, 4.0, None, 0.0, "train.py:7 in reward")
WAITS = State(9, 4.0, "the log", 3.5, "train.py:9 in learn")
COMES = State(9, 0.5, "the log", 0.5, "train.py:9 in learn")
ALIVE = {0: 0.1, 1: 0.1, 2: 0.1}


@pytest.mark.parametrize(
    ("states", "silence", "ranks", "words"),
    [
        (
            [WAITS, STUCK, WAITS],
            ALIVE,
            [1],
            "none of rank 1 for 4 s, which is at train.py:7 in reward; rank 0 waits",
        ),
        ([WAITS, STUCK, STUCK], ALIVE, [1, 2], "none of rank 1 for 4 s, .* and none of rank 2"),
        (
            [WAITS, AT_WORK, WAITS],
            {**ALIVE, 1: 3.5},
            [1],
            "no answer of rank 1 for 4 s, last seen at train.py:3",
        ),
        ([WAITS, WAITS, WAITS], ALIVE, [0, 1, 2], "none of rank 0 .* rank 2 waits for it at 'the log'"),
        ([WAITS, AT_WORK, WAITS], ALIVE, None, ""),  # a slow one, which samples or evaluates
        ([AT_WORK, STUCK, AT_WORK], ALIVE, None, ""),  # nobody waits for it yet
        ([WAITS, WAITS, COMES], ALIVE, None, ""),  # the last has just come
        ([COMES, STUCK, COMES], ALIVE, None, ""),  # a slow start, for which nobody has waited long
    ],
)
def test_who_hangs_by_hand(states, silence, ranks, words):
    found = verdict(dict(enumerate(states)), silence, 3.0)
    assert (found and found[0]) == ranks
    assert ranks is None or re.search(words, found[1])


def test_the_timeout_of_the_environment(monkeypatch):
    monkeypatch.delenv("TEXTENV_TIMEOUT", raising=False)
    assert timeout_from_environment() == 1800 and (pause(1800), pause(2)) == (5.0, 0.25)
    monkeypatch.setenv("TEXTENV_TIMEOUT", "90")
    assert timeout_from_environment() == 90
    for text in ("-1", "half an hour", "nan", "inf"):
        monkeypatch.setenv("TEXTENV_TIMEOUT", text)
        with pytest.raises(ValueError, match="Expected TEXTENV_TIMEOUT to be a positive number of seconds, got '"):
            timeout_from_environment()


def test_the_slowest_rank_waits_least():
    rows = [{"time/waited_seconds": seconds} for seconds in (3.0, 0.5, 2.0)]
    assert merge(rows) == {"time/waited_seconds": 3.0, "time/slowest_rank": 1}


SLOW = pytest.mark.slow
CASES = [pytest.param(where, None, marks=SLOW, id=where) for where in ("reward", "rollout", "forward", "optimizer")]
WAYS = {"gathered": Sharded(), "lock-step": Sharded(gather=False)}
CASES += [
    pytest.param(where, shard, marks=SLOW if way == "gathered" else pytest.mark.long, id=f"{where}-{way}")
    for way, shard in WAYS.items()
    for where in ("rollout", "forward")
]


@pytest.mark.parametrize(("where", "shard"), CASES)
def test_a_process_that_sleeps_is_named_with_its_place_before_it_wakes(where, shard):
    sleep = SLEEP if shard is None or where != "forward" else 2 * TORCHS
    (error, end, _), (_, _, start) = launch(2, "hangs", where, sleep, TIMEOUT, shard, environments=SOON)
    assert end - start < sleep and isinstance(error, ProcessLost), error
    place = r"none of rank 1 for \d s, which is at tests/helpers/mistakes.py:\d+ in __call__, called from"
    assert re.search(place, str(error))
    assert "; rank 0 waits for it at '" in str(error)


def test_a_reward_that_waits_for_people_longer_than_the_timeout_is_no_hang():
    (rows, end, _), (_, _, start) = train(2, "hangs", "people", 2 * TIMEOUT, TIMEOUT, environments=SOON)
    assert end - start > 2 * TIMEOUT and [step for step, _ in rows] == [16, 32, 48]
    (_, earlier), (_, last) = rows[1:]
    assert last["time/slowest_rank"] == 1 and last["time/waited_seconds"] > 2 * TIMEOUT - 0.5
    assert last["time/waited_seconds"] > earlier["time/waited_seconds"]


@pytest.mark.slow
def test_a_process_that_was_stopped_is_named_and_one_in_another_collective_too():
    (error, *_), _ = launch(2, "hangs", "reward", None, TIMEOUT, environments=SOON, timeout=20)
    assert isinstance(error, ProcessLost) and re.search(r"no answer of rank 1 for \d s, last seen at", str(error)), (
        error
    )
    error, other = launch(2, "hangs", "collective", 0, TIMEOUT, environments=SOON)
    assert isinstance(error, ProcessLost) and re.search(r"none of rank 0 for \d\d s", str(error)), error
    assert "at 'two'" in str(error)
    assert "rank 1 waits for it at 'torch.distributed, barrier'" in str(error) and "Timed out" in str(other)


def test_all_have_the_same_timeout():
    for error in launch(2, "join", 20, environments={0: {"TEXTENV_TIMEOUT": "60"}, 1: {}}):
        assert isinstance(error, ValueError)
        assert "Expected TEXTENV_TIMEOUT=60 in all processes, as in rank 0, got 1800 in rank 1" in str(error)


ENDS = """
import sys, threading
import torch.distributed as dist
from agents.distributed.world import world
class Last:
    def __del__(self, enumerate=threading.enumerate, write=sys.stdout.write):
        write(repr([thread.name for thread in enumerate()]))
last = Last()  # it is deleted when the interpreter ends, after all atexit functions
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world()
sys.stdout.write(repr([thread.name for thread in threading.enumerate()]) + "\\n")
"""


def test_the_watch_ends_with_a_script_that_made_the_process_group_itself():
    """A thread that comes back from C++ while the interpreter ends would abort the process."""
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    before, after = done.stdout.splitlines()
    assert "watch over the processes" in before and "watch" not in after and done.returncode == 0, done.stderr
