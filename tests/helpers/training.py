"""Tiny models and agents for the tests that train, and functions that compare two of them."""

import json
import random

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from transformers import GPT2Config

from agents.build import make_agent
from textenv import CharTokenizer, TextEnv

TOKENIZER = CharTokenizer()
PROMPTS = ("ab", "cde", "fghi", "j", "kl")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny_config(vocab_size=33, **kwargs):
    """Return the config of a two-layer GPT-2 whose end token is the `CharTokenizer`'s."""
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, **NO_DROPOUT, **kwargs}
    return GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape)


def length_and_letters(prompt, preds, done):
    """Reward the end of a text by two named parts that differ from text to text."""
    return {"length": 0.1 * len(preds), "letters": sum(preds.ids) / 100} if done else 0.0


def tiny_env(reward=length_and_letters, prompts=PROMPTS, max_new_tokens=4, cls=TextEnv, **kwargs):
    if cls is TextEnv:
        kwargs["reward"] = reward
    return cls(prompts, TOKENIZER, max_new_tokens=max_new_tokens, **kwargs)


def tiny_agent(env=None, n_envs=4, algorithm=PPO, lm=None, **kwargs):
    """Return an agent that visibly learns in a few iterations: the learning rate is large."""
    env = env or tiny_env()
    settings = {
        "seed": 0,
        "device": "cpu",
        "learning_rate": 1e-2,
        "n_steps": env.unwrapped.rules.max_new_tokens,
        **kwargs,
    }
    if algorithm is PPO:
        settings = {"n_epochs": 2, "batch_size": n_envs * settings["n_steps"], **settings}
    return make_agent(env, lm or tiny_config(), n_envs=n_envs, algorithm=algorithm, **settings)


def train_until(model, score, n_iterations, callback=None, enough=0.95, n_checks=8):
    """Train for at most `n_iterations` and stop once `score()` is enough; return the last score.

    The number of iterations that a task needs differs from seed to seed, and on another processor a seed writes other
    texts. So budgets are about twice what most seeds need, and most runs end early. Controls never do.
    """
    per_check = -(-n_iterations // n_checks)
    for done in range(0, n_iterations, per_check):
        count = min(per_check, n_iterations - done)
        model.learn(count * model.n_steps * model.n_envs, callback=callback, reset_num_timesteps=done == 0)
        if (reached := score()) > enough:
            break
    return reached


def weights(model):
    """Return a copy of all weights of the policy."""
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same_weights(first, second):
    """Return whether two results of `weights` are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(BaseCallback):
    """Keeps observations, actions, dones and infos of all steps, and each rollout's numbers."""

    def _on_training_start(self):
        self.observations, self.actions, self.dones, self.infos = [], [], [], []
        self.rewards, self.penalties, self.log_probs = [], [], []

    def _on_step(self):
        self.observations.append(self.locals["obs_tensor"].numpy())
        self.actions.append(self.locals["actions"].copy())
        self.dones.append(self.locals["dones"].copy())
        self.infos.append(self.locals["infos"])
        return True

    def _on_rollout_end(self):
        self.rewards.append(self.model.rollout_buffer.rewards.copy())
        self.penalties.append(self.model.rollout_buffer.penalties.copy())
        self.log_probs.append(self.model.rollout_buffer.log_probs.copy())

    def episodes(self):
        """Yield the final info and the transitions, as (step, lane), of each episode that ended."""
        for lane in range(len(self.dones[0])):
            start = 0
            for step in range(len(self.dones)):
                if self.dones[step][lane]:
                    yield self.infos[step][lane], [(number, lane) for number in range(start, step + 1)]
                    start = step + 1

    def stacked(self, name):
        return np.concatenate(getattr(self, name))


class Trained(BaseCallback):
    """Keeps the log-probability, advantage, return and action of every transition that a rollout trains."""

    def _on_training_start(self):
        self.rollouts = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        (samples,) = self.model.rollout_buffer.get()
        tensors = (samples.old_log_prob, samples.advantages, samples.returns, samples.actions)
        self.rollouts.append(list(zip(*(tensor.tolist() for tensor in tensors))))


def run_state(model):
    """Return everything that the next update depends on, comparable with ==."""
    buffer = model.rollout_buffer
    arrays, meta = model.get_env().state_dict()
    for episode in meta["waiting"]:
        del episode["episode"]["t"]  # wall-clock seconds differ from run to run
    optimizer = model.policy.optimizer.state_dict()
    tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    tensors |= {f"optimizer.{i}.{k}": v for i, entries in optimizer["state"].items() for k, v in entries.items()}
    tensors |= {f"waiting.{lane}.{k}": v for lane, part in buffer.waiting.items() for k, v in part._asdict().items()}
    for number, episode in buffer.waiting_episodes.items():
        fields = {**episode.part._asdict(), "tokens": episode.tokens, "group": episode.group}
        tensors |= {f"waiting.{number}.{name}": array for name, array in fields.items()}
    tensors |= arrays | {"last_obs": model._last_obs, "starts": model._last_episode_starts}
    tensors |= {name: getattr(model.policy, name).get_state() for name in ("generator", "predict_generator")}
    tensors["torch"] = torch.get_rng_state()
    groups = [{**group, "betas": list(group.get("betas", ()))} for group in optimizer["param_groups"]]
    return {
        "tensors": {name: np.asarray(tensor).tobytes() for name, tensor in tensors.items()},
        "groups": groups,
        "env": json.loads(json.dumps(meta)),
        "random": (random.getstate(), [str(part) for part in np.random.get_state()], buffer.rng.bit_generator.state),
        "counters": (model.num_timesteps, model._n_updates, model._current_progress_remaining),
        "steps": sorted(buffer.expected_steps),
    }


def numbers_of_draws(model):
    """Return a list that gets the number of each prompt that the lanes of a model draw from now on."""
    dealer, numbers = model.get_env().lanes.dealer, []
    deal = dealer.deal

    def deal_and_note():
        prompt, group = deal()
        numbers.append(prompt.number)
        return prompt, group

    dealer.deal = deal_and_note
    return numbers
