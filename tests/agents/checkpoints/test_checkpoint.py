"""Resuming from checkpoints: the resumed run equals the uninterrupted one (E8), its reference included (C5)."""

import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from stable_baselines3 import A2C
from transformers import LlamaConfig

from agents import KLPenalty
from agents.callbacks.checkpoints import Checkpoints
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import verify_checkpoint
from agents.models.backbone import Backbone
from tests.helpers.advantage_jobs import above_the_group
from tests.helpers.command import ROOT
from tests.helpers.models import few
from tests.helpers.training import PROMPTS, Recorder, run_state, tiny_agent, tiny_config, tiny_env
from textenv import TextEnv

pytestmark = pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")  # counts waiting segments
STEPS, LANES, LONGEST = 5, 4, 7  # an episode of 7 tokens straddles rollouts of 5
EVERY, TOTAL = 3, 6  # rollouts
ROWS = [{"prompt": prompt, "max_new_tokens": 3 + i} for i, prompt in enumerate(PROMPTS)]


class Remembers(TextEnv):
    """An env with memory in `preds.state`, draws from its generator, replies and named reward parts."""

    def get_reward(self, prompt, preds, done):
        preds.state["sum"] = preds.state.get("sum", 0.0) + float(self.np_random.normal()) + len(prompt) / 10
        return {"memory": preds.state["sum"], "lengths": sum(len(turn.text) for turn in preds.turns) / 10}

    def respond(self, prompt, preds):
        return "yz" if preds.ids[-1] % 2 else None


def global_random(prompt, preds, done):
    return random.random() + np.random.rand() + float(torch.rand(())) if done else 0.0


def linear(progress):
    return 2e-2 * progress


def llama():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=33, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **shape)


def long_env(**kwargs):
    return tiny_env(**{"prompts": ROWS, "max_new_tokens": LONGEST, **kwargs})


def turns_env():
    return tiny_env(cls=Remembers, max_new_tokens=LONGEST, max_turns=4, max_response_tokens=2, stop_ids=range(0, 33, 3))


def complete():
    return {"rollout_buffer_kwargs": {"complete_episodes": True}, "batch_size": LANES * STEPS}


def groups_env():
    """Return an env of groups of 4, whose prompts are so long that an update reads them once (see `prompt_layout`)."""
    prompts = ["abcdefghijklmnopqrstuvwxyz", "zyxwvutsrqponmlkjihgfedcba"]
    return tiny_env(prompts=prompts, max_new_tokens=LONGEST, samples_per_prompt=4)


def shared():
    return {"lm": tiny_config(n_positions=64), "rollout_buffer_kwargs": {"advantage": "rloo"}}


def lambdas():
    return {"rollout_buffer_kwargs": {"critic_lambda": 1.0, "lambda_alpha": 0.5}, "batch_size": LANES * STEPS}


def function():
    return {**shared(), "rollout_buffer_kwargs": {"advantage": above_the_group, "normalize_advantage": True}}


# Each run as functions that return the env, the agent's arguments and the callbacks.
RUNS = {
    "unfinished": (long_env, dict, list),
    "kl": (long_env, dict, lambda: [KLPenalty(0.1)]),
    "waiting": (long_env, complete, lambda: [KLPenalty(0.1)]),
    "groups": (groups_env, shared, lambda: [KLPenalty(0.1)]),
    "lambdas": (long_env, lambdas, lambda: [KLPenalty(0.1)]),
    "function": (groups_env, function, lambda: [KLPenalty(0.1)]),
    "late": (lambda: long_env(score_at="rollout_end"), complete, list),
    "schedule": (tiny_env, lambda: {"learning_rate": linear, "clip_range": linear}, lambda: [EpisodeMetrics()]),
    "a2c": (tiny_env, lambda: {"algorithm": A2C}, lambda: [KLPenalty(0.1)]),
    "rmsprop": (tiny_env, lambda: {"algorithm": A2C, "use_rms_prop": True}, list),
    "turns": (turns_env, lambda: {"lm": tiny_config(n_positions=64)}, list),
    "random": (lambda: tiny_env(global_random), dict, list),
    "llama": (tiny_env, lambda: {"lm": llama()}, lambda: [KLPenalty(0.1)]),
    "untied": (tiny_env, lambda: {"lm": tiny_config(tie_word_embeddings=False)}, list),
    "sequential": (lambda: tiny_env(order="sequential"), dict, list),
}


def build(run, **kwargs):
    env, agent, callbacks = RUNS[run]
    return tiny_agent(env(), n_steps=STEPS, n_envs=LANES, **{**agent(), **kwargs}), callbacks()


def history(recorder, start=0):
    """Return the tokens, finished episodes and rewards of every step from rollout `start` on."""
    infos = [
        [(str(info["prompt"]), info["text"], info["reward_parts"]) for info in step if info] for step in recorder.infos
    ]
    steps = slice(start * STEPS, None)
    tokens = [
        np.concatenate([row.ravel() for row in pair]).tolist() for pair in zip(recorder.observations, recorder.actions)
    ]
    return tokens[steps], infos[steps], [rewards.tolist() for rewards in recorder.rewards[start:]]


def disturb():
    """Advance the global generators, as another process would not have."""
    random.random(), np.random.rand(3), torch.rand(3)


