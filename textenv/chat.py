"""Chats: messages as text through the tokenizer's chat template, and replies between the policy's turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from textenv.completion import Preds
from textenv.episode import EndReason
from textenv.templates import apply_template
from textenv.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "Hello"}, as `apply_chat_template` takes it
PLACE = "0A1place2of3a4turn5B6"  # stands for what the policy writes; a template has no reason to change it


@runtime_checkable
class _ChatTokenizer(Protocol):
    """A tokenizer that renders messages, as every Hugging Face tokenizer with a chat template does."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, continue_final_message: bool
    ) -> Any:
        """Return the text of the messages."""


def is_chat(value: Any) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of messages: a list whose first item is a mapping."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and len(value) > 0 and isinstance(value[0], Mapping)


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], where: str = "the prompt") -> str:
    """Return messages as the text that a chat model continues, special tokens included.

    It opens the assistant's turn (`add_generation_prompt`), or goes on with the last message where that is the
    assistant's (`continue_final_message`).

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: Role and content of each.
        where: What an error calls them.

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
    is_open = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not is_open, "continue_final_message": is_open}
    return apply_template(tokenizer, list(messages), where, **options)


def _is_message(message: Message) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def encode_reply(
    tokenizer: Tokenizer,
    messages: Sequence[Message] | None,
    preds: Preds,
    reply: str,
    tail: str = "",
    stop_strings: Sequence[str] = (),
) -> list[int]:
    """Return the tokens that stand between a turn of the policy that has just ended and its next.

    Of a chat, all that the template writes between them: the end of the assistant's turn where the policy has not
    written it itself, the reply as a user's turn, and the opening of the assistant's next. It is the difference of two
    renderings, of which one must begin with the other. What the policy wrote stays as it is, token for token.

    Args:
        tokenizer: The tokenizer.
        messages: The prompt's; None for a prompt that is no chat, whose reply is encoded as it is.
        preds: What the policy has written.
        reply: What answers it.
        tail: The last few tokens of the turn as text, special tokens included.
        stop_strings: The texts that end a turn.

    Raises:
        ValueError: If the template changes what came before when a message is added.
    """
    if messages is None:
        return list(tokenizer.encode(reply, add_special_tokens=False))
    history = list(messages)
    for turn in preds.turns[:-1]:
        history = [*_said(history, turn.text), {"role": "user", "content": turn.response or ""}]
    before = render_chat(tokenizer, history) + PLACE
    after = render_chat(tokenizer, [*_said(history, PLACE), {"role": "user", "content": reply}])
    if not after.startswith(before):
        raise ValueError(
            "Expected a chat template that leaves what came before as it was when a message is added, got one that "
            f"writes {before[-80:]!r} in another way. Give prompts as texts in the model's format; then the text that "
            "`respond` returns is observed as it is: let it close the turn and open the next."
        )
    rest = after[len(before) :]
    ends = [tokenizer.decode([preds[-1]])] if preds.end_reason is EndReason.EOS else stop_strings
    written = next((end for end in ends if tail.endswith(end) and rest.startswith(end)), "")
    return list(tokenizer.encode(rest[len(written) :], add_special_tokens=False))


def _said(history: Sequence[Message], text: str) -> list[Message]:
    """Return the messages behind which the assistant has said `text`, which may go on with its last message."""
    if history[-1]["role"] != "assistant":
        return [*history, {"role": "assistant", "content": text}]
    return [*history[:-1], {**history[-1], "content": history[-1]["content"] + text}]
