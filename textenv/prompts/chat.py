"""Chats as prompts: messages that the tokenizer's chat template renders as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from textenv.prompts.templates import apply_template
from textenv.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "Hello"}, as in transformers' `apply_chat_template`
TURN = "0A1place2of3a4turn5B6"  # the stand-in for a turn of the policy: a text that no template has a rule for


@runtime_checkable
class _ChatTokenizer(Protocol):
    """A tokenizer that renders messages, as Hugging Face tokenizers do."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, continue_final_message: bool
    ) -> Any:
        """Return the text of the messages."""


def is_chat(value: Any) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a chat: a list whose first item is a mapping."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and len(value) > 0 and isinstance(value[0], Mapping)


def with_turn(messages: Sequence[Message], text: str) -> list[Message]:
    """Return the messages with a turn of the assistant added, joined to a last message that is the assistant's.

    Example:
        >>> with_turn([{"role": "assistant", "content": "It was "}], "good.")
        [{'role': 'assistant', 'content': 'It was good.'}]
    """
    if not messages or messages[-1]["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": text}]
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], where: str = "the prompt") -> str:
    """Render messages as the text that a chat model continues, special tokens included.

    The text ends with the opening of the assistant's turn (`add_generation_prompt`). If the last message is the
    assistant's, the text ends within that message (`continue_final_message`).

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: The messages, each with "role" and "content".
        where: The messages as errors name them, such as "prompt 3".

    Raises:
        ValueError: If there is no template, a message lacks a role or a text, or the template refuses the messages.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not _is_message(message):
            raise ValueError(
                f"Expected message {number} of {where} to have the texts 'role' and 'content', got {message!r:.90}."
                " Rename the keys of other formats ('from', 'value'), and join a content of several parts to one text."
            )
    if not isinstance(tokenizer, _ChatTokenizer) or not tokenizer.chat_template:
        raise ValueError(
            f"Expected a tokenizer with a chat template for {where}, which is a list of messages, got "
            f"{type(tokenizer).__name__} without one. Take the tokenizer of a chat model, set "
            "`tokenizer.chat_template`, or give prompts as texts."
        )
    # transformers' `apply_chat_template` refuses both options at once.
    is_unfinished = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not is_unfinished, "continue_final_message": is_unfinished}
    return apply_template(tokenizer, list(messages), where, **options)


def _is_message(message: Message) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
