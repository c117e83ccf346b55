"""The reading of texts by models that score them: the tokens of a text or a conversation, in training and in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from textenv.episodes.completion import Preds
from textenv.huggingface.positions import n_positions
from textenv.prompts.chat import TURN, Message, render_chat, with_turn
from textenv.prompts.prompts import Prompt
from textenv.prompts.templates import apply_template
from textenv.text.tokenizer import special_tokens_around

# A text to score, prompt included, or the messages of a conversation.
Scored = str | Sequence[Message]
# The key in a model's config under which `train_reward_model` stores how it read the texts.
READ_AS = "textenv_reads"


class Parts(NamedTuple):
    """The tokens of a text: those that open it (BOS), its own, and those that close it (EOS)."""

    opening: list[int]
    body: list[int]
    closing: list[int]


@dataclass(frozen=True)
class ReadAs:
    """How the texts were read on which a reward model was trained; its config stores it.

    Args:
        closing: The tokens that closed every text; empty if the score was read at the text's own last token.
        is_chat: Whether a chat template wrote the texts, so that the tokenizer adds nothing in front of them.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config()
        >>> ReadAs(closing=(2,), is_chat=True).store(config)
        >>> ReadAs.of(config), ReadAs.of(GPT2Config())
        (ReadAs(closing=(2,), is_chat=True), None)
    """

    closing: tuple[int, ...] = ()
    is_chat: bool = False

    def store(self, config: Any) -> None:
        """Write it into a model's config, which is saved with the model."""
        setattr(config, READ_AS, {"closing": list(self.closing), "is_chat": self.is_chat})

    @classmethod
    def of(cls, config: Any) -> ReadAs | None:
        """Read it from a model's config; None for a model that `train_reward_model` has not trained.

        Raises:
            ValueError: If the config's entry is damaged.
        """
        stored = getattr(config, READ_AS, None)
        if stored is None:
            return None
        entries = stored if isinstance(stored, dict) else {}
        closing, is_chat = entries.get("closing"), entries.get("is_chat")
        if not isinstance(closing, list) or not all(type(i) is int for i in closing) or type(is_chat) is not bool:
            raise ValueError(f"Expected token ids `closing`, and `is_chat`, in {READ_AS} of a config, got {stored!r}.")
        return cls(tuple(closing), is_chat)


@dataclass(frozen=True)
class TextReader:
    """Reads texts for every model that scores them, so that a text has the same tokens in training and in a reward.

    The tokens that the tokenizer puts in front of a text (BOS) are there once, even if the text itself begins with
    them, as one from a chat template does. A conversation is read as the chat template writes it, with nothing in
    front. The tokens that close a text depend on the model. For a model of `train_reward_model` they are those that
    closed all texts of its training, often none; its config says which. For any other model they are those that its
    authors' code would add: what the tokenizer puts behind a text ([SEP], EOS), once, or what the template writes
    behind the last answer of a conversation.

    Args:
        tokenizer: The model's own tokenizer.
        max_length: The most tokens of a text, special tokens included.
        truncation_side: The side on which a longer text loses tokens of its own; the tokens around it are kept.
        read_as: How the texts of the model's training were read; None for a model of someone else.

    Example:
        >>> from textenv import CharTokenizer
        >>> TextReader(CharTokenizer("ab"), max_length=2).encode("aab")
        [1, 2]
    """

    tokenizer: Any
    max_length: int
    truncation_side: Literal["left", "right"] = "left"
    read_as: ReadAs | None = None

    def encode(self, scored: Scored) -> list[int]:
        """Return the token ids of a text or a conversation, cut to `max_length`.

        Raises:
            ValueError: If `max_length` leaves no room for the text, or the template refuses the conversation.
        """
        return self.cut(self.parts(scored))

    def cut(self, parts: Parts) -> list[int]:
        """Return the token ids of an encoded text, cut to `max_length`."""
        room = self.room(parts)
        body = parts.body
        if len(body) > room:
            body = body[-room:] if self.truncation_side == "left" else body[:room]
        return parts.opening + body + parts.closing

    def room(self, parts: Parts) -> int:
        """Return how many of a text's own tokens fit beside those that open and close it.

        Raises:
            ValueError: If none fits.
        """
        room = self.max_length - len(parts.opening) - len(parts.closing)
        if room < 1:
            raise ValueError(
                f"Expected `max_length` to leave room beside the {len(parts.opening) + len(parts.closing)} special "
                f"tokens around a text, got {self.max_length}."
            )
        return room

    def parts(self, scored: Scored) -> Parts:
        """Return the tokens of a text or a conversation before they are cut.

        Raises:
            ValueError: If the tokenizer changes a text's own tokens, or the template refuses the conversation.
        """
        is_text, known = isinstance(scored, str), self.read_as
        opening, body, closing = special_tokens_around(self.tokenizer, self.text(scored))
        closing = closing if known is None else list(known.closing)
        if body[: len(opening)] == opening:  # the text, or the chat template, has written them
            body = body[len(opening) :]
        elif known.is_chat if known is not None else not is_text:  # the chat template writes no BOS
            opening = []
        if closing and body[-len(closing) :] == closing:
            body = body[: -len(closing)]
        elif known is None and not is_text:  # the chat template alone closes a conversation
            closing = []
        return Parts(opening, body, closing)

    def text(self, scored: Scored) -> str:
        """Return the text of a conversation as the chat template writes it; a text is returned as it is."""
        if isinstance(scored, str):
            return scored
        if self.read_as is not None and not self.read_as.closing:
            return render_open(self.tokenizer, scored)
        return apply_template(self.tokenizer, list(scored), "a text to be scored")

    def whole(self, prompt: Prompt, preds: Preds, chat: bool = False, column: str | None = None) -> Scored:
        """Return prompt and completion as one text, or as a conversation.

        A prompt that is a chat becomes the beginning of a conversation if the tokenizer has a chat template, unless
        `train_reward_model` trained the model on texts that no template wrote.

        Args:
            prompt: The prompt.
            preds: The completion; a reply of the env between two turns is the user's message.
            chat: Whether to read any prompt as a conversation; one that is no chat is then the user's message.
            column: The column of the prompt's row that has the messages, for prompts that are no chats.
        """
        is_chat = prompt.messages is not None and bool(getattr(self.tokenizer, "chat_template", None))
        if not chat and (not is_chat or (self.read_as is not None and not self.read_as.is_chat)):
            return str(prompt) + preds.text
        return conversation(self.tokenizer, messages_of(prompt, column), preds)


