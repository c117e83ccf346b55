"""Rollouts that another engine writes: the updates of the policy's own rollouts, requests, weights and resuming."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback

from agents import (
    Checkpoints,
    CriticWarmup,
    EngineRollouts,
    EpisodeMetrics,
    KLPenalty,
    LoRA,
    RewardShaping,
    SampleTable,
    SeparateCritic,
    TrainingWarnings,
    generate,
    load_checkpoint,
    save_checkpoint,
)
from agents.doctor import examine as doctor
from agents.engines.process import write
from agents.engines.protocol import Request, check_completions
from agents.models.sampling import TokenDistribution
from tests.helpers.engines import LANES, LONGEST, STEPS, InProcess, Scripted, build, often
from tests.helpers.models import collect
from tests.helpers.training import TOKENIZER, Recorder, run_state, same_weights, tiny_config, weights
from textenv import PrioritySampling, TextEnv
from textenv.episodes.rules import SEPARATOR

pytestmark = pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")
ROLLOUTS = 3
CLOSE = 1e-5  # tolerance of float32 log-probabilities


class Answers(TextEnv):
    """A dialogue: after a turn that ends with an odd id, the env replies "yz"."""

    def get_reward(self, prompt, preds, done):
        return sum(preds.ids) / 40 if done else 0.0

    def respond(self, prompt, preds):
        return "yz" if preds.ids[-1] % 2 else None


def complete(**kwargs):
    return {"rollout_buffer_kwargs": {"complete_episodes": True, "normalize_advantage": True, **kwargs}}


# The env's arguments, the agent's, and a function that returns further callbacks.
CASES = {
    "plain": (often(4), {}, list),
    "everything": (
        {**often(6), "score_at": "rollout_end", "length_limit": "truncate", "order": "sequential"},
        {**complete(), "policy_kwargs": {"temperature": 0.7, "value_norm": "popart"}, "gamma": 0.98},
        lambda: [KLPenalty(0.1), RewardShaping(scale=True), EpisodeMetrics(), TrainingWarnings()],
    ),
    "groups": (
        {**often(6), "samples_per_prompt": 3},
        {"rollout_buffer_kwargs": {"advantage": "grpo"}, "vf_coef": 0.0},
        list,
    ),
    "turns": ({**often(5), "cls": Answers, "max_turns": 3, "max_response_tokens": 2}, complete(), list),
    "stop strings": ({**often(12), "stop_strings": ["e", "xy"]}, {}, list),
    "own critic": (often(4), {"policy_kwargs": {"critic": SeparateCritic(tiny_config(n_embd=8))}}, list),
    "LoRA": (often(4), {"policy_kwargs": {"train": LoRA(r=2)}}, lambda: [KLPenalty(0.1)]),
    "A2C": (often(4), {"algorithm": A2C}, list),
    "priority": ({**often(4), "order": PrioritySampling("reward")}, {}, list),
    "warmup": (often(4), {}, lambda: [CriticWarmup(1)]),
}


def trained(model, *callbacks):
    recorder = Recorder()
    model.learn(ROLLOUTS * STEPS * LANES, callback=[*callbacks, recorder], log_interval=None)
    return recorder


@pytest.mark.parametrize(
    "case", ["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "everything")]
)
def test_an_update_is_that_of_the_policys_own_rollout_of_the_same_tokens(case, monkeypatch):
    """The engine has the policy's weights: importance weights are 1, and values, penalties and gradients the same."""
    env_kwargs, agent_kwargs, callbacks = CASES[case]
    engine, model = InProcess(), build(env_kwargs, agent_kwargs)
    written = trained(model, EngineRollouts(engine), *callbacks())
    assert len(engine.calls) > 1 and engine.n_loads == ROLLOUTS
    figures = model.logger.name_to_value

    actions = iter(written.actions)
    monkeypatch.setattr(TokenDistribution, "get_actions", lambda self, *args: torch.as_tensor(next(actions)))
    own = build(env_kwargs, agent_kwargs)
    sampled = trained(own, *callbacks())
    assert np.array_equal(sampled.stacked("actions"), written.stacked("actions"))
    assert np.abs(sampled.stacked("log_probs") - written.stacked("log_probs")).max() < CLOSE
    assert np.abs(sampled.stacked("rewards") - written.stacked("rewards")).max() < 1e-4
    buffers = model.rollout_buffer, own.rollout_buffer
    assert np.abs(buffers[0].values - buffers[1].values).max() < 1e-4
    assert np.abs(buffers[0].behaviour_log_probs - buffers[0].log_probs).max() < CLOSE
    for name, weight in weights(own).items():
        assert torch.allclose(weight, weights(model)[name], atol=1e-5), name
    assert figures["engine/weight"] == pytest.approx(1, abs=CLOSE) and figures["engine/truncated"] == 0
    assert abs(figures["engine/kl_k1"]) < CLOSE and abs(figures["engine/kl_k3"]) < CLOSE
    assert 0 < figures["engine/used"] <= 1 and figures["engine/calls"] >= 1 and figures["engine/seconds"] > 0
    starts = build(env_kwargs, agent_kwargs)
    assert not same_weights(weights(starts), weights(model)), "something was learnt"


