"""A judge beside the trained reward: the gap by hand and on any scale, the early stop, and a resumed run."""

import math
from pathlib import Path

import pytest

from agents import Checkpoints, Evaluate, EvaluationConfig, ModelConfig, TrainConfig, load_checkpoint
from agents.configuration.defaults import default_settings
from agents.evaluation.judge_gap import judge_gap
from agents.evaluation.prompt_scores import PromptScores
from tests.helpers.training import PROMPTS, TOKENIZER, tiny_agent, tiny_env
from textenv.metrics import Scores, mean_of
from textenv.rewards import DROPPED

LETTER = 5


def letters(prompt, preds, done):
    return float(preds[-1] == LETTER)


def judge(factor, shift=0.0):
    """Return a judge whose score is a linear function of the sum of rewards that `letters` gives to a text."""
    return lambda prompt, preds, done: factor * list(preds.ids).count(LETTER) + shift


def learner():
    return tiny_agent(tiny_env(letters, stop_ids=()), n_envs=16, n_epochs=4)


def look(**kwargs):
    settings = {"every": 1, "reward": letters, "n": 4, "stop_ids": (), "max_new_tokens": 4}
    return Evaluate(PROMPTS, TOKENIZER, **settings, **kwargs)


def scores(reward, of_judge):
    return PromptScores(["a"] * len(reward), {"reward": mean_of(reward), "judge": mean_of(of_judge)})


def test_the_gap_by_hand():
    """Deviations of the start: sqrt(2) for the reward, 10 sqrt(2) for the judge."""
    start = scores([0.0, 2.0], [0.0, 20.0])
    assert judge_gap(start, start) == 0.0
    up, down = scores([3.0, 3.0], [5.0, 25.0]), scores([3.0, 3.0], [-10.0, 10.0])
    assert judge_gap(start, up) == pytest.approx(2 / math.sqrt(2) - 5 / (10 * math.sqrt(2)))
    assert judge_gap(start, down) == pytest.approx(2 / math.sqrt(2) + 10 / (10 * math.sqrt(2)))
    both = scores([1.0, 3.0], [10.0, 30.0])  # by one and by ten: equal in deviations
    assert judge_gap(start, both) == pytest.approx(0.0)
    # A prompt all of whose texts were dropped has no score, and is in no deviation.
    dropped = PromptScores(
        ["a"] * 3, {**start.scores, "judge": Scores(mean_of([0.0, 20.0, 9.0]).rows * [[1], [1], [0]])}
    )
    assert judge_gap(dropped, up) == pytest.approx(judge_gap(start, up))
    for same in (scores([1.0, 1.0], [0.0, 20.0]), scores([0.1 + 0.2, 0.3], [0.0, 20.0]), scores([1.0], [2.0])):
        assert math.isnan(judge_gap(same, up))


def test_training_stops_where_the_judge_falls_while_the_reward_rises():
    falling = look(judge=judge(-1.0), patience=3)
    model = learner()
    model.learn(64 * 8, callback=falling)
    first, *_, last = falling.history.values()
    assert falling.best == "judge" and len(falling.history) < 8 and model.num_timesteps < 64 * 8
    assert last["reward"] > first["reward"] and last["judge"] < first["judge"]
    assert first["gap"] == 0.0 and last["gap"] > 0.5
    assert falling.best_value == max(row["judge"] for row in falling.history.values())


@pytest.mark.parametrize("settings", [{"judge": judge(20.0, -3.0)}, {"judge": judge(-1.0), "best": "reward"}])
def test_training_goes_on_where_both_rise_or_the_reward_decides(settings):
    """The controls. A judge that is the reward on another scale never has a gap."""
    rising = look(patience=3, **settings)
    model = learner()
    model.learn(64 * 8, callback=rising)
    assert len(rising.history) == 9 and model.num_timesteps == 64 * 8
    if "best" not in settings:
        assert [row["gap"] for row in rising.history.values()] == pytest.approx([0.0] * 9, abs=1e-9)


def test_the_judge_is_the_default_of_best_where_there_is_one():
    assert look().best == "reward" and look(judge="length").best == "judge"
    assert look(judge="length", best="reward").best == "reward"
    config = TrainConfig(model=ModelConfig("gpt2"))
    assert default_settings(config) == {}
    config.evaluation = EvaluationConfig(judge="length")
    assert default_settings(config) == {"evaluation.best": "judge"}


def test_a_gap_that_is_not_known_is_no_number():
    """The judge drops all texts: neither it nor the gap has a figure, and training goes on."""
    dropping = look(judge=lambda prompt, preds, done: DROPPED, best="reward")
    learner().learn(64, callback=dropping)
    assert all(math.isnan(row[name]) for row in dropping.history.values() for name in ("judge", "gap"))


@pytest.mark.slow
def test_a_resumed_run_has_the_gaps_of_one_that_never_stopped(tmp_path):
    """The start's scores come from scores.json, so that the deviations are the same."""

    def judged(folder):
        return look(judge=judge(-1.0), patience=4, folder=tmp_path / folder)

    whole = judged("whole")
    learner().learn(64 * 8, callback=whole)
    model = learner()
    model.learn(64 * 3, callback=[Checkpoints(tmp_path / "run", every=2, keep=9), judged("resumed")])
    resumed = learner()
    load_checkpoint(resumed, sorted(Path(tmp_path / "run").iterdir())[0])
    again = judged("resumed")
    resumed.learn(64 * 6, reset_num_timesteps=False, callback=again)
    assert again.history == whole.history and resumed.num_timesteps < 64 * 8
    assert (again.best_value, again.best_at) == (whole.best_value, whole.best_at)
    for name in ("history.json", "scores.json", "best/best.json"):
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "whole" / name).read_text()
