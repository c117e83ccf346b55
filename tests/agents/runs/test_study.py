"""The study of a search without any training: its trials, its bound, its pruning, and what is read from its file."""

import fcntl
import math
import os
import pickle
import re
import signal
import sqlite3

import pytest
import sqlalchemy

from agents.configuration.search import SearchConfig, TuneConfig, read_ranges
from agents.errors import CommandError
from agents.runs.study import STARTUP, Study

RANGES = {"kl.coef": {"low": 0.0, "high": 1.0}, "algorithm.advantage": {"choices": ["gae", "grpo"]}}


@pytest.fixture(autouse=True)
def no_sync():
    """Let SQLite write without waiting for the disk, for which it would wait some ten times a trial."""

    def connected(connection, record):
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)


def open_study(folder, max_kl=2.0, ranges=RANGES, **changes):
    config = TuneConfig(tune=SearchConfig(ranges, max_kl), **changes)
    return Study(folder, config, read_ranges(ranges))


def finish(study, reward, kl, n=100):
    """Take a trial and end it with these figures; return the words that set its values."""
    with study.taken(n) as trial:
        study.tell(trial, "reward", {"reward": reward, "kl": kl, "tokens": 64})
        return trial.words


def state(study):
    return [row["state"] for row in study.rows()]


def test_the_best_is_feasible_by_hand(tmp_path):
    study = open_study(tmp_path, max_kl=2.0)
    for reward, kl in ((0.5, 1.0), (0.9, 2.1), (0.7, 2.0), (0.7, 0.1), (None, 1.0), (0.8, None)):
        finish(study, reward, kl)
    with study.taken(100) as trial:
        study.give_up(trial, "a NaN")
    rows = study.rows()
    assert state(study) == ["done", "over max_kl", "done", "done", "failed", "failed", "failed"]
    assert study.best(rows)["trial"] == 2  # the earliest of equal ones
    assert [row["note"] for row in rows[4:]] == [*["no finite reward or kl"] * 2, "a NaN"]
    assert study.best(rows[1:2]) is None


def test_a_figure_that_is_better_when_lower(tmp_path):
    config = TuneConfig(tune=SearchConfig(RANGES))
    config.evaluation.higher_is_better = False
    study = Study(tmp_path, config, read_ranges(RANGES))
    for value in (3.0, 1.0, 2.0):
        finish(study, value, 0.0)
    assert study.best(study.rows())["trial"] == 1


@pytest.mark.slow
def test_the_sampler_stays_away_from_what_is_not_feasible(tmp_path):
    """The reward rises with kl.coef, of which a half is not feasible; without the bound the sampler goes there."""

    def share_above(folder, max_kl):
        study = open_study(folder, max_kl, {"kl.coef": RANGES["kl.coef"]})
        drawn = []
        for _ in range(30):
            with study.taken(30) as trial:
                ((_, value),) = trial.drawn
                study.tell(trial, "reward", {"reward": value, "kl": 4 * value})
                drawn.append(value)
        return sum(value > 0.5 for value in drawn[10:]) / 20

    assert share_above(tmp_path / "bounded", 2.0) <= 0.5 < 0.8 <= share_above(tmp_path / "free", 100.0)


def test_pruning_by_hand(tmp_path):
    study = open_study(tmp_path, max_kl=2.0)
    for reward in (0.4, 0.5, 0.6, 0.7, 0.8):
        with study.taken(100) as trial:
            assert not trial.report(1, reward, 0.5)  # too few finished trials to compare with
            assert not trial.report(2, 0.9, 2.5)  # above the bound: unknown
            study.tell(trial, "reward", {"reward": reward, "kl": 1.0})
    assert STARTUP == 5
    for reward, kl, is_pruned in ((0.61, 0.5, False), (0.59, 0.5, True), (0.9, 2.1, True)):
        with study.taken(100) as trial:
            assert trial.report(1, reward, kl) is is_pruned, (reward, kl)
            study.tell(trial, "reward", {"reward": reward, "kl": kl}, is_pruned)
    with study.taken(100) as trial:  # the values above the bound at step 2 count for nothing
        assert not trial.report(2, 0.1, 0.5)
    assert state(study)[5:] == ["done", "pruned", "pruned", "running"]


def test_another_process_draws_what_this_one_would(tmp_path):
    """A study that is opened again draws the same values, both at random and by a sampler that has learnt."""
    kept = open_study(tmp_path / "kept")
    whole = [finish(kept, i % 3, 0.5) for i in range(STARTUP + 2)]
    anew = [open_study(tmp_path / "anew") for _ in range(2)]
    assert [finish(anew[i % 2], i % 3, 0.5) for i in range(STARTUP + 2)] == whole
    assert len(set(map(tuple, whole))) == len(whole)
    assert finish(open_study(tmp_path / "seed", seed=1), 0, 0.5) != whole[0]


