"""The command `textenv chat`: a conversation in the terminal, which is the prompt of each next answer as a whole."""

from __future__ import annotations

import sys
from typing import Any

from textenv.huggingface.positions import n_positions
from textenv.prompts.templates import apply_template
from textenv.text.printable import printable

from ..configuration.config import TrainConfig, TrustOptions
from ..errors import CommandError, Exit
from ..evaluation.generation import USUAL_TOKENS, generate
from .options import ChatOptions
from .trained_model import Writer, open_writer

ANY_PROMPT = [[0]]  # a stand-in for the run's prompts, which `open_writer` then does not read
DEFAULT_POSITIONS = 1024  # the most tokens of prompt and answer, for a model whose config has no limit


class Conversation:
    """A conversation with a model.

    With a chat template each turn is a message; without one the prompt is the text of all turns, joined by spaces.

    Args:
        writer: The model.
        options: Lengths and sampling.
    """

    def __init__(self, writer: Writer, options: ChatOptions) -> None:
        self.writer, self.options = writer, options
        self.positions = n_positions(writer.policy.backbone.model) or DEFAULT_POSITIONS
        self.answer_length = self._answer_length()
        self.messages: list[dict[str, str]] = []
        self.seed = options.seed

    def answer(self, line: str) -> str:
        """Return the model's answer to a line, and add both to the conversation."""
        self.messages.append({"role": "user", "content": line})
        [answer] = generate(
            self.writer.policy,
            [self._ids()[self.answer_length - self.positions :]],  # the last tokens, with room left for the answer
            self.writer.tokenizer,  # type: ignore[arg-type]
            max_new_tokens=self.answer_length,
            deterministic=self.options.greedy,
            seed=self.seed,
            **self.writer.options,
        )
        self.seed += 1  # so that a repeated question may get another answer
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer.text

    def _answer_length(self) -> int:
        """Return the most tokens of an answer: the user's number, or at most half of what the model can read."""
        requested, usual = self.options.max_new_tokens, self.writer.trained_length or USUAL_TOKENS
        if requested is not None and requested >= self.positions:
            raise CommandError(
                f"Expected --max_new_tokens below {self.positions}, which is all that the model can read, got "
                f"{requested}."
            )
        if requested is not None or usual <= self.positions // 2:
            return requested or usual
        half = self.positions // 2
        print(
            f"textenv: Answers have at most {half} tokens, not {usual}: the model reads {self.positions} in all.",
            file=sys.stderr,
        )
        return half

    def _ids(self) -> list[int]:
        tokenizer: Any = self.writer.tokenizer
        if tokenizer.chat_template is not None:
            text = apply_template(tokenizer, self.messages, "the conversation", add_generation_prompt=True)
            return list(tokenizer.encode(text, add_special_tokens=False))
        return list(tokenizer.encode(" ".join(message["content"] for message in self.messages)))


def talk(config: TrainConfig | None, chosen: ChatOptions, options: TrustOptions) -> int:
    """Answer line after line until /exit or the end of the input; return the exit code."""
    conversation = Conversation(open_writer(chosen.model, config, options, ANY_PROMPT), chosen)
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return Exit.DONE
        if line.strip() == "/reset":
            conversation.messages.clear()
        elif line.strip():
            print(printable(conversation.answer(line.strip())), flush=True)
