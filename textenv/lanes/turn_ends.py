"""The ends of turns and episodes: stop tokens, limits and the env's replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from textenv.episodes.completion import Preds, Turn
from textenv.episodes.rules import EndReason, EpisodeRules, ended_turns
from textenv.episodes.scores import describe
from textenv.lanes.hooks import EpisodeHost
from textenv.lanes.replies import encode_reply
from textenv.lanes.state import LaneState
from textenv.text.tokenizer import decode_continuation


class EpisodeEnd(NamedTuple):
    """The end of an episode: its reason, which may differ from that of the last turn, and the completion."""

    reason: EndReason
    preds: Preds


def lane_preds(env: EpisodeHost, state: LaneState, lane: int, end_reason: EndReason | None = None) -> Preds:
    """Return a snapshot of the completion in a lane.

    Args:
        env: The env.
        state: The running episodes.
        lane: The lane.
        end_reason: The reason why the current turn is over, or None while it is not.
    """
    episode, turn = state.episodes[lane], state.turn(lane)
    return Preds(
        env.tokenizer,
        np.concatenate([episode.written, turn]) if episode.turns else turn,  # (T,)
        context=state.context(lane, int(state.turn_starts[lane])),
        turn_length=len(turn),
        closed=episode.turns,
        end_reason=end_reason,
        stop_strings=env.rules.stop_strings,
        state=episode.state,
        lane=lane,
        group=episode.group,
    )


def turn_limits(rules: EpisodeRules, state: LaneState) -> np.ndarray:
    """Return the value of `state.generated` at which the current turn has reached its limit, (B,)."""
    if rules.turn_tokens is None:
        return state.limits
    n_turn = state.lengths - state.turn_starts  # tokens of the current turn, (B,)
    return state.generated - n_turn + rules.turn_tokens


def end_turns(env: EpisodeHost, state: LaneState, actions: np.ndarray) -> dict[int, EpisodeEnd]:
    """Return the episodes that end with the tokens just appended, by lane.

    Where a turn ends and its episode does not, the env's reply is appended.

    Args:
        env: The env.
        state: The running episodes, to which the replies are appended.
        actions: The tokens just appended, (B,).
    """
    rules = env.rules
    reasons = ended_turns(
        rules, actions, state.generated, turn_limits(rules, state), lambda lane: _tail(env, state, lane)
    )
    ends: dict[int, EpisodeEnd] = {}
    for lane, turn_reason in reasons.items():
        if state.idle[lane]:  # nothing was written, so nothing ends
            continue
        preds = lane_preds(env, state, lane, turn_reason)
        reason = _answer(env, state, lane, preds) if env.is_multi_turn else turn_reason
        if reason is not None:
            ends[lane] = EpisodeEnd(reason, preds)
    return ends


def _answer(env: EpisodeHost, state: LaneState, lane: int, preds: Preds) -> EndReason | None:
    """Append the env's reply to a turn and return None, or return the reason why the episode ends with that turn."""
    rules, episode = env.rules, state.episodes[lane]
    if rules.turn_tokens is None:
        # The last allowed token leaves no room for another turn, whatever ended this turn.
        if state.generated[lane] >= state.limits[lane]:
            return preds.end_reason
        # `respond` is not called for the last turn, since the policy would not answer the reply.
        if len(episode.turns) + 1 >= rules.max_turns:
            return EndReason.ENV
    response = env.respond(episode.prompt, preds)
    if response is None:
        return EndReason.ENV
    if response is EndReason.LENGTH:
        return response
    if not isinstance(response, str):
        raise TypeError(f"Expected `respond` to return a str or None, got {response!r:.80}.")
    tail = _tail(env, state, lane)
    reply = encode_reply(env.tokenizer, episode.prompt.messages, preds, response, tail, rules.stop_strings)
    if not _has_room(rules, state, lane, reply, preds):
        return EndReason.LENGTH
    state.close_turn(lane, Turn(preds.turns[-1].text, response), preds.ids.tolist(), reply)
    return None


def _has_room(rules: EpisodeRules, state: LaneState, lane: int, reply: Sequence[int], preds: Preds) -> bool:
    """Return whether a reply and another turn fit into the episode.

    Raises:
        ValueError: If the reply is longer than `max_response_tokens`.
    """
    prompt = state.episodes[lane].prompt
    if rules.turn_tokens is not None:
        n_used = int(state.lengths[lane]) - (len(prompt.ids) + 1)  # tokens after the separator, replies included
        return bool(n_used + len(reply) + rules.turn_tokens <= state.limits[lane])
    if len(reply) > rules.max_response_tokens:
        raise ValueError(
            f"Expected a response of at most max_response_tokens={rules.max_response_tokens} tokens, got "
            f"{len(reply)} ({describe(prompt, preds)}): shorten it in `respond`, or raise the limit."
        )
    return True


def _tail(env: EpisodeHost, state: LaneState, lane: int) -> str:
    """Return the text of the last tokens of a lane's current turn, special tokens included."""
    tail = state.turn(lane, env.rules.tail_tokens).tolist()
    context = state.context(lane, int(state.lengths[lane]) - len(tail))
    return decode_continuation(env.tokenizer, context, tail, skip_special_tokens=False)
