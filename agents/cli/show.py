"""The command `textenv show`: an episode token by token, with the reward, value and KL divergence of each token."""

from __future__ import annotations

from typing import cast

import torch

from textenv.text.printable import printable

from ..configuration.config import TrainConfig
from ..errors import CommandError, Exit
from ..evaluation.evaluation import sequence_of
from ..policies.lm_policy import LMPolicy
from ..policies.reference import build_reference, divergences
from ..runs.assemble import Parts, load_lm, trust_of
from .credit import write_credit
from .options import ShowOptions
from .page_options import ShowFlags
from .replay import replay
from .show_page import write_episode
from .trained_model import load_newest


def show(config: TrainConfig, chosen: ShowOptions, options: ShowFlags) -> int:
    """Print an episode of the run's newest policy, a line per token, or write it as a page, or its credit.

    The divergence, in nats, is exact; it is measured from the run's reference model, or the model before training.

    Raises:
        CommandError: If the number of the prompt is out of range, the run has no intact checkpoint, or both a page and
            its credit are asked for.
    """
    if chosen.credit is not None:
        if options.html:
            raise CommandError("Expected --html or --credit, got both: the page of `textenv report` draws the credit.")
        return write_credit(config, chosen, options)
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
