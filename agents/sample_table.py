"""Tables of sampled texts: on the console and in TensorBoard, while a model trains, or on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

from textenv.printable import page_text, printable
from textenv.prompts import PromptLike
from textenv.tokenizer import Tokenizer

from .generation import Generation, generate
from .policies import LMPolicy
from .sharding import gathered
from .world import is_main_process


class SampleTable(BaseCallback):
    """Shows what the policy writes: before training, every so many rollouts, and at the end.

    On the console and, where TensorBoard logs, as text under `samples`. It draws from a generator of its own and does
    not change training.

    Args:
        prompts: What to continue, once each.
        tokenizer: The tokenizer that the model trains with.
        every: Rollouts from one table to the next.
        max_new_tokens: The most tokens of a sample; unset, as in `generate`: as many as in training.
        seed: The seed of the sampling: the same for every table, so that they can be compared.
        console: Where to print; rich's default console.
        **env_kwargs: Other arguments of `generate`: the env's `mask`, `stop_ids`, `stop_strings`, ...
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
        with gathered(cast("LMPolicy", self.model.policy).lm):
            if is_main_process():
                self._print()

    def _print(self) -> None:
        samples = generate(self.model, self.prompts, self.tokenizer, **self.options)
        title = f"samples after {self.model.num_timesteps} tokens"
        self.console.print(sample_table({title: samples}))
        page = "\n\n".join(f"**{page_text(sample.prompt)}**{page_text(sample.text)}" for sample in samples)
        # Not by `logger.record`: the next dump has a later step, and after training there is none.
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_text("samples", page, self.model.num_timesteps)
                output.writer.flush()  # after training nothing else would


def sample_table(columns: dict[str, Sequence[Generation]]) -> Table:
    """Return samples as a table: a row a prompt, a column for each title, prompt and text told apart.

    Control characters and markup in what a model wrote are shown, not obeyed.
    """
    table = Table(show_lines=True)
    for title in columns:
        table.add_column(title, ratio=1)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text.assemble((printable(sample.prompt), "dim"), printable(sample.text)) for sample in row))
    return table
