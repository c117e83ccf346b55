"""The tokens between two turns of the policy: the env's reply, and the chat template's text around it."""

from __future__ import annotations

from collections.abc import Sequence

from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.prompts.chat import TURN, Message, render_chat, with_turn
from textenv.text.tokenizer import Tokenizer


def encode_reply(
    tokenizer: Tokenizer,
    messages: Sequence[Message] | None,
    preds: Preds,
    reply: str,
    tail: str = "",
    stop_strings: Sequence[str] = (),
) -> list[int]:
    """Return the tokens between a turn of the policy that has just ended and its next turn.

    After a prompt that is no chat, these are the tokens of the reply. In a chat, they are everything that the template
    writes between the turns: the end of the assistant's turn (unless the policy has written it), the reply as a user's
    message, and the opening of the assistant's next turn. They are the difference of two renderings of the chat, with
    and without the reply, so the longer rendering must begin with the shorter one. The policy's own tokens stay as they
    are.

    Args:
        tokenizer: The tokenizer.
        messages: The messages of the prompt; None if it is no chat.
        preds: The completion so far, whose last turn has just ended.
        reply: The reply to that turn.
        tail: The text of the turn's last few tokens, special tokens included.
        stop_strings: The texts that end a turn.

    Raises:
        ValueError: If the template changes earlier messages when one is added.
    """
    if messages is None:
        return list(tokenizer.encode(reply, add_special_tokens=False))
    history = list(messages)  # up to the turn that has just ended
    for turn in preds.turns[:-1]:
        history = [*with_turn(history, turn.text), {"role": "user", "content": turn.response or ""}]
    # In both renderings a stand-in takes the place of the turn: many templates strip the text of a message, and the
    # policy's tokens may not be those that the tokenizer would choose for it.
    before = render_chat(tokenizer, history) + TURN
    after = render_chat(tokenizer, [*with_turn(history, TURN), {"role": "user", "content": reply}])
    if not after.startswith(before):
        raise ValueError(
            "Expected a chat template that keeps earlier messages as they are when one is added, got one that then "
            f"writes {before[-80:]!r} in another way. Give prompts as texts in the model's format; then the text that "
            "`respond` returns is observed as it is: let it close the turn and open the next."
        )
    rest = after[len(before) :]
    # The template may begin with the EOS or stop string that ended the turn, which must not be written twice.
    ends = [tokenizer.decode([preds[-1]])] if preds.end_reason is EndReason.EOS else stop_strings
    written = next((end for end in ends if tail.endswith(end) and rest.startswith(end)), "")
    return list(tokenizer.encode(rest[len(written) :], add_special_tokens=False))
