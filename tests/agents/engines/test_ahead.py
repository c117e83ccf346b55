"""Texts that an engine writes during the update before their rollout: weights, age, resuming, and what ends them."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import (
    Checkpoints,
    EngineLost,
    EngineRollouts,
    KLPenalty,
    SampleTable,
    TextVecEnv,
    generate,
    load_checkpoint,
    save_checkpoint,
)
from agents.doctor import examine as doctor
from agents.engines.protocol import BackgroundEngine
from agents.rollout.importance import Correction
from tests.agents.engines.test_engine import CASES, CLOSE
from tests.helpers.engines import LANES, STEPS, Background, InProcess, build, often
from tests.helpers.models import few
from tests.helpers.training import TOKENIZER, Recorder, run_state, same_weights, tiny_env, weights

pytestmark = pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")
ROLLOUT = STEPS * LANES
WHOLE = {"stop_ids": (), "max_new_tokens": STEPS}  # each text is as long as a rollout
DIFFERENT = ("engine/age", "engine/seconds")


class Figures(BaseCallback):
    """Keeps the figures of the engine of each rollout."""

    def _on_training_start(self):
        self.rollouts = getattr(self, "rollouts", [])

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        logged = self.logger.name_to_value.items()
        self.rollouts.append({name: value for name, value in logged if name.startswith("engine/")})


def ages(figures):
    return [rollout["engine/age"] for rollout in figures.rollouts]


@pytest.mark.parametrize("case", few(["everything", "plain", "groups", "turns", "priority", "stop strings"], 1))
def test_a14_without_learning_the_run_is_the_one_without(case):
    """With a learning rate of 0 old weights are the new ones: texts, numbers and figures are equal bit for bit."""
    env_kwargs, agent_kwargs, callbacks = CASES[case]
    runs = []
    for ahead in (False, True):
        model = build(env_kwargs, {**agent_kwargs, "learning_rate": 0.0})
        recorder, figures = Recorder(), Figures()
        step = EngineRollouts(Background(heat=0.7), ahead=ahead)
        model.learn(4 * ROLLOUT, callback=[step, *callbacks(), recorder, figures])
        runs.append((recorder, figures))
    (plain, plain_figures), (early, early_figures) = runs
    for name in ("observations", "actions", "rewards", "log_probs", "dones"):
        assert np.array_equal(plain.stacked(name), early.stacked(name)), name
    for one, other in zip(plain_figures.rollouts, early_figures.rollouts, strict=True):
        assert all(one[name] == other[name] for name in one if name not in DIFFERENT)
    assert ages(plain_figures) == [0] * 4
    assert ages(early_figures)[0] == 0 and all(0 < age <= 1 for age in ages(early_figures)[1:])


class TwoPolicies(BaseCallback):
    """Compares each rollout's log-probabilities with those by the weights of now and of the rollout before."""

    def _on_training_start(self):
        self.before, self.shares = None, []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        policy, buffer = self.model.policy, self.model.rollout_buffer
        view, now = buffer.view(), weights(self.model)
        ours, theirs = (array[view.steps, view.lanes] for array in (buffer.log_probs, buffer.behaviour_log_probs))
        by_now = self.log_probs(view)
        assert np.abs(ours - by_now).max() < CLOSE, "PPO's ratio starts at 1"
        if self.before is not None:
            policy.load_state_dict(self.before)
            by_before = self.log_probs(view)
            policy.load_state_dict(now)
            is_old, is_new = np.abs(theirs - by_before) < CLOSE, np.abs(theirs - by_now) < CLOSE
            assert (is_old | is_new).all() and not (is_old & is_new).all()
            self.shares.append((is_old & ~is_new).mean())
        self.before = now

    def log_probs(self, view):
        with torch.no_grad():
            return self.model.policy.lm.log_probs(view.batch, view.actions).numpy()


@pytest.mark.parametrize("env_kwargs", [WHOLE, often(4)])
def test_a14_texts_are_by_the_weights_before_the_update_and_ratios_by_those_after(env_kwargs):
    model, check, figures, engine = build(env_kwargs, {"learning_rate": 0.3}), TwoPolicies(), Figures(), Background()
    model.learn(4 * ROLLOUT, callback=[EngineRollouts(engine, ahead=True), check, figures])
    assert ages(figures)[1:] == pytest.approx(check.shares, abs=0.05)
    if env_kwargs is WHOLE:
        assert ages(figures) == [0, 1, 1, 1] and len(engine.calls) == 1 + 4
    else:
        assert 0.3 < min(check.shares) < 1, "what is missing is written by the new weights"
    assert all(rollout["engine/kl_k3"] > 1e-6 for rollout in figures.rollouts[1:])
    assert engine.n_loads == 4, "once per update"


def test_the_loss_uses_the_weights_of_older_texts(monkeypatch):
    """With all weights 1 the updates differ; texts by the policy's own weights have weights of 1 anyway."""

    def run(ahead):
        model = build(WHOLE, {"learning_rate": 0.3})
        model.learn(3 * ROLLOUT, callback=EngineRollouts(Background(), ahead=ahead))
        return torch.cat([weight.flatten() for weight in weights(model).values()])

    early, plain = run(True), run(False)
    monkeypatch.setattr(Correction, "weights", lambda self, ours, *_: np.ones(len(ours), dtype=np.float32))
    assert (run(True) - early).abs().max() > 1e-4 and (run(False) - plain).abs().max() < 1e-6


