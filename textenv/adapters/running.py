"""The running games, one for each lane, which are replayed from their seed and turns where needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textenv.adapters.game import Game, GameError, Outcome
from textenv.adapters.randomness import OwnRandomness
from textenv.episodes.completion import Turn

OPENINGS = -1  # the number of a pretended lane whose game is used only to read openings


@dataclass
class _Running:
    """A lane's game, the texts of the turns that were played, and the outcome of the last one."""

    game: Game
    seed: int
    randomness: OwnRandomness
    texts: list[str]
    last: Outcome | None = None


class RunningGames:
    """The games of all lanes, in which each turn is played once and its outcome can be asked for repeatedly.

    A game's state follows from its seed and its turns. If a lane's game is in another state (a checkpoint was loaded,
    an evaluation ran in between, or the env was copied), it is replayed from its start and must give the same replies.
    So a checkpoint needs nothing of a game but its seed and turns, which the lanes save anyway.

    Args:
        make: A function that makes a game.

    Raises:
        ValueError: If `make` is a game itself, or not callable.
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
        """Pickle without the games, which are replayed when they are needed."""
        return RunningGames, (self.make,)

    def opening(self, seed: int) -> str:
        """Return the text with which the game of a seed begins."""
        return self._begin(OPENINGS, seed)

    def outcome(self, lane: int, seed: int, opening: str, turns: Sequence[Turn]) -> Outcome:
        """Return the outcome of the last of these turns, and play that turn unless it was played before.

        Args:
            lane: The number of the game's lane.
            seed: The game's seed.
            opening: The text with which the game began.
            turns: All turns of the policy, each but the last with the game's reply.

        Raises:
            GameError: If the game raises, breaks its protocol, or gives other replies than before.
        """
        texts, running = [turn.text.strip() for turn in turns], self._running.get(lane)
        if running is not None and running.seed == seed and running.texts == texts and running.last is not None:
            return running.last  # this turn was already played
        if running is None or running.seed != seed or running.texts != texts[:-1]:
            # The lane's game is in another state: it is replayed, and each reply compared with the recorded one.
            self._check_same(seed, 0, self._begin(lane, seed), opening)
            for number, (text, turn) in enumerate(zip(texts[:-1], turns, strict=False), start=1):
                self._check_same(seed, number, self._step(lane, text).text, turn.response)
        return self._step(lane, texts[-1])

    def _begin(self, lane: int, seed: int) -> str:
        """Begin a lane's game anew, and return its opening."""
        previous, randomness = self._running.pop(lane, None), OwnRandomness(seed)
        with randomness.inside():
            try:
                game = self.make() if previous is None else previous.game
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
        running = self._running.pop(lane)  # put back below, but not if the game raises: its state is then unknown
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