@pytest.mark.parametrize("run", few(RUNS, 7))
def test_e8_a_resumed_run_is_the_run(run, tmp_path):
    """Bit for bit: weights, optimizer, episodes, prompts, rewards, generators and counters."""
    model, callbacks = build(run)
    whole = Recorder()
    model.learn(TOTAL * STEPS * LANES, callback=[*callbacks, whole, Checkpoints(tmp_path, every=EVERY)])
    middle = tmp_path / f"step_{EVERY * STEPS * LANES:012d}"
    assert verify_checkpoint(middle) == EVERY * STEPS * LANES

    expected = run_state(model)
    disturb()
    resumed, callbacks = build(run, seed=7)
    load_checkpoint(resumed, middle)
    rest = Recorder()
    resumed.learn((TOTAL - EVERY) * STEPS * LANES, callback=[*callbacks, rest], reset_num_timesteps=False)
    assert history(rest) == history(whole, EVERY)
    assert run_state(resumed) == expected


def test_e8_what_the_runs_above_contain(tmp_path):
    """The runs do have unfinished episodes, waiting segments, a second epoch of prompts and a falling rate."""
    model, _ = build("waiting")
    model.learn(EVERY * STEPS * LANES)
    save_checkpoint(model, tmp_path / "saved")
    meta = json.loads((tmp_path / "saved" / "state.json").read_text())
    assert meta["env"]["cursor"]["epoch"] >= 1
    assert safetensors.torch.load_file(tmp_path / "saved" / "waiting.safetensors")
    assert safetensors.torch.load_file(tmp_path / "saved" / "episodes.safetensors")["generated"].max() > 0
    model, callbacks = build("schedule")
    model.learn(TOTAL * STEPS * LANES, callback=Checkpoints(tmp_path, every=EVERY))
    middle = json.loads((tmp_path / "step_000000000060" / "state.json").read_text())
    assert middle["param_groups"][0]["lr"] == pytest.approx(linear(0.5))
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_e8_the_run_of_groups_shares_prompts_before_and_after_the_checkpoint(monkeypatch):
    read, read_shared = [], Backbone.read_shared
    model, callbacks = build("groups")
    shares = lambda self, part: read.append((model.num_timesteps, self.training)) or read_shared(self, part)  # noqa: E731
    monkeypatch.setattr(Backbone, "read_shared", shares)
    model.learn(TOTAL * STEPS * LANES, callback=callbacks)
    updates = [steps // (STEPS * LANES) for steps, is_training in read if is_training]
    assert min(updates) <= EVERY < max(updates) and {is_training for _, is_training in read} == {True, False}
    assert model.policy.lm.rollout_cache.shared_tokens > 0


PROCESS = """
import sys, torch
from tests.agents.checkpoints.test_checkpoint import *
model, callbacks = build("waiting", learning_rate=linear, seed=3)
load_checkpoint(model, sys.argv[1])
model.learn((TOTAL - EVERY) * STEPS * LANES, callback=callbacks, reset_num_timesteps=False)
save_checkpoint(model, sys.argv[2])
"""


@pytest.mark.slow
def test_e8_in_a_fresh_process(tmp_path):
    model, callbacks = build("waiting", learning_rate=linear)
    model.learn(TOTAL * STEPS * LANES, callback=[*callbacks, Checkpoints(tmp_path, every=EVERY)])
    first, last = sorted(tmp_path.glob("step_*"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROCESS, first, tmp_path / "resumed"], check=True, env=environment)
    for file in sorted(last.iterdir()):
        if file.name == "state.json":
            saved, resumed = (json.loads((folder / file.name).read_text()) for folder in (last, tmp_path / "resumed"))
            for episode in (*saved["episodes"], *resumed["episodes"]):
                del episode["t"]  # wall-clock seconds
            assert resumed == saved
        elif file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes(), file.name


def test_loading_and_saving_at_once_keeps_everything(tmp_path):
    """The reference is kept too, although no penalty has been attached to the new model yet (C5, E8)."""
    model, callbacks = build("kl")
    model.learn(60, callback=callbacks)
    save_checkpoint(model, tmp_path / "first")
    again, _ = build("kl", seed=7)
    load_checkpoint(again, tmp_path / "first")
    save_checkpoint(again, tmp_path / "second")
    for name in sorted(path.name for path in (tmp_path / "first").iterdir()):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_c5_a_resumed_run_has_the_reference_and_asks_for_its_penalty(tmp_path):
    model, [penalty] = build("kl")
    model.learn(60, callback=penalty)
    save_checkpoint(model, tmp_path / "saved")
    resumed, _ = build("kl", seed=7)
    load_checkpoint(resumed, tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"\['KLPenalty'\] before returns"):
        resumed.learn(20, reset_num_timesteps=False)
    resumed, _ = build("kl", seed=7)
    load_checkpoint(resumed, tmp_path / "saved")
    other = KLPenalty(5.0)
    resumed.learn(20, callback=other, reset_num_timesteps=False)
    assert other.coef == penalty.coef
    for name, tensor in penalty.reference.state_dict().items():
        assert torch.equal(tensor, other.reference.state_dict()[name])


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model, callbacks = build("kl")
    model.learn(40, callback=callbacks)
    saved = save_checkpoint(model, tmp_path / "saved")
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_checkpoint(build("kl")[0], saved)
