"""Tables of sampled texts, on the console and in TensorBoard, while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

from textenv.prompts.prompts import PromptLike
from textenv.text.printable import page_text, printable
from textenv.text.tokenizer import Tokenizer

from ..distributed.sharding import gathered
from ..distributed.world import is_main_process
from ..policies.lm_policy import LMPolicy
from .generation import Generation, generate


class SampleTable(BaseCallback):
    """Shows texts of the policy before training, every `every` rollouts, and at the end; does not change training.

    The table goes to the console and, if the model logs to TensorBoard, into its texts under `samples`.

    Args:
        prompts: The prompts to continue, once each.
        tokenizer: The tokenizer that the model trains with.
        every: The number of rollouts from one table to the next.
        max_new_tokens: The most tokens of a sample; by default as many as in training (see `generate`).
        seed: The seed of the sampling, the same for every table, so that they can be compared.
        console: The console to print on; by default a new `rich.console.Console`.
        **env_kwargs: Other arguments of `generate`: the env's `mask`, `stop_ids`, `stop_strings`, ...

    Raises:
        ValueError: If `every` is below 1.

    Example:
        >>> from agents import SampleTable
        >>> # model.learn(100_000, callback=SampleTable(["The film was"], tokenizer, every=5))
    """

    def __init__(
        self,
        prompts: Sequence[PromptLike],
        tokenizer: Tokenizer,
        every: int = 10,
        max_new_tokens: int | None = None,
        seed: int = 0,
        console: Console | None = None,
        **env_kwargs: Any,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"Expected `every` to be at least 1, got {every}.")
        self.prompts, self.tokenizer, self.every = prompts, tokenizer, every
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, **env_kwargs}
        self.console = console or Console()
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._rollouts % self.every == 0:
            self._show()
        self._rollouts += 1

    def _on_training_end(self) -> None:
        self._show()

    def _show(self) -> None:
        with gathered(cast("LMPolicy", self.model.policy).lm):  # a collective: rank 0 then has whole weights
            if is_main_process():
                self._print()

    def _print(self) -> None:
        samples = generate(self.model, self.prompts, self.tokenizer, **self.options)
        title = f"samples after {self.model.num_timesteps} tokens"
        self.console.print(sample_table({title: samples}))
        page = "\n\n".join(f"**{page_text(sample.prompt)}**{page_text(sample.text)}" for sample in samples)
        # Not through `logger.record`: SB3 `on_policy_algorithm.learn` dumps it a rollout later, or after the end never.
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_text("samples", page, self.model.num_timesteps)
                output.writer.flush()  # SB3 flushes only in its own `write`, which it does not call after training


def sample_table(columns: dict[str, Sequence[Generation]]) -> Table:
    """Return samples as a table with a row for each prompt and a column for each title, prompts dimmed.

    Control characters and markup in a text are shown as they are, and have no effect.

    Args:
        columns: Samples of the same prompts in the same order, by title.
    """
    table = Table(show_lines=True)
    for title in columns:
        table.add_column(title, ratio=1)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text.assemble((printable(sample.prompt), "dim"), printable(sample.text)) for sample in row))
    return table