def test_the_answer_is_waited_for_after_the_update():
    """The engine has the time of the update; and no rollout begins before it has answered."""
    order = []

    class Noted(Background):
        def start(self, requests, temperature, seed):
            answer = super().start(requests, temperature, seed)
            order.append("asked")
            return lambda: order.append("waited") or answer()

    model = build(WHOLE, {})
    train = model.train
    model.train = lambda: order.append("update") or train()
    model.learn(2 * ROLLOUT, callback=EngineRollouts(Noted(), ahead=True))
    assert order == ["asked", "update", "waited"] * 2, "the end of `learn` waits, too"


@pytest.mark.parametrize("case", few(["everything", "groups", "turns"], 1))
def test_e8_a_run_resumed_with_texts_ahead_is_the_run(case, tmp_path):
    env_kwargs, agent_kwargs, callbacks = CASES[case]

    def steps():
        return [EngineRollouts(Background(heat=0.7), truncation=1.5, ahead=True), *callbacks()]

    whole, figures = build(env_kwargs, agent_kwargs), Figures()
    whole.learn(4 * ROLLOUT, callback=[*steps(), Checkpoints(tmp_path, every=2), figures])
    resumed, again = build(env_kwargs, {**agent_kwargs, "seed": 7}), Figures()
    load_checkpoint(resumed, tmp_path / f"step_{2 * ROLLOUT:012d}")
    resumed.learn(2 * ROLLOUT, callback=[*steps(), again], reset_num_timesteps=False)
    assert run_state(resumed) == run_state(whole)
    assert ages(again) == ages(figures)[2:] and min(ages(again)) > 0


def test_a_run_goes_on_after_the_end_of_learn_as_one_that_did_not_stop():
    runs = []
    for parts in ([4], [2, 2]):
        model = build(often(4), {})
        for i, n_rollouts in enumerate(parts):
            step = EngineRollouts(Background(), ahead=True)  # another engine, which has no weights yet
            model.learn(n_rollouts * ROLLOUT, callback=step, reset_num_timesteps=i == 0)
        runs.append(model)
    assert same_weights(*map(weights, runs))


@pytest.mark.slow
def test_looking_at_the_policy_does_not_disturb_what_is_written():
    def run(*callbacks):
        model = build(often(6), {})
        model.learn(3 * ROLLOUT, callback=[EngineRollouts(Background(), ahead=True), *callbacks])
        return weights(model)

    class Looks(Recorder):
        def _on_rollout_start(self):
            generate(self.model, ["ab"], TOKENIZER, max_new_tokens=3)
            doctor.check(self.model.policy, self.training_env.env)

    assert same_weights(run(), run(Looks(), SampleTable(["ab"], TOKENIZER, every=1, max_new_tokens=3), KLPenalty(0.0)))


def test_texts_for_another_env_are_forgotten():
    engine, figures = Background(), Figures()
    model = build(often(4), {})
    model.learn(2 * ROLLOUT, callback=EngineRollouts(engine, ahead=True))
    model.set_env(TextVecEnv(tiny_env(prompts=("wxyz", "w"), **often(5)), LANES))
    engine.calls.clear()
    model.learn(2 * ROLLOUT, callback=[EngineRollouts(engine, ahead=True), figures], reset_num_timesteps=False)
    assert len(engine.calls[0]) >= LANES and ages(figures)[0] == 0 < ages(figures)[1]
    prompts = {tuple(TOKENIZER.encode(text)) for text in ("wxyz", "w")}
    assert {tuple(tokens) for tokens, _ in engine.calls[0]} <= prompts


def test_after_a_reset_or_a_stop_rows_without_a_text_are_requested():
    class Stops(BaseCallback):
        def _on_step(self):
            return self.n_calls != STEPS + 3

    engine, figures = Background(), Figures()
    model = build(often(4), {})
    model.learn(3 * ROLLOUT, callback=[EngineRollouts(engine, ahead=True), Stops()])
    assert model.num_timesteps == ROLLOUT + 3 * LANES
    for reset in (False, True):
        model.learn(2 * ROLLOUT, callback=[EngineRollouts(engine, ahead=True), figures], reset_num_timesteps=reset)
    assert len(figures.rollouts) == 4 and ages(figures)[0] == 0, "what was written for the stopped rollout is gone"


def test_an_engine_that_writes_in_this_process_is_refused():
    assert not isinstance(InProcess(), BackgroundEngine) and isinstance(Background(), BackgroundEngine)
    with pytest.raises(
        ValueError, match=r"in the background with ahead=True, such as LocalEngine, got InProcess, which"
    ):
        EngineRollouts(InProcess(), ahead=True)
    EngineRollouts(InProcess())


def test_texts_that_are_lost_are_said_and_written_anew(tmp_path):
    """The engine has ended during the last update: the trained model is there, and can be saved and go on."""

    class Lost(Background):
        def start(self, requests, temperature, seed):
            def answer():
                raise EngineLost("Expected an answer of the engine's process, got its end, by signal 9.")

            return answer

    model = build(often(4), {})
    with pytest.warns(UserWarning, match=r"texts of the next rollout.* are lost.*by signal 9"):
        model.learn(ROLLOUT, callback=EngineRollouts(Lost(), ahead=True))
    save_checkpoint(model, tmp_path / "saved")
    model.learn(ROLLOUT, callback=EngineRollouts(Background(), ahead=True), reset_num_timesteps=False)
    with pytest.raises(EngineLost, match="by signal 9"):
        model.learn(2 * ROLLOUT, callback=EngineRollouts(Lost(), ahead=True))
    assert model.policy.samples_itself
