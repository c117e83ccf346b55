"""The base classes of rewards that score many rows in a call, and the helpers that rewards share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from textenv.episodes.completion import Preds
from textenv.episodes.scores import Reward, RewardFunction, Score, ScoreAt, check_length, check_rewards, score_each
from textenv.prompts.prompts import Prompt

Reads = Literal["completion", "whole"]


class BatchReward(ABC):
    """Base class of rewards that score many rows in one call: `TextEnv(prompts, tokenizer, reward=MyReward())`.

    Write `score` in a subclass. Declare its parameters as the fields of a dataclass, so that it can be pickled. For a
    single row, an instance can be called as a function: `reward(prompt, preds, done)`.

    Attributes:
        score_at: The time of the call, unless the `TextEnv` sets its own `score_at`. "step": at every token. "done": at
            the end of each text. "rollout_end": once for all texts of a rollout that have ended, which suits rewards
            with an expensive call, such as a model's. With the last two, tokens within a text earn 0.
        may_drop: Whether `score` may return `textenv.rewards.DROPPED`: `agents.make_agent` then attaches the step that
            leaves such episodes out of training.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> class Shouting(BatchReward):
        ...     def score(self, prompts, preds, dones):
        ...         return [float(completion.text.isupper()) for completion in preds]
        >>> env = TextEnv(["B"], CharTokenizer("AB"), reward=Shouting(), max_new_tokens=1)
        >>> env.score_at, env.reset(seed=0)[1], env.step(1)[1]
        ('done', {}, 1.0)
    """

    score_at: ScoreAt = "done"
    may_drop: bool = False

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of B rows, in their order: finite numbers, or dicts of named parts, which are summed.

        For a finished row without a reward, return `textenv.rewards.DROPPED`: training leaves its episode out.
        """

    def __call__(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of one row."""
        [reward] = score_rows(self, [prompt], [preds], [done])
        return reward.score


# A function, a `BatchReward`, the name of a reward, or a mapping of name and options: {"name": "length", "target": 9}.
RewardLike = RewardFunction | str | Mapping[str, Any]


class RowReward(BatchReward):
    """Base class of rewards of finished texts that score one row at a time; subclass it and write `score_row`.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> class Vowels(RowReward):
        ...     def score_row(self, prompt, preds):
        ...         return float(sum(preds.text.count(vowel) for vowel in "aeiou"))
        >>> Vowels()(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2, 1]), True)
        2.0
    """

    @abstractmethod
    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the reward of a finished row."""

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Any]:
        """Return the rewards of the rows."""
        return score_each(
            lambda prompt, completion, done: self.score_row(prompt, completion),
            prompts,
            preds,
            dones,
            type(self).__name__,
        )


def score_rows(
    reward: RewardFunction, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]
) -> list[Reward]:
    """Return the checked rewards of B rows from a reward function or a `BatchReward`.

    A `BatchReward` of finished texts is called with the finished rows only, and not at all if there are none.

    Raises:
        RewardError: If a reward is no finite number; the message names its row.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> from textenv.rewards import Length
        >>> preds = [Preds(CharTokenizer("ab"), [1, 2]), Preds(CharTokenizer("ab"), [1])]
        >>> [reward.value for reward in score_rows(Length(2), [Prompt("a")] * 2, preds, [True, False])]
        [1.0, 0.0]
    """
    return check_rewards(ask_rows(reward, prompts, preds, dones), prompts, preds)


def ask_rows(
    reward: RewardFunction, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]
) -> list[Score]:
    """Return the rewards of rows as `score_rows` does, one for each row, but unchecked."""
    if not isinstance(reward, BatchReward):
        return score_each(reward, prompts, preds, dones)
    chosen = [row for row, done in enumerate(dones) if done or reward.score_at == "step"]
    scores: list[Score] = [0.0 for _ in dones]  # unfinished rows of a reward of finished texts stay at 0
    if chosen:
        values = reward.score(*([column[row] for row in chosen] for column in (prompts, preds, dones)))  # type: ignore[arg-type]
        check_length(values, len(chosen))
        for row, value in zip(chosen, values, strict=True):
            scores[row] = value
    return scores


def read_text(reads: Reads, prompt: Prompt, preds: Preds) -> str:
    """Return the text to score: the completion alone, or prompt and completion as one text."""
    return preds.text if reads == "completion" else str(prompt) + preds.text


def read_references(prompt: Prompt) -> list[str]:
    """Return the prompt's reference texts.

    Raises:
        ValueError: If the prompt has none.
    """
    if not prompt.references:
        raise ValueError(
            "Expected a prompt with reference texts, got one without: name their column, "
            "TextEnv(references_column='references')."
        )
    return prompt.references


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless the value of an option is one of the choices."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {list(choices)}, got {value!r}.")
