"""The command `textenv show`: an episode token by token, with the reward, value and KL divergence of each token."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from textenv.env import TextEnv
from textenv.text.printable import printable
from textenv.vector import TextVectorEnv

from ..configuration.config import TrainConfig
from ..errors import CommandError, Exit
from ..evaluation.evaluation import sequence_of
from ..policies.lm_policy import LMPolicy
from ..policies.reference import build_reference, divergences
from ..runs.assemble import Parts, load_lm, trust_of
from .options import ShowOptions
from .page_options import ShowFlags
from .show_page import write_episode
from .trained_model import load_newest


def show(config: TrainConfig, chosen: ShowOptions, options: ShowFlags) -> int:
    """Print an episode of the run's newest policy, a line per token, or write it as a page; return the exit code.

    The divergence, in nats, is exact; it is measured from the run's reference model, or the model before training.

    Raises:
        CommandError: If the number of the prompt is out of range, or the run has no intact checkpoint.
    """
    parts = Parts(config, trust_of(options))
    load_newest(chosen.run, parts)
    env, policy = parts.env, cast("LMPolicy", parts.agent.policy)
    if not 0 <= chosen.prompt < len(env.prompts):
        raise CommandError(f"Expected --prompt between 0 and {len(env.prompts) - 1}, got {chosen.prompt}.")
    episode = replay(policy, env, chosen.prompt, chosen.seed)
    if options.html:
        reference = load_lm(parts.config.kl.reference or parts.folder, parts.trust)
        print(f"page: {printable(str(write_episode(chosen.run, parts, episode, reference)))}")
        return Exit.DONE
    observations, actions, rewards, info = episode[:4]
    with torch.no_grad():
        values = policy.predict_values(observations[:-1])[:, 0].tolist()  # (T, 1) -> (T,)
        divergence = _divergence(policy, parts, observations[-1:])
    print(f"prompt: {printable(str(info['prompt']))}\n\n{'token':<16}{'reward':>9}{'value':>9}{'KL, nats':>10}")
    for step, (action, reward, value) in enumerate(zip(actions, rewards, values, strict=True)):
        nats = f"{divergence[step]:10.4f}" if divergence is not None else " " * 10
        token = printable(repr(parts.tokenizer.decode([action])))
        print(f"{token:<16}{reward:9.3f}{value:9.3f}{nats}")
    print(f"\n{printable(info['text'])}\nended by {info['end_reason']}; reward {info['episode']['r']:.3f}", end="")
    print("".join(f"  {name} {value:.3f}" for name, value in info["reward_parts"].items()))
    return Exit.DONE


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


def _divergence(policy: LMPolicy, parts: Parts, last: torch.Tensor) -> list[float] | None:
    """Return the divergence at each token, in nats; None with masks, replies, top-k and the like.

    Those restrict or insert tokens, so that the distributions of the two models alone do not give the divergence.
    """
    env = parts.env
    if env.masks or env.is_multi_turn or policy.lm.sampling.has_support:
        return None
    reference_lm = load_lm(parts.config.kl.reference or parts.folder, parts.trust)
    reference = build_reference(reference_lm, policy.lm, env.max_prompt_tokens + env.rules.room)
    return divergences(reference, policy.lm, sequence_of(last)).tolist()
