"""The conformance check for environments that users write."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env

from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.episodes.scores import Reward, RewardError, check_rewards, describe
from textenv.lanes.hooks import EpisodeHost
from textenv.lanes.lanes import Lanes
from textenv.prompts.prompts import Prompt
from textenv.vector import unwrap_text_env

N_LANES = 3  # lane 0 reaches the length limit; the others may stop early
N_EPISODES = 12  # the episodes that are played under a mask
N_CALLS = 20  # the first calls of the reward, all of which are repeated; later ones only if an episode has ended

_Step = tuple[int, np.ndarray, float, bool, bool]  # action, observation, reward, terminated, truncated


def check_text_env(env: gym.Env[Any, Any]) -> None:
    """Check that the hooks of a `TextEnv` keep their contract, by playing random episodes in several lanes and alone.

    The check passes if

    - the tokenizer's ids are in the vocabulary, and a sample of them decodes;
    - rewards are finite, the same in a second call, the same for a row alone as in a batch, and the same from
      `get_reward` as from `get_rewards` if both are defined;
    - `respond` returns a str or None, not too long, and the same in a second call;
    - no hook changes the instance (except for what it loads at first use) or a prompt's row;
    - the same actions lead to the same observations and rewards in a lane and alone;
    - masks allow a token, and the same tokens when computed from the whole text as token by token;
    - Gymnasium's own `check_env` passes.

    It warns if the env cannot be copied or pickled, and if its masks never allowed a stop id. It resets the env.

    Args:
        env: A `TextEnv`, a subclass, or the result of `gym.make` for one.

    Raises:
        TypeError: If the env is wrapped, overrides `step` or `reset`, or `respond` returns no text.
        ValueError: If the tokenizer's ids do not fit, a reward is no finite number, or a reply is too long.
        MaskError: If a mask allows no token.
        AssertionError: If a hook breaks its contract; the message names the hook, the row and a cure.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> class Vowels(TextEnv):
        ...     def get_reward(self, prompt, preds, done):
        ...         return float(preds.text[-1:] in "aeiou")
        >>> check_text_env(Vowels(["hello "], CharTokenizer(), max_new_tokens=3))
    """
    text_env = unwrap_text_env(env)
    _check_tokenizer(text_env)
    _check_copy(text_env, "copied", copy.deepcopy)
    _check_copy(text_env, "pickled", lambda env: pickle.loads(pickle.dumps(env)))
    episodes = _play(text_env)
    try:
        _play(cast(EpisodeHost, _Probe(text_env)))
    except RewardError as error:  # the lanes wrap all errors of a reward, those that the probe raises included
        raise error.__cause__ if isinstance(error.__cause__, AssertionError) else error from None
    _check_alone(text_env, episodes)
    if text_env.masks:
        _check_masks(text_env)
    check_env(text_env, skip_render_check=True)  # gymnasium's check of rendering needs an env with a registered id


def _check_tokenizer(env: TextEnv) -> None:
    size = len(env.tokenizer)
    if env.action_space != gym.spaces.Discrete(size):
        raise ValueError(f"Expected as many actions as tokens, {size}, got {env.action_space}: add tokens first.")
    # The first, the last and 64 random ids: decoding all ids of a vocabulary of 150,000 would take seconds.
    for token in {0, size - 1, *np.random.default_rng(0).integers(size, size=64).tolist()}:
        try:
            text: Any = env.tokenizer.decode([token], skip_special_tokens=True)
        except Exception as error:
            raise ValueError(f"Expected `decode` to take ids in [0, {size}), but {token} raised {error!r}.") from error
        if not isinstance(text, str):
            raise ValueError(f"Expected `decode` to return a str, got {text!r:.80} for {token}.")


def _check_copy(env: TextEnv, participle: str, make_copy: Callable[[TextEnv], TextEnv]) -> None:
    try:
        make_copy(env)
    except Exception as error:
        why = "as environments in other processes must (a lambda never can)"
        warnings.warn(f"{type(env).__name__} cannot be {participle}, {why}: {error!r}", stacklevel=3)


def _play(env: EpisodeHost) -> list[tuple[Prompt, list[_Step]]]:
    """Play random episodes side by side until every lane has finished an episode; return the last one of each lane."""
    lanes, random = Lanes(env, N_LANES), np.random.default_rng(0)
    lanes.reset(seed=0)
    running: list[list[_Step]] = [[] for _ in range(N_LANES)]
    finished: dict[int, tuple[Prompt, list[_Step]]] = {}
    while len(finished) < N_LANES:
        actions = random.integers(len(env.tokenizer), size=N_LANES)
        # In 3 of 10 steps a lane stops early, but never lane 0, so that one episode reaches the length limit.
        if env.rules.stop_ids and random.random() < 0.3:
            actions[random.integers(1, N_LANES)] = random.choice(env.rules.stop_ids)
        if env.masks:
            actions = _allowed_actions(lanes.allowed(), actions, random)
        prompts, result = list(lanes.prompts), lanes.step(actions)
        for lane, action in enumerate(actions.tolist()):
            # in a lane that has ended, `observations` already has the next episode's first observation
            observation = result.final_observations.get(lane, result.observations[lane])
            ends = bool(result.terminated[lane]), bool(result.truncated[lane])
            running[lane].append((action, observation, float(result.rewards[lane]), *ends))
            if any(ends):
                finished[lane], running[lane] = (prompts[lane], running[lane]), []
    return list(finished.values())


def _check_alone(env: TextEnv, episodes: Sequence[tuple[Prompt, list[_Step]]]) -> None:
    """Check that the same actions lead to the same steps in the env's own single row."""
    for prompt, steps in episodes:
        env.reset(options={"prompts": [prompt.row]})
        for action, observation, reward, *ends in steps:
            step = env.step(action)
            if not np.array_equal(step[0], observation) or not _is_close(step[1], reward) or [*step[2:4]] != ends:
                raise AssertionError(
                    "Expected the same actions to lead to the same alone as in one of several lanes: hooks may depend "
                    f"on their arguments only. Got {step[:4]}, not {(observation, reward, *ends)}, for "
                    f"{str(prompt)!r:.80}."
                )


