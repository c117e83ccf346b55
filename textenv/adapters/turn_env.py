"""A game of turns as an environment of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from textenv.adapters.game import Game, Outcome
from textenv.adapters.running import RunningGames
from textenv.completion import Preds
from textenv.env import TextEnv
from textenv.episode import EndReason
from textenv.masks import MaskLike
from textenv.priority import PrioritySampling
from textenv.prompts import Order, Prompt, PromptLike
from textenv.rewarding import Score
from textenv.tokenizer import Tokenizer


class TurnEnv(TextEnv):
    """A game as a `TextEnv`: the policy writes a turn token by token, the game is played, its reply is observed.

    A turn ends with EOS, a stop string or its `turn_tokens`-th token; the game gets its text without those and without
    white space around it. The reward of a turn is that of its last token; all its other tokens earn 0. The reply is
    observed, never trained: between turns the observation grows by its tokens (of a chat, by what the chat template
    writes up to the assistant's next turn), and what stood there stays, token for token. The game ends the episode:
    terminated where it says so, else truncated (end reason "length") where it says so, or where `max_new_tokens` leaves
    no room for the reply and a whole turn more.

    A prompt is the opening of a numbered game: its row is `{"seed": n}`. Rows of other seeds, as
    `reset(options={"prompts": [{"seed": 10_000}]})` takes them, are games that training has not seen.

    Every lane has a game of its own. A game is nothing but its seed and the turns played, so copies, evaluations in
    between and checkpoints need no more than that: elsewhere it is played again from its start, and a `GameError` says
    so where it then plays otherwise. `outcome` has all that the game said of a turn, for a `get_reward` of your own.

    Args:
        game: Makes a game (see `textenv.adapters.Game`): a class, a `functools.partial` of one, or a function.
        tokenizer: See `TextEnv`.
        turn_tokens: The most tokens of one turn.
        max_new_tokens: The room behind the opening: the most tokens of all turns and replies together.
        n_games: How many games there are to train on: the seeds from 0. Their openings are read at once.
        stop: Texts that end a turn as soon as they appear.
        chat: Whether opening and replies are a user's messages, and turns the assistant's, by the tokenizer's chat
            template; else texts follow each other as they are.
        length_limit: Whether a game that is broken off, or has no room left, is "truncate"d, as Gymnasium has it, or
            "terminate"d. The value of going on is added to what a truncated episode has earned, so that training does
            not mind the end; where the room is part of the task (so many guesses), terminate.
        stop_ids: As in `TextEnv`, and so are all below.
        max_prompt_tokens: The longest opening. Unset, the longest of the `n_games`; other seeds may have longer ones.
        samples_per_prompt: How many times each game is played before the next: a group.
        order: In which order games are played.
        mask: Which tokens are allowed next.
        seed: The seed of the order.
        render_mode: "ansi", "human" or None.

    Raises:
        ValueError: If an argument cannot work, or an opening has no token.
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
        self.games = RunningGames(game)
        self.chat = chat
        super().__init__(
            [{"seed": number} for number in range(n_games)],
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
        """Return the opening of the game of a row, `{"seed": n}`, as a `Prompt`."""
        source = row.row if isinstance(row, Prompt) else row
        seed = source.get("seed") if isinstance(source, Mapping) else None
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"Expected a row {{'seed': n}} with n >= 0, the number of a game, got {source!r:.80}.")
        opening = self.games.opening(seed)
        prompt = [{"role": "user", "content": opening}] if self.chat else opening
        return super().read_prompt({"prompt": prompt, "seed": seed}, number)

    def outcome(self, prompt: Prompt, preds: Preds) -> Outcome:
        """Return what the last turn led to, which must be over: in `get_reward`, where it is done or answered."""
        opening = str(prompt) if prompt.messages is None else prompt.messages[0]["content"]
        return self.games.outcome(preds.lane, prompt.row["seed"], opening, preds.turns)

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return what the turn has earned with its last token, and 0 with those before."""
        is_over = done or len(preds.turn_ids) == 0  # behind a reply the next turn is empty
        return self.outcome(prompt, preds).reward if is_over else 0.0

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        """Play the turn that is over; return the game's reply, or how it has ended the episode."""
        outcome = self.outcome(prompt, preds)
        if outcome.terminated:
            return None
        return EndReason.LENGTH if outcome.truncated else outcome.text
