"""The checks of those arguments of `TextEnv` that make the rules of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from textenv.episodes.rules import EpisodeRules
from textenv.text.tokenizer import Tokenizer


def make_rules(
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int] | None,
    stop_strings: Sequence[str],
    max_new_tokens: int,
    length_limit: Literal["terminate", "truncate"],
    max_turns: int,
    max_response_tokens: int,
    turn_tokens: int | None,
    responder: str | None,
) -> EpisodeRules:
    """Return the rules of an episode; the arguments are those of `TextEnv`.

    Args:
        tokenizer: The tokenizer, whose EOS is the default stop id.
        stop_ids: Token ids that end a turn.
        stop_strings: Texts that end a turn.
        max_new_tokens: The most tokens of an episode.
        length_limit: Whether an episode that reaches this limit is terminated or truncated.
        max_turns: The most turns.
        max_response_tokens: The most tokens of a reply.
        turn_tokens: The most tokens of a turn.
        responder: The name of the class, if it defines `respond`.

    Raises:
        ValueError: If the arguments cannot work, alone or together.
    """
    _check_turns(max_new_tokens, max_turns, max_response_tokens, turn_tokens, responder)
    rules = EpisodeRules(
        stop_ids=_read_stop_ids(tokenizer, stop_ids),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        max_new_tokens=max_new_tokens,
        length_limit=length_limit,
        max_turns=max_turns,
        max_response_tokens=max_response_tokens,
        turn_tokens=turn_tokens,
    )
    if not all(rules.stop_strings):
        raise ValueError(f"Expected `stop_strings` without an empty one, got {rules.stop_strings}.")
    return rules


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError for a number below 1."""
    if value < 1:
        raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")


def _check_turns(
    max_new_tokens: int, max_turns: int, max_response_tokens: int, turn_tokens: int | None, responder: str | None
) -> None:
    check_at_least_one("max_new_tokens", max_new_tokens)
    if turn_tokens is not None:
        # (1, 0) are the defaults of `TextEnv`: the caller has set neither of the two.
        if responder is None or (max_turns, max_response_tokens) != (1, 0):
            raise ValueError(
                "Expected `turn_tokens` where `respond` is defined, and without max_turns and max_response_tokens, "
                "which it replaces."
            )
        if not 1 <= turn_tokens <= max_new_tokens:
            raise ValueError(f"Expected `turn_tokens` in [1, max_new_tokens={max_new_tokens}], got {turn_tokens}.")
        return
    # A reply needs a second turn that reads it, and room for its tokens.
    if responder is not None and (max_turns < 2 or max_response_tokens < 1):
        raise ValueError(
            f"Expected max_turns >= 2 and max_response_tokens >= 1, since {responder} defines `respond`; got "
            f"{max_turns} and {max_response_tokens}. They limit how many tokens the replies may take."
        )
    if responder is None and (max_turns != 1 or max_response_tokens != 0):
        raise ValueError("Expected `respond` to be defined where max_turns or max_response_tokens is given.")


def _read_stop_ids(tokenizer: Tokenizer, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    if stop_ids is None:
        end = tokenizer.eos_token_id
        if end is not None and not 0 <= end < len(tokenizer):
            raise ValueError(
                f"Expected the tokenizer's end token in [0, {len(tokenizer)}), its number of tokens, got {end}, an id "
                "that can never be written: take a tokenizer whose ids have no gap, or give stop_ids, which may be []."
            )
        return () if end is None else (end,)
    for token in stop_ids:
        if not 0 <= token < len(tokenizer):
            raise ValueError(f"Expected `stop_ids` in [0, {len(tokenizer)}), got {token}.")
    return tuple(stop_ids)
