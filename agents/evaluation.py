"""What a policy writes on given prompts, measured: figures with intervals, beside those of before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from textenv.env import TextEnv
from textenv.metrics.bootstrap import Estimate, difference, estimate, per_prompt
from textenv.metrics.scores import Metric, Scores, mean_of
from textenv.prompts import PromptLike
from textenv.rewarding import RewardFunction
from textenv.tokenizer import Tokenizer

from .actor_critic import LMActorCritic
from .files import write_text
from .generation import FinalStep, Generation, check_generator, env_that_fits, no_reward, run_episodes
from .kl import KLPenalty
from .observations import prompt_lengths, unpack_observations
from .policies import LMPolicy
from .pretrained import LMLike
from .reference import build_reference, divergences
from .sequences import SequenceBatch

KL_ROWS = 64  # episodes whose divergence is computed together


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation, each with its 95 % interval (BCa bootstrap over prompts).

    Attributes:
        scores: What each prompt adds to each figure; a row a prompt.
        generations: What was written: the prompts in order, the texts of one prompt together.
        n: Texts a prompt.
        before: The evaluation that this one is compared with, of the same prompts, or None.
        seed: Of the resampling.
        n_resamples: How often the prompts are drawn.
        figures: The figures by name: value, low, high. An interval of None: the figure has none (distinct n-grams).
        differences: Figure minus the one of before, the same prompts drawn for both; empty without `before`.

    Example:
        >>> from textenv.metrics import mean_of
        >>> before = Evaluation({"reward": mean_of([0.0, 1.0])}, [])
        >>> after = Evaluation({"reward": mean_of([1.0, 2.0])}, [], before=before)
        >>> print(after.to_markdown())
        | figure | before | after | difference |
        |---|---|---|---|
        | reward | 0.500 [0.00, 1.00] | 1.50 [1.00, 2.00] | +1.00 [+1.00, +1.00] |
    """

    scores: Mapping[str, Scores]
    generations: Sequence[Generation]
    n: int = 1
    before: Evaluation | None = None
    seed: int = 0
    n_resamples: int = 1000
    figures: dict[str, Estimate] = field(init=False)
    differences: dict[str, Estimate] = field(init=False)

    def __post_init__(self) -> None:
        draws = self.seed, self.n_resamples
        figures = {name: estimate(scores, *draws) for name, scores in self.scores.items()}
        earlier = {} if self.before is None else self.before.scores
        shared = [name for name in self.scores if name in earlier]
        differences = {name: difference(self.scores[name], earlier[name], *draws) for name in shared}
        object.__setattr__(self, "figures", figures)
        object.__setattr__(self, "differences", differences)

    def to_markdown(self) -> str:
        """Return the figures as a table: with `before`, the two side by side and their paired difference."""
        if self.before is None:
            rows = [[name, _shown(one)] for name, one in self.figures.items()]
            return _table(["figure", "value [95 % interval]"], rows)
        earlier = self.before.figures
        rows = []
        for name in [*earlier, *(name for name in self.figures if name not in earlier)]:
            rows.append([name, _shown(earlier.get(name)), _shown(self.figures.get(name))])
            rows[-1].append(_shown(self.differences.get(name), sign="+"))
        return _table(["figure", "before", "after", "difference"], rows)

    def to_dict(self) -> dict[str, Any]:
        """Return figures, differences and texts as what goes into JSON; where there is no number, None."""
        earlier = {} if self.before is None else self.before.figures
        return {
            "n_prompts": len(self.generations) // self.n,
            "n": self.n,
            "figures": {name: _plain(one) for name, one in self.figures.items()},
            "before": {name: _plain(one) for name, one in earlier.items()},
            "differences": {name: _plain(one) for name, one in self.differences.items()},
            "texts": [
                {"prompt": str(one.prompt), "text": one.text, "end_reason": str(one.end_reason)}
                for one in self.generations
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` + ".json" and `path` + ".md", each whole or not at all."""
        write_text(f"{os.fspath(path)}.json", json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")
        write_text(f"{os.fspath(path)}.md", self.to_markdown() + "\n")


def evaluate(
    model: BaseAlgorithm | LMPolicy,
    prompts: Sequence[PromptLike],
    tokenizer: Tokenizer,
    metrics: Sequence[Metric] = (),
    *,
    n: int = 1,
    reward: RewardFunction | None = None,
    env: TextEnv | None = None,
    reference: LMActorCritic | LMLike | KLPenalty | None = None,
    before: Evaluation | None = None,
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> Evaluation:
    """Continue each prompt `n` times, through an env and in batches, and measure the texts.

    The texts are those of `generate` with the same arguments, and as there, training is not disturbed. Always there:
    `length` (tokens written, the end token included). With a reward: `reward`, the sum of an episode, and
    `reward/<part>` for its named parts; where the reward drops texts they are in neither, and `dropped` is their share.
    With a reference: `kl` (nats a text) and `kl_token` (nats a token), the
    divergence of the policy from it over the whole vocabulary, averaged over what was written.

    Args:
        model: A trained model, or its policy.
        prompts: Texts, rows or lists of token ids; references come from the rows, see `references_column`.
        tokenizer: The tokenizer that the model was trained with.
        metrics: Callables over prompts, texts and references, as in `textenv.metrics`.
        n: Texts a prompt. Intervals are over prompts: the texts of one are drawn together.
        reward: A function with the contract of `TextEnv.get_reward`.
        env: The env to run the prompts through, in place of `reward` and `env_kwargs`: its reward, limits, masks and
            replies. Its own row and order stay; a stateful hook is called as in training.
        reference: A `KLPenalty` of this model, another policy's `lm`, or a name, path, config or spec.
        before: An evaluation of the same prompts, to compare with.
        deterministic: Take the most probable token instead of sampling.
        seed: The seed of the sampling and of the resampling.
        n_envs: The most rows side by side.
        progress_bar: Show one.
        **env_kwargs: Arguments of `TextEnv`: `max_new_tokens` (unset, as in `generate`), `references_column`,
            `stop_strings`, ...

    Raises:
        ValueError: If arguments contradict each other, a metric returns a name twice or another number of rows, or
            `before` is of other prompts.

    Example:
        >>> from agents.evaluation import evaluate
        >>> # after = evaluate(model, rows, tokenizer, [ROUGE()], references_column="reply", before=before)
        >>> # print(after.to_markdown()); after.save("runs/after")
    """
    policy = check_generator(model, tokenizer, n)
    if env is not None and (reward is not None or env_kwargs):
        raise ValueError(f"Expected `env` alone, got `reward` or {sorted(env_kwargs)} with it: they are the env's own.")
    rows = [prompt for prompt in prompts for _ in range(n)]
    is_scored = env is not None or reward is not None
    if env is None:
        settings = dict(env_kwargs) if is_scored else {"score_at": "done", **env_kwargs}
        given = settings.pop("max_new_tokens", None)
        scored = {"reward": reward or no_reward, **settings}
        env = env_that_fits(model, lambda most: TextEnv(rows, tokenizer, max_new_tokens=most, **scored), given)
        rows = list(env.prompts)
    episodes = run_episodes(policy, env, rows, deterministic, seed, n_envs, progress_bar)
    scores = {"length": mean_of([one.info["episode"]["l"] for one in episodes])}
    if is_scored:
        scores.update(_reward_scores(episodes))
    if reference is not None:
        scores.update(_divergence_scores(policy, reference, env, episodes))
    generations = [one.generation for one in episodes]
    for metric in metrics:
        _add(scores, metric, generations)
    scores = {name: per_prompt(one, n) for name, one in scores.items()}
    if before is not None and _prompts(before.generations, before.n) != _prompts(generations, n):
        raise ValueError("Expected `before` to be an evaluation of the same prompts in the same order, got others.")
    return Evaluation(scores, generations, n, before, seed)


def _prompts(generations: Sequence[Generation], n: int) -> list[list[int]]:
    return [one.prompt.ids.tolist() for one in generations[::n]]


def _reward_scores(episodes: Sequence[FinalStep]) -> dict[str, Scores]:
    parts = [one.info["reward_parts"] for one in episodes]
    names = list(dict.fromkeys(name for row in parts for name in row))
    is_scored = np.array([not one.info["dropped"] for one in episodes])
    values = {"reward": [one.info["episode"]["r"] for one in episodes]}
    values |= {f"reward/{name}": [row.get(name, 0.0) for row in parts] for name in names}
    # A row that was dropped adds neither to the sum nor to the number of rows.
    scores = {name: Scores(mean_of(each).rows * is_scored[:, None]) for name, each in values.items()}
    return scores if is_scored.all() else scores | {"dropped": mean_of(~is_scored)}


def _add(scores: dict[str, Scores], metric: Metric, generations: Sequence[Generation]) -> None:
    prompts, texts = [one.prompt for one in generations], [one.text for one in generations]
    for name, one in metric(prompts, texts, [one.prompt.references for one in generations]).items():
        if name in scores:
            raise ValueError(f"Expected each figure once, got {name!r} twice: give one of the metrics another name.")
        if len(one.rows) != len(texts):
            raise ValueError(f"Expected {name!r} of {len(texts)} texts to have as many rows, got {len(one.rows)}.")
        scores[name] = one


def _divergence_scores(
    policy: LMPolicy, reference: LMActorCritic | LMLike | KLPenalty, env: TextEnv, episodes: Sequence[FinalStep]
) -> dict[str, Scores]:
    """Return KL(policy, reference), exact at each token written, summed over a text: k1's expectation, less spread."""
    if env.masks or env.is_multi_turn or policy.lm.sampling.has_support:
        raise ValueError(
            "Expected a policy without top_k, top_p or min_p and an env without masks and replies for `reference`: "
            "which tokens were allowed, and which were the policy's, is not kept here."
        )
    width = env.max_prompt_tokens + env.rules.room
    lm = _reference(policy, reference, width)
    counts = np.array([one.info["episode"]["l"] for one in episodes])
    nats = []
    for start in range(0, len(episodes), KL_ROWS):
        observations = np.stack([one.observation for one in episodes[start : start + KL_ROWS]])
        batch = sequence_of(torch.as_tensor(observations, device=policy.device))
        kl = divergences(lm, policy.lm, batch).double().cpu().numpy()
        nats.append(np.bincount(batch.rows, weights=kl, minlength=len(observations)))
    sums = np.concatenate(nats)
    return {"kl": mean_of(sums), "kl_token": Scores(np.stack([sums, counts], axis=1))}


def sequence_of(observations: torch.Tensor) -> SequenceBatch:
    """Return final observations, (B, L), as sequences with a transition for every token since the prompt."""
    ids, lengths = unpack_observations(observations)
    n_tokens, n_prompt = lengths.cpu().numpy(), prompt_lengths(observations).cpu().numpy()
    rows = np.repeat(np.arange(len(n_tokens)), n_tokens - n_prompt)
    cols = np.concatenate([np.arange(p - 1, t - 1) for p, t in zip(n_prompt, n_tokens, strict=True)])
    return SequenceBatch(ids, n_tokens, rows, cols, n_prompt=n_prompt)


def _reference(policy: LMPolicy, reference: LMActorCritic | LMLike | KLPenalty, width: int) -> LMActorCritic:
    if isinstance(reference, KLPenalty):
        if reference.reference is None:
            raise ValueError("Expected a KLPenalty that was attached to the model: it takes its reference then.")
        reference = reference.reference
    if not isinstance(reference, LMActorCritic):
        return build_reference(reference, policy.lm, width)
    if reference.sampling != policy.lm.sampling:
        raise ValueError(f"Expected a reference with {policy.lm.sampling}, got {reference.sampling}.")
    return reference


def _plain(one: Estimate) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in one._asdict().items()
    }


def _shown(one: Estimate | None, sign: str = "") -> str:
    if one is None:
        return ""
    number = f"{sign}#.3g"
    interval = "" if one.low is None or one.high is None else f" [{one.low:{number}}, {one.high:{number}}]"
    return f"{one.value:{number}}{interval}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
