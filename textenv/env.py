"""The environment: text generation, one episode at a time, and the hooks that users override."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from textenv.episodes.arguments import check_at_least_one, make_rules
from textenv.episodes.completion import Preds
from textenv.episodes.failure_policy import Failures, OnFailure
from textenv.episodes.rules import SEPARATOR, EndReason
from textenv.episodes.scores import RewardFunction, Score, ScoreAt, check_rewards, score_each
from textenv.lanes.lanes import Lanes
from textenv.lanes.rendering import MODES, check_render_mode, picture, render_row
from textenv.lanes.wrappers import check_wrappers
from textenv.masks.token_masks import MaskLike, read_masks
from textenv.prompts.priority import PrioritySampling
from textenv.prompts.prompts import Order, Prompt, PromptLike, PromptReader, read_source
from textenv.rewards.asynchronous import AsyncReward
from textenv.rewards.base import BatchReward, RewardLike, RowReward, ask_rows, check_choice
from textenv.rewards.registry import read_reward
from textenv.rewards.steps import StepReward
from textenv.text.named_tokenizer import read_tokenizer
from textenv.text.printable import printable
from textenv.text.tokenizer import Tokenizer
from textenv.text.vocabulary import Vocabulary


class TextEnv(gym.Env[np.ndarray, Any]):
    """Text generation as an environment: in an episode a policy continues one prompt, and each action is one token.

    Define `get_reward` in a subclass, or pass `reward=`; then train with Stable-Baselines3.

    **Observation**: `Box(-2, V - 1, (L,), int64)` with V = `len(tokenizer)` and L = `max_prompt_tokens + 1 +
    max_new_tokens` (plus the replies of an env with several turns): the token ids of the prompt, one separator (-2),
    the token ids written so far, then padding (-1). So the observation shows where the prompt ends and how many tokens
    were written, even if the tokenizer pads with EOS.

    **Action**: `Discrete(V)`, the id of the next token.

    **Reward**: the result of `get_reward(prompt, preds, done)` for the token just written; `score_at` decides for which
    tokens it is called.

    **Start**: `reset` takes the next prompt in `order`, after which the policy writes.
    `reset(options={"prompts": rows})` runs rows of your own.

    **End**: the policy writes one of `stop_ids` or `stop_strings`, or `max_new_tokens` tokens. All of these terminate
    the episode. The length limit does, too, since the observation shows how many tokens are left; with
    `length_limit="truncate"` it truncates. The `info` of the last step has these keys (the info of other steps is
    empty):

    - `text`, `prompt`: the completion, and the `Prompt` that it continues.
    - `end_reason`: an `EndReason`: "eos", "stop", "length" or "env".
    - `reward_parts`: the sum of each named part of the rewards.
    - `episode`: `{"r": sum of rewards, "l": number of tokens}`. Gymnasium's RecordEpisodeStatistics writes the same
      key by default: pass it another `stats_key`.
    - `group`: the number of the group of samples; see `samples_per_prompt`.
    - `scored`: False while a score of `score_at="rollout_end"` is still to come.
    - `dropped`: whether the reward left the episode out of training.

    **Several turns**: define `respond(prompt, preds) -> str | None`, which is called when a turn of the policy ends.
    The policy observes its text but is not trained on it; None ends the episode. If the prompt is a chat, the text is
    the content of a user's message, and the policy observes all that the chat template writes up to the assistant's
    next turn: make `max_response_tokens` large enough for that. A template that rewrites earlier messages is refused.

    The same instance serves all lanes of a `TextVectorEnv` or `agents.TextVecEnv`, so hooks must not keep anything
    about an episode in `self`. They keep it in `preds.state`, a dict that lives as long as the episode.

    Args:
        prompts: Texts, rows (dicts), lists of token ids or chats (lists of messages `{"role": ..., "content": ...}`,
            rendered by the tokenizer's chat template, which also opens the assistant's turn); or the path of a .jsonl,
            .json, .csv or .txt file. A row may have a smaller `max_new_tokens` of its own. A list is read into memory.
            Any other sized sequence, such as a `datasets.Dataset` (see `textenv.read_dataset`), is checked row by row
            at the start, and a row is read again each time it is drawn.
        tokenizer: A Hugging Face tokenizer, its name, folder or GGUF file, or an object with `Tokenizer`'s members.
            Special tokens that open a text (BOS) are added to a prompt; special tokens that close it are not.
        reward: In place of a subclass: a function with the contract of `get_reward`, a `textenv.rewards.BatchReward`,
            or the name of a reward, such as "vader" (see `textenv.rewards.read_reward`).
        max_new_tokens: The most tokens that the policy writes in an episode.
        max_prompt_tokens: The most tokens of a prompt; by default, the length of the longest of `prompts`. Set it if
            training and test prompts differ, since it decides the width of the observation.
        truncation_side: The side on which a longer prompt is cut: "left" keeps its end, "right" its start. None
            raises.
        prompt_column: The column of a row that holds the prompt.
        references_column: The column that holds reference texts; the reward reads them as `prompt.references`.
        encoding: The encoding of a file of prompts, such as "gb18030", "utf-16" or "cp1252".
        stop_ids: Token ids that end a turn; by default the tokenizer's EOS. Chat models may use another one.
        stop_strings: Texts that end a turn as soon as they appear; they are not part of `preds.text`.
        length_limit: The effect of reaching `max_new_tokens`: "terminate" or "truncate".
        score_at: The time of the reward's call. "step": at every token. "done": at the end of each episode.
            "rollout_end": once for all episodes of a rollout that have ended (with `agents.LateScores`; without it,
            the same as "done"). The default is the `score_at` of a `BatchReward`, and "step" for any other reward.
        on_failure: The treatment of a row whose reward raises or is no finite number. "raise" stops the run. "drop"
            leaves the episode out of training and counts it; too many dropped episodes stop the run (see `Failures`). A
            number is the row's reward, as the part "failure". If a `BatchReward` or `get_rewards` raises, all rows of
            the call fail. An `AsyncReward` has an `on_failure` of its own. There is no time limit, since Python cannot
            stop a function: `AsyncFunction(judge, time_limit=30)` and `HTTPJudge` have one.
        samples_per_prompt: The number of episodes that continue each drawn prompt, and form a group. Lanes begin the
            members as they become free, so `n_envs` need not be a multiple of it. `preds.group` and `info["group"]`
            number the groups. With `score_at="rollout_end"` and `agents.LateScores`, a group is scored in one call once
            its last member has ended, its rows side by side, so that the reward may compare them. Rows passed to
            `reset` run once.
        order: "shuffle": each prompt once an epoch, in a new order. "sequential": the order of the source.
            `PrioritySampling`: by priority, for example more often where the reward is low.
        max_turns: The most turns of the policy, if `respond` is defined.
        max_response_tokens: The most tokens of a reply, if `respond` is defined.
        turn_tokens: In place of these two: the most tokens of one turn. `max_new_tokens` then limits turns and replies
            together, and `respond` is called after every turn. The episode ends by length if a reply and another full
            turn no longer fit.
        mask: The tokens that are allowed next: a mask (`RegexMask(...)`), a function (prompt, preds) that returns ids
            or a bool array (V,), or a list of these, all of which must allow a token. Algorithms such as sb3-contrib's
            MaskablePPO read it through `action_masks`; `step` itself accepts forbidden tokens. Masks see the current
            turn only.
        seed: The seed of the order of prompts, until `reset(seed=...)` sets another.
        render_mode: "ansi" (`render` returns a str), "human" (it prints), "rgb_array" (it draws; needs Pillow) or None.

    Raises:
        ValueError: If the prompts, a limit or an option cannot work.

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

    metadata: dict[str, Any] = {"render_modes": list(MODES), "render_fps": 4}  # 4 tokens a second: reading speed

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
        encoding: str = "utf-8",
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
        check_at_least_one("samples_per_prompt", samples_per_prompt)
        if max_prompt_tokens is not None:
            check_at_least_one("max_prompt_tokens", max_prompt_tokens)
        self.tokenizer = read_tokenizer(tokenizer)
        self.reward = self._read_reward(reward)
        self.score_at: ScoreAt = score_at or self._own_score_at()
        self.failures = self._make_failures(on_failure)
        self.samples_per_prompt = samples_per_prompt
        self.order = order
        self.seed = seed
        self.render_mode = render_mode
        self.is_multi_turn = type(self).respond is not TextEnv.respond  # a subclass with `respond` has several turns
        self.rules = make_rules(
            self.tokenizer,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            max_new_tokens=max_new_tokens,
            length_limit=length_limit,
            max_turns=max_turns,
            max_response_tokens=max_response_tokens,
            turn_tokens=turn_tokens,
            responder=type(self).__name__ if self.is_multi_turn else None,
        )
        self.masks = read_masks(mask)
        self.vocabulary = Vocabulary(self.tokenizer, self.rules.stop_ids)
        self._reader = PromptReader(
            self.tokenizer, prompt_column, references_column, max_prompt_tokens, truncation_side
        )
        # All prompts are read before the width of the observation is known, since it may depend on the longest one.
        self.prompts, longest = read_source(prompts, self.read_prompt, encoding)
        self.max_prompt_tokens = self._reader.max_prompt_tokens = max_prompt_tokens or longest
        width = self.max_prompt_tokens + 1 + self.rules.room  # 1 for the separator
        self.observation_space = spaces.Box(SEPARATOR, len(self.tokenizer) - 1, (width,), np.int64)
        self.action_space = spaces.Discrete(len(self.tokenizer))
        self._lanes = Lanes(self, 1, autoreset=False)  # last: it reads the attributes above

    def _read_reward(self, reward: RewardLike | None) -> RewardFunction | None:
        hooks = type(self)
        overridden = hooks.get_reward is not TextEnv.get_reward or hooks.get_rewards is not TextEnv.get_rewards
        if overridden == (reward is not None):
            raise ValueError(
                "Expected exactly one reward: a subclass of TextEnv that defines `get_reward(self, prompt, preds, "
                f"done)`, or `reward=function`; got {'both' if overridden else 'neither'}."
            )
        return None if reward is None else read_reward(reward)

    def _make_failures(self, on_failure: OnFailure) -> Failures:
        failures = Failures(on_failure)
        if on_failure != "raise" and isinstance(self.reward, AsyncReward):
            raise ValueError(
                f"Expected on_failure to be given to the {type(self.reward).__name__}, got {on_failure!r} for the "
                "env: it decides itself what happens to rows without an answer."
            )
        return failures

    def _own_score_at(self) -> ScoreAt:
        return self.reward.score_at if isinstance(self.reward, BatchReward) else "step"

    def read_prompt(self, row: PromptLike, number: int = -1) -> Prompt:
        """Return a text, row, list of token ids or chat as a `Prompt` of this env.

        Args:
            row: The prompt.
            number: The prompt's index among the env's prompts, -1 if it is none of them.

        Raises:
            ValueError: If the prompt is empty, too long or malformed, or its `max_new_tokens` is above the env's.
        """
        prompt = self._reader.read(row, number)
        # A row may only lower the limit, since the observation's width leaves room for the env's `max_new_tokens`.
        if (prompt.max_new_tokens or 1) > self.rules.max_new_tokens:
            raise ValueError(
                f"Expected the max_new_tokens of prompt {str(prompt)[:80]!r} to be at most the env's, "
                f"{self.rules.max_new_tokens}, got {prompt.max_new_tokens}."
            )
        return prompt

    def draw_seed(self) -> int:
        """Return the constructor's seed; without one, a seed drawn from `np_random`."""
        return int(self.np_random.integers(2**31)) if self.seed is None else self.seed

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of the token just written; override this method.

        Args:
            prompt: The prompt, a str; `prompt.row` is its row of the data set, `prompt.references` its reference texts.
            preds: The tokens written so far; `preds.text` decodes them.
            done: Whether the episode is over. To score whole texts: `return score(preds.text) if done else 0.0`.

        Returns:
            A finite number, or a dict of named numbers, which are summed, and logged by name. For a finished episode
            without a score, return `textenv.rewards.DROPPED`: training and `agents.evaluate` leave it out.
        """
        assert self.reward is not None, "checked at construction"
        return self.reward(prompt, preds, done)

    def get_rewards(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of several rows; override this method if a batch is cheaper, as for a classifier.

        By default a `BatchReward` is called once, and for any other reward `get_reward` is called row by row. Rows with
        the same `preds.group` are samples of one prompt. In training with `score_at="rollout_end"` a call has complete
        groups, the rows of each side by side; otherwise (an evaluation, a single row) a group may be incomplete.

        Args:
            prompts: The prompts of the rows.
            preds: The completions of the rows, so far.
            dones: Whether each row's episode is over.

        Returns:
            One reward for each row, as from `get_reward`.
        """
        if isinstance(self.reward, BatchReward):
            scores = ask_rows(self.reward, prompts, preds, dones)
            if self.on_failure == "raise":  # otherwise `RewardCalls` checks each row by itself
                check_rewards(scores, prompts, preds)
            return scores
        return score_each(self.get_reward, prompts, preds, dones, "`get_reward`")

    @property
    def on_failure(self) -> OnFailure:
        """The treatment of a row whose reward fails."""
        return self.failures.on_failure

    @property
    def may_drop(self) -> bool:
        """Whether the reward may leave episodes out of training."""
        return self.on_failure == "drop" or (isinstance(self.reward, BatchReward) and self.reward.may_drop)

    @property
    def scores_rows_apart(self) -> bool:
        """Whether the reward of a row does not depend on the other rows of the call."""
        # A `get_rewards` of the user's own or a `BatchReward` may compare the rows of a call.
        by_row = not isinstance(self.reward, BatchReward) or isinstance(self.reward, (RowReward, StepReward))
        return by_row and type(self).get_rewards is TextEnv.get_rewards

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        """Answer a turn of the policy; define it for an episode of several turns.

        Args:
            prompt: The prompt.
            preds: The tokens written so far; `preds.turns[-1].text` is the turn that has just ended.

        Returns:
            The reply; None to end the episode; `EndReason.LENGTH` to end it as the length limit does (see
            `length_limit`).
        """
        return None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode at the next prompt.

        Args:
            seed: The seed with which the order of prompts starts anew; None continues the order.
            options: `{"prompts": rows}` runs these rows, one at each reset, and then continues with the env's prompts.

        Returns:
            The observation, (L,) int64, and an empty dict.

        Raises:
            ValueError: If a row cannot work, or a `RecordEpisodeStatistics` around the env has the default `stats_key`.
        """
        check_wrappers()
        super().reset(seed=seed)  # seeds `np_random`
        # The order of prompts has a generator of its own; the hooks draw from `np_random`.
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
        # From an int, a numpy scalar or an array with one element to shape (1,), the single lane.
        result = self._lanes.step(np.asarray(action).reshape(-1))
        if self.render_mode == "human":
            self.render()
        terminated, truncated = bool(result.terminated[0]), bool(result.truncated[0])
        return result.observations[0], float(result.rewards[0]), terminated, truncated, result.infos[0]

    @property
    def action_masks(self) -> Callable[[], np.ndarray]:
        """A function without arguments that returns which tokens are allowed next, (V,) bool.

        This is a property, so that an env without `mask` has no such attribute: `is_masking_supported` of sb3-contrib
        (`common/maskable/utils.py`) looks for it. Once the episode is over, all tokens are allowed.

        Raises:
            AttributeError: If the env has no mask.
            MaskError: When the function is called, if no token is allowed.
        """
        self.check_mask()
        return lambda: self._lanes.allowed()[0]

    def check_mask(self) -> None:
        """Raise AttributeError if the env has no mask."""
        if not self.masks:
            raise AttributeError(f"Expected `mask` to be given to {type(self).__name__}, for it has no `action_masks`.")

    def render(self) -> Any:
        """Return ("ansi"), draw ("rgb_array") or print ("human") the prompt, a bar, and the text written so far."""
        text = render_row(self.tokenizer, self._lanes.tokens[0])
        if self.render_mode == "rgb_array":
            return picture(text)
        if self.render_mode == "human":
            print(printable(text))
            return None
        return text
