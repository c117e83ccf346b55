"""The games that run: one a lane, each found again from its seed and the turns played."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textenv.adapters.game import Game, GameError, Outcome
from textenv.adapters.randomness import OwnRandomness
from textenv.completion import Turn

OPENINGS = -1  # the lane whose game is asked for openings alone


@dataclass
class _Running:
    """A lane's game: what was played of it, and what the last turn led to."""

    game: Game
    seed: int
    randomness: OwnRandomness
    texts: list[str]
    last: Outcome | None = None


class RunningGames:
    """Plays turns, each once, and says what they led to as often as it is asked.

    A game's state is its seed and its turns: where the game at hand stands elsewhere (a checkpoint was loaded, an
    evaluation ran in between, the env was copied) it is played again from its start, and must answer what it answered.
    Nothing of a game is saved besides what the lanes keep anyway.

    Args:
        make: Makes a game.
    """

    def __init__(self, make: Callable[[], Game]) -> None:
        if isinstance(make, Game) and not isinstance(make, type):
            raise ValueError(
                f"Expected `game` to make games, one for each lane, got one game, {make!r:.80}: pass its class, or "
                "functools.partial(class, arguments)."
            )
        if not callable(make):
            raise ValueError(f"Expected `game` to be a class, a functools.partial or a function, got {make!r:.80}.")
        self.make = make
        self._running: dict[int, _Running] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the games out: they are played again where they are needed."""
        return RunningGames, (self.make,)

    def opening(self, seed: int) -> str:
        """Return the text at which the game of a seed begins."""
        return self._begin(OPENINGS, seed)

    def outcome(self, lane: int, seed: int, opening: str, turns: Sequence[Turn]) -> Outcome:
        """Return what the last of these turns led to, after those before it.

        Args:
            lane: Whose game it is.
            seed: The game's seed.
            opening: The text at which it began.
            turns: All turns of the policy, with what was answered to those before the last.

        Raises:
            GameError: If the game raises, breaks its protocol, or answers otherwise than it did.
        """
        texts, running = [turn.text.strip() for turn in turns], self._running.get(lane)
        if running is not None and running.seed == seed and running.texts == texts and running.last is not None:
            return running.last
        if running is None or running.seed != seed or running.texts != texts[:-1]:
            self._check_same(seed, 0, self._begin(lane, seed), opening)
            for number, (text, turn) in enumerate(zip(texts[:-1], turns, strict=False), start=1):
                self._check_same(seed, number, self._step(lane, text).text, turn.response)
        return self._step(lane, texts[-1])

    def _begin(self, lane: int, seed: int) -> str:
        """Begin a lane's game anew; return its opening."""
        before, randomness = self._running.pop(lane, None), OwnRandomness(seed)
        with randomness.inside():
            try:
                game = self.make() if before is None else before.game
                result = game.reset(seed=seed)
            except Exception as error:
                raise GameError(f"The game of seed {seed} raised at its start: {error!r:.400}.") from error
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], str):
            raise GameError(
                f"Expected `reset` of {type(game).__name__} to return a text and an info, got {result!r:.80}."
            )
        self._running[lane] = _Running(game, seed, randomness, [])
        return result[0]

    def _step(self, lane: int, text: str) -> Outcome:
        running = self._running.pop(lane)  # where it raises, its state is not known
        with running.randomness.inside():
            try:
                result = running.game.step(text)
            except Exception as error:
                where = f"at {text!r:.80}, after {running.texts!r:.200}"
                raise GameError(f"The game of seed {running.seed} raised {error!r:.400} {where}.") from error
        if not isinstance(result, tuple) or len(result) != 5 or not isinstance(result[0], str):
            raise GameError(
                f"Expected `step` of {type(running.game).__name__} to return text, reward, terminated, truncated and "
                f"info, got {result!r:.80}."
            )
        reply, reward, terminated, truncated, info = result
        running.texts.append(text)
        running.last = Outcome(reply, reward, bool(terminated), bool(truncated), info)
        self._running[lane] = running
        return running.last

    def _check_same(self, seed: int, number: int, got: str, expected: str | None) -> None:
        if got != expected:
            raise GameError(
                f"Expected the game of seed {seed} to play the same again, as a resumed run needs it, got {got!r:.80} "
                f"after turn {number}, which was {expected!r:.80}. What is random in it, an opponent included, must "
                "follow from the seed, or from Python's `random` or NumPy's global functions, which are kept for it."
            )
