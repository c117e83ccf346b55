"""The numbers of each token of a few episodes: what it earned, what the critic said, and what else was likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from textenv.text.tokenizer import Tokenizer, decode_continuation

from ..models.sequences import SequenceBatch
from ..models.token_sets import AllowedTokens, TokenSets
from ..policies.actor_critic import LMActorCritic
from ..rollout.transitions import Segment, Transitions, batch_of, joined

N_LIKELIEST = 5
MOST_TOKENS = 256  # of an episode whose numbers are kept
MOST_PROMPT = 4000  # characters of a prompt, its end
DIGITS = 7  # significant ones: as many as float32 has
# The names of the numbers of a token in a row, and the arrays of `Transitions` that they are.
OF_ROLLOUT = {
    "reward": "task_rewards",
    "penalty": "penalties",
    "value": "values",
    "return": "returns",
    "advantage": "advantages",
    "log_prob": "log_probs",
}


class Likeliest(NamedTuple):
    """The distribution over the next token at each of N transitions, in short."""

    entropies: np.ndarray  # (N,) in nats
    tokens: np.ndarray  # (N, k) the likeliest tokens, the likeliest first
    chances: np.ndarray  # (N, k) their probabilities


class Episodes(NamedTuple):
    """Some episodes, with N transitions in all, to read by a model and to write as rows.

    Attributes:
        segments: The tokens of each.
        parts: The numbers of the transitions of each.
        batch: The episodes as a model reads them.
        actions: The tokens taken, (N,).
        support: The number of tokens that could be sampled, (N,).
    """

    segments: Sequence[Segment]
    parts: Sequence[Transitions]
    batch: SequenceBatch
    actions: torch.Tensor
    support: np.ndarray

    @classmethod
    def of(
        cls, sequences: Sequence[tuple[Segment, Transitions]], sets: TokenSets, device: torch.device | str
    ) -> Episodes:
        """Return episodes, whose numbers are copied, since a buffer overwrites its arrays; very long ones are cut.

        Args:
            sequences: The tokens and transitions of each.
            sets: The sets of tokens by whose numbers the transitions name what they could sample.
            device: The device of the batch.
        """
        parts = [Transitions(*(array[:MOST_TOKENS] for array in joined([part]))) for _, part in sequences]
        segments = [
            segment._replace(tokens=segment.tokens[: part.cols[-1] + 1])
            for (segment, _), part in zip(sequences, parts, strict=True)
        ]
        rows = np.repeat(np.arange(len(parts)), [len(part.actions) for part in parts])  # (N,)
        numbers = np.concatenate([part.allowed for part in parts])  # (N,)
        cols = np.concatenate([part.cols for part in parts])  # (N,)
        batch = batch_of(segments, rows, cols, None, AllowedTokens(sets, numbers), device)
        sizes = {number: int(sets.dense(np.array([number])).sum()) for number in np.unique(numbers)}
        actions = torch.as_tensor(np.concatenate([part.actions for part in parts]), device=device).long()
        return cls(segments, parts, batch, actions, np.array([sizes[number] for number in numbers]))


@torch.no_grad()
def likeliest(lm: LMActorCritic, batch: SequenceBatch, k: int = N_LIKELIEST) -> Likeliest:
    """Return the entropy and the likeliest tokens at each transition, under the distribution of sampling.

    Args:
        lm: The model.
        batch: Sequences with N transitions.
        k: The number of tokens, at most the vocabulary's.
    """
    k = min(k, lm.backbone.vocab_size)
    result = Likeliest(np.zeros(len(batch)), np.zeros((len(batch), k), dtype=np.int64), np.zeros((len(batch), k)))
    for chunk in lm.chunks(batch):
        start = 0
        for own in lm.log_probabilities(chunk):  # (m, V)
            places = chunk.transitions[start : start + len(own)]  # (m,)
            start += len(own)
            chances = own.exp()
            result.entropies[places] = -(chances * own).sum(dim=-1).cpu().numpy()
            top = chances.topk(k, dim=-1)
            result.tokens[places], result.chances[places] = top.indices.cpu().numpy(), top.values.cpu().numpy()
    return result


def token_rows(
    episodes: Episodes, tokenizer: Tokenizer, found: Likeliest, more: Mapping[str, np.ndarray | None]
) -> list[dict[str, Any]]:
    """Return episodes as rows for JSON.

    Args:
        episodes: The episodes.
        tokenizer: Their tokenizer.
        found: The likeliest tokens.
        more: Further numbers by name, (N,) each; None for those that are not known.

    Returns:
        Each row has `prompt`, `pieces` (the text of each token behind the prompt) and, for each piece, a number under
        each name: `reward`, `penalty`, `value`, `return`, `advantage`, `log_prob`, `entropy`, `support` and those of
        `more`; and `alternatives`, [text, probability] of each of the likeliest. A piece that another speaker wrote,
        or that another rollout has, has None in place of each.
    """
    rows, start = [], 0
    for segment, part in zip(episodes.segments, episodes.parts, strict=True):
        own = slice(start, start := start + len(part.actions))
        ids = [*segment.tokens.tolist(), int(part.actions[-1])]
        n, places = len(ids) - segment.n_prompt, part.cols + 1 - segment.n_prompt
        numbers: dict[str, Any] = {name: getattr(part, array) for name, array in OF_ROLLOUT.items()}
        numbers |= {"entropy": found.entropies[own], "support": episodes.support[own]}
        numbers |= {name: None if array is None else array[own] for name, array in more.items()}
        alternatives: list[Any] = [None] * n
        for place, tokens, chances in zip(places, found.tokens[own], found.chances[own], strict=True):
            context = ids[: segment.n_prompt + place]
            texts = [_piece(tokenizer, context, token) for token in tokens.tolist()]
            alternatives[place] = [
                [text, float(f"{chance:.3g}")] for text, chance in zip(texts, chances.tolist(), strict=True) if chance
            ]
        rows.append(
            {
                "prompt": tokenizer.decode(ids[: segment.n_prompt])[-MOST_PROMPT:],
                "pieces": [_piece(tokenizer, ids[:i], ids[i]) for i in range(segment.n_prompt, len(ids))],
                **{name: _spread(array, places, n) for name, array in numbers.items() if array is not None},
                "alternatives": alternatives,
            }
        )
    return rows


def _piece(tokenizer: Tokenizer, before: list[int], token: int) -> str:
    return decode_continuation(tokenizer, before, [token], skip_special_tokens=False)


def _spread(values: np.ndarray, places: np.ndarray, n: int) -> list[Any]:
    """Return values at their places in a list of n, with None at the others, for NaN and for infinity."""
    result: list[Any] = [None] * n
    for place, value in zip(places.tolist(), values.tolist(), strict=True):
        if not isinstance(value, float):
            result[place] = value
        elif np.isfinite(value):
            result[place] = float(f"{value:.{DIGITS}g}")
    return result
