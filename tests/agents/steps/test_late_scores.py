"""Scores at the end of a rollout: one call, on the right transition, in every log (invariants C1, C10)."""

import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from agents import KLPenalty, LateScores, LMPolicy, SequenceRolloutBuffer, TextVecEnv
from agents.callbacks.episode_metrics import EpisodeMetrics
from tests.helpers.training import (
    PROMPTS,
    TOKENIZER,
    Recorder,
    same_weights,
    tiny_agent,
    tiny_config,
    tiny_env,
    weights,
)
from textenv import CharTokenizer, RewardError, TextEnv

LOWER = CharTokenizer("abc")  # four tokens: a quarter of all tokens ends an episode


class Scorer(TextEnv):
    """An env that scores batches, and keeps its calls in `calls`."""

    calls: list = []

    def get_rewards(self, prompts, preds, dones):
        self.calls.append(
            [(str(prompt), pred.text, pred.lane, done) for prompt, pred, done in zip(prompts, preds, dones)]
        )
        return [{"length": 0.1 * len(pred), "text": sum(pred.ids) / 10} for pred in preds]


@pytest.fixture
def scorer():
    """Return a function that builds a `Scorer` with its own list of calls."""

    def make(prompts=PROMPTS, max_new_tokens=4, tokenizer=TOKENIZER, score_at="rollout_end", **kwargs):
        cls = type("Scorer", (Scorer,), {"calls": []})
        return cls(prompts, tokenizer, max_new_tokens=max_new_tokens, score_at=score_at, **kwargs)

    return make


def lower_agent(env, **kwargs):
    return tiny_agent(env, lm=tiny_config(vocab_size=len(LOWER)), **kwargs)


def score(ids):
    return 0.1 * len(ids) + sum(ids) / 10


def test_one_call_a_rollout_with_every_episode_that_ended(scorer):
    env, recorder = scorer(), Recorder()
    model = tiny_agent(env, n_steps=6)
    model.learn(72, callback=recorder)
    assert len(env.calls) == 3
    for rollout, call in enumerate(env.calls):
        infos = [info for step in recorder.infos[6 * rollout : 6 * rollout + 6] for info in step if info]
        assert [(text, done) for _, text, _, done in call] == [(info["text"], True) for info in infos]
        assert [prompt for prompt, *_ in call] == [str(info["prompt"]) for info in infos]