def test_what_is_asked_of_the_engine():
    """At a rollout's start: new weights, all rows, and the next prompts; later only rows without a completion."""
    different = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    engine, model = InProcess(), build({**often(4), "prompts": different}, {})
    recorder, n_rollouts, steps = Recorder(), 5, []
    generate = engine.generate
    engine.generate = lambda *args: (steps.append(len(recorder.actions)), generate(*args))[1]
    model.learn(n_rollouts * STEPS * LANES, callback=[EngineRollouts(engine), recorder])
    firsts = np.concatenate(
        [[np.ones(LANES, dtype=bool)], np.array(recorder.dones)[:-1]]
    )  # (T, B): where an episode begins
    begun = firsts.reshape(n_rollouts, STEPS, LANES)[:, 1:].sum(axis=(1, 2))
    assert engine.n_loads == n_rollouts and len(set(engine.seeds)) == len(engine.seeds) and begun.min() > 5
    prompts = {tuple(prompt.ids.tolist()) for prompt in model.env.env.prompts}
    asked = np.zeros(n_rollouts, dtype=int)
    for step, call in zip(steps, engine.calls):
        rollout, step_in_rollout = divmod(step, STEPS)
        observed = recorder.observations[step]
        rows = [row[row >= 0].tolist() for row in observed]
        n_missing = (
            LANES if step_in_rollout == 0 else next(i for i in range(len(call), 0, -1) if call[i - 1][0] in rows)
        )
        assert all(tokens in rows for tokens, _ in call[:n_missing])
        if step_in_rollout == 0:
            assert len(call) == LANES + (begun[rollout - 1] if rollout else 0)
            written = (observed >= 0).sum(axis=1) - (observed == SEPARATOR).argmax(axis=1)
            assert [most_new for _, most_new in call[:LANES]] == np.minimum(LONGEST - written, STEPS).tolist()
        for tokens, most_new in call[n_missing:]:
            assert tuple(tokens) in prompts and most_new == min(LONGEST, STEPS - step_in_rollout)
        asked[rollout] += len(call)
    assert len(engine.calls) < begun.sum() / 2 and (asked >= LANES + begun).all(), "few calls, and each episode in one"


def test_texts_written_ahead_go_to_the_prompts_they_continue():
    engine, model = InProcess(), build(often(6), {})
    written = Counter()
    generated = engine.generate

    def generate_and_note(requests, *args):
        completions = generated(requests, *args)
        for request, completion in zip(requests, completions):
            written[(*request.tokens.tolist(), SEPARATOR, *completion.tokens.tolist())] += 1
        return completions

    engine.generate = generate_and_note
    recorder = Recorder()
    model.learn(3 * STEPS * LANES, callback=[EngineRollouts(engine), recorder])
    starts = {tuple(text[: text.index(SEPARATOR)]) for text in written}
    checked = 0
    for _, transitions in recorder.episodes():
        if transitions[0][0] // STEPS != transitions[-1][0] // STEPS:
            continue  # a new rollout asked for the rest anew
        row = recorder.observations[transitions[0][0]][transitions[0][1]]
        prompt = tuple(row[row >= 0].tolist())
        text = (*prompt, SEPARATOR, *(int(recorder.actions[step][lane]) for step, lane in transitions))
        assert prompt in starts and any(completion[: len(text)] == text for completion in written)
        checked += 1
    assert checked > 12


def test_the_dealer_knows_what_is_coming():
    model = build(often(4), {})
    model.env.reset()
    dealer = model.env.lanes.dealer
    coming = [prompt.number for prompt in dealer.coming(12)]
    assert coming == [dealer.deal()[0].number for _ in range(12)] and len(set(coming)) == 5
    by_reward = build(CASES["priority"][0], {})
    by_reward.env.reset()
    assert by_reward.env.lanes.dealer.coming(3) == [], "what is next depends on what is earned"


