"""Rewards of single steps: each step of a text is scored as it ends, on the token that ends it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textenv.checks.trust import Kind, is_called_with
from textenv.episodes.completion import Preds
from textenv.episodes.scores import ScoreAt, check_length
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward
from textenv.rewards.registry import make_named

SCORER = Kind("step scorer", "a class with __call__(self, prompt, steps)", is_called_with("prompt", "steps"))


@dataclass(kw_only=True)
class StepwiseReward(BatchReward):
    """Base class of rewards whose `score_steps`, which subclasses write, scores steps: the pieces between separators.

    A step ends with the token that completes the separator behind it, or with its turn. That token earns the step's
    score, and every other token 0; a token that ends several steps earns their sum. The separator is looked for in the
    text, from the left, so that it may lie inside a token or span several; a token that decoding leaves out of the text
    (a special token) cannot be a separator. A piece without text, as between two separators in a row, is no step. Each
    step is scored once: `preds.state` keeps the number of steps so far. All steps that end at the same time, in all
    lanes, are scored in one call.

    The sum of the scores is the score of the text; a scorer that wants the last or the lowest score to count instead
    returns differences. With `TextEnv(score_at="done")` or "rollout_end", all steps are scored when the text ends, on
    its last token. Step rewards need the advantage "gae", with a critic or without (`vf_coef=0, gae_lambda=1.0`):
    "grpo", "grpo_mean" and "rloo" give all tokens of a text the same advantage, from the sum.

    Args:
        separator: The text between two steps. It is no part of a step.
        score_at: "step", since steps end within a text.

    Raises:
        ValueError: If the separator is empty.
    """

    separator: str = "\n"
    score_at: ScoreAt = "step"

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("Expected `separator` to be a text, got an empty one.")

    @abstractmethod
    def score_steps(self, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]]) -> Sequence[float]:
        """Return the score of the last step of each row, given the prompt and the steps up to it."""

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return the sum of the scores of the steps that each row's newest token ends."""
        rows: list[int] = []
        ended: list[list[str]] = []  # for each step to be scored, the steps of its row up to it
        for row, (completion, done) in enumerate(zip(preds, dones, strict=True)):
            steps = steps_of(completion, self.separator, done)
            for end in range(self._count(completion, len(steps)) + 1, len(steps) + 1):
                rows.append(row)
                ended.append(steps[:end])
        rewards = [0.0] * len(preds)
        if ended:
            scores = self.score_steps([prompts[row] for row in rows], ended)
            check_length(scores, len(ended))
            for row, score in zip(rows, scores, strict=True):
                rewards[row] += score
        return rewards

    def _count(self, preds: Preds, n_steps: int) -> int:
        """Return how many steps had ended before the newest token, and note how many have ended with it.

        A repeated call for the same token, as after a failure or by another reward of the same separator, returns the
        same. The note is a list of numbers, since checkpoints write the state of an episode as JSON.
        """
        key = f"steps {self.separator!r}"
        at, before, now = preds.state.get(key, (0, 0, 0))  # the tokens at the last call, the steps before it and after
        if at != len(preds):
            # The text of some tokenizers gets shorter when a token is added; what was scored stays scored.
            at, before, now = len(preds), now, max(now, n_steps)
            preds.state[key] = [at, before, now]
        return before


@dataclass
class StepReward(StepwiseReward):
    """The score of each step by a function `(prompt, steps)`, on the token that ends the step.

    `textenv.rewards.process_model.ProcessReward` is the same with a process reward model.

    Args:
        function: The function, or its "module:name"; in a configuration, the "module:name" of a class with such a
            `__call__`. It gets the prompt and the list of all steps so far, and returns the score of the last of them.
        separator: The text between two steps.
        score_at: "step", since steps end within a text.

    Raises:
        ValueError: If the separator is empty, or the function's name unknown.
        TypeError: If `function` cannot be called.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> def ascends(prompt, steps):
        ...     return float(len(steps) == 1 or int(steps[-1]) > int(steps[-2]))
        >>> tokenizer = CharTokenizer("0123456789,:")
        >>> env = TextEnv([":"], tokenizer, reward=StepReward(ascends, separator=","), max_new_tokens=5)
        >>> _ = env.reset(seed=0)
        >>> [env.step(token)[1] for token in tokenizer.encode("3,15,")]
        [0.0, 1.0, 0.0, 0.0, 1.0]
    """

    function: str | Callable[[Prompt, list[str]], float]

    def __post_init__(self) -> None:
        super().__post_init__()
        function: Any = make_named(self.function, SCORER, {}) if isinstance(self.function, str) else self.function
        if not callable(function):
            raise TypeError(f"Expected a function (prompt, steps), got {function!r:.80}.")
        self._function = function

    def score_steps(self, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]]) -> list[float]:
        """Return the function's score of the last step of each row."""
        return [self._function(prompt, list(own)) for prompt, own in zip(prompts, steps, strict=True)]


def steps_of(preds: Preds, separator: str, done: bool) -> list[str]:
    """Return the steps of a completion that have ended; the last one ends with its turn.

    Example:
        >>> from textenv import CharTokenizer
        >>> preds = Preds(CharTokenizer("ab;"), [1, 3, 3, 2])  # "a;;b"
        >>> steps_of(preds, ";", done=False), steps_of(preds, ";", done=True)
        (['a'], ['a', 'b'])
    """
    steps: list[str] = []
    for turn in preds.turns:
        pieces = turn.text.split(separator)
        is_over = done or turn.response is not None or preds.end_reason is not None
        steps += pieces if is_over else pieces[:-1]
    return [step for step in steps if step.strip()]
