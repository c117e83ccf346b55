"""The command `textenv chat`: a talk in the terminal, whose history stays in the prompt."""

from __future__ import annotations

import sys
from typing import Any

from textenv.printable import printable
from textenv.templates import apply_template

from .backbone import n_positions
from .config import TrainConfig
from .generation import generate
from .refusal import Exit
from .verb_config import ChatOptions, TrustOptions
from .verbs import Writer, open_writer

DEFAULT_POSITIONS = 1024  # of models that nothing bounds


class Talk:
    """What was said, as a prompt.

    With a chat template each side's words are a message of it; without one the model goes on with the plain text.

    Args:
        writer: Who answers.
        options: Lengths and sampling.
    """

    def __init__(self, writer: Writer, options: ChatOptions) -> None:
        self.writer, self.options = writer, options
        self.messages: list[dict[str, str]] = []
        self.seed = options.seed

    def answer(self, line: str) -> str:
        """Return the model's answer to a line, and remember both."""
        self.messages.append({"role": "user", "content": line})
        limit = (n_positions(self.writer.policy.backbone.model) or DEFAULT_POSITIONS) - self.options.max_new_tokens
        [one] = generate(
            self.writer.policy,
            [self._ids()[-max(limit, 1) :]],
            self.writer.tokenizer,  # type: ignore[arg-type]
            max_new_tokens=self.options.max_new_tokens,
            deterministic=self.options.greedy,
            seed=self.seed,
        )
        self.seed += 1
        self.messages.append({"role": "assistant", "content": one.text})
        return one.text

    def _ids(self) -> list[int]:
        tokenizer: Any = self.writer.tokenizer
        if tokenizer.chat_template is not None:
            text = apply_template(tokenizer, self.messages, "what was said", add_generation_prompt=True)
            return list(tokenizer.encode(text, add_special_tokens=False))
        return list(tokenizer.encode(" ".join(message["content"] for message in self.messages)))


def talk(config: TrainConfig | None, chosen: ChatOptions, options: TrustOptions) -> int:
    """Answer line after line until the end of the input."""
    session = Talk(open_writer(chosen.model, config, options), chosen)
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return Exit.DONE
        if line.strip() == "/reset":
            session.messages.clear()
        elif line.strip():
            print(printable(session.answer(line.strip())), flush=True)
