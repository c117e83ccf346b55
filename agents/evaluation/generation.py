"""The generation of texts by a policy, in batches, through an env without a reward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from textenv.env import TextEnv
from textenv.episodes.rules import SEPARATOR, EndReason
from textenv.lanes.lanes import Lanes
from textenv.prompts.prompts import Prompt, PromptLike
from textenv.text.tokenizer import Tokenizer
from textenv.vector import unwrap_text_env

from ..distributed.hangs import note_progress
from ..models.interface import LengthError
from ..policies.lm_policy import LMPolicy
from ..rollout.vec_env import TextVecEnv
from ..small_models.progress import progress

USUAL_TOKENS = 64  # the most tokens of a text, for a policy without an env: the default of `TextEnv`


class Generation(NamedTuple):
    """A prompt and its continuation."""

    prompt: Prompt
    text: str
    ids: list[int]  # the tokens of the text, the end token included
    end_reason: EndReason


class FinalStep(NamedTuple):
    """The last step of an episode: the info that `TextEnv.step` returns with it, and the observation, (L,)."""

    info: dict[str, Any]
    observation: np.ndarray

    @property
    def generation(self) -> Generation:
        """The episode's prompt and text."""
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

    When a text ends, its row continues with the next prompt, so that no row waits for the longest. Training is not
    disturbed: sampling has a random generator and a cache of its own.

    Args:
        model: A trained model, or its policy.
        prompts: Texts, rows or lists of token ids.
        tokenizer: The tokenizer that the model was trained with.
        n: The number of continuations per prompt.
        max_new_tokens: The most tokens of a continuation; by default as many as in training (64 for a policy without
            its algorithm), or fewer, with a warning, if the model cannot read so many.
        deterministic: Whether to take the most probable token instead of sampling.
        seed: The seed of the sampling. The draws of a text follow from it and from the text's number, whatever is
            generated beside it: the same seed and prompts give the same texts, up to rounding.
        n_envs: The largest number of texts that are generated side by side.
        progress_bar: Whether to show a progress bar.
        **env_kwargs: Other arguments of `TextEnv`: `stop_ids`, `stop_strings`, `mask`, `prompt_column`, ...

    Returns:
        The continuations in the order of the prompts; the continuations of one prompt stand together.

    Raises:
        TypeError: If `model` has no `LMPolicy`.
        ValueError: If `n` is below 1, the tokenizer has another number of tokens than the model, or prompts and texts
            are longer than the model can read.

    Example:
        >>> from agents import generate, make_agent
        >>> from textenv import CharTokenizer
        >>> from transformers import GPT2Config
        >>> tokenizer = CharTokenizer()
        >>> env = TextEnv(["a", "bcd"], tokenizer, reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> model = make_agent(env, config, n_envs=8, device="cpu")
        >>> [str(generation.prompt) for generation in generate(model, ["the film was"], tokenizer, n=2)]
        ['the film was', 'the film was']
    """
    policy = check_generator(model, tokenizer, n)
    rows = [prompt for prompt in prompts for _ in range(n)]
    settings = {"reward": no_reward, "score_at": "done", **env_kwargs}
    env = env_that_fits(model, lambda most: TextEnv(rows, tokenizer, max_new_tokens=most, **settings), max_new_tokens)
    episodes = run_episodes(policy, env, env.prompts, deterministic, seed, n_envs, progress_bar)
    return [episode.generation for episode in episodes]


def env_that_fits(
    model: BaseAlgorithm | LMPolicy,
    make_env: Callable[[int], TextEnv],
    max_new_tokens: int | None,
    stacklevel: int = 3,
) -> TextEnv:
    """Return an env to generate in, whose texts are as long as in training if the model can read them.

    Args:
        model: The model or policy that will generate.
        make_env: A function from `max_new_tokens` to the env.
        max_new_tokens: The length that the user asked for, which is then used as it is; None for none.
        stacklevel: The number of calls from the warning to the user's line.
    """
    if max_new_tokens is not None:
        return make_env(max_new_tokens)
    wanted = trained_length(model)
    env = make_env(wanted)
    most = fitting_length(model if isinstance(model, LMPolicy) else model.policy, env.max_prompt_tokens, wanted)  # type: ignore[arg-type]
    if most == wanted:
        return env
    warnings.warn(
        f"{shorter_texts(most, wanted, env.max_prompt_tokens)}; max_new_tokens chooses.", stacklevel=stacklevel
    )
    return make_env(most)


def trained_length(model: BaseAlgorithm | LMPolicy) -> int:
    """Return `max_new_tokens` of the env that a model trains on; 64 for a model without an env."""
    envs = None if isinstance(model, LMPolicy) else model.get_env()
    inner = None if envs is None else envs.unwrapped
    return inner.env.rules.max_new_tokens if isinstance(inner, TextVecEnv) else USUAL_TOKENS


def fitting_length(policy: LMPolicy, n_prompt: int, wanted: int) -> int:
    """Return how many tokens, at most `wanted`, fit after prompts of up to `n_prompt` tokens.

    Raises:
        ValueError: If not even one token fits.
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
    """Return a message that texts are shorter than usual, and why, without a full stop."""
    return f"Texts have at most {most} tokens, not {wanted}: behind prompts of up to {n_prompt} the model reads no more"


def check_generator(model: BaseAlgorithm | LMPolicy, tokenizer: Tokenizer, n: int) -> LMPolicy:
    """Return the policy of a model; raise the errors of `generate` if model, tokenizer and `n` do not fit."""
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
    first: int = 0,
) -> list[FinalStep]:
    """Run one episode of each prompt, in batches; return the last step of each, in the order of the prompts.

    The policy's training and the env's own episode, prompt order and `np_random` stay untouched. An episode that the
    reward drops is returned like any other, with `info["dropped"]` true. `first` is the number of the first prompt,
    where these are some of many: the draws of an episode follow from the seed and its number.
    """
    policy.lm.backbone.check_length(env.max_prompt_tokens, env.rules.room)
    lanes = Lanes(unwrap_text_env(env), min(n_envs, len(prompts)), accepts_dropped=True)
    draws = _Draws(seed, first, lanes.n_lanes, env.rules.room)
    ends: dict[int, FinalStep] = {}
    observations = lanes.reset(0, prompts)
    policy.set_training_mode(False)
    with torch.no_grad(), progress(total=len(prompts), description="texts", unit="text", is_shown=progress_bar) as bar:
        while not lanes.idle.all():
            batch = torch.as_tensor(observations, device=policy.device)
            allowed = torch.as_tensor(lanes.allowed(), device=policy.device) if env.masks else None
            note_progress()
            numbers = np.array([episode.group for episode in lanes.state.episodes])  # (B,)
            uniform = draws.next(numbers, lanes.idle)
            actions = policy.lm.act(batch, deterministic, uniform, policy.lm.predict_cache, allowed, False).actions
            result = lanes.step(actions.cpu().numpy())
            observations = result.observations
            for lane, observation in result.final_observations.items():
                # `group` numbers the prompts in the order in which lanes took them: here one episode per prompt.
                ends[result.infos[lane]["group"]] = FinalStep(result.infos[lane], observation)
                bar.update()
    if policy.lm.predict_cache is not None:
        policy.lm.predict_cache.drop()
    return [ends[group] for group in sorted(ends)]


