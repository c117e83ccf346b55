"""The command `textenv show`: an episode token by token, with the reward, value and KL divergence of each token."""

from __future__ import annotations

from typing import Any, cast

import torch

from textenv.env import TextEnv
from textenv.text.printable import printable
from textenv.vector import TextVectorEnv

from ..configuration.config import TrainConfig, TrustOptions
from ..errors import CommandError, Exit
from ..evaluation.evaluation import sequence_of
from ..policies.lm_policy import LMPolicy
from ..policies.reference import build_reference, divergences
from ..runs.assemble import Parts, load_lm, trust_of
from .credit import write_credit
from .options import ShowOptions
from .trained_model import load_newest


def show(config: TrainConfig, chosen: ShowOptions, options: TrustOptions) -> int:
    """Print an episode of the run's newest policy, a line per token, or write its credit; return the exit code.

    The divergence, in nats, is exact; it is measured from the run's reference model, or the model before training.

    Raises:
        CommandError: If the number of the prompt is out of range, or the run has no intact checkpoint.
    """
    if chosen.credit is not None:
        return write_credit(config, chosen, options)
    parts = Parts(config, trust_of(options))
    load_newest(chosen.run, parts)
    env, policy = parts.env, cast("LMPolicy", parts.agent.policy)
    if not 0 <= chosen.prompt < len(env.prompts):
        raise CommandError(f"Expected --prompt between 0 and {len(env.prompts) - 1}, got {chosen.prompt}.")
    observations, actions, rewards, info = replay(policy, env, chosen.prompt, chosen.seed)
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


def replay(
    policy: LMPolicy, env: TextEnv, prompt: int, seed: int
) -> tuple[torch.Tensor, list[int], list[float], dict[str, Any]]:
    """Run an episode of one prompt.

    Args:
        policy: The policy.
        env: The environment.
        prompt: The number of the prompt.
        seed: The seed of the sampling.

    Returns:
        The observations, (T + 1, L), the T actions, the T rewards and the final info.
    """
    envs = TextVectorEnv(env, 1)
    generator = torch.Generator().manual_seed(seed)
    observation = envs.lanes.reset(0, [env.prompts[prompt]])
    observations, actions, rewards = [torch.as_tensor(observation[0])], [], []
    policy.set_training_mode(False)
    with torch.no_grad():
        while True:
            batch = observations[-1][None].to(policy.device)  # (L,) -> (1, L)
            allowed = torch.as_tensor(envs.lanes.allowed(), device=policy.device) if env.masks else None
            action = policy.lm.act(batch, False, generator, policy.lm.predict_cache, allowed, False).actions
            result = envs.lanes.step(action.cpu().numpy())
            actions.append(int(action[0]))
            rewards.append(float(result.rewards[0]))
            ended = result.final_observations.get(0)
            observations.append(torch.as_tensor(result.observations[0] if ended is None else ended))
            if ended is not None:
                if policy.lm.predict_cache is not None:
                    policy.lm.predict_cache.drop()  # keys and values of a text that has ended
                return torch.stack(observations).to(policy.device), actions, rewards, result.infos[0]


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
