"""Rewards that fail or are slow: the score of a failed row by `on_failure`, and the reward's share of the time."""

import math
import re
import time
import warnings

import pytest

from agents import DropEpisodes, EpisodeMetrics, TrainingWarnings, load_checkpoint, save_checkpoint
from tests.helpers.command import run, settings, small_model
from tests.helpers.training import TOKENIZER, Recorder, run_state, same_weights, tiny_agent, tiny_env, weights
from textenv import RewardError
from textenv.episodes import failure_policy as failures
from textenv.episodes.failure_policy import Failures
from textenv.rewards import DROPPED, AsyncFunction, BatchReward, RowReward

pytestmark = pytest.mark.filterwarnings("ignore:.*(such rows|fewer than 4 in each)")


def is_bad(preds):
    return sum(preds.ids) % 3 == 0


def score(preds):
    return {"sum": sum(preds.ids) / 30}


def raising(prompt, preds, done):
    if done and is_bad(preds):
        raise ConnectionError("gone")
    return score(preds) if done else 0.0


def answering(instead):
    """Return the reward `raising` with the answer `instead` in place of each failure."""
    return lambda prompt, preds, done: (instead if is_bad(preds) else score(preds)) if done else 0.0


class Rows(RowReward):
    def score_row(self, prompt, preds):
        return raising(prompt, preds, True)


class Batch(BatchReward):
    """A batch reward that is NaN in single rows."""

    def score(self, prompts, preds, dones):
        return [math.nan if is_bad(completion) else score(completion) for completion in preds]


class Fragile(BatchReward):
    """A batch reward that fails for all rows if one is bad."""

    def score(self, prompts, preds, dones):
        if any(map(is_bad, preds)):
            raise ConnectionError("gone")
        return [score(completion) for completion in preds]


@pytest.fixture
def patient(monkeypatch):
    """Let any share of the episodes fail."""
    monkeypatch.setattr(failures, "MOST_DROPPED", 1.0)


def trained(env, rollouts=3):
    model, recorder = tiny_agent(env, n_envs=8), Recorder()
    model.learn(32 * rollouts, callback=[EpisodeMetrics(), recorder], log_interval=None)
    return model, [info for info, _ in recorder.episodes()]


@pytest.mark.parametrize(("reward", "score_at"), [(raising, "step"), (Rows(), "done"), (Batch(), "rollout_end")])
@pytest.mark.parametrize(("on_failure", "instead"), [("drop", DROPPED), (-1.0, {"failure": -1.0})])
def test_the_same_training_as_with_a_reward_that_answers(reward, score_at, on_failure, instead, patient):
    model, infos = trained(tiny_env(reward, score_at=score_at, on_failure=on_failure))
    env = tiny_env(answering(instead), score_at=score_at)
    other = tiny_agent(env, n_envs=8)
    other.learn(32 * 3, callback=[DropEpisodes()] if on_failure == "drop" and score_at != "rollout_end" else [])
    assert same_weights(weights(model), weights(other))
    n_failed = sum(info["dropped"] if on_failure == "drop" else "failure" in info["reward_parts"] for info in infos)
    assert 0 < n_failed == model.get_env().env.failures.n_failed < len(infos)
    key = "episode/dropped" if on_failure == "drop" else "episode/failed"
    assert model.logger.name_to_value[key] > 0


def test_an_episode_that_fails_midway_is_dropped_at_its_end_also_after_a_resume(patient, tmp_path):
    def second_token(prompt, preds, done):
        if len(preds) == 2 and preds[-1] % 2:
            raise KeyError("no")
        return 0.1 * float(preds[-1])

    def agent():
        return tiny_agent(tiny_env(second_token, on_failure="drop", stop_ids=[]), n_envs=8, n_steps=6)

    model, recorder = agent(), Recorder()
    model.learn(8 * 6, callback=recorder)  # half of the episodes are still running
    save_checkpoint(model, tmp_path / "saved")
    assert any(episode.failed for episode in model.get_env().lanes.state.episodes)
    resumed_model, resumed = agent(), Recorder()
    load_checkpoint(resumed_model, tmp_path / "saved")
    model.learn(8 * 6, callback=recorder, reset_num_timesteps=False)
    resumed_model.learn(8 * 6, callback=resumed, reset_num_timesteps=False)
    assert run_state(model) == run_state(resumed_model)
    episodes = list(resumed.episodes())
    assert {info["dropped"] for info, _ in episodes} == {True, False}
    dropped_and_ids = [(info["dropped"], TOKENIZER.encode(info["text"])) for info, _ in episodes]
    assert all(is_dropped == bool(ids[1] % 2) for is_dropped, ids in dropped_and_ids if len(ids) == 4)  # without EOS


