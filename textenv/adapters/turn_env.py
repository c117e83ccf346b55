"""The environment of a game of turns: each turn is written token by token, then played."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from textenv.adapters.game import Game, Outcome
from textenv.adapters.running import RunningGames
from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.episodes.scores import Score
from textenv.masks.token_masks import MaskLike
from textenv.prompts.priority import PrioritySampling
from textenv.prompts.prompts import Order, Prompt, PromptLike
from textenv.text.tokenizer import Tokenizer


class TurnEnv(TextEnv):
    """A game as a `TextEnv`: the policy writes a turn token by token, the game plays it, the policy observes its reply.

    A turn ends with EOS, with a stop string, or with its `turn_tokens`-th token. The game gets the turn's text without
    EOS, stop string and surrounding white space. The last token of a turn gets the turn's reward, all others 0. The
    policy observes replies but is not trained on them: after a turn the observation grows by the reply's tokens (in a
    chat, by all tokens of the chat template up to the assistant's next turn), and the earlier tokens stay as they are.
    The episode terminates or is truncated (end reason "length") when the game is, and it is truncated when
    `max_new_tokens` leaves no room for the reply and one more turn.

    A prompt is the opening of a numbered game, and its row is `{"seed": n}`. Other seeds, as in
    `reset(options={"prompts": [{"seed": 10_000}]})`, give games that training has not seen.

    Every lane has a game of its own. A game's state follows from its seed and the turns played, so copies, evaluations
    during training and checkpoints store only these. Where its state is needed again, the game is replayed from its
    start; if its replies then differ, a `GameError` is raised. `outcome` returns the game's full result of a turn, for
    a `get_reward` of your own.

    Args:
        game: A function that makes a game (see `textenv.adapters.Game`), its class, or a `functools.partial` of these.
        tokenizer: The policy's tokenizer; see `TextEnv`.
        turn_tokens: The most tokens of one turn.
        max_new_tokens: The most tokens of all turns and replies together.
        n_games: The number of games to train on, with the seeds from 0. Their openings are all read at the start.
        stop: Texts that end a turn as soon as they appear.
        chat: Whether the tokenizer's chat template writes the opening and replies as a user's messages, and the turns
            as the assistant's; otherwise the texts follow each other as they are.
        length_limit: The treatment of a game that is broken off, or has no room left: "truncate", as in Gymnasium, adds
            the value of its continuation to the episode's return, as if the game did not end there; "terminate" does
            not, and suits tasks in which the room is part of the rules (a number of guesses).
        stop_ids: Token ids that end a turn. This and the arguments below are those of `TextEnv`.
        max_prompt_tokens: The most tokens of an opening. By default, the longest of the `n_games`; the openings of
            other seeds may be longer.
        samples_per_prompt: The number of times that each game is played before the next, as a group.
        order: The order in which games are played.
        mask: The mask of the tokens that are allowed next.
        seed: The seed of the order.
        render_mode: "ansi", "human" or None.

    Raises:
        ValueError: If an argument is out of range, or an opening has no token.
        GameError: If a game breaks its protocol.

    Example:
        >>> import random
        >>> from textenv import CharTokenizer
        >>> from textenv.adapters import TurnEnv
        >>> class Guess:
        ...     def reset(self, *, seed):
        ...         self.letter = random.choice("ab")
        ...         return "a or b?", {}
        ...     def step(self, text):
        ...         return "no,", float(text == self.letter), text == self.letter, False, {}
        >>> env = TurnEnv(Guess, CharTokenizer(), turn_tokens=1, max_new_tokens=9)
        >>> _ = env.reset(options={"prompts": [{"seed": 0}]})
        >>> env.step(1)[1:4], env.step(2)[1:4]
        ((0.0, False, False), (1.0, True, False))
    """

    def __init__(
        self,
        game: Callable[[], Game],
        tokenizer: Tokenizer,
        *,
        turn_tokens: int = 16,
        max_new_tokens: int = 256,
        n_games: int = 1000,
        stop: Sequence[str] = (),
        chat: bool = False,
        length_limit: Literal["terminate", "truncate"] = "truncate",
        stop_ids: Sequence[int] | None = None,
        max_prompt_tokens: int | None = None,
        samples_per_prompt: int = 1,
        order: Order | PrioritySampling = "shuffle",
        mask: MaskLike | Sequence[MaskLike] | None = None,
        seed: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if n_games < 1:
            raise ValueError(f"Expected `n_games` to be at least 1, got {n_games}.")
        self.games = RunningGames(game)  # before `super().__init__`, which calls `read_prompt`
        self.chat = chat
        super().__init__(
            [{"seed": number} for number in range(n_games)],  # `read_prompt` reads the opening of each
            tokenizer,
            max_new_tokens=max_new_tokens,
            turn_tokens=turn_tokens,
            stop_strings=stop,
            stop_ids=stop_ids,
            length_limit=length_limit,
            max_prompt_tokens=max_prompt_tokens,
            samples_per_prompt=samples_per_prompt,
            order=order,
            mask=mask,
            seed=seed,
            render_mode=render_mode,
        )

    def read_prompt(self, row: PromptLike, number: int = -1) -> Prompt:
        """Return the opening of a row's game, `{"seed": n}`, as a `Prompt`.

        Raises:
            ValueError: If the row has no seed of 0 or more.
        """
        source = row.row if isinstance(row, Prompt) else row
        seed = source.get("seed") if isinstance(source, Mapping) else None
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"Expected a row {{'seed': n}} with n >= 0, the number of a game, got {source!r:.80}.")
        opening = self.games.opening(seed)
        # The row keeps the seed, from which the lane's own game begins when the policy ends its first turn.
        prompt = [{"role": "user", "content": opening}] if self.chat else opening
        return super().read_prompt({"prompt": prompt, "seed": seed}, number)

    def outcome(self, prompt: Prompt, preds: Preds) -> Outcome:
        """Return the result of the last turn, which must have ended; in `get_reward`, when `done` or after a reply."""
        opening = str(prompt) if prompt.messages is None else prompt.messages[0]["content"]
        return self.games.outcome(preds.lane, prompt.row["seed"], opening, preds.turns)

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the turn's reward at its last token, and 0 at its other tokens."""
        is_over = done or len(preds.turn_ids) == 0  # directly after a reply, the next turn is still empty
        return self.outcome(prompt, preds).reward if is_over else 0.0

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        """Play a turn that has ended; return the game's reply, None if the game is over, LENGTH if it is broken off."""
        outcome = self.outcome(prompt, preds)
        if outcome.terminated:
            return None
        return EndReason.LENGTH if outcome.truncated else outcome.text
