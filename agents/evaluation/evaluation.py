"""The evaluation of a policy on prompts: figures with intervals, and their differences from an earlier evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.scores import RewardFunction
from textenv.metrics.bootstrap import Estimate, difference, estimate, per_prompt
from textenv.metrics.scores import Metric, Scores, mean_of
from textenv.prompts.prompts import PromptLike
from textenv.rewards.base import RewardLike, score_rows
from textenv.rewards.registry import read_reward
from textenv.text.tokenizer import BOUNDARY_TOKENS, Tokenizer

from ..distributed.world import is_main_process
from ..files import write_text
from ..models.observations import prompt_lengths, unpack_observations
from ..models.pretrained import LMLike
from ..models.sequences import SequenceBatch, number_prompts
from ..policies.actor_critic import LMActorCritic
from ..policies.lm_policy import LMPolicy
from ..policies.reference import build_reference, divergences
from ..steps.kl_penalty import KLPenalty
from .generation import FinalStep, Generation, check_generator, env_that_fits, no_reward, run_episodes
from .shared_episodes import run_together
from .tables import markdown, plain, shown

KL_ROWS = 64  # episodes per forward of the divergence, to bound the memory


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation, each with its 95 % interval (BCa bootstrap over prompts).

    Attributes:
        scores: By figure, the contribution of each prompt: one row per prompt.
        generations: The texts in the order of the prompts; the texts of one prompt stand together.
        n: The number of texts per prompt.
        before: The earlier evaluation of the same prompts to compare with, or None.
        seed: The seed of the resampling.
        n_resamples: The number of times that the prompts are resampled.
        figures: The figures by name: value, low, high. Low and high are None for a figure without an interval, such as
            distinct n-grams.
        differences: Each figure minus that of `before`, with the same prompts drawn for both; empty without `before`.

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

    @property
    def prompts(self) -> list[str]:
        """The text of each prompt."""
        return [str(generation.prompt) for generation in self.generations[:: self.n]]

    def to_markdown(self) -> str:
        """Return the figures as a Markdown table; with `before`, both evaluations and their paired differences."""
        if self.before is None:
            rows = [[name, shown(figure)] for name, figure in self.figures.items()]
            return markdown(["figure", "value [95 % interval]"], rows)
        earlier = self.before.figures
        rows = []
        for name in [*earlier, *(name for name in self.figures if name not in earlier)]:
            rows.append([name, shown(earlier.get(name)), shown(self.figures.get(name))])
            rows[-1].append(shown(self.differences.get(name), sign="+"))
        return markdown(["figure", "before", "after", "difference"], rows)

    def to_dict(self) -> dict[str, Any]:
        """Return figures, differences and texts, ready for JSON; None stands for a number that is not finite."""
        earlier = {} if self.before is None else self.before.figures
        return {
            "n_prompts": len(self.generations) // self.n,
            "n": self.n,
            "figures": {name: plain(figure) for name, figure in self.figures.items()},
            "before": {name: plain(figure) for name, figure in earlier.items()},
            "differences": {name: plain(figure) for name, figure in self.differences.items()},
            "texts": [
                {"prompt": str(generation.prompt), "text": generation.text, "end_reason": str(generation.end_reason)}
                for generation in self.generations
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the files `path` + ".json" and `path` + ".md", each of them whole or not at all."""
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
    judge: RewardLike | None = None,
    reference: LMActorCritic | LMLike | KLPenalty | None = None,
    before: Evaluation | None = None,
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> Evaluation:
    """Continue each prompt `n` times, in batches, and measure the texts.

    The texts are the ones that `generate` returns for the same arguments, and like `generate` this does not disturb
    training. The figures are those of `metrics`, and

    - `length`: tokens written, the end token included, mean of the texts,
    - with a reward, `reward`: the sum of an episode's rewards, and `reward/<part>` for its named parts. Texts that the
      reward drops count in neither of the two; their share is `dropped`,
    - with a judge, `judge`: its mean score of the finished texts,
    - with a reference, `kl` (nats a text) and `kl_token` (nats a token): KL(policy, reference) over the whole
      vocabulary at each token written.

    Args:
        model: A trained model, or its policy.
        prompts: Texts, rows or lists of token ids; references come from the rows, see `references_column`.
        tokenizer: The tokenizer that the model was trained with.
        metrics: Callables of prompts, texts and references, as in `textenv.metrics`.
        n: The number of texts per prompt. Intervals are over prompts: the texts of a prompt are resampled together.
        reward: A function with the arguments and result of `TextEnv.get_reward`.
        env: An env to run the prompts through, with its reward, limits, masks and replies, instead of `reward` and
            `env_kwargs`. Its own episode and prompt order stay as they are; its hooks are called as in training.
        judge: A reward that the policy was not trained on, as for `TextEnv`, for finished texts of one turn. Where the
            reward rises and the judge does not, the policy pleases the reward alone (Gao et al., 2023, "Scaling laws
            for reward model overoptimization", arXiv 2210.10760).
        reference: A `KLPenalty` of this model, another policy's `lm`, or a name, path, config or spec.
        before: An evaluation of the same prompts, to compare with.
        deterministic: Whether to take the most probable token instead of sampling.
        seed: The seed of the sampling and of the resampling.
        n_envs: The largest number of texts that are generated side by side.
        progress_bar: Whether to show a progress bar.
        **env_kwargs: Arguments of `TextEnv`: `max_new_tokens` (by default as in `generate`), `references_column`,
            `stop_strings`, ...

    Raises:
        TypeError: If `model` has no `LMPolicy`.
        ValueError: If arguments contradict each other, two metrics return the same name, a metric returns another
            number of rows than there are texts, or `before` has other prompts.

    Example:
        >>> from agents import evaluate, make_agent
        >>> from textenv import CharTokenizer
        >>> from textenv.metrics import Distinct
        >>> from transformers import GPT2Config
        >>> tokenizer = CharTokenizer()
        >>> env = TextEnv(["a", "bcd"], tokenizer, reward=lambda prompt, preds, done: float(done), max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> model = make_agent(env, config, n_envs=8, device="cpu")
        >>> before = evaluate(model, ["a", "bcd"], tokenizer, [Distinct([1])], n=2, env=env)
        >>> # ... model.learn(10_000) ...
        >>> after = evaluate(model, ["a", "bcd"], tokenizer, [Distinct([1])], n=2, env=env, before=before)
        >>> sorted(before.figures), after.differences["reward"].value
        (['distinct_1', 'length', 'reward'], 0.0)
    """
    sampling = (deterministic, seed, n_envs, progress_bar)
    ran = _run(run_episodes, model, prompts, tokenizer, n, reward, env, *sampling, **env_kwargs)
    return _measure(ran, metrics, judge, reference, before)


