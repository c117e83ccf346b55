"""TextArena's games, of one player or several, as games of one policy.

Written for textarena 0.7.4. Its traps:

- The default wrapper (`LLMObservationWrapper`) keeps what was seen in earlier episodes through `reset`, and repeats the
  whole history at every turn. So each episode has a game of its own, and its wrappers are taken off: a reply is what
  came since. What the `-train` wrappers do (brackets around an action) `to_action` does.
- Games draw from Python's global `random`, which `reset(seed=...)` seeds. It is kept for each game (see `Game`).
- `step` returns no reward: rewards come from `close`, once the game is over, and so all of it is the last turn's.
- An invalid move costs nothing the first time and loses at once the second (`error_allowance`). The player is asked
  again either way, an opponent too.
- An invalid move of an opponent that ends the game counts as a win: a reward of 1 may be the other's slip.
- GuessTheNumber pays for a near miss, also where two invalid moves end it: a first guess in the middle and then
  nonsense earns 0.7 of 1 without a hint being read.
- Importing it needs openai, nltk, chess, python-dotenv, requests and websockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from textenv.adapters.game import GameError
from textenv.extras import needs

MOVES = 1000  # of the opponents between two turns of the policy


class TextArenaGame:
    """A TextArena game: the policy has one seat, functions have the others.

    An opponent is called with all that its seat has seen, a line a message, and returns its move. What is random in it
    must come from Python's `random` or NumPy's global functions, which are seeded with each game. A frozen copy of the
    policy is one, too, in self-play::

        frozen = copy.deepcopy(model.policy)

        def opponent(text):
            seed = random.getrandbits(31)
            [one] = agents.generate(frozen, [text], tokenizer, max_new_tokens=4, seed=seed)
            return one.text

    Args:
        env_id: As in `textarena.make`.
        opponents: The functions of the other seats, in their order; none for a game of one player.
        seat: The policy's.
        to_text: What the policy sees of new messages: called with them joined by newlines, those of its own left out.
        to_action: What the game gets of a turn.
        **kwargs: Arguments of `textarena.make`.

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
        self.opponents.insert(seat, _no_opponent)
        self.seat = seat
        self.to_text = to_text
        self.to_action = to_action

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Make a game and begin it; opponents whose turn is first move."""
        with needs("textarena", "textarena", "TextArenaGame"):
            import textarena

        env = textarena.make(self.env_id, **self.kwargs)
        while isinstance(env, textarena.Wrapper):
            env = env.env
        self.env = env
        self.seen = ["" for _ in self.opponents]  # what each seat knows
        self.env.reset(num_players=len(self.opponents), seed=seed)
        done, news = self._until_own_turn(False)
        if done:
            raise GameError(f"Expected {self.env_id} to wait for seat {self.seat}, but it was over before its turn.")
        return self.to_text(news), {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Make a move, and let the others make theirs."""
        done, _ = self.env.step(self.to_action(text))
        done, news = self._until_own_turn(done)
        if not done:
            return self.to_text(news), 0.0, False, False, {}
        rewards, info = self.env.close()
        return self.to_text(news), float(rewards[self.seat]), True, False, dict(info[self.seat])

    def _until_own_turn(self, done: bool) -> tuple[bool, str]:
        """Let the opponents move while it is their turn; return whether it is over, and what is new to the policy."""
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
        """Return messages as lines; a player's own are left out."""
        return "\n".join(text for sender, text, _ in messages if sender != player)


def _no_opponent(text: str) -> str:
    raise AssertionError("this seat is the policy's")