def test_an_engine_with_old_weights_is_noticed():
    """The control for sending weights: without them, the engine's log-probabilities differ from the policy's."""
    spreads = []
    for takes_weights in (True, False):
        model = build(often(6), {"learning_rate": 0.5})
        model.learn(3 * STEPS * LANES, callback=EngineRollouts(InProcess(takes_weights=takes_weights)))
        buffer = model.rollout_buffer
        spreads.append(np.abs(buffer.log_probs - buffer.behaviour_log_probs).max())
    assert spreads[0] < CLOSE and spreads[1] > 0.1


def test_the_engine_samples_at_the_policys_temperature():
    model = build(often(6), {"policy_kwargs": {"temperature": 0.3}})
    buffer = collect(model, EngineRollouts(InProcess()))
    assert np.abs(buffer.log_probs - buffer.behaviour_log_probs).max() < CLOSE
    other = collect(build(often(6), {}), EngineRollouts(InProcess(heat=0.3)))
    assert np.abs(other.log_probs - other.behaviour_log_probs).max() > 0.1


def test_what_waits_keeps_what_the_engine_said():
    model = build(often(20), complete())
    model.learn(2 * STEPS * LANES, callback=EngineRollouts(InProcess(heat=0.5)))
    waiting = model.rollout_buffer.waiting
    assert waiting and not any(part.is_by_policy for part in waiting.values())
    (samples,) = model.rollout_buffer.get()
    assert len(samples.actions) != STEPS * LANES, "some of the rollout before, some not yet"


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_weights_of_joined_parts_by_hand(per):
    """Advantages of waiting parts and their ends are multiplied by min(exp(ours - theirs), truncation)."""
    model = build(often(20), complete())
    model.learn(2 * STEPS * LANES, callback=EngineRollouts(InProcess(heat=0.5), truncation=1.5, per=per))
    buffer = model.rollout_buffer
    state = buffer.rng.bit_generator.state
    weighted = next(buffer.get())
    buffer.correction, buffer.rng.bit_generator.state = None, state
    plain = next(buffer.get())
    parts = list(buffer.trained)
    ours, theirs = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("log_probs", "behaviour_log_probs")
    )
    log_ratios = dict(zip(ours.tolist(), (ours - theirs).tolist()))
    ratios = np.array([log_ratios[log_prob] for log_prob in plain.old_log_prob.tolist()])
    rows = plain.observations.rows
    if per == "sequence":
        ratios = np.array([ratios[rows == row].sum() for row in rows])
    expected = plain.advantages.numpy() * np.minimum(np.exp(ratios), 1.5)
    np.testing.assert_allclose(weighted.advantages.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert len(set(rows)) < len(rows) and not np.allclose(expected, plain.advantages.numpy())


def test_what_is_logged_of_masked_weights_by_hand():
    model = build(often(20), {})
    step = EngineRollouts(InProcess(heat=0.5), truncation=math.inf, band=(0.95, 1.05))
    model.learn(STEPS * LANES, callback=step, log_interval=None)
    buffer, logged = model.rollout_buffer, model.logger.name_to_value
    ratios = np.exp(buffer.log_probs.astype(np.float64) - buffer.behaviour_log_probs)
    weights = np.where((ratios >= 0.95) & (ratios <= 1.05), ratios, 0.0)
    assert logged["engine/masked"] == pytest.approx((weights == 0).mean()) and 0.05 < (weights == 0).mean() < 0.95
    share = weights.sum() ** 2 / (weights**2).sum() / weights.size
    assert logged["engine/effective"] == pytest.approx(share, rel=1e-4)
    assert logged["engine/weight"] == pytest.approx(ratios.mean(), rel=1e-4) and not logged["engine/truncated"]
    advantages = next(buffer.get()).advantages.numpy()
    assert (advantages == 0).mean() == pytest.approx(logged["engine/masked"]), "such tokens get no gradient"


def test_one_step_serves_one_model_after_another():
    step = EngineRollouts(InProcess())
    for seed in (0, 1):
        model = build(often(6), {"seed": seed})
        buffer = collect(model, step)
        assert np.abs(buffer.log_probs - buffer.behaviour_log_probs).max() < CLOSE


def test_after_a_rollout_that_was_broken_off_no_more_is_asked_for_than_fits():
    """After a stop, SB3 passes the old `_last_obs` although the env has already begun new episodes."""

    class Stops(BaseCallback):
        def _on_step(self):
            return self.n_calls != STEPS - 1

    model, engine = build(often(20), {}), InProcess()
    model.learn(STEPS * LANES, callback=[EngineRollouts(engine), Stops()])
    model.learn(STEPS * LANES, callback=EngineRollouts(engine), reset_num_timesteps=False)
    width = model.observation_space.shape[0]
    assert all(len(tokens) + most_new < width for call in engine.calls for tokens, most_new in call)


def test_an_error_of_the_engine_gives_sampling_back_to_the_policy():
    model = build(often(6), {})
    with pytest.raises(ValueError, match="Expected"):
        model.learn(STEPS * LANES, callback=EngineRollouts(Scripted([99], [0.0])))
    assert model.policy.samples_itself


@pytest.mark.slow
def test_looking_at_the_policy_does_not_disturb_the_rollout():
    def run(*callbacks):
        model = build(often(6), {})
        model.learn(ROLLOUTS * STEPS * LANES, callback=[EngineRollouts(InProcess()), *callbacks])
        return weights(model)

    class Looks(Recorder):
        def _on_step(self):
            self.model.predict(self.model._last_obs)
            if self.model.num_timesteps == 2 * LANES:
                generate(self.model, ["ab"], TOKENIZER, max_new_tokens=3)
                doctor.check(self.model.policy, self.training_env.env)
            return True

    table = SampleTable(["ab"], TOKENIZER, every=1, max_new_tokens=3)
    assert same_weights(run(), run(Looks(), table))


def test_the_policy_samples_itself_between_rollouts():
    model, engine = build(often(6), {}), InProcess()
    model.learn(STEPS * LANES, callback=EngineRollouts(engine))
    asked = len(engine.calls)
    assert model.policy.samples_itself
    model.policy.forward(torch.as_tensor(model._last_obs))
    assert len(engine.calls) == asked


@pytest.mark.slow
@pytest.mark.parametrize("case", ["everything", "groups"])
def test_e8_a_resumed_run_is_the_run(case, tmp_path):
    env_kwargs, agent_kwargs, callbacks = CASES[case]

    def steps():
        return [EngineRollouts(InProcess(heat=0.7), truncation=1.5), *callbacks()]

    whole, rollout = build(env_kwargs, agent_kwargs), STEPS * LANES
    whole.learn(4 * rollout, callback=[*steps(), Checkpoints(tmp_path, every=2)])
    resumed = build(env_kwargs, {**agent_kwargs, "seed": 7})
    load_checkpoint(resumed, tmp_path / f"step_{2 * rollout:012d}")
    assert "EngineRollouts" in resumed.rollout_buffer.expected_steps
    assert resumed.rollout_buffer.waiting or resumed.rollout_buffer.waiting_episodes
    resumed.learn(2 * rollout, callback=steps(), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(whole)


def test_a_resumed_run_without_the_engine_is_refused(tmp_path):
    model = build(often(6), {})
    model.learn(STEPS * LANES, callback=EngineRollouts(InProcess()))
    save_checkpoint(model, tmp_path / "one")
    other = build(often(6), {})
    load_checkpoint(other, tmp_path / "one")
    with pytest.raises(RuntimeError, match=r"Expected the steps \['EngineRollouts'\] before returns"):
        other.learn(STEPS * LANES, reset_num_timesteps=False)


def test_the_engine_writes_what_a_plain_forward_says(n_requests=9):
    """With more texts than rows: each token's log-probability is that of one forward over the whole text."""
    engine = InProcess(n_rows=3)
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(1, 33, 1 + i), 2 + i % 5, (0, 7)) for i in range(n_requests)]
    written = write(engine.writer.lm, requests, 0.8, 5, 3)
    check_completions(requests, written, 33)
    for request, (tokens, log_probs) in zip(requests, written):
        ids = torch.as_tensor(np.concatenate([request.tokens, tokens]))[None]
        with torch.no_grad():
            logits = engine.writer.lm.backbone.model(input_ids=ids).logits[0, len(request.tokens) - 1 : -1]
        expected = torch.log_softmax(logits / 0.8, -1).gather(-1, torch.as_tensor(tokens)[:, None])[:, 0]
        assert np.abs(expected.numpy() - log_probs).max() < CLOSE
    again = write(engine.writer.lm, requests, 0.8, 5, 3)
    assert all(np.array_equal(first.tokens, second.tokens) for first, second in zip(written, again)), "the same seed"
    with pytest.raises(ValueError, match="32 positions, got up to 40"):
        write(engine.writer.lm, [Request(np.ones(30, int), 10, ())], 1.0, 0, 3)
