"""The estimate of the remaining time, with a clock of the test's own: by hand, at evaluations, and after a resume."""

import io
import re

import pytest
from rich.console import Console

from agents.configuration.config import EvaluationConfig, TrainConfig, TrainOptions
from agents.runs import remaining
from agents.runs.live_screen import LiveScreen
from agents.runs.remaining import ELAPSED, RECENT, Remaining
from agents.runs.screens import PlainScreen
from agents.runs.train import make_screen

ROLLOUT, EVERY, TOTAL = 100, 300, 1200


@pytest.fixture
def now(monkeypatch):
    """The clock's time in seconds, as the only item of a list."""
    seconds = [0.0]
    monkeypatch.setattr(remaining.time, "monotonic", lambda: seconds[0])
    return seconds


def rows(first, last, train=20.0, evaluation=50.0, at_start=True):
    """Yield the seconds and the row of each iteration: 20 s of training, 50 s of an evaluation after 300 tokens."""
    for tokens in range(first, last + 1, ROLLOUT):
        is_due = tokens % EVERY == 0
        passed = (train if tokens > first or not at_start else 0.0) + evaluation * is_due
        yield passed, {"tokens": tokens, **({"eval/reward": 0.5} if is_due else {})}


def test_it_is_exact_from_the_first_rollout_to_the_end_across_evaluations(now):
    """1,200 tokens: 12 rollouts of 20 s, and evaluations of 50 s after 0, 300, 600, 900 and 1,200 tokens."""
    estimate = Remaining(TOTAL, EVERY)
    estimate.begin()
    end = 12 * 20 + 5 * 50
    said = []
    for passed, row in rows(0, TOTAL):
        now[0] += passed
        said.append(estimate.seconds(row))
        if row["tokens"]:
            assert said[-1] == pytest.approx(end - now[0]), row
    assert said[0] is None and said[-1] == 0.0


def test_a_mean_over_everything_would_jump(now):
    """The control: the estimate of before, from the speed since the first row, is wrong by half an evaluation."""
    estimate, errors, means = Remaining(TOTAL, EVERY), [], []
    estimate.begin()
    for passed, row in rows(0, TOTAL):
        now[0] += passed
        left, true = estimate.seconds(row), 12 * 20 + 5 * 50 - now[0]
        if row["tokens"]:
            errors.append(abs(left - true))
            means.append(abs((now[0] - 50) / row["tokens"] * (TOTAL - row["tokens"]) - true))
    assert max(errors) < 1e-6 and max(means) > 25


def test_the_recent_speed_counts(now):
    """Texts that become longer make rollouts slower: after ten of 40 s the first ones are forgotten."""
    estimate = Remaining(100_000, 1_000_000)
    estimate.begin()
    for number in range(1, 2 * RECENT + 1):
        now[0] += 20.0 if number <= RECENT else 40.0
        left = estimate.seconds({"tokens": number * ROLLOUT})
    assert left == pytest.approx(0.4 * (100_000 - 2 * RECENT * ROLLOUT) + 0.0)


def test_evaluations_in_each_iteration_are_part_of_the_speed(now):
    estimate = Remaining(1000, 50)
    estimate.begin()
    for tokens in (100, 200):
        now[0] += 30.0
        left = estimate.seconds({"tokens": tokens, "eval/reward": 0.5})
    assert left == pytest.approx(8 * 30.0)


def of_a_session(first, last):
    """Return the rows of a session as metrics.jsonl has them: the time of a row is that of its rollout's end."""
    elapsed, made = 50 if first == 0 else 0, []  # the evaluation at 0 comes before the first rollout
    for tokens in range(first, last + 1, ROLLOUT):
        if tokens > first or first:
            elapsed += 10  # the rollout; the update takes as long
        is_due = tokens % EVERY == 0
        timed = {ELAPSED: elapsed} if tokens else {}  # nothing is rolled out before the first row
        made.append({"tokens": tokens, **timed, **({"eval/reward": 0.5} if is_due else {})})
        elapsed += 10 * (tokens > 0) + 50 * is_due * (tokens > 0)
    return made


def test_a_resumed_run_knows_its_speed_and_its_evaluations_from_its_rows(now):
    before = of_a_session(0, 700)
    now[0] = 5_000.0  # another session, of another process
    estimate = Remaining(TOTAL, EVERY)
    estimate.begin(700, before)
    for passed, row in rows(800, TOTAL, at_start=False):
        now[0] += passed
        left = estimate.seconds(row)
        assert left == pytest.approx(5_000 + 5 * 20 + 2 * 50 - now[0]), row


def test_times_of_several_sessions_are_not_subtracted_from_each_other(now):
    estimate = Remaining(TOTAL, EVERY)
    estimate.begin(600, [{"tokens": 400, ELAPSED: 900}, {"tokens": 500, ELAPSED: 20}, {"tokens": 600, ELAPSED: 40}])
    assert [passed.seconds for passed in estimate.plain] == [20]


def test_the_screens_begin_with_the_resumed_tokens_and_show_what_is_left(now, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    plain, live = PlainScreen(TOTAL, EVERY), LiveScreen(TOTAL, EVERY, console)
    for screen in (plain, live):
        screen.begin(700, of_a_session(0, 700))
    now[0] += 20
    for screen in (plain, live):
        screen.row({"tokens": 800})
        screen.close()
    assert "left 0:03:00" in capsys.readouterr().out  # 4 rollouts of 20 s and 2 evaluations of 50 s
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    assert "800 / 1,200 tokens" in shown and "0:03:00 left" in shown


def test_a_run_s_screen_knows_when_it_evaluates(monkeypatch):
    config = TrainConfig(total_tokens=TOTAL, evaluation=EvaluationConfig(every=EVERY))
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        screen = make_screen(config, TrainOptions())
        assert (screen.remaining.total, screen.remaining.every) == (TOTAL, EVERY)