def longest(model: Any, tokenizer: Any) -> int:
    """Return the most tokens of a text that both a model and its tokenizer allow; about 1e30 if neither has a limit."""
    # transformers `tokenization_utils_base.VERY_LARGE_INTEGER` is the limit of a tokenizer without one.
    return min(tokenizer.model_max_length, n_positions(model) or tokenizer.model_max_length)


def messages_of(prompt: Prompt, column: str | None = None) -> list[Message]:
    """Return the messages before the completion: those of a column or of the chat, else the prompt as one message."""
    if column is not None:
        return list(prompt.row[column])
    return [{"role": "user", "content": str(prompt)}] if prompt.messages is None else list(prompt.messages)


def conversation(tokenizer: Any, messages: Sequence[Message], preds: Preds) -> list[Message]:
    """Return messages with the turns of a completion behind them, each followed by the env's reply to it.

    Many policies begin an answer with the space that their chat template has there ("[/INST] Yes"). If the template of
    this tokenizer writes it as well, it is taken off the message, so that the text has it once.
    """
    history = list(messages)
    for turn in preds.turns:
        history = with_turn(history, turn.text.removeprefix(_front(tokenizer, history)))
        if turn.response is not None:
            history.append({"role": "user", "content": turn.response})
    return history


def _front(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return what the chat template writes between the opening of an answer and its text; it is often empty."""
    if not messages or messages[-1]["role"] == "assistant":
        return ""
    where = "a text to be scored"
    opened = apply_template(tokenizer, list(messages), where, add_generation_prompt=True)
    front, _, _ = apply_template(tokenizer, with_turn(messages, TURN), where).partition(TURN)
    return front.removeprefix(opened) if front.startswith(opened) else ""


def render_open(tokenizer: Any, messages: Sequence[Message], where: str = "a text to be scored") -> str:
    """Render a conversation up to the end of its last answer, without the tokens that close the answer.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: The messages.
        where: The messages as errors name them.

    Raises:
        ValueError: If there is no template, or it refuses the messages.
    """
    last = messages[-1]
    # transformers' `apply_chat_template` cannot find the end of an answer without text.
    if len(messages) > 1 and last.get("role") == "assistant" and not str(last.get("content")).strip():
        return render_chat(tokenizer, messages[:-1], where)
    return render_chat(tokenizer, messages, where)