class _Draws:
    """Uniform numbers for the tokens of episodes that run side by side, which follow from seed and episode alone.

    So a text depends neither on the number of lanes nor on the process that writes it.
    """

    def __init__(self, seed: int, first: int, n_lanes: int, most: int) -> None:
        self.seed, self.first = seed, first
        self.numbers = np.full(n_lanes, -1)  # (B,): of the episode in each lane
        self.used = np.zeros(n_lanes, dtype=np.int64)  # (B,): how many numbers it has used
        self.table = np.zeros((n_lanes, most), dtype=np.float32)  # (B, T): a number for each token that it may write

    def next(self, numbers: np.ndarray, idle: np.ndarray) -> torch.Tensor:
        """Return the next draws of the episodes with these numbers, (B,), as (B, 1); any draw for an idle lane."""
        for lane in np.flatnonzero((self.numbers != numbers) & ~idle):
            self.numbers[lane], self.used[lane] = numbers[lane], 0
            of_episode = np.random.default_rng([self.seed, self.first + numbers[lane]])
            self.table[lane] = of_episode.random(self.table.shape[1], dtype=np.float32)
        uniform = self.table[np.arange(len(idle)), self.used]  # (B,)
        # After its last number an episode has ended, and its lane has another one, or is idle for good.
        self.used = (self.used + ~idle) % self.table.shape[1]
        return torch.from_numpy(uniform[:, None])  # (B,) to (B, 1)


def _continuation(observation: np.ndarray) -> list[int]:
    """Return the ids behind the separator of an observation, (L,), without padding."""
    behind = observation[int(np.flatnonzero(observation == SEPARATOR)[0]) + 1 :]
    return behind[behind >= 0].tolist()  # padding is negative


def no_reward(prompt: Prompt, preds: Any, done: bool) -> float:
    """Return 0, the reward of an env that only generates."""
    return 0.0
