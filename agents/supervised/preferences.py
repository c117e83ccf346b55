"""Training data of reward models: rankings of texts by preference, and texts with a score each."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textenv.checks.lines import check_encodable
from textenv.prompts.chat import Message, is_chat, render_chat
from textenv.prompts.dialogues import REPLIES, split_pair
from textenv.rewards.text_reader import TextReader, render_open
from textenv.text.tokenizer import Tokenizer


class Ranking(NamedTuple):
    """Answers to one prompt, the best first; a ranking of two is a pair of chosen and rejected.

    Args:
        texts: The answers, each as a continuation of the prompt.
        prompt: The text that all answers continue. A reward model scores `prompt + text`.
        margin: The difference to train between the scores of a better and a worse answer, in nats (Touvron et al.,
            2023, "Llama 2", equation 2).
        is_chat: Whether a chat template wrote prompt and texts, so that the tokenizer adds no BOS of its own.

    Example:
        >>> from agents import Ranking
        >>> Ranking(("good", "fair", "bad"), prompt="It was ").pairs()
        [(0, 1), (0, 2), (1, 2)]
    """

    texts: Sequence[str]
    prompt: str = ""
    margin: float = 0.0
    is_chat: bool = False

    def pairs(self) -> list[tuple[int, int]]:
        """Return the indices of all pairs of texts, the better text first."""
        return list(itertools.combinations(range(len(self.texts)), 2))

    def wholes(self) -> list[str]:
        """Return each text with the prompt in front."""
        return [self.prompt + text for text in self.texts]


class Labelled(NamedTuple):
    """A text, prompt included, and the score that a reward model should give it."""

    text: str
    label: float


def hh_pairs(rows: Sequence[Mapping[str, str]]) -> list[Ranking]:
    r"""Read pairs of dialogues in the format of Anthropic's hh-rlhf, each as a prompt and its two replies.

    Args:
        rows: Mappings with "chosen" and "rejected": turns that open with "\n\nHuman:" and "\n\nAssistant:".

    Returns:
        Rankings of two, whose prompt is the shared start of both dialogues, up to its last "\n\nAssistant:".

    Raises:
        ValueError: If the dialogues of a row share no "\n\nAssistant:"; the message names the row.

    Example:
        >>> from agents import hh_pairs
        >>> hh_pairs([{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}])
        [Ranking(texts=(' Hello', ' Go'), prompt='\n\nHuman: Hi\n\nAssistant:', margin=0.0, is_chat=False)]
    """
    pairs = [split_pair(row, f"row {number}") for number, row in enumerate(rows)]
    return [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in pairs]


def chat_pair(row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Ranking:
    """Read a pair of conversations as the texts that a chat model reads and writes.

    The prompt is rendered as an env renders a chat: up to the opening of the assistant's answer. The answers follow
    without the tokens that close a message, which a policy has not written when it ends its text. A model that
    `train_reward_model` trains on them says so in its config, and a reward reads texts in the same way.

    Args:
        row: A mapping with "chosen" and "rejected": lists of messages, either whole conversations, which share the
            prompt, or answers to "prompt", which is a list of messages, or the text of a single one by the user.
            Answers to a list of messages may be texts.
        tokenizer: A Hugging Face tokenizer with a chat template.
        where: The row as errors name it, such as "row 3".

    Raises:
        ValueError: If a conversation has no answer, both share no prompt, or they cannot be rendered.

    Example:
        >>> question = {"role": "user", "content": "Hi"}
        >>> both = {name: [question, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        >>> # chat_pair(both, AutoTokenizer.from_pretrained(name), "row 1").texts is ("chosen", "rejected")
    """
    first, second = (_conversation(row, name, f"the column {name} of {where}") for name in REPLIES)
    n_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    n_shared = min(n_shared, len(first) - 1, len(second) - 1)  # equal conversations share their answers, too
    if n_shared < 1:
        raise ValueError(
            f"Expected the conversations of {where} to begin with the same messages, got {first[0]!r:.60} and "
            f"{second[0]!r:.60}: leave the row out."
        )
    prompt = render_chat(tokenizer, first[:n_shared], where)
    texts = []
    for name, messages in zip(REPLIES, (first, second), strict=True):
        whole = render_open(tokenizer, messages, f"the column {name} of {where}")
        check_encodable(whole, f"the column {name} of {where}")
        if messages[n_shared]["role"] != "assistant" or not whole.startswith(prompt):
            raise ValueError(
                f"Expected the column {name} of {where} to continue the shared messages as the chat template opens an "
                f"answer, {prompt[-40:]!r}, got {messages[n_shared]!r:.60}."
            )
        texts.append(whole[len(prompt) :])
    return Ranking(tuple(texts), prompt, is_chat=True)


def _conversation(row: Mapping[str, Any], name: str, place: str) -> list[Message]:
    """Return all messages of one side of a pair, the prompt's included."""
    prompt, answer = row.get("prompt") or [], row[name]
    if isinstance(answer, str) and is_chat(prompt):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_chat(answer):
        raise ValueError(f"Expected a list of messages in {place}, got {answer!r:.80}.")
    if prompt and not is_chat(prompt):
        raise ValueError(f"Expected a text or messages in the prompt beside {place}, got {prompt!r:.80}.")
    last = answer[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or not last.get("content"):
        raise ValueError(f"Expected {place} to end with an answer of the assistant, got {last!r:.80}.")
    if answer[0].get("role") == "assistant":
        return [*prompt, *answer]
    if not all(message in answer for message in prompt):
        raise ValueError(
            f"Expected {place} to be an answer, or a conversation with the row's prompt, got {answer[0]!r:.80} in the "
            f"place of {prompt[0]!r:.80}."
        )
    return list(answer)


def different_pairs(
    name: str, data: Sequence[Ranking], encoded: Sequence[list[list[int]]], max_tokens: int
) -> list[list[tuple[int, int]]]:
    """Return those pairs of each ranking whose tokens differ; a warning counts the others.

    Args:
        name: The data as messages name them, "data" or "held_out".
        data: The rankings.
        encoded: The tokens of each ranking's texts, from `encode_texts`.
        max_tokens: The most tokens of a text.

    Raises:
        ValueError: If no pair is left.

    Example:
        >>> different_pairs("data", [Ranking(("a", "b", "c"))], [[[1], [2], [3]]], max_tokens=8)
        [[(0, 1), (0, 2), (1, 2)]]
    """
    pairs, equal, n_cut = [], [], 0
    for number, (example, ids) in enumerate(zip(data, encoded, strict=True)):
        same = [(better, worse) for better, worse in example.pairs() if ids[better] == ids[worse]]
        pairs.append([(better, worse) for better, worse in example.pairs() if ids[better] != ids[worse]])
        equal += [number] * len(same)
        n_cut += sum(1 for better, worse in same if example.texts[better] != example.texts[worse])
    if equal:
        summary = (
            f"{len(equal)} of {len(equal) + sum(map(len, pairs))} pairs of `{name}` have equal texts, the first in "
            f"{name}[{equal[0]}] ({n_cut} of them only as tokens, cut to max_tokens={max_tokens})"
        )
        if not any(pairs):
            raise ValueError(f"Expected texts that differ, got none: {summary}.")
        warnings.warn(f"{summary}. They are left out, since they say nothing of what is better.", stacklevel=4)
    return pairs


def encode_texts(reader: TextReader, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that are compared with each other.

    If a text is longer than the reader's `max_length`, all texts lose the same number of tokens of their common start,
    so that their first difference stays in one column; a text that is still too long loses more of its own start. The
    tokens in front of a text (BOS) are kept.

    Raises:
        ValueError: If a text has no token.
    """
    encoded = [reader.parts(text) for text in texts]
    for text, parts in zip(texts, encoded, strict=True):
        if not parts.opening + parts.body:
            raise ValueError(f"Expected texts of at least one token, got {text!r}.")
    excess = max(0, *(len(parts.body) - reader.room(parts) for parts in encoded))
    # The number of tokens at the start that all texts share.
    bodies = zip(*(parts.body for parts in encoded), strict=False)
    n_shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, bodies))
    n_cut = min(excess, n_shared)
    # A text that is no more than the shared start keeps its last token.
    return [reader.cut(parts._replace(body=parts.body[:-1][n_cut:] + parts.body[-1:])) for parts in encoded]