def evaluate_together(
    model: BaseAlgorithm | LMPolicy,
    prompts: Sequence[PromptLike],
    tokenizer: Tokenizer,
    metrics: Sequence[Metric] = (),
    *,
    judge: RewardLike | None = None,
    reference: LMActorCritic | LMLike | KLPenalty | None = None,
    before: Evaluation | None = None,
    **kwargs: Any,
) -> Evaluation | None:
    """Evaluate as `evaluate` does, the episodes shared among the processes; all processes must call it.

    Args:
        model: As for `evaluate`, and so are the others; with sharded weights, all that it reads must be `gathered`.
        prompts: The prompts, the same in all processes.
        tokenizer: The tokenizer.
        metrics: The metrics, which rank 0 computes.
        judge: The judge, which rank 0 asks.
        reference: The reference, which rank 0 reads.
        before: An evaluation of the same prompts, to compare with.
        **kwargs: Other arguments of `evaluate`.

    Returns:
        The evaluation in the process of rank 0, None in the others.
    """
    ran = _run(run_together, model, prompts, tokenizer, **kwargs)
    return _measure(ran, metrics, judge, reference, before) if is_main_process() else None


class _Ran(NamedTuple):
    """Episodes that are to be measured, and what they were run with."""

    policy: LMPolicy
    env: TextEnv
    episodes: Sequence[FinalStep]
    is_scored: bool  # whether the env has a reward of the caller's
    n: int
    seed: int