def test_c10_a_score_lands_on_the_last_transition_of_its_episode(scorer):
    """C1, C10: a lane has several episodes in a rollout, some of one token, and some straddle rollouts."""
    env, recorder = scorer(("ab", "c"), max_new_tokens=5, tokenizer=LOWER), Recorder()
    model = lower_agent(env, n_steps=12)
    model.learn(4 * 12 * 3, callback=recorder)
    rewards, expected = recorder.stacked("rewards"), np.zeros((36, 4))
    lengths, ends = set(), []
    for info, positions in recorder.episodes():
        ids = [int(recorder.actions[step][lane]) for step, lane in positions]
        expected[positions[-1]] = score(ids)
        lengths.add(len(ids))
        ends.append((positions[0][0] // 12, positions[-1][0] // 12))
        assert info["episode"]["r"] == pytest.approx(score(ids))
        assert info["reward_parts"] == pytest.approx({"length": 0.1 * len(ids), "text": sum(ids) / 10})
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert {1, 2, 5} <= lengths and any(first != last for first, last in ends) and len(ends) > 24


def test_two_episodes_of_one_lane_by_hand(scorer, monkeypatch):
    """Lane 0 writes a, end, b, c, end; lane 1 writes c, c, end, end, a. Rewards are on the ending transitions."""
    env = scorer(("ab",), max_new_tokens=4, tokenizer=LOWER)
    model = lower_agent(env, n_envs=2, n_steps=5)
    written = iter(np.array([[1, 3], [0, 3], [2, 0], [3, 0], [0, 1]]))
    forced = TextVecEnv.step_async
    monkeypatch.setattr(TextVecEnv, "step_async", lambda self, actions: forced(self, next(written)))
    recorder = Recorder()
    model.learn(10, callback=recorder)
    expected = np.zeros((5, 2))
    expected[1, 0], expected[4, 0] = 0.2 + 0.1, 0.3 + 0.5
    expected[2, 1], expected[3, 1] = 0.3 + 0.6, 0.1 + 0.0
    np.testing.assert_allclose(recorder.rewards[0], expected, atol=1e-6)
    assert [(text, lane) for _, text, lane, _ in env.calls[0]] == [("a", 0), ("cc", 1), ("", 1), ("bc", 0)]


def test_logs_have_the_late_scores(scorer):
    model, recorder = tiny_agent(scorer(), n_steps=6), Recorder()
    model.learn(24, callback=[EpisodeMetrics(), recorder], log_interval=None)
    logged = dict(model.logger.name_to_value)
    model.logger.dump = lambda step: logged.update(model.logger.name_to_value)
    model.dump_logs()  # as SB3 calls it between rollout and update
    infos = [info for info, _ in recorder.episodes()]
    mean = np.mean([info["episode"]["r"] for info in infos])
    assert mean > 0
    assert logged["rollout/ep_rew_mean"] == pytest.approx(mean) == logged["reward/task"]
    assert logged["reward/length"] == pytest.approx(np.mean([info["reward_parts"]["length"] for info in infos]))
    assert logged["reward/text"] == pytest.approx(np.mean([info["reward_parts"]["text"] for info in infos]))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_the_same_training_as_scores_at_done(scorer, algorithm):
    """The weights are equal bit for bit if every episode ends in the rollout that it began in."""
    trained = []
    for score_at in ("done", "rollout_end"):
        env = scorer(stop_ids=(), score_at=score_at)
        model = tiny_agent(env, algorithm=algorithm, n_steps=8)
        model.learn(32 * 3, callback=KLPenalty(0.1))
        trained.append(weights(model))
        assert len(env.calls) == (6 if score_at == "done" else 3)
    assert same_weights(*trained)


def test_the_same_training_as_scores_at_done_with_episodes_of_all_lengths(scorer):
    """Episodes may straddle rollouts: a score makes no difference if it comes before the returns are computed."""
    trained = []
    for score_at in ("done", "rollout_end"):
        env = scorer(("ab", "c"), max_new_tokens=5, tokenizer=LOWER, score_at=score_at)
        model = lower_agent(env, n_steps=12)
        model.learn(4 * 12 * 3)
        trained.append(weights(model))
    assert same_weights(*trained)


class Returns(BaseCallback):
    """A callback that keeps the log-probability and the return of every trained transition."""

    def _on_training_start(self):
        self.trained = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        (samples,) = self.model.rollout_buffer.get()
        pairs = zip(samples.old_log_prob.tolist(), samples.returns.tolist())
        self.trained += [(log_prob, round(value, 4)) for log_prob, value in pairs]


def test_complete_episodes_bring_the_score_to_every_token_of_an_episode_that_straddles(scorer):
    """With gamma = lambda = 1, the return of every token of an episode is its score, in whatever rollout it began."""
    env, recorder, returns = scorer(max_new_tokens=7, tokenizer=LOWER, prompts=("ab", "c")), Recorder(), Returns()
    options = {"complete_episodes": True, "normalize_advantage": False}
    model = lower_agent(env, n_envs=8, n_steps=6, gae_lambda=1.0, rollout_buffer_kwargs=options)
    model.learn(48 * 5, callback=[recorder, returns])
    log_probs, straddling, expected = recorder.stacked("log_probs"), 0, []
    for info, positions in recorder.episodes():
        straddling += positions[0][0] // 6 != positions[-1][0] // 6
        expected += [(float(log_probs[position]), round(info["episode"]["r"], 4)) for position in positions]
    assert straddling >= 6
    assert sorted(returns.trained) == sorted(expected), "each transition once; unfinished episodes still wait"


def test_evaluation_on_the_same_class_scores_at_done(scorer):
    env = scorer()
    model = tiny_agent(env)
    evaluation = TextVecEnv(scorer(), 2)
    model.learn(32, callback=EvalCallback(evaluation, n_eval_episodes=4, eval_freq=2, verbose=0))
    assert len(env.calls) == 2
    assert evaluation.env.calls and all(done for call in evaluation.env.calls for *_, done in call)
    rewards, lengths = evaluate_policy(model, evaluation, n_eval_episodes=6, return_episode_rewards=True)
    assert len(rewards) == 6 and min(rewards) > 0
    assert evaluation.lanes.unscored == []


def test_evaluation_on_the_training_env_scores_at_done_too(scorer):
    """SB3's own examples evaluate on `model.get_env()`, between one `learn` and the next."""
    model = tiny_agent(scorer())
    model.learn(16)
    rewards, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=4, return_episode_rewards=True)
    assert min(rewards) > 0
    model.learn(16)  # the reset env has late scores again
    assert len(model.get_env().env.calls[-1]) == 4


def test_a_rollout_that_was_broken_off_leaves_no_score_behind(scorer):
    """C10: episodes of a rollout that was broken off are not scored in the next one."""

    class StopAt(BaseCallback):
        def _on_step(self):
            return self.n_calls != 6

    env = scorer(max_new_tokens=3, stop_ids=())
    model = tiny_agent(env, n_steps=8)
    model.learn(64, callback=StopAt())
    assert env.calls == []
    recorder = Recorder()
    model.learn(32, callback=recorder, reset_num_timesteps=False)
    ended = [(str(info["prompt"]), info["text"]) for step in recorder.infos for info in step if info]
    assert [(prompt, text) for prompt, text, _, _ in env.calls[-1]] == ended
    for step, infos in enumerate(recorder.infos):
        for lane, info in enumerate(infos):
            assert recorder.rewards[0][step, lane] == pytest.approx(info["episode"]["r"] if info else 0.0)


def test_an_env_that_scores_at_another_time_is_refused():
    with pytest.raises(ValueError, match="Expected an env with score_at='rollout_end', got 'done'"):
        LateScores().attach(tiny_agent(tiny_env(score_at="done")))


def test_an_env_of_another_kind_is_refused():
    env = tiny_env(score_at="rollout_end")
    settings = {"policy_kwargs": {"lm": tiny_config()}, "n_steps": 8, "batch_size": 8, "device": "cpu"}
    model = PPO(LMPolicy, env, rollout_buffer_class=SequenceRolloutBuffer, **settings)
    with pytest.raises(ValueError, match="Expected the model to train on a TextVecEnv, got DummyVecEnv"):
        LateScores().attach(model)


def test_without_the_step_scores_come_at_done(scorer):
    env = scorer()
    settings = {"policy_kwargs": {"lm": tiny_config()}, "n_steps": 4, "batch_size": 16, "device": "cpu", "seed": 0}
    model = PPO(LMPolicy, TextVecEnv(env, 4), rollout_buffer_class=SequenceRolloutBuffer, **settings)
    recorder = Recorder()
    model.learn(32, callback=recorder)
    assert all(info["episode"]["r"] > 0 for info, _ in recorder.episodes())


def test_a_late_score_that_fails_names_the_row():
    """C7 at the end of a rollout."""
    env = tiny_env(lambda prompt, preds, done: float("nan"), score_at="rollout_end", prompts=["ab"])
    with pytest.raises(RewardError, match=r"finite number, got nan \(lane 0, prompt 'ab', text"):
        tiny_agent(env).learn(16)


def test_a_loaded_model_scores_late_again(scorer, tmp_path):
    model = tiny_agent(scorer())
    model.learn(16)
    model.save(tmp_path / "model.zip")
    env = scorer()
    loaded = PPO.load(tmp_path / "model.zip", env=TextVecEnv(env, 4))
    with pytest.raises(RuntimeError, match=r"\['LateScores'\]"):
        loaded.learn(16)
    env.calls.clear()
    loaded.learn(16, callback=LateScores())
    assert len(env.calls) == 1 and len(env.calls[0]) >= 4
