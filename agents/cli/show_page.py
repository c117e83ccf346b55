"""The page of `textenv show --html`: one episode of a run's newest policy, with the numbers of each token."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch

from textenv.text.tokenizer import Tokenizer

from ..evaluation.token_numbers import Episodes, likeliest, token_rows
from ..files import write_text
from ..models.observations import prompt_lengths, unpack_observations
from ..models.pretrained import Pretrained
from ..models.token_sets import TokenSets
from ..policies.lm_policy import LMPolicy
from ..policies.reference import build_reference, log_probs
from ..report.episodes import episode_tables
from ..report.page import page
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.estimation import gae
from ..rollout.transitions import Segment, Transitions
from ..runs.assemble import Parts
from ..steps.kl_penalty import KLPenalty, estimate
from .replay import Replay

PAGE = "episode.html"  # in the folder of the run


def write_episode(run: str, parts: Parts, episode: Replay, reference: Pretrained) -> Path:
    """Write the page of an episode; return its path.

    Args:
        run: The run's folder.
        parts: The run's objects, with its newest weights.
        episode: The episode.
        reference: The model from which the divergence is measured.
    """
    at = parts.agent.num_timesteps
    rows = [{"tokens": at, **episode_row(parts, episode, reference)}]
    name = Path(run).resolve().name
    target = Path(run) / PAGE
    data = {"runs": [{"name": name, "episodes": episode_tables(rows)}], "kind": "episode"}
    write_text(target, page(name, data))
    return target


def episode_row(parts: Parts, episode: Replay, reference: Pretrained) -> dict[str, object]:
    """Return the numbers of each token of an episode, as the run's tokens.jsonl has them.

    `kl` is log pi - log pi_ref of the token, from the reference, and `penalty` what the run's `KLPenalty` subtracts for
    it in reward, at the coefficient of the checkpoint. `return` and `advantage` are those of generalized advantage
    estimation by the run's lambdas; a run whose advantages compare samples has none of a single episode.
    """
    agent, policy = parts.agent, cast("LMPolicy", parts.agent.policy)
    ids, lengths = unpack_observations(episode.observations)
    n, cols = len(episode.actions), lengths[:-1].cpu().numpy() - 1  # (T,)
    sets = TokenSets(policy.lm.backbone.vocab_size)
    numbers = np.zeros(n, dtype=np.int32)
    for i, allowed in enumerate(episode.allowed):
        if allowed is not None:
            numbers[i] = sets.add(allowed[None].cpu().numpy())[0]
    with torch.no_grad():
        values = policy.predict_values(episode.observations[:-1])[:, 0].cpu().numpy()  # (T, 1) to (T,)
    zeros = np.zeros(n, dtype=np.float32)
    own = np.array(episode.log_probs, dtype=np.float32)
    rewards = np.array(episode.rewards, dtype=np.float32)
    part = Transitions(
        cols.astype(np.int32), np.array(episode.actions, dtype=np.int32), rewards, zeros, values, own,
        zeros, zeros, numbers, zeros, own,
    )  # fmt: skip
    tokens = ids[-2, : lengths[-2]].cpu().numpy().astype(np.int32)
    n_prompt = int(prompt_lengths(episode.observations[:1])[0])
    episodes = Episodes.of([(Segment(0, 0, n, tokens, True, n_prompt), part)], sets, policy.device)
    built = build_reference(reference, policy.lm, parts.env.max_prompt_tokens + parts.env.rules.room)
    kept = len(episodes.actions)
    kl = own[:kept] - log_probs(built, policy.lm, episodes.batch, episodes.actions).cpu().numpy()
    penalties, buffer = _penalties(parts, kl), agent.rollout_buffer
    more: dict[str, np.ndarray | None] = {"kl": kl, "penalty": penalties, "advantage": None, "return": None}
    if isinstance(buffer, SequenceRolloutBuffer) and kept == n:
        terms, left = buffer.estimation, rewards - penalties
        more["return"] = values + gae(left, values, terms.gamma, terms.critic_lambda)
        if buffer.advantage == "gae":
            more["advantage"] = gae(left, values, terms.gamma, terms.policy_lambda(n))
    tokenizer = cast("Tokenizer", parts.tokenizer)  # transformers' decode also takes batches
    return token_rows(episodes, tokenizer, likeliest(policy.lm, episodes.batch), more)[0]


def _penalties(parts: Parts, kl: np.ndarray) -> np.ndarray:
    """Return what the run's KL penalty subtracts for each token, in reward, by its estimator; "exact" counts as k1."""
    config = parts.config.kl
    if not config.coef or config.where == "loss":
        return np.zeros_like(kl)
    buffer = parts.agent.rollout_buffer
    saved = buffer.saved_steps.get(KLPenalty.key) if isinstance(buffer, SequenceRolloutBuffer) else None
    coef = config.coef if saved is None else saved[1]["coef"]
    estimated = kl if config.estimator == "exact" else estimate(torch.as_tensor(kl), config.estimator).numpy()
    return coef * (estimated if config.clip is None else estimated.clip(-config.clip, config.clip))
