"""The tokens between two turns of the policy: a reply, and what a chat template writes around it."""

from __future__ import annotations

from collections.abc import Sequence

from textenv.chat import Message, render_chat
from textenv.completion import Preds
from textenv.episode import EndReason
from textenv.tokenizer import Tokenizer

TURN = "0A1place2of3a4turn5B6"  # stands for what the policy writes: no template has a rule for such a text


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
    before = render_chat(tokenizer, history) + TURN
    after = render_chat(tokenizer, [*_said(history, TURN), {"role": "user", "content": reply}])
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
