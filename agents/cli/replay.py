"""One episode of one prompt by a policy, with what each step knew: for `textenv show`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from textenv.env import TextEnv
from textenv.vector import TextVectorEnv

from ..policies.lm_policy import LMPolicy


class Replay(NamedTuple):
    """An episode of T tokens by the policy."""

    observations: torch.Tensor  # (T + 1, L)
    actions: list[int]
    rewards: list[float]
    info: dict[str, Any]  # the final one
    log_probs: list[float]  # of the actions, in nats
    allowed: list[torch.Tensor | None]  # (V,) bool each: the tokens that could be sampled; None for all


def replay(policy: LMPolicy, env: TextEnv, prompt: int, seed: int) -> Replay:
    """Run an episode of one prompt.

    Args:
        policy: The policy.
        env: The environment.
        prompt: The number of the prompt.
        seed: The seed of the sampling.
    """
    envs = TextVectorEnv(env, 1)
    generator = torch.Generator().manual_seed(seed)
    observation = envs.lanes.reset(0, [env.prompts[prompt]])
    observations, actions, rewards = [torch.as_tensor(observation[0])], [], []
    log_probs: list[float] = []
    support: list[torch.Tensor | None] = []
    policy.set_training_mode(False)
    with torch.no_grad():
        while True:
            batch = observations[-1][None].to(policy.device)  # (L,) -> (1, L)
            allowed = torch.as_tensor(envs.lanes.allowed(), device=policy.device) if env.masks else None
            step = policy.lm.act(batch, False, generator, policy.lm.predict_cache, allowed, False)
            result = envs.lanes.step(step.actions.cpu().numpy())
            actions.append(int(step.actions[0]))
            log_probs.append(float(step.log_probs[0]))
            support.append(None if step.allowed is None else step.allowed[0])
            rewards.append(float(result.rewards[0]))
            ended = result.final_observations.get(0)
            observations.append(torch.as_tensor(result.observations[0] if ended is None else ended))
            if ended is not None:
                if policy.lm.predict_cache is not None:
                    policy.lm.predict_cache.drop()  # keys and values of a text that has ended
                rows = torch.stack(observations).to(policy.device)
                return Replay(rows, actions, rewards, result.infos[0], log_probs, support)
