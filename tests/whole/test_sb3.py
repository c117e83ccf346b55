"""Ordinary Stable-Baselines3 code with textenv's envs and policies (invariants D3, D4, D7, E10)."""

import os
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import KLPenalty, LMPolicy, Pretrained, SequenceRolloutBuffer, TextVecEnv
from agents.build import make_agent
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.evaluation.sample_table import SampleTable
from agents.models.sequences import SequenceBatch
from tests.helpers.command import ROOT
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
from textenv import TextEnv


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Save a GPT-2 in a folder, which stands in for the name "gpt2"."""
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    tiny_agent().policy.lm.backbone.model.save_pretrained(folder)
    return str(folder)


class Cheerful(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float("g" in preds.text) if done else 0.0


def test_the_example_of_the_readme(gpt2):
    env = Cheerful(["the film was", "this phone is"], TOKENIZER, max_new_tokens=8)
    model = PPO(
        LMPolicy,
        TextVecEnv(env, n_envs=16),
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_kwargs=dict(lm=gpt2),
        n_steps=8,
        batch_size=64,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=1.0,
        normalize_advantage=False,
    )
    before = weights(model)
    model.learn(256)
    assert model.num_timesteps == 256 and not same_weights(before, weights(model))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_single_env_with_the_stock_buffer(algorithm):
    env = tiny_env()
    kwargs = {"batch_size": 8} if algorithm is PPO else {"use_rms_prop": False}
    settings = {"policy_kwargs": {"lm": tiny_config()}, "device": "cpu", "seed": 0, **kwargs}
    model = algorithm(LMPolicy, env, n_steps=8, **settings)
    assert type(model.rollout_buffer) is RolloutBuffer and isinstance(model.get_env(), DummyVecEnv)
    before = weights(model)
    model.learn(24)
    assert not same_weights(before, weights(model))
    observation, _ = env.reset(seed=0)
    action, state = model.predict(observation)
    assert action.shape == () and state is None and 0 <= action < 33
    assert np.isfinite(model.ep_info_buffer[0]["r"])


def test_predict_is_greedy_on_demand_and_takes_one_row_or_many():
    model = tiny_agent()
    observations = model.get_env().reset()
    greedy, _ = model.predict(observations, deterministic=True)
    for row, action in zip(observations, greedy):
        logits = model.policy.lm.backbone.model(input_ids=torch.as_tensor(row[row >= 0])[None]).logits[0, -1]
        assert model.predict(row, deterministic=True)[0] == action == int(logits.argmax())
    assert len({int(model.predict(observations[0])[0]) for _ in range(30)}) > 5


# make_agent


def test_d7_make_agent_sets_what_suits_a_language_model():
    """D7: the values that the docstring of `make_agent` lists, on an unmodified PPO."""
    model = make_agent(tiny_env(max_new_tokens=6), tiny_config(), n_envs=64, device="cpu")
    assert type(model) is PPO and type(model.policy) is LMPolicy
    assert type(model.rollout_buffer) is SequenceRolloutBuffer and type(model.get_env()) is TextVecEnv
    assert (model.gamma, model.gae_lambda, model.learning_rate) == (1.0, 0.95, 1e-5)
    assert (model.n_steps, model.batch_size, model.n_epochs) == (6, 6 * 64 // 8, 4)
    assert (model.vf_coef, model.max_grad_norm, model.normalize_advantage) == (0.1, 1.0, False)
    assert model.rollout_buffer.normalize_advantage
    assert (model.rollout_buffer.gamma, model.rollout_buffer.gae_lambda) == (1.0, 0.95)
    assert type(model.policy.optimizer) is torch.optim.AdamW


def test_d7_make_agent_with_a2c():
    model = make_agent(tiny_env(), tiny_config(), n_envs=8, algorithm=A2C, device="cpu")
    assert type(model) is A2C and type(model.policy.optimizer) is torch.optim.AdamW
    assert (model.gamma, model.gae_lambda, model.n_steps, model.max_grad_norm) == (1.0, 0.95, 4, 1.0)
    before = weights(model)
    model.learn(64)
    assert not same_weights(before, weights(model))


@pytest.mark.parametrize("n_envs", [1, 3, 8, 16, 20, 31, 32, 64, 100])
def test_d7_the_batch_size_divides_the_rollout_and_leaves_sequences(n_envs):
    model = make_agent(tiny_env(), tiny_config(), n_envs=n_envs, device="cpu")
    n_minibatches, rest = divmod(4 * n_envs, model.batch_size)
    assert rest == 0 and n_envs >= (8 * n_minibatches if n_minibatches > 1 else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if n_envs >= 4 else "ignore")
        model.learn(4 * n_envs)


def test_arguments_override_the_defaults_of_make_agent(gpt2):
    model = make_agent(
        gym.make(
            "textenv/Text-v0",
            prompts=PROMPTS,
            tokenizer=TOKENIZER,
            reward=lambda prompt, preds, done: 0.0,
            max_new_tokens=8,
        ),
        Pretrained(gpt2),
        n_envs=4,
        policy_kwargs={"temperature": 0.5},
        rollout_buffer_kwargs={"normalize_advantage": False, "complete_episodes": True},
        gamma=0.9,
        n_steps=16,
        n_epochs=1,
        ent_coef=0.01,
        device="cpu",
    )
    assert (model.gamma, model.n_steps, model.n_epochs, model.ent_coef) == (0.9, 16, 1, 0.01)
    assert model.policy.lm.sampling.temperature == 0.5
    assert not model.rollout_buffer.normalize_advantage and model.rollout_buffer.complete_episodes


PATCHED = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import stable_baselines3

for module in pkgutil.walk_packages(stable_baselines3.__path__, "stable_baselines3."):
    try:
        importlib.import_module(module.name)
    except ImportError:
        pass  # an optional package is missing

OWN = {"__warningregistry__", "_abc_impl", "__doc__"}

def snapshot():
    attributes = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] != "stable_baselines3":
            continue
        for key, value in vars(module).items():
            attributes[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                attributes.update({(name, key, member): content for member, content in vars(value).items()})
    return {key: value for key, value in attributes.items() if key[-1] not in OWN}

before = snapshot()
from agents import KLPenalty
from tests.helpers.training import tiny_agent
model = tiny_agent()
model.learn(32, callback=KLPenalty(0.1))
after = snapshot()
assert len(before) > 1500, len(before)
changed = sorted(str(key) for key in before.keys() | after.keys() if before.get(key) is not after.get(key))
assert not changed, changed
assert type(model).__module__.startswith("stable_baselines3.")
print("unchanged")
"""


