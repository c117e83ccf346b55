"""`textenv tune`: its table and best configuration, joined, stopped and killed searches, and what it refuses.

A search trains its trials, and reads its configuration for each of them and each end of a range: a test that runs one
takes about two seconds.
"""

import gc
import json
import os
import re
import signal

import pytest
import yaml

from agents.cli import main as cli
from agents.errors import CommandError, Exit, NumericsError
from agents.policies.lm_policy import LMPolicy
from agents.runs import tune as tuning
from agents.runs.live_screen import LiveScreen
from agents.runs.screens import PlainScreen
from tests.helpers.command import ROLLOUT, files_here, in_a_fork, refused, rows, run, settings

RANGES = {"algorithm.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
N = 2


def search_of(model, folder):
    """Return the words of a search of small trials, whose ranges stand in a file."""
    (folder / "tune.yml").write_text(yaml.safe_dump({"tune": {"max_kl": 50.0, "ranges": RANGES}}))
    more = {"device": "cpu", "evaluation.every": ROLLOUT, "trials": N}
    return [folder / "tune.yml", *settings(model, rollouts=2, **more)]


@pytest.fixture
def words(model, tmp_path):
    return search_of(model, tmp_path)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a search that was never stopped."""
    folder = tmp_path_factory.mktemp("searches")
    assert run("tune", *search_of(model, folder), "--out", folder / "whole", "--quiet") == 0
    return folder / "whole"


def table(folder):
    return (folder / "trials.md").read_text()


def test_it_ends_with_a_table_and_the_best_as_a_file(words, tmp_path, capsys):
    out = tmp_path / "search"
    judge = "--evaluation.judge={id: length, args: {target: 3}}"  # trials may be compared by what they do not train on
    assert run("tune", *words, judge, "--evaluation.best=judge", "--out", out) == 0
    said = capsys.readouterr().out
    assert re.search(r"^trial 1: algorithm\.learning_rate=0\.0", said, re.MULTILINE)
    assert re.search(r"^trial 1: done  judge \S+  kl \S+  best: [01]  left 0:00:00$", said, re.MULTILINE)
    assert said.count("eval/reward") == said.count("eval/judge") == N * 3 and table(out) in said
    assert table(out).startswith("| trial | state | algorithm.learning_rate | judge | kl | tokens |\n")
    assert "the evaluations use the prompts of training" in said
    best = re.search(r"best: trial (\d)", said)[1]
    text = (out / "best.yml").read_text()
    assert text.startswith(f"# The best of {N} trials of `textenv tune` in {out}: trial {best}.\n# On the prompts")
    config, _, _ = cli.train_config([str(out / "best.yml")])
    assert config == cli.train_config([str(out / "trials" / f"00{best}" / "config.yml")])[0] and config.out is None
    for number in map(str, range(N)):  # models of the best one alone
        kept = {path.name for path in (out / "trials" / f"00{number}").iterdir()}
        assert ({"checkpoints", "model", "best"} <= kept) is (number == best)
        assert {"metrics.jsonl", "results.json", "history.json", "config.yml"} <= kept
    # The best configuration trains to the very figures of its trial.
    assert run("train", out / "best.yml", "--quiet", "--out", tmp_path / "again") == 0
    trial = [{key: row[key] for key in row if not key.startswith("eval/kl")} for row in rows(out / f"trials/00{best}")]
    assert rows(tmp_path / "again") == trial


@pytest.mark.slow
def test_killed_and_continued_it_is_the_same_search(whole, words, tmp_path, monkeypatch):
    """A process is killed in the middle of trial 1, behind a checkpoint; the same command goes on with that trial."""
    out, original = tmp_path / "search", tuning.PruningCallback._on_rollout_start

    def die(self):
        original(self)
        if self.trial.number == 1 and self.model.num_timesteps == ROLLOUT:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.PruningCallback, "_on_rollout_start", die)
        status = os.waitpid(in_a_fork("tune", *words, "--out", out, "--quiet"), 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL and "| 1 | " not in table(out)
    assert run("tune", *words, "--out", out, "--quiet") == 0
    assert table(out) == table(whole)
    for number in range(N):
        assert rows(out / "trials" / f"00{number}") == rows(whole / "trials" / f"00{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("at", "said"), [(8, f"{ROLLOUT} tokens, saved"), (ROLLOUT + 8, f"{2 * ROLLOUT} tokens")])
def test_ctrl_c_saves_the_trial_and_the_same_command_goes_on(at, said, whole, words, tmp_path, monkeypatch, capfd):
    """Also in the last iteration of a trial, after which the next one must not start."""
    out, original = tmp_path / "search", tuning.PruningCallback._on_step

    def interrupt(self):
        if self.model.num_timesteps == at and self.trial.number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.PruningCallback, "_on_step", interrupt)
        assert run("tune", *words, "--out", out, "--quiet") == 130
    assert f"stopped after {said}; the same command goes on" in capfd.readouterr().err
    assert run("tune", *words, "--out", out, "--quiet") == 0
    assert table(out) == table(whole)


def test_ctrl_c_between_two_trials(words, tmp_path, monkeypatch, capfd):
    def between(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.Search, "step", between)
    assert run("tune", *words, "--out", tmp_path / "search") == 130
    assert "interrupted; the same command goes on" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_trials(whole, words, tmp_path):
    out = tmp_path / "search"
    both = [in_a_fork("tune", *words, "--out", out, "--quiet") for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in both] == [0, 0]
    assert table(out) == table(whole)  # drawn at random still, so that it does not matter which is finished first


@pytest.mark.slow
def test_a_trial_that_cannot_be_trained_is_noted_and_others_go_on(words, tmp_path, monkeypatch):
    original = tuning.train_in

    def train_in(run, *rest):
        if run.path.name == "000":
            raise NumericsError("Expected finite weights, got a NaN | in one.")
        return original(run, *rest)

    monkeypatch.setattr(tuning, "train_in", train_in)
    assert run("tune", *words, "--out", tmp_path / "search", "--quiet") == 0
    done, failed = table(tmp_path / "search").splitlines()[2:]
    assert done.startswith("| 1 | done |") and "| 0 | failed: Expected finite weights, got a NaN / in one. |" in failed


@pytest.mark.slow
def test_another_error_stops_the_search_which_goes_on_with_that_trial(words, tmp_path, monkeypatch, capfd):
    def train_in(*arguments):
        raise CommandError("The reward raised OSError.", Exit.REWARD)

    words = [*words, "--trials=1", "--out", tmp_path / "search", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train_in", train_in)
        assert run("tune", *words) == Exit.REWARD
    said = capfd.readouterr().err
    assert "trial 0: The reward raised OSError. Once that is mended, the same command goes on." in said
    assert run("tune", *words) == 0
    assert "| 0 | done |" in table(tmp_path / "search")


@pytest.mark.slow
def test_a_trial_leaves_no_model_in_memory(words, tmp_path, monkeypatch):
    def n_policies():
        return sum(issubclass(type(thing), LMPolicy) for thing in gc.get_objects())

    found, original = [], tuning.Study.taken

    def taken(self, n):
        found.append(n_policies())
        return original(self, n)

    monkeypatch.setattr(tuning.Study, "taken", taken)
    gc.collect()
    before = n_policies()
    gc.disable()
    try:
        assert run("tune", *words, "--trials=1", "--out", tmp_path / "search", "--quiet") == 0
    finally:
        gc.enable()
    assert found == [before, before]


def test_a_line_of_a_signal_goes_below_a_live_view(capfd):
    tuning.TrialScreen(PlainScreen(8, 8), 0).note("stopping")
    assert capfd.readouterr().err == "stopping\n"
    tuning.TrialScreen(live := LiveScreen(8, 8), 0).note("stopping")
    assert capfd.readouterr().err == "" and live.last_note == "stopping"


@pytest.mark.slow
def test_without_a_feasible_trial_it_fails_and_says_so(words, tmp_path, capfd):
    assert (
        run("tune", *words, "--trials=1", "--tune.max_kl=1e-9", "--out", tmp_path / "search", "--quiet") == Exit.FAILED
    )
    assert "a divergence of at most 1e-09 nats a text (tune.max_kl), got none of 1" in capfd.readouterr().err
    assert not (tmp_path / "search" / "best.yml").exists()
    assert table(tmp_path / "search").count("| over max_kl |") == 1


@pytest.mark.slow
def test_a_pruned_trial_is_broken_off_and_a_pruned_one_is_never_the_best(words, tmp_path, monkeypatch, capsys):
    """With --json, there is a line for each iteration and one for each trial."""
    monkeypatch.setattr(tuning.Trial, "report", lambda self, step, value, kl: step == 1)
    assert run("tune", *words, "--trials=1", "--out", tmp_path / "search", "--json") == Exit.FAILED
    *first, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["trial"], line["tokens"]) for line in first] == [(0, 0), (0, ROLLOUT)]
    assert last["state"] == "pruned" and last["figures"]["tokens"] == ROLLOUT and last["best"] is None
    assert last["values"].keys() == RANGES.keys() and "words" not in last
    assert re.search(rf"^\| 0 \| pruned \| .* \| {ROLLOUT} \|$", table(tmp_path / "search"), re.MULTILINE)


def test_a_dry_run_writes_nothing(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("tune", *words, "--dry-run") == 0
    assert "the whole run, 128 tokens" in (said := capsys.readouterr().out) and "2 trials of that length" in said
    assert files_here() == set()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"kl.coeff": {"choices": [0]}}, "tune.ranges: unrecognized arguments: --kl.coeff=0: did you mean 'kl.coef'?"),
        ({"algorithm.n_epochs": {"low": 0, "high": 4}}, "Expected algorithm.n_epochs to be above 0, got 0"),
        ({"model.tokenizer": {"low": 0, "high": 1}}, "Expected choices in tune.ranges.model.tokenizer"),
        ({"algorithm.args.foo": {"choices": [1]}}, "for algorithm.args, got 'foo'"),
        ({"env.args.foo": {"choices": [1]}}, "got 'foo'"),
        ({"algorithm.surrogate": {"choices": [{"id": "os:system"}]}}, None),
    ],
)
def test_a_range_that_does_not_fit_is_refused_before_anything_runs(
    ranges, message, words, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    if message is None:  # which the trial's own agent would build: a value has no more rights than a configuration
        search = [*words, f"--tune.ranges={json.dumps(ranges)}", "--trials=1", "--out", "search", "--quiet"]
        assert run("tune", *search) == Exit.FAILED
        assert "got 'os:system': if you trust it, add --allow os" in table(tmp_path / "search")
        return
    assert message in refused(capfd, "tune", *words, f"--tune.ranges={json.dumps(ranges)}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.top_k=2", "Expected a task without masks and replies, and no top_k, top_p or min_p"),
        ("--tune.max_kl=0", "Expected tune.max_kl to be above 0, got 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(option, message, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, "tune", *words, option)


@pytest.mark.slow
def test_a_file_of_a_training_and_one_of_ranges(model, tmp_path, monkeypatch):
    """The ranges may stand in a file of their own, behind that of a training; whole numbers stay whole."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yml").write_text("algorithm: {n_epochs: 4, args: {clip_range: 0.1}}\n")
    text = "tune: {ranges: {algorithm: {n_epochs: {low: 1, high: 4}, args: {ent_coef: {low: 0, high: 1e-2}}}}}\n"
    (tmp_path / "ranges.yml").write_text(text)
    more = settings(model, rollouts=1, device="cpu")
    assert run("tune", "train.yml", "--config", "ranges.yml", *more, "--trials=1", "--quiet", "--out=search") == 0
    config = cli.train_config(["search/best.yml"])[0]
    assert type(config.algorithm.n_epochs) is int and type(config.algorithm.args["ent_coef"]) is float
    assert config.algorithm.args["clip_range"] == 0.1
    with pytest.raises(CommandError, match="tune reads it: leave it out"):
        cli.train_config(["train.yml", "--config", "ranges.yml"])


@pytest.mark.slow  # several seconds: a search of one trial
def test_where_every_trial_fails_the_first_says_why(words, tmp_path, capfd):
    words = [*words, "--trials=1", "--evaluation.best=judge", "--out", tmp_path / "search", "--quiet"]
    assert run("tune", *words) == Exit.FAILED
    said = capfd.readouterr().err
    assert "got 1 that failed, the first by: Expected `best` to be one of ['length', 'reward', 'kl'," in said