def _allowed_actions(allowed: np.ndarray, wanted: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the wanted actions, (B,), with random allowed ones in place of those that `allowed`, (B, V), forbids."""
    pairs = zip(allowed, wanted, strict=True)  # a row (V,) and a token id for each lane
    return np.array([token if row[token] else random.choice(np.flatnonzero(row)) for row, token in pairs])


def _check_masks(env: TextEnv) -> None:
    """Check that masks which remember the steps so far allow the same tokens as fresh copies of them."""
    lanes, random = Lanes(env, N_LANES), np.random.default_rng(0)
    lanes.reset(seed=0)
    stop_ids, stops, n_finished = list(env.rules.stop_ids), not env.rules.stop_ids, 0
    while n_finished < N_EPISODES:
        # `LaneMasks.__reduce__`, which deepcopy calls, leaves out what the masks remember.
        allowed, fresh = lanes.allowed(), copy.deepcopy(lanes.masks)  # (B, V), and masks to compare it with
        rows = [(prompt, _copied(lanes.preds(lane))) for lane, prompt in enumerate(lanes.prompts)]
        if not np.array_equal(allowed, fresh.allowed(rows)):
            lane = int(np.flatnonzero((allowed != fresh.allowed(rows)).any(axis=1))[0])
            raise AssertionError(
                f"Expected a mask that depends on the prompt and the text so far only, but computed afresh it differs "
                f"({describe(*rows[lane])}): keep no memory of the steps before, and draw no random numbers."
            )
        stops = stops or bool(allowed[:, stop_ids].any())
        result = lanes.step(_allowed_actions(allowed, random.integers(len(env.tokenizer), size=N_LANES), random))
        n_finished += len(result.final_observations)
    if not stops:
        warnings.warn(
            f"{list(env.masks)} never allowed one of the stop ids {stop_ids}: texts may not end", stacklevel=3
        )


class _Probe:
    """A stand-in for the env that lanes use: it passes everything on to the env, and checks the calls of its hooks."""

    def __init__(self, env: TextEnv) -> None:
        self.env, self.n_calls, hooks = env, 0, type(env)
        self.has_both = TextEnv.get_reward is not hooks.get_reward and TextEnv.get_rewards is not hooks.get_rewards

    def __getattr__(self, name: str) -> Any:  # Python calls this only for names that the class does not define
        return getattr(self.env, name)

    def get_rewards(self, prompts: list[Prompt], preds: list[Preds], dones: list[bool]) -> Sequence[Any]:
        self.n_calls += 1
        with _unchanged(self.env, "the reward", prompts):
            if self.n_calls <= N_CALLS or any(dones):
                self._check_batch(prompts, preds, dones)
            return self.env.get_rewards(prompts, preds, dones)

    def _check_batch(self, prompts: list[Prompt], preds: list[Preds], dones: list[bool]) -> None:
        answers = [self.env.get_rewards(prompts, [_copied(row) for row in preds], dones) for _ in range(2)]
        pairs = zip(*(check_rewards(values, prompts, preds) for values in answers), strict=True)
        for prompt, completion, done, (reward, repeated) in zip(prompts, preds, dones, pairs, strict=True):
            row = f"({describe(prompt, completion)}, done={done})"
            _check_same(reward, repeated, f"when asked again {row}: draw no random numbers in it")
            values = self.env.get_rewards([prompt], [_copied(completion)], [done])
            alone = check_rewards(values, [prompt], [completion])[0]
            _check_same(reward, alone, f"of a row alone as in a batch {row}: score each row by itself")
            if self.has_both:
                values = [self.env.get_reward(prompt, _copied(completion), done)]
                single = check_rewards(values, [prompt], [completion])[0]
                _check_same(reward, single, f"from `get_reward` as from `get_rewards` {row}: define only one of them")

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        with _unchanged(self.env, "`respond`", [prompt]):
            again, response = self.env.respond(prompt, _copied(preds)), self.env.respond(prompt, preds)
        if response != again:
            raise AssertionError(f"Expected `respond` to answer the same again, got {response!r:.80}, {again!r:.80}.")
        return response


def _is_close(a: float, b: float) -> bool:
    # The last digits of a model's float32 score depend on the batch size, hence the tolerance.
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)


def _check_same(reward: Reward, other: Reward, label: str) -> None:
    a, b = ({"sum": scored.value, **scored.parts} for scored in (reward, other))
    if a.keys() != b.keys() or not all(_is_close(a[name], b[name]) for name in a):
        raise AssertionError(f"Expected the same reward, {a}, got {b}, {label}.")


def _copied(preds: Preds) -> Preds:
    twin = copy.copy(preds)  # a shallow copy: the tokenizer is shared
    twin.state = copy.deepcopy(preds.state)  # a hook may write into it
    return twin


@contextmanager
def _unchanged(env: TextEnv, hook: str, prompts: Sequence[Prompt]) -> Iterator[None]:
    """Check that neither the instance nor a prompt's row changes in the block."""
    before = _frozen({**vars(env), "prompt.row": [prompt.row for prompt in prompts]})
    yield
    after = _frozen({**vars(env), "prompt.row": [prompt.row for prompt in prompts]})
    changed = [name for name in {**before, **after} if before.get(name, ...) != after.get(name, ...)]
    if changed:
        raise AssertionError(
            f"Expected {hook} to change neither the instance, which serves all lanes at once, nor `prompt.row`, which "
            f"all episodes of a prompt share, but it changed {changed}. Keep the memory of an episode in "
            "`preds.state`, and a cache in an object of its own."
        )


def _frozen(value: Any) -> Any:
    """Return plain data by value, and other objects by their identity, since a model may count its calls."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_frozen(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if type(value) in (str, int, float, bool, type(None)) else id(value)