@pytest.mark.slow
def test_no_attribute_of_sb3_differs_after_importing_and_training():
    """Nothing is patched: every attribute of every module and class of SB3 is the same object as before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PATCHED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "unchanged\n", done.stderr


# Evaluation, files, logs


def test_evaluation_needs_no_monitor(tmp_path):
    model = tiny_agent(tiny_env(max_new_tokens=6))
    evaluation = TextVecEnv(tiny_env(max_new_tokens=6), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = {"best_model_save_path": str(tmp_path), "log_path": str(tmp_path)}
        callback = EvalCallback(evaluation, n_eval_episodes=5, eval_freq=6, verbose=0, **paths)
        model.learn(96, callback=callback)
        rewards, lengths = evaluate_policy(model, evaluation, n_eval_episodes=7, return_episode_rewards=True)
    assert len(rewards) == len(lengths) == 7 and all(1 <= length <= 6 for length in lengths)
    assert callback.best_mean_reward > 0 and (tmp_path / "best_model.zip").exists()
    # The training env of the agent works as well.
    single, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=4, deterministic=True)
    assert single > 0


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_save_load_and_train_on(algorithm, tmp_path):
    model = tiny_agent(algorithm=algorithm)
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=TextVecEnv(tiny_env(), 4), device="cpu")
    assert same_weights(weights(model), weights(loaded))
    observations = loaded.get_env().reset()
    for deterministic in (True, False):
        assert loaded.predict(observations, deterministic=deterministic)[0].shape == (4,)
    ours, theirs = (each.predict(observations, deterministic=True)[0].tolist() for each in (model, loaded))
    assert ours == theirs
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64 and not same_weights(weights(model), weights(loaded))
    assert loaded.rollout_buffer.normalize_advantage
    alone = algorithm.load(tmp_path / "model", device="cpu")  # without an env, to predict
    assert same_weights(weights(model), weights(alone))


def test_tensorboard_has_the_documented_keys(tmp_path):
    model = tiny_agent(tensorboard_log=str(tmp_path))
    callbacks = [KLPenalty(0.1), EpisodeMetrics(), SampleTable(["ab", "c"], TOKENIZER, every=1, max_new_tokens=3)]
    model.learn(48, callback=callbacks, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"), size_guidance={"tensors": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "reward/task", "reward/length", "reward/letters"}
    expected |= {"kl/token", "kl/sequence", "kl/penalty", "kl/coef", "episode/length", "time/tokens_per_second"}
    expected |= {f"episode/end_{reason}" for reason in ("eos", "stop", "length", "env")}
    assert expected <= scalars
    shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 16, 32, 48]
    assert all("**ab**" in text and "**c**" in text for text in shown)


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_a_progress_bar(capfd):
    tiny_agent().learn(32, progress_bar=True)
    assert "32/32" in "".join(capfd.readouterr())


def test_envs_of_gym_make():
    kwargs = {"prompts": PROMPTS, "tokenizer": TOKENIZER, "reward": lambda prompt, preds, done: 1.0 * done}
    env = gym.make("textenv/Text-v0", max_new_tokens=4, **kwargs)
    model = PPO(LMPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"lm": tiny_config()}, device="cpu")
    model.learn(8)
    model = tiny_agent(env)
    model.learn(32)
    assert model.ep_info_buffer[0]["r"] == 1.0
    envs = gym.make_vec("textenv/Text-v0", num_envs=2, max_new_tokens=4, **kwargs)
    observations, _ = envs.reset(seed=0)
    for _ in range(4):
        observations, rewards, *_ = envs.step(model.predict(observations)[0])
        assert observations in envs.observation_space


def test_options_run_given_prompts():
    """`set_options` is SB3's way to `reset(options=...)`."""
    env = TextVecEnv(tiny_env(), 2)
    env.set_options({"prompts": ["x", "yz", "zz"]})
    observations, texts = env.reset(), []
    for _ in range(8):
        observations, _, dones, infos = env.step(np.full(2, 5))
        texts += [str(info["prompt"]) for info in infos if info]
    assert sorted(texts) == ["x", "yz", "zz"]
    env.reset()
    assert not env.lanes.idle.any()