def test_a_trial_that_was_broken_off_is_taken_up_and_not_counted_twice(tmp_path):
    study = open_study(tmp_path)
    finish(study, 0.1, 0.1)
    pid = os.fork()
    if pid == 0:  # takes a trial, reports, and is killed
        with open_study(tmp_path).taken(3) as trial:
            trial.report(1, 0.3, 0.1)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert state(study) == ["done", "running"]
    with study.taken(3) as again:
        assert again.number == 1 and again.reported == {1}
        assert not again.report(1, 0.4, 0.1)  # a repeated evaluation changes nothing
        with open_study(tmp_path).taken(3) as other:  # its folder is locked
            assert other.number == 2
            with open_study(tmp_path).taken(3) as none:
                assert none is None
        study.tell(again, "reward", {"reward": 0.5, "kl": 0.1})
    assert state(study) == ["done", "done", "running"]
    kept = study.study.get_trials()[1]
    assert kept.intermediate_values == {1: 0.3} and again.words == study.rows()[1]["words"]


def test_taking_waits_for_the_lock(tmp_path):
    study = open_study(tmp_path)
    with study.alone(), (tmp_path / "lock").open("a") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_configuration_is_refused(tmp_path):
    open_study(tmp_path)
    open_study(tmp_path, trials=50, device="cuda", out="elsewhere", samples=9)  # have no influence on a trial
    with pytest.raises(CommandError, match=re.escape("got another (tune.max_kl: 2.0 -> 3.0): give another --out")):
        open_study(tmp_path, max_kl=3.0)
    with pytest.raises(CommandError, match="total_tokens: 100000 -> 5"):
        open_study(tmp_path, total_tokens=5)
    ranges = {**RANGES, "kl.coef": {"low": 0.0, "high": 2.0}}
    with pytest.raises(CommandError, match=re.escape("tune.ranges.kl.coef.high: 1.0 -> 2.0")):
        open_study(tmp_path, ranges=ranges)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "study.db").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(CommandError, match=r"Expected Optuna's study in .*study\.db, got: .*not a database"):
        open_study(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(CommandError, match="Expected the folder of a search, or a new one, got the run"):
        open_study(tmp_path / "run")
    with pytest.raises(CommandError, match="Expected a folder without"):
        open_study(tmp_path / "{a}")
    with pytest.raises(CommandError, match="Expected a folder to write to"):
        open_study(tmp_path / "study.db")


def test_a_study_of_plain_optuna_is_refused(tmp_path):
    import optuna

    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="textenv")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(CommandError, match=re.escape("got another (all of it)")):
        open_study(tmp_path)


@pytest.mark.parametrize(("sql", "said"), [("param_value = 7.5", "got 7.5"), ("param_value = 1e-30", None)])
def test_values_of_a_changed_file_stay_in_their_ranges(sql, said, tmp_path):
    study = open_study(tmp_path, ranges={"kl.coef": RANGES["kl.coef"]})
    finish(study, 0.5, 0.5)
    with sqlite3.connect(tmp_path / "study.db") as file:
        file.execute(f"UPDATE trial_params SET {sql}")
    study = open_study(tmp_path, ranges={"kl.coef": RANGES["kl.coef"]})
    if said is None:
        assert math.isclose(study.rows()[0]["values"]["kl.coef"], 1e-30)
        return
    with pytest.raises(CommandError, match=f"Expected values of kl.coef within its range in .*{said}"):
        study.rows()


def test_a_choice_of_a_changed_file_is_looked_up_in_our_own(tmp_path):
    study = open_study(tmp_path)
    finish(study, 0.5, 0.5)
    with sqlite3.connect(tmp_path / "study.db") as file:
        other = """'{"name": "CategoricalDistribution", "attributes": {"choices": ["\\"os:system\\"", "\\"x\\""]}}'"""
        file.execute(f"UPDATE trial_params SET distribution_json = {other} WHERE param_name = 'algorithm.advantage'")
    with pytest.raises(CommandError, match=r"Expected values of algorithm\.advantage within its range"):
        open_study(tmp_path).rows()


def test_no_pickle_is_read_or_written(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    study = open_study(tmp_path)
    for i in range(STARTUP + 1):
        finish(study, i, 0.5)
    assert len(open_study(tmp_path).rows()) == STARTUP + 1
