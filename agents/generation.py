"""A policy and prompts to texts, in batches: for evaluation, sample tables and a look at what was learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from tqdm.auto import tqdm

from textenv.env import TextEnv
from textenv.episode import SEPARATOR, EndReason
from textenv.prompts import Prompt, PromptLike
from textenv.tokenizer import Tokenizer
from textenv.vector import TextVectorEnv

from .interface import LengthError
from .policies import LMPolicy
from .vec_env import TextVecEnv

USUAL_TOKENS = 64  # of a text, where a policy was not trained on any; as `TextEnv` has it


class Generation(NamedTuple):
    """A prompt and what the policy wrote after it."""

    prompt: Prompt
    text: str
    ids: list[int]
    end_reason: EndReason


class FinalStep(NamedTuple):
    """The end of an episode: its final info, as `TextEnv` has it, and its last observation, (L,)."""

    info: dict[str, Any]
    observation: np.ndarray

    @property
    def generation(self) -> Generation:
        """Prompt, text, ids and end reason."""
        ids = _continuation(self.observation)
        return Generation(self.info["prompt"], self.info["text"], ids, self.info["end_reason"])


def generate(
    model: BaseAlgorithm | LMPolicy,
    prompts: Sequence[PromptLike],
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    max_new_tokens: int | None = None,
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> list[Generation]:
    """Continue each prompt exactly `n` times.

    Rows that end make room for the next prompt, so no row waits for the longest. Training is not disturbed: sampling
    has a generator of its own, and the rollout's cached rows stay.

    Args:
        model: A trained model, or its policy.
        prompts: Texts, rows or lists of token ids.
        tokenizer: The tokenizer that the model was trained with.
        n: How many continuations of each prompt.
        max_new_tokens: The most tokens of each; unset, as many as in training, or 64 for a policy alone, and fewer,
            with a warning, where the model has no room for so many.
        deterministic: Take the most probable token instead of sampling.
        seed: The seed of the sampling: the same seed, prompts and `n_envs` give the same texts.
        n_envs: The most rows side by side.
        progress_bar: Show one.
        **env_kwargs: Other arguments of `TextEnv`: `stop_ids`, `stop_strings`, `mask`, `prompt_column`, ...

    Returns:
        The continuations in the order of the prompts, those of one prompt together.

    Raises:
        ValueError: If `n` is below 1, the tokenizer has another vocabulary than the model, or the texts would be
            longer than it can read.

    Example:
        >>> from agents import generate
        >>> # [generation.text for generation in generate(model, ["The film was"], tokenizer, n=4)]
    """
    policy = check_generator(model, tokenizer, n)
    rows = [prompt for prompt in prompts for _ in range(n)]
    settings = {"reward": no_reward, "score_at": "done", **env_kwargs}
    env = env_that_fits(model, lambda most: TextEnv(rows, tokenizer, max_new_tokens=most, **settings), max_new_tokens)
    episodes = run_episodes(policy, env, env.prompts, deterministic, seed, n_envs, progress_bar)
    return [episode.generation for episode in episodes]


def env_that_fits(
    model: BaseAlgorithm | LMPolicy, make_env: Callable[[int], TextEnv], max_new_tokens: int | None
) -> TextEnv:
    """Return an env to write in: of texts as long as asked for, else as in training, as far as the model has room."""
    if max_new_tokens is not None:
        return make_env(max_new_tokens)
    wanted = trained_length(model)
    env = make_env(wanted)
    most = fitting_length(model if isinstance(model, LMPolicy) else model.policy, env.max_prompt_tokens, wanted)  # type: ignore[arg-type]
    if most == wanted:
        return env
    warnings.warn(f"{shorter_texts(most, wanted, env.max_prompt_tokens)}; max_new_tokens chooses.", stacklevel=3)
    return make_env(most)


def trained_length(model: BaseAlgorithm | LMPolicy) -> int:
    """Return the most tokens of a text that a model was trained with, or 64 where it does not know."""
    envs = None if isinstance(model, LMPolicy) else model.get_env()
    inner = None if envs is None else envs.unwrapped
    return inner.env.rules.max_new_tokens if isinstance(inner, TextVecEnv) else USUAL_TOKENS


def fitting_length(policy: LMPolicy, n_prompt: int, wanted: int) -> int:
    """Return how many tokens may be written behind prompts of up to `n_prompt` tokens: at most those wanted.

    Raises:
        ValueError: If the model has no room for a single one.
    """
    try:
        policy.lm.backbone.check_length(n_prompt, wanted)
    except LengthError as error:
        if error.excess is None:
            raise
        if error.excess >= wanted:
            raise ValueError(
                f"Expected prompts that leave the model room for a text, got one of {n_prompt} tokens ({error.fact}): "
                "shorten it, or give max_prompt_tokens and truncation_side, which cut prompts."
            ) from error
        return wanted - error.excess
    return wanted


def shorter_texts(most: int, wanted: int, n_prompt: int) -> str:
    """Return what is said where texts have less room than is usual."""
    return f"Texts have at most {most} tokens, not {wanted}: behind prompts of up to {n_prompt} the model reads no more"


def check_generator(model: BaseAlgorithm | LMPolicy, tokenizer: Tokenizer, n: int) -> LMPolicy:
    """Return the policy of what `generate` was given, or say what does not fit."""
    policy = model if isinstance(model, LMPolicy) else model.policy
    if not isinstance(policy, LMPolicy):
        raise TypeError(f"Expected a model with an LMPolicy, got {type(policy).__name__}.")
    if n < 1:
        raise ValueError(f"Expected `n` to be at least 1, got {n}.")
    if len(tokenizer) != policy.lm.backbone.vocab_size:
        raise ValueError(
            f"Expected the tokenizer that the model was trained with, of {policy.lm.backbone.vocab_size} tokens, "
            f"got one of {len(tokenizer)}."
        )
    return policy


def run_episodes(
    policy: LMPolicy,
    env: TextEnv,
    prompts: Sequence[PromptLike],
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
) -> list[FinalStep]:
    """Run one episode of each prompt through an env, in batches; return how each ended, in the order of the prompts.

    Neither the policy's training nor the env's own row, order and `np_random` are touched. What the reward drops ends
    as any other, with `info["dropped"]`.
    """
    policy.lm.backbone.check_length(env.max_prompt_tokens, env.rules.room)
    envs = TextVectorEnv(env, min(n_envs, len(prompts)))
    envs.lanes.accepts_dropped = True
    generator = torch.Generator().manual_seed(seed)
    ends: dict[int, FinalStep] = {}
    observations = envs.lanes.reset(0, prompts)
    policy.set_training_mode(False)
    with torch.no_grad(), tqdm(total=len(prompts), unit="text", disable=not progress_bar) as bar:
        while not envs.lanes.idle.all():
            batch = torch.as_tensor(observations, device=policy.device)
            allowed = torch.as_tensor(envs.lanes.allowed(), device=policy.device) if env.masks else None
            actions = policy.lm.act(batch, deterministic, generator, policy.lm.predict_cache, allowed, False).actions
            result = envs.lanes.step(actions.cpu().numpy())
            observations = result.observations
            for lane, observation in result.final_observations.items():
                ends[result.infos[lane]["group"]] = FinalStep(result.infos[lane], observation)  # as they were dealt
                bar.update()
    if policy.lm.predict_cache is not None:
        policy.lm.predict_cache.drop()
    return [ends[place] for place in sorted(ends)]


def _continuation(observation: np.ndarray) -> list[int]:
    since = observation[int(np.flatnonzero(observation == SEPARATOR)[0]) + 1 :]
    return since[since >= 0].tolist()


def no_reward(prompt: Prompt, preds: Any, done: bool) -> float:
    """Return 0: the reward of an env that is only to be written in."""
    return 0.0