# Advantages, through unmodified `collect_rollouts`


def plain_value(model, observation, action):
    """Return the value of the text after an action, by a plain forward of one row."""
    lm = model.policy.lm
    ids = torch.as_tensor([[*observation[observation >= 0], action]])
    with torch.no_grad():
        return float(lm.critic(lm.backbone.model.base_model(input_ids=ids).last_hidden_state[0, -1:]))


@pytest.mark.parametrize("limit", ["truncate", "terminate"])
def test_d3_d4_only_truncation_bootstraps_once_from_its_own_lane(limit):
    """D3, D4: gamma * V(final observation) is added to the last reward of a truncated episode, and to no other."""
    model = tiny_agent(tiny_env(length_limit=limit, max_new_tokens=5), n_steps=8, gamma=0.9)
    recorder, ends = Recorder(), set()
    torch.nn.init.normal_(model.policy.lm.critic.linear.weight)  # so that values are not all 0
    model.lr_schedule = lambda progress: 0.0  # no update: the values stay the same
    model.learn(32, callback=recorder)
    for info, positions in recorder.episodes():
        step, lane = positions[-1]
        cut = str(info["end_reason"]) == "length" and limit == "truncate"
        ends.add(cut)
        assert info["TimeLimit.truncated"] == cut
        bonus = (
            0.9 * plain_value(model, recorder.observations[step][lane], recorder.actions[step][lane]) if cut else 0.0
        )
        assert not cut or abs(bonus) > 1e-3
        assert recorder.rewards[0][step, lane] == pytest.approx(info["episode"]["r"] + bonus, abs=1e-5)
    assert (limit == "truncate") in ends
    assert all(recorder.rewards[0][position] == 0 for position in zip(*np.where(~np.array(recorder.dones))))
    assert max(map(sum, recorder.dones)) > 1, "several lanes ended in one step"


