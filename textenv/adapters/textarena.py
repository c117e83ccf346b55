"""TextArena's games, of one player or several, as games of one policy.

Written for textarena 0.7.4. Its traps:

- The default wrapper (`LLMObservationWrapper`) keeps the observations of earlier episodes through `reset`, and repeats
  the whole history at every turn. So each episode makes a new game here, without its wrappers, and a reply has only the
  new messages. The `-train` wrappers put brackets around an action; `to_action` can do that.
- Games draw from Python's global `random`, which `reset(seed=...)` seeds. Its state is kept for each game (see `Game`).
- `step` returns no reward. Rewards come from `close`, once the game is over, so the last turn earns all of it.
- A first invalid move costs nothing, and the player, even an opponent, is asked again; the second one loses the game
  (`error_allowance`).
- If an opponent's invalid move ends the game, the policy wins: a reward of 1 may be the opponent's mistake.
- GuessTheNumber pays for a near miss, even if two invalid moves end the game: a first guess in the middle and then
  nonsense earns 0.7 of 1, without the policy reading a hint.
- Importing it needs openai, nltk, chess, python-dotenv, requests and websockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from textenv.adapters.game import GameError
from textenv.checks.extras import needs

MOVES = 1000  # the most moves of opponents between two turns of the policy: more than any game needs


class TextArenaGame:
    """A TextArena game in which the policy has one seat and functions have the others.

    An opponent is called with all messages that its seat has seen, one per line, and returns its move. Its randomness
    must come from Python's `random` or NumPy's global functions, which are seeded for each game. For self-play, an
    opponent may be a frozen copy of the policy::

        frozen = copy.deepcopy(model.policy)

        def opponent(text):
            seed = random.getrandbits(31)
            [move] = agents.generate(frozen, [text], tokenizer, max_new_tokens=4, seed=seed)
            return move.text

    Args:
        env_id: An id for `textarena.make`.
        opponents: The functions of the other seats, in their order; none for a game of one player.
        seat: The policy's seat, from 0.
        to_text: A function from the new messages of the others, joined by newlines, to the text that the policy sees.
        to_action: A function from a turn's text to the game's action.
        **kwargs: Other arguments of `textarena.make`.

    Raises:
        ValueError: If there is no such seat.

    Example:
        >>> from functools import partial
        >>> from textenv.adapters import TurnEnv
        >>> make_game = partial(TextArenaGame, "GuessTheNumber-v0", to_action="[{}]".format)
        >>> # TurnEnv(make_game, tokenizer, turn_tokens=8, max_new_tokens=512)
    """

    def __init__(
        self,
        env_id: str,
        opponents: Sequence[Callable[[str], str]] = (),
        seat: int = 0,
        to_text: Callable[[str], str] = str,
        to_action: Callable[[str], str] = str,
        **kwargs: Any,
    ) -> None:
        if not 0 <= seat <= len(opponents):
            raise ValueError(f"Expected `seat` in [0, {len(opponents)}], got {seat}.")
        self.env_id = env_id
        self.kwargs = kwargs
        self.opponents = list(opponents)
        self.opponents.insert(seat, _no_opponent)  # so that an index in this list is the number of a seat
        self.seat = seat
        self.to_text = to_text
        self.to_action = to_action

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Make and begin a game, and let opponents move until it is the policy's turn; return its text and an info."""
        with needs("textarena", "textarena", "TextArenaGame"):
            import textarena

        env = textarena.make(self.env_id, **self.kwargs)
        while isinstance(env, textarena.Wrapper):  # wrappers repeat the history at every turn (see the traps above)
            env = env.env
        self.env = env
        self.seen = ["" for _ in self.opponents]  # the messages that each seat has seen
        self.env.reset(num_players=len(self.opponents), seed=seed)
        done, news = self._until_own_turn(False)
        if done:
            raise GameError(f"Expected {self.env_id} to wait for seat {self.seat}, but it was over before its turn.")
        return self.to_text(news), {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Make a move and let the opponents make theirs; return text, reward, terminated, truncated and info."""
        done, _ = self.env.step(self.to_action(text))
        done, news = self._until_own_turn(done)
        if not done:
            return self.to_text(news), 0.0, False, False, {}
        rewards, info = self.env.close()
        return self.to_text(news), float(rewards[self.seat]), True, False, dict(info[self.seat])

    def _until_own_turn(self, done: bool) -> tuple[bool, str]:
        """Let opponents move until it is the policy's turn; return whether the game is over, and the new messages."""
        for _ in range(MOVES):
            if done:
                return True, self._news(self.seat, self.env.state.observations[self.seat])
            player, messages = self.env.get_observation()
            news = self._news(player, messages)
            if player == self.seat:
                return False, news
            self.seen[player] += news + "\n"
            done, _ = self.env.step(self.opponents[player](self.seen[player]))
        raise GameError(f"Expected a turn of seat {self.seat} within {MOVES} moves of the others in {self.env_id}.")

    def _news(self, player: int, messages: Sequence[tuple[int, str, Any]]) -> str:
        """Return the messages of other players as lines."""
        return "\n".join(text for sender, text, _ in messages if sender != player)


def _no_opponent(text: str) -> str:
    raise AssertionError("this seat is the policy's")