def test_a_call_that_raises_fails_for_all_its_rows(patient):
    model, infos = trained(tiny_env(Fragile(), on_failure=-1.0, score_at="rollout_end"), rollouts=1)
    assert all("failure" in info["reward_parts"] for info in infos)


@pytest.mark.parametrize("value", [None, "good", math.inf, {"part": math.nan}])
def test_a_score_that_is_no_number_is_a_failure(value):
    env = tiny_env(lambda *_: value, on_failure=-2.0)
    env.reset(seed=0)
    assert env.step(1)[1] == -2.0


def test_more_than_five_in_a_hundred_stop_the_run():
    counted = Failures("drop")
    counted.count(50, 5)
    with pytest.raises(RewardError, match=r"at most 5% of the episodes, got 6 of the last 51.*on_failure='raise'"):
        counted.count(1, 1)
    counted = Failures("drop")
    counted.count(10_000, 0)
    counted.count(50, 50)
    with pytest.raises(RewardError, match="got 51 of the last 1000"):
        counted.count(1, 1)
    Failures(0.0).count(10, 10)
    with pytest.raises(RewardError, match="at most 5% of the episodes"):
        tiny_agent(tiny_env(raising, on_failure="drop"), n_envs=8).learn(32 * 10)


def test_the_first_failure_is_shown_and_the_default_raises():
    env = tiny_env(raising, on_failure=-1.0)
    with pytest.warns(UserWarning, match=r"The reward has no score of \d of \d rows; such rows earn -1.*Connection"):
        trained(env, rollouts=1)
    with pytest.raises(RewardError, match=r"`get_reward` raised ConnectionError: gone \(lane"):
        trained(tiny_env(raising))


def test_an_env_alone_refuses_to_drop_an_episode():
    env = tiny_env(raising, on_failure="drop")
    env.reset(seed=0)
    with pytest.raises(RewardError, match="Expected a reward of every finished row, got DROPPED"):
        for token in (1, 1, 1, 3, 3, 3, 3, 3):
            if env.step(token)[2]:
                env.reset()


def test_options_that_cannot_work_are_refused():
    async def judge(prompt, preds):
        return 1.0

    with pytest.raises(ValueError, match="on_failure to be given to the AsyncFunction, got 'drop' for the env"):
        tiny_env(AsyncFunction(judge), on_failure="drop")
    with pytest.raises(ValueError, match="'raise', 'drop' or a number, got 'skip'"):
        tiny_env(on_failure="skip")


@pytest.mark.parametrize(("on_failure", "code"), [("drop", 4), ("-1.0", 0), ("raise", 4)])
def test_from_a_configuration(on_failure, code, tmp_path, monkeypatch, capfd):
    lines = "class Failing:\n    def __call__(self, prompt, preds, done):\n"
    lines += "        if done and len(preds) % 2 == 0:\n            raise OSError('no')\n        return 1.0\n"
    (tmp_path / "own_failing.py").write_text(lines)
    (tmp_path / "c.yml").write_text(f"env:\n  reward: own_failing:Failing\n  on_failure: {on_failure}\n")
    monkeypatch.chdir(tmp_path)
    words = settings(small_model(tmp_path / "model"), tmp_path / "run", rollouts=2)
    assert run("train", tmp_path / "c.yml", *words, "--allow", "own_failing", "--quiet") == code
    error = capfd.readouterr().err
    assert {"drop": "at most 5% of the episodes", "raise": "raised OSError: no (lane"}.get(on_failure, "") in error


# The time that the reward takes


class Slow:
    """A reward that seems to take some seconds, as it moves the clock."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.passed = seconds, 0.0
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + self.passed)

    def __call__(self, prompt, preds, done):
        self.passed += self.seconds
        return float(preds[-1])


def test_the_rewards_share_of_the_time_is_logged_and_a_large_one_warns(monkeypatch):
    for seconds, is_slow in ((1.0, True), (0.0, False)):
        model = tiny_agent(tiny_env(Slow(monkeypatch, seconds)), n_envs=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(32 * 2, callback=[EpisodeMetrics(), TrainingWarnings()], log_interval=None)
        messages = [str(warning.message) for warning in caught if "The reward takes" in str(warning.message)]
        assert len(messages) == is_slow
        share = model.logger.name_to_value["time/reward_share"]
        assert (0.9 < share <= 1.0) if is_slow else (0.0 < share < 0.5)
        if is_slow:
            assert (
                re.search("takes (9.|100)% of the time", messages[0])
                and "BatchReward" in messages[0]
                and "HTTPJudge" in messages[0]
            )
