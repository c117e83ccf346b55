"""Text generation as a Gymnasium environment: one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from os import PathLike
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from textenv.completion import Preds
from textenv.episode import SEPARATOR, EndReason, EpisodeRules
from textenv.failures import Failures, OnFailure
from textenv.lanes import Lanes
from textenv.masks import MaskLike, read_masks
from textenv.named_tokenizer import read_tokenizer
from textenv.printable import printable
from textenv.priority import PrioritySampling
from textenv.prompts import Order, Prompt, PromptLike, PromptReader, PromptRows, read_rows
from textenv.rendering import MODES, check_render_mode, picture, render_row
from textenv.rewarding import RewardFunction, Score, ScoreAt, check_rewards, score_each
from textenv.rewards.asynchronous import AsyncReward
from textenv.rewards.base import BatchReward, RewardLike, RowReward, ask_rows, check_choice
from textenv.rewards.registry import read_reward
from textenv.tokenizer import Tokenizer
from textenv.vocabulary import Vocabulary
from textenv.wrapped import check_wrappers


class TextEnv(gym.Env[np.ndarray, Any]):
    """A language model's episode: it starts at a prompt, each action writes one token, and `get_reward` scores it.

    Subclass it and write `get_reward` (or pass `reward=`), then train with Stable-Baselines3.

    Observation: `Box(-2, V - 1, (max_prompt_tokens + 1 + room,), int64)`: the prompt's tokens, one separator -2, the
    tokens since, then padding -1. Where the prompt ends and how far one is can be read off it, even where pad and EOS
    are the same token. `room` is `max_new_tokens`, plus the replies of a multi-turn env.

    Action: `Discrete(V)`, a token id, where V is `len(tokenizer)`.

    Episode end: the policy writes one of `stop_ids` or `stop_strings`, or `max_new_tokens` tokens. The last
    terminates too, since the observation shows how far one is; `length_limit="truncate"` truncates instead. The final
    `info` has `text`, `prompt`, `end_reason`, `reward_parts`, `group`, `scored` (False until a deferred score has
    come), `dropped` (whether the reward left the episode out) and `episode` ({"r": sum of rewards, "l": tokens}).
    Gymnasium's RecordEpisodeStatistics wants the key `episode` for itself: give it another `stats_key`.

    Several turns: define `respond(prompt, preds) -> str | None`. It is called when a turn of the policy ends; its text
    is observed, never trained; None ends the episode. Where the prompt is a chat, the text is the content of a user's
    message, and what is observed is all that the chat template writes up to the assistant's next turn: allow for it in
    `max_response_tokens`. A template that rewrites earlier messages cannot do that: the error says what to do instead.
    `turn_tokens` shares one room between turns and replies, as `textenv.adapters.TurnEnv` has it.

    The instance keeps no state of an episode besides its own row: the same instance serves all lanes of a
    `TextVectorEnv` or `TextVecEnv`. Hooks that need memory write into `preds.state`, which lives one episode.

    Args:
        prompts: Texts, rows (dicts), lists of token ids or chats (lists of messages `{"role": ..., "content": ...}`,
            rendered by the tokenizer's chat template, which also opens the assistant's turn); or the path of a .jsonl,
            .csv or .txt file. A row may carry its own, smaller `max_new_tokens`. Of a list all are read at once; any
            other sized sequence, as a `datasets.Dataset` (see `textenv.read_dataset`), is checked row by row and stays
            where it is: a row is read again each time it is dealt.
        tokenizer: A Hugging Face tokenizer, or its name or folder, or anything with the members of
            `textenv.Tokenizer`. A prompt gets the special tokens that open a text (BOS), not those that close it.
        reward: Instead of a subclass: a function with the contract of `get_reward`, a `textenv.rewards.BatchReward`,
            or the name of a reward, as "vader" (see `textenv.rewards.read_reward`).
        max_new_tokens: The most tokens that the policy writes in an episode.
        max_prompt_tokens: The longest prompt. Unset, the longest one given: set it where training and test prompts
            differ, since it decides the width of the observation.
        truncation_side: Where a longer prompt loses tokens: "left" keeps its end, "right" its start; None raises.
        prompt_column: The column of a row that holds the prompt.
        references_column: The column that holds reference texts; they reach the reward as `prompt.references`.
        stop_ids: Token ids that end a turn; the tokenizer's EOS by default. A chat model's turns may end with another.
        stop_strings: Texts that end a turn as soon as they appear; they are not part of `preds.text`.
        length_limit: Whether reaching `max_new_tokens` is "terminate" or "truncate".
        score_at: "step" calls the reward for every token, "done" for finished episodes only, "rollout_end" for all
            finished episodes of a rollout in one call (see `agents.LateScores`; without it, as "done"). Unset, a
            `BatchReward` says it itself; anything else is called for every token.
        on_failure: What becomes of a row whose reward raises, or is no finite number. "raise": the error stops the run.
            "drop": the episode is left out of training and counted, and too many stop the run (see `Failures`). A
            number: that is its reward, as the part "failure". A `BatchReward` or `get_rewards` that raises fails for
            all rows of the call. An `AsyncReward` has its own. There is no time limit: Python cannot end a function
            that does not return. `AsyncFunction(judge, time_limit=30)` and `HTTPJudge` have one.
        samples_per_prompt: How many episodes each prompt is given to, a group: one draw of the order. Lanes take the
            members one after the other, as they become free, so `n_envs` need not be a multiple of it, and the members
            need not stand in neighbouring lanes, nor in step. `preds.group` and `info["group"]` number the groups. With
            `score_at="rollout_end"` and `agents.LateScores` the members of a group are scored in one call, rows
            together, when the last has ended: the reward may compare them. Rows given to `reset` run once each.
        order: "shuffle" visits each prompt once an epoch in a new order; "sequential" keeps the source's;
            `PrioritySampling` draws more often what earns little, varies or was seldom seen.
        max_turns: The most turns of the policy, where `respond` is defined.
        max_response_tokens: The most tokens of a reply, where `respond` is defined.
        turn_tokens: In place of these two: the most tokens of one turn. `max_new_tokens` is then the room of all that
            stands behind the prompt, replies included. Each turn is given to `respond`, the last one too, and where
            the room left is too small for the reply and a whole turn more, the episode ends by length.
        mask: Which tokens are allowed next, for a policy that asks `action_masks`, as sb3-contrib's MaskablePPO does:
            a mask (`RegexMask(...)`), a function (prompt, preds) that returns their ids or a bool array (V,), or a list
            of these, of which all must allow a token. Masks see the current turn. `step` accepts what they forbid.
        seed: The seed of the prompts' order, until `reset(seed=...)` gives another.
        render_mode: "ansi" (`render` returns a str), "human" (it prints), "rgb_array" (it draws; needs Pillow) or None.

    Raises:
        ValueError: For prompts, limits or options that cannot work; the message says what was expected.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> class Vowels(TextEnv):
        ...     def get_reward(self, prompt, preds, done):
        ...         return float(preds.text[-1:] in "aeiou")
        >>> env = Vowels(["hello "], CharTokenizer(), max_new_tokens=3)
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(1)  # the letter "a"
        >>> reward, terminated
        (1.0, False)
    """

    metadata: dict[str, Any] = {"render_modes": list(MODES), "render_fps": 4}

    def __init__(
        self,
        prompts: Sequence[PromptLike] | str | PathLike[str],
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        reward: RewardLike | None = None,
        max_new_tokens: int = 64,
        max_prompt_tokens: int | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        prompt_column: str = "prompt",
        references_column: str | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        length_limit: Literal["terminate", "truncate"] = "terminate",
        score_at: ScoreAt | None = None,
        on_failure: OnFailure = "raise",
        samples_per_prompt: int = 1,
        order: Order | PrioritySampling = "shuffle",
        max_turns: int = 1,
        max_response_tokens: int = 0,
        turn_tokens: int | None = None,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        seed: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_choice("truncation_side", truncation_side, (None, "left", "right"))
        check_choice("length_limit", length_limit, ("terminate", "truncate"))
        check_choice("score_at", score_at, (None, *get_args(ScoreAt)))
        if not isinstance(order, PrioritySampling):
            check_choice("order", order, get_args(Order))
        check_render_mode(render_mode)
        self.tokenizer = read_tokenizer(tokenizer)
        self.reward = self._check_reward(reward)
        own_choice: ScoreAt = self.reward.score_at if isinstance(self.reward, BatchReward) else "step"
        self.score_at: ScoreAt = own_choice if score_at is None else score_at
        self.failures = self._check_failures(on_failure)
        _check_at_least_one("samples_per_prompt", samples_per_prompt)
        self.samples_per_prompt = samples_per_prompt
        self.order = order
        self.seed = seed
        self.render_mode = render_mode
        self.is_multi_turn = type(self).respond is not TextEnv.respond
        self._check_turns(max_new_tokens, max_turns, max_response_tokens, turn_tokens)
        if max_prompt_tokens is not None:
            _check_at_least_one("max_prompt_tokens", max_prompt_tokens)
        self.rules = EpisodeRules(
            stop_ids=self._check_stop_ids(stop_ids),
            stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
            max_new_tokens=max_new_tokens,
            length_limit=length_limit,
            max_turns=max_turns,
            max_response_tokens=max_response_tokens,
            turn_tokens=turn_tokens,
        )
        if any(not stop for stop in self.rules.stop_strings):
            raise ValueError(f"Expected `stop_strings` without an empty one, got {self.rules.stop_strings}.")
        self.masks = read_masks(mask)
        self.vocabulary = Vocabulary(self.tokenizer, self.rules.stop_ids)
        self._reader = PromptReader(
            self.tokenizer, prompt_column, references_column, max_prompt_tokens, truncation_side
        )
        self.prompts, longest = self._read_all(prompts)
        self.max_prompt_tokens = max_prompt_tokens or longest
        self._reader.max_prompt_tokens = self.max_prompt_tokens
        width = self.max_prompt_tokens + 1 + self.rules.room
        self.observation_space = spaces.Box(SEPARATOR, len(self.tokenizer) - 1, (width,), np.int64)
        self.action_space = spaces.Discrete(len(self.tokenizer))
        self._lanes = Lanes(self, 1, autoreset=False)

    def _check_reward(self, reward: RewardLike | None) -> RewardFunction | None:
        hooks = type(self)
        overridden = hooks.get_reward is not TextEnv.get_reward or hooks.get_rewards is not TextEnv.get_rewards
        if overridden == (reward is not None):
            raise ValueError(
                "Expected exactly one reward: a subclass of TextEnv that defines `get_reward(self, prompt, preds, "
                f"done)`, or `reward=function`; got {'both' if overridden else 'neither'}."
            )
        return None if reward is None else read_reward(reward)

    def _check_failures(self, on_failure: OnFailure) -> Failures:
        failures = Failures(on_failure)
        if on_failure != "raise" and isinstance(self.reward, AsyncReward):
            raise ValueError(
                f"Expected on_failure to be given to the {type(self.reward).__name__}, got {on_failure!r} for the "
                "env: what waits for answers decides over those that do not come."
            )
        return failures

    def _check_turns(
        self, max_new_tokens: int, max_turns: int, max_response_tokens: int, turn_tokens: int | None
    ) -> None:
        _check_at_least_one("max_new_tokens", max_new_tokens)
        if turn_tokens is not None:
            if not self.is_multi_turn or (max_turns, max_response_tokens) != (1, 0):
                raise ValueError(
                    "Expected `turn_tokens` where `respond` is defined, and without max_turns and max_response_tokens, "
                    "which it replaces."
                )
            if not 1 <= turn_tokens <= max_new_tokens:
                raise ValueError(f"Expected `turn_tokens` in [1, max_new_tokens={max_new_tokens}], got {turn_tokens}.")
            return
        if self.is_multi_turn and (max_turns < 2 or max_response_tokens < 1):
            raise ValueError(
                f"Expected max_turns >= 2 and max_response_tokens >= 1, since {type(self).__name__} defines `respond`; "
                f"got {max_turns} and {max_response_tokens}. They bound the room that the replies take."
            )
        if not self.is_multi_turn and (max_turns != 1 or max_response_tokens != 0):
            raise ValueError("Expected `respond` to be defined where max_turns or max_response_tokens is given.")

    def _check_stop_ids(self, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
        if stop_ids is None:
            eos = self.tokenizer.eos_token_id
            return () if eos is None else (eos,)
        for token in stop_ids:
            if not 0 <= token < len(self.tokenizer):
                raise ValueError(f"Expected `stop_ids` in [0, {len(self.tokenizer)}), got {token}.")
        return tuple(stop_ids)

    def _read_all(self, prompts: Sequence[PromptLike] | str | PathLike[str]) -> tuple[Sequence[Prompt], int]:
        """Return the prompts, all of which have been checked, and the length of the longest."""
        rows = read_rows(prompts) if isinstance(prompts, (str, PathLike)) else prompts
        if isinstance(rows, Mapping):
            raise ValueError(f"Expected `prompts` to be a list of prompts, got one mapping: {rows!r:.80}.")
        if not isinstance(rows, Sized):
            raise ValueError(
                f"Expected `prompts` with a length and rows by number, got {type(rows).__name__}: make a list of it, "
                "or read a data set without streaming."
            )
        if len(rows) == 0:
            raise ValueError("Expected at least one prompt, got none.")
        read = PromptRows(rows, self.read_prompt)
        kept: Sequence[Prompt] = list(read) if isinstance(rows, (list, tuple)) else read
        return kept, max(len(prompt.ids) for prompt in kept)

    def read_prompt(self, row: PromptLike, number: int = -1) -> Prompt:
        """Return a text, row, list of token ids or chat as a `Prompt` of this env, with its limits checked."""
        prompt = self._reader.read(row, number)
        if (prompt.max_new_tokens or 1) > self.rules.max_new_tokens:
            raise ValueError(
                f"Expected the max_new_tokens of prompt {str(prompt)[:80]!r} to be at most the env's, "
                f"{self.rules.max_new_tokens}, got {prompt.max_new_tokens}."
            )
        return prompt

    def draw_seed(self) -> int:
        """Return the constructor's seed, or one drawn from `np_random`."""
        return int(self.np_random.integers(2**31)) if self.seed is None else self.seed

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of the token just written; override it.

        Args:
            prompt: The prompt, a str; `prompt.row` is its data-set row, `prompt.references` its reference texts.
            preds: The tokens generated so far; `preds.text` decodes them.
            done: Whether the episode is over. A score of the whole text belongs here: `... if done else 0.0`.

        Returns:
            A finite number, or a dict of named numbers, which are summed and logged by name. For a finished row that
            has no score, `textenv.rewards.DROPPED`, which only training and `agents.evaluate` can leave out.
        """
        assert self.reward is not None, "checked at construction"
        return self.reward(prompt, preds, done)

    def get_rewards(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of several rows at once; override it where a batch is cheaper, as with a classifier.

        The default calls a `BatchReward` once, and anything else, by `get_reward`, for each row; arguments and result
        are lists of that method's. Rows of one `preds.group` are samples of one prompt. In training with
        `score_at="rollout_end"` a call has whole groups, each together; elsewhere (an evaluation, a single row) it has
        the rows that are there, maybe one of a group.
        """
        if isinstance(self.reward, BatchReward):
            scores = ask_rows(self.reward, prompts, preds, dones)
            if self.on_failure == "raise":  # else each row is looked at by itself
                check_rewards(scores, prompts, preds)
            return scores
        return score_each(self.get_reward, prompts, preds, dones, "`get_reward`")

    @property
    def on_failure(self) -> OnFailure:
        """What becomes of a row whose reward fails."""
        return self.failures.on_failure

    @property
    def may_drop(self) -> bool:
        """Whether episodes may have no reward, and are to be left out of training."""
        return self.on_failure == "drop" or (isinstance(self.reward, BatchReward) and self.reward.may_drop)

    @property
    def scores_rows_apart(self) -> bool:
        """Whether a row's reward has nothing to do with the others of the call."""
        by_row = not isinstance(self.reward, BatchReward) or isinstance(self.reward, RowReward)
        return by_row and type(self).get_rewards is TextEnv.get_rewards

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        """Answer a turn of the policy, or end the episode with None; define it for an episode of several turns.

        `EndReason.LENGTH` ends it as one that was cut: see `length_limit`.

        Args:
            prompt: The prompt.
            preds: What the policy has written; `preds.turns[-1].text` is the turn that is over.
        """
        return None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode at the next prompt.

        Args:
            seed: Starts the prompts' order anew.
            options: `{"prompts": rows}` runs these rows, one a reset, and then goes back to the env's own prompts.

        Returns:
            The observation, (L,) int64, and an empty dict.
        """
        check_wrappers()
        super().reset(seed=seed)
        order_seed = None if seed is None else int(self.np_random.integers(2**31))
        observations = self._lanes.reset(order_seed, (options or {}).get("prompts"))
        if self.render_mode == "human":
            self.render()
        return observations[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Write one token.

        Args:
            action: A token id.

        Returns:
            Observation (L,) int64, reward, terminated, truncated, and info (empty until the episode ends).

        Raises:
            RuntimeError: Before `reset`, or after the end of the episode.
            ValueError: If the action is no token id.
            RewardError: If the reward raises or is no finite number.
        """
        result = self._lanes.step(np.asarray(action).reshape(-1))
        if self.render_mode == "human":
            self.render()
        terminated, truncated = bool(result.terminated[0]), bool(result.truncated[0])
        return result.observations[0], float(result.rewards[0]), terminated, truncated, result.infos[0]

    @property
    def action_masks(self) -> Callable[[], np.ndarray]:
        """A method without arguments: which tokens are allowed next, (V,) bool. An env without `mask` has none.

        Once the episode is over it allows everything. sb3-contrib looks for this name.

        Raises:
            MaskError: If no token is allowed.
        """
        self.check_mask()
        return lambda: self._lanes.allowed()[0]

    def check_mask(self) -> None:
        """Raise AttributeError, which is how sb3-contrib learns of it, where the env has no mask."""
        if not self.masks:
            raise AttributeError(f"Expected `mask` to be given to {type(self).__name__}, for it has no `action_masks`.")

    def render(self) -> Any:
        """Return ("ansi"), draw ("rgb_array") or print ("human") the prompt and what was generated, told apart."""
        text = render_row(self.tokenizer, self._lanes.tokens[0])
        if self.render_mode == "rgb_array":
            return picture(text)
        if self.render_mode == "human":
            print(printable(text))
            return None
        return text


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")
