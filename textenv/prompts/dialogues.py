r"""Dialogues of a human and an assistant as texts, and pairs of dialogues that differ in their last reply.

The format is that of Anthropic's hh-rlhf (Bai et al., 2022, "Training a Helpful and Harmless Assistant with
Reinforcement Learning from Human Feedback"): turns that open with "\n\nHuman:" and "\n\nAssistant:".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
REPLIES = ("chosen", "rejected")


class Pair(NamedTuple):
    """The text that two dialogues share, up to the opening of the assistant's reply, and the two replies.

    Attributes:
        prompt: The shared text; it ends with "Assistant:".
        chosen: The better reply.
        rejected: The worse reply.
    """

    prompt: str
    chosen: str
    rejected: str


def split_pair(row: Mapping[str, Any], where: str) -> Pair:
    r"""Split the two dialogues of a row after the last "\n\nAssistant:" that they share.

    Args:
        row: A mapping with the texts "chosen" and "rejected", each a whole dialogue.
        where: The row as errors name it, such as "row 3".

    Raises:
        ValueError: If a dialogue is missing or no text, or the two share no "\n\nAssistant:".

    Example:
        >>> shared = "\n\nHuman: Hi\n\nAssistant:"
        >>> split_pair({"chosen": shared + " Hello", "rejected": shared + " Go"}, "row 0")
        Pair(prompt='\n\nHuman: Hi\n\nAssistant:', chosen=' Hello', rejected=' Go')
    """
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in REPLIES):
        columns = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"Expected {where} to have the texts 'chosen' and 'rejected', got {columns}.")
    both = zip(row["chosen"], row["rejected"], strict=False)
    shared = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)  # rfind returns -1 for none
    if end < len(ASSISTANT):
        raise ValueError(
            f"Expected the dialogues of {where} to share the opening {ASSISTANT!r} of an answer, got "
            f"{row['chosen'][:40]!r} and {row['rejected'][:40]!r}: leave the row out."
        )
    return Pair(shared[:end], row["chosen"][end:], row["rejected"][end:])