def test_d3_truncated_and_ended_at_once_is_terminated():
    """D3: an end token as the last allowed token is both; termination wins."""
    env = TextVecEnv(tiny_env(length_limit="truncate", max_new_tokens=2), 1)
    env.reset()
    env.step(np.array([5]))
    _, _, dones, [info] = env.step(np.array([0]))
    assert dones[0] and not info["TimeLimit.truncated"] and str(info["end_reason"]) == "eos"


def test_d3_a_terminal_value_leaves_the_rollouts_cache_alone():
    cached, plain = [], []
    for cache, values in ((True, cached), (False, plain)):
        model = tiny_agent(
            tiny_env(length_limit="truncate", max_new_tokens=5), n_steps=7, policy_kwargs={"cache": cache}, n_epochs=1
        )
        model.learn(7 * 4 * 3)
        values += model.rollout_buffer.returns.tolist()
    np.testing.assert_allclose(cached, plain, atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_d4_lanes_truncated_in_one_step_are_valued_in_one_forward(cache, monkeypatch):
    """D4: truncation costs no batch-of-one forward per finished lane."""
    env = tiny_env(length_limit="truncate", max_new_tokens=4, stop_ids=[])
    model = tiny_agent(env, n_envs=4, n_steps=8, policy_kwargs={"cache": cache})
    rows, values = [], model.policy.lm.values
    monkeypatch.setattr(
        model.policy.lm, "values", lambda obs, **options: rows.append(len(obs)) or values(obs, **options)
    )
    model.learn(32)
    assert rows == [4, 4, 4], "two steps in which all four were cut, and the end of the rollout"


def test_d4_reaching_the_limit_is_termination_by_default():
    env = TextVecEnv(tiny_env(max_new_tokens=1), 1)
    env.reset()
    _, _, dones, [info] = env.step(np.array([5]))
    assert dones[0] and not info["TimeLimit.truncated"] and str(info["end_reason"]) == "length"


# E10


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_e10_the_same_seed_is_the_same_run(algorithm):
    """E10: equal bit for bit, including draws of hooks from `self.np_random`; another seed gives another run."""

    class Noisy(TextEnv):
        def get_reward(self, prompt, preds, done):
            return float(self.np_random.normal()) if done else 0.0

    runs = []
    for seed in (3, 3, 4):
        model, recorder = tiny_agent(tiny_env(cls=Noisy), algorithm=algorithm, seed=seed), Recorder()
        torch.rand(5)  # draws of the rest of the process
        model.learn(48, callback=[recorder, KLPenalty(0.1)])
        infos = [(str(info["prompt"]), info["text"], info["episode"]["r"]) for info, _ in recorder.episodes()]
        runs.append((weights(model), infos, recorder.stacked("rewards").tolist()))
    assert same_weights(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert not same_weights(runs[0][0], runs[2][0]) and runs[0][1] != runs[2][1]


def test_algorithms_pass_observations_on_unread():
    """PPO never looks inside `observations`: a batch of whole sequences."""
    model = tiny_agent()
    model.learn(16)
    for samples in model.rollout_buffer.get(16):
        assert isinstance(samples.observations, SequenceBatch) and len(samples.observations) == 16