def _run(
    run: Callable[..., list[FinalStep]],
    model: BaseAlgorithm | LMPolicy,
    prompts: Sequence[PromptLike],
    tokenizer: Tokenizer,
    n: int = 1,
    reward: RewardFunction | None = None,
    env: TextEnv | None = None,
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> _Ran:
    """Run the episodes of an evaluation by `run_episodes` or `run_together`; see `evaluate` for the arguments."""
    policy = check_generator(model, tokenizer, n)
    if env is not None and (reward is not None or env_kwargs):
        raise ValueError(f"Expected `env` alone, got `reward` or {sorted(env_kwargs)} with it: they are the env's own.")
    rows = [prompt for prompt in prompts for _ in range(n)]
    is_scored = env is not None or reward is not None
    if env is None:
        settings = dict(env_kwargs) if is_scored else {"score_at": "done", **env_kwargs}
        max_new_tokens = settings.pop("max_new_tokens", None)
        settings = {"reward": reward or no_reward, **settings}
        make = partial(TextEnv, rows, tokenizer, **settings)
        env = env_that_fits(model, lambda most: make(max_new_tokens=most), max_new_tokens, stacklevel=4)
        rows = list(env.prompts)  # tokenized already
    episodes = run(policy, env, rows, deterministic, seed, n_envs, progress_bar)
    return _Ran(policy, env, episodes, is_scored, n, seed)


def _measure(
    ran: _Ran,
    metrics: Sequence[Metric],
    judge: RewardLike | None,
    reference: LMActorCritic | LMLike | KLPenalty | None,
    before: Evaluation | None,
) -> Evaluation:
    """Return the evaluation of episodes; see `evaluate` for the arguments."""
    policy, env, episodes, is_scored, n, seed = ran
    scores = {"length": mean_of([episode.info["episode"]["l"] for episode in episodes])}
    if is_scored:
        scores.update(_reward_scores(episodes))
    if judge is not None:
        scores["judge"] = _judge_scores(read_reward(judge), env, episodes)
    if reference is not None:
        scores.update(_divergence_scores(policy, reference, env, episodes))
    generations = [episode.generation for episode in episodes]
    for metric in metrics:
        _add(scores, metric, generations)
    scores = {name: per_prompt(of_texts, n) for name, of_texts in scores.items()}
    if before is not None and _prompts(before.generations, before.n) != _prompts(generations, n):
        raise ValueError("Expected `before` to be an evaluation of the same prompts in the same order, got others.")
    return Evaluation(scores, generations, n, before, seed)


def _prompts(generations: Sequence[Generation], n: int) -> list[list[int]]:
    return [generation.prompt.ids.tolist() for generation in generations[::n]]


def _reward_scores(episodes: Sequence[FinalStep]) -> dict[str, Scores]:
    """Return the scores of the reward and of its parts, and the share of dropped episodes if there are any."""
    parts = [episode.info["reward_parts"] for episode in episodes]
    names = list(dict.fromkeys(name for row in parts for name in row))
    is_scored = np.array([not episode.info["dropped"] for episode in episodes])
    values = {"reward": [episode.info["episode"]["r"] for episode in episodes]}
    values |= {f"reward/{name}": [row.get(name, 0.0) for row in parts] for name in names}
    # Each row of `mean_of` is (sum, count): the row of a dropped episode becomes (0, 0), and so does not count.
    scores = {name: Scores(mean_of(column).rows * is_scored[:, None]) for name, column in values.items()}
    return scores if is_scored.all() else scores | {"dropped": mean_of(~is_scored)}


def _judge_scores(judge: RewardFunction, env: TextEnv, episodes: Sequence[FinalStep]) -> Scores:
    """Return the judge's score of each text; a text that it drops does not count."""
    if env.is_multi_turn:
        raise ValueError("Expected texts of one turn for `judge`, got an env with replies: use a metric instead.")
    generations = [episode.generation for episode in episodes]
    preds = [
        Preds(
            env.tokenizer,
            own.ids,
            context=own.prompt.ids[-BOUNDARY_TOKENS:],
            end_reason=own.end_reason,
            stop_strings=env.rules.stop_strings,
        )
        for own in generations
    ]
    judged = score_rows(judge, [own.prompt for own in generations], preds, [True] * len(preds))
    counts = np.array([not score.is_dropped for score in judged])
    return Scores(mean_of([score.value for score in judged]).rows * counts[:, None])


def _add(scores: dict[str, Scores], metric: Metric, generations: Sequence[Generation]) -> None:
    """Add the scores of a metric.

    Raises:
        ValueError: If a name exists already, or the scores have another number of rows than there are texts.
    """
    prompts, texts = [generation.prompt for generation in generations], [generation.text for generation in generations]
    for name, measured in metric(prompts, texts, [prompt.references for prompt in prompts]).items():
        if name in scores:
            raise ValueError(f"Expected each figure once, got {name!r} twice: give one of the metrics another name.")
        if len(measured.rows) != len(texts):
            raise ValueError(f"Expected {name!r} of {len(texts)} texts to have as many rows, got {len(measured.rows)}.")
        scores[name] = measured


def _divergence_scores(
    policy: LMPolicy, reference: LMActorCritic | LMLike | KLPenalty, env: TextEnv, episodes: Sequence[FinalStep]
) -> dict[str, Scores]:
    """Return KL(policy, reference), summed over each text.

    The divergence at each token is exact, over the whole vocabulary: it has the same expectation as the estimator k1
    (Schulman, 2020, "Approximating KL divergence") and a lower variance.
    """
    if env.masks or env.is_multi_turn or policy.lm.sampling.has_support:
        raise ValueError(
            "Expected a policy without top_k, top_p or min_p and an env without masks and replies for `reference`: "
            "an evaluation does not keep which tokens were allowed, and which the policy wrote."
        )
    width = env.max_prompt_tokens + env.rules.room
    lm = _reference(policy, reference, width)
    counts = np.array([episode.info["episode"]["l"] for episode in episodes])  # (N,) tokens
    nats = []
    for start in range(0, len(episodes), KL_ROWS):
        observations = np.stack([episode.observation for episode in episodes[start : start + KL_ROWS]])  # (B, L)
        batch = sequence_of(torch.as_tensor(observations, device=policy.device))
        kl = divergences(lm, policy.lm, batch).double().cpu().numpy()  # (n,), one per token written
        nats.append(np.bincount(batch.rows, weights=kl, minlength=len(observations)))  # (B,), summed over each text
    sums = np.concatenate(nats)
    return {"kl": mean_of(sums), "kl_token": Scores(np.stack([sums, counts], axis=1))}


def sequence_of(observations: torch.Tensor) -> SequenceBatch:
    """Return final observations, (B, L), as sequences with a transition for every token after the prompt.

    Equal prompts are numbered alike, so that they are read once.
    """
    ids, lengths = unpack_observations(observations)  # (B, T) and (B,)
    n_tokens, n_prompt = lengths.cpu().numpy(), prompt_lengths(observations).cpu().numpy()
    rows = np.repeat(np.arange(len(n_tokens)), n_tokens - n_prompt)
    # With p tokens of prompt and t in all, column p - 1 predicts the first token written, column t - 2 the last.
    cols = np.concatenate([np.arange(p - 1, t - 1) for p, t in zip(n_prompt, n_tokens, strict=True)])
    prompts = number_prompts(list(ids.cpu().numpy()), n_prompt)
    return SequenceBatch(ids, n_tokens, rows, cols, n_prompt=n_prompt, prompts=prompts)


def _reference(policy: LMPolicy, reference: LMActorCritic | LMLike | KLPenalty, width: int) -> LMActorCritic:
    """Return the reference model, for sequences of up to `width` tokens; build it from a name, config or spec."""
    if isinstance(reference, KLPenalty):
        if reference.reference is None:
            raise ValueError("Expected a KLPenalty that was attached to the model: it takes its reference then.")
        reference = reference.reference
    if not isinstance(reference, LMActorCritic):
        return build_reference(reference, policy.lm, width)
    if reference.sampling != policy.lm.sampling:
        raise ValueError(f"Expected a reference with {policy.lm.sampling}, got {reference.sampling}.")
    return reference
