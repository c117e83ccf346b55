"""The returns of texts outside a rollout: those of the rollout's buffer."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty, LoRA, RewardShaping
from agents.evaluation.continuations import Continuations
from agents.evaluation.generation import FinalStep
from agents.evaluation.trained_rewards import TrainedRewards
from agents.models.token_sets import AllowedTokens
from tests.agents.evaluation.credit_toys import agent_of, few_tokens, letters, preds_of
from tests.helpers.training import tiny_env
from textenv.episodes.rules import PADDING, SEPARATOR, EndReason


class AtRolloutEnd(BaseCallback):
    """Compares the returns of a rollout's episodes with those that `TrainedRewards` gives the same texts."""

    def _on_training_start(self):
        self.steps, self.n_compared, self.n_truncated = [], 0, 0

    def _on_rollout_start(self):
        self.steps = []

    def _on_step(self):
        self.steps.append({name: self.locals[name].copy() for name in ("actions", "dones", "infos")})
        return True

    def _on_rollout_end(self):
        buffer, rewards = self.model.rollout_buffer, TrainedRewards.of(self.model)
        for segment in buffer.segments:
            if not segment.is_finished or not buffer.episode_starts[segment.start, segment.lane]:
                continue
            own = slice(segment.start, segment.end), slice(segment.lane, segment.lane + 1)
            info = self.steps[segment.end - 1]["infos"][segment.lane]
            text = text_of(self.model, buffer, own, info)
            was_training = self.model.policy.training
            self.model.policy.set_training_mode(False)
            with torch.no_grad():
                found = rewards.returns(text)[0]
            self.model.policy.set_training_mode(was_training)
            assert found == pytest.approx(float(buffer.returns[segment.start, segment.lane]), abs=2e-6)
            self.n_compared += 1
            self.n_truncated += bool(text.truncated[0])


def text_of(model, buffer, own, info):
    """Return an episode of a rollout as a continuation from its prompt, with the task's own rewards."""
    env = model.get_env().unwrapped.env
    actions, prompt = buffer.actions[own].astype(np.int64), info["prompt"]
    observation = np.full(env.observation_space.shape, PADDING, dtype=np.int64)
    ids = [*prompt.ids.tolist(), SEPARATOR, *actions[:, 0].tolist()]
    observation[: len(ids)] = ids
    rewards = np.array([[letters(prompt, preds_of(env, prompt, actions[: i + 1, 0]), i + 1 == len(actions))]
                        for i in range(len(actions))])  # fmt: skip
    if env.score_at == "done":
        rewards[:-1] = 0.0
    is_cut = info["end_reason"] is EndReason.LENGTH and env.rules.length_limit == "truncate"
    live, allowed = np.ones_like(actions, dtype=bool), AllowedTokens(buffer.token_sets, buffer.allowed[own].ravel())
    arrays = (actions, buffer.log_probs[own], buffer.cols[own].astype(np.int64), rewards, live)
    return Continuations(*arrays, allowed, [FinalStep(info, observation)], np.array([is_cut]))


TRAINED = {
    "bare": ([], {}, {}),
    "k1": ([lambda: KLPenalty(0.3)], {}, {}),
    "clipped k3": ([lambda: KLPenalty(0.3, estimator="k3", clip=0.05)], {}, {"length_limit": "truncate"}),
    "exact, LoRA": ([lambda: KLPenalty(0.3, estimator="exact")], {"policy_kwargs": {"train": LoRA(r=2)}}, {}),
    "in the loss": ([lambda: KLPenalty(0.3, estimator="k2", where="loss")], {}, {}),
    "shaped": (
        [
            lambda: RewardShaping(clip=1.2, scale=True, missing_eos_penalty=0.5, overlong_tokens=2),
            lambda: KLPenalty(0.1),
        ],
        {},
        {"score_at": "done", "length_limit": "truncate"},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_returns_are_those_that_the_critic_is_trained_on(name):
    """With lambda 1 the buffer's returns at a text's first token are the discounted sum of its rewards."""
    steps, settings, rules = TRAINED[name]
    env = tiny_env(letters, mask=few_tokens, **rules)
    model = agent_of(env, gamma=0.9, gae_lambda=1.0, learning_rate=3e-2, n_steps=8, **settings)
    look = AtRolloutEnd()
    model.learn(64, callback=[*(step() for step in steps), look])
    assert look.n_compared > 10 and (look.n_truncated > 2) == (rules.get("length_limit") == "truncate")
