"""The dealer of prompts to lanes: the env's own prompts, each to a group of samples, or the rows passed to `reset`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from textenv.lanes.hooks import PromptHost
from textenv.lanes.state import NO_GROUP
from textenv.prompts.cursor import PromptCursor
from textenv.prompts.priority import PriorityCursor, PrioritySampling
from textenv.prompts.prompts import Prompt, PromptLike


class PromptDealer:
    """The source of the lanes' prompts, one at a time: each of the env's prompts for a group of episodes.

    A group is one draw of the cursor, for `samples_per_prompt` episodes. Lanes begin its members one after the other,
    as they become free. Groups are numbered in the order in which they begin, from 0 after each `seed`. Each row passed
    to `reset` is used once, as a group of one.

    Args:
        env: The environment.

    Attributes:
        shard: (r, w) if w processes share the env's prompts: this process, the r-th, takes every w-th draw of the
            order or by priority. Set it before the first `seed`. With an order by priority, the processes agree on
            what they have drawn and earned by `cursor.agree`.
        cursor: The order of the env's prompts; None before the first `seed`.
        queue: The rows passed to `reset` that have not begun; None if `reset` was called without rows.
        n_groups: The number of groups that have begun.
        group: The number of the current group of the env's prompts.
        left: The number of members of that group that have not begun.
    """

    def __init__(self, env: PromptHost) -> None:
        self.env = env
        self.shard = (0, 1)
        self.cursor: PromptCursor | PriorityCursor | None = None
        self.queue: list[Prompt] | None = None
        self.n_groups = 0
        self.group = NO_GROUP
        self.left = 0

    @property
    def group_size(self) -> int:
        """The number of episodes in a group."""
        return self.env.samples_per_prompt if self.queue is None else 1

    def seed(self, seed: int) -> None:
        """Start the order of prompts and the numbers of groups anew.

        Args:
            seed: The seed of the order.
        """
        order, n_prompts = self.env.order, len(self.env.prompts)
        if isinstance(order, PrioritySampling):
            self.cursor = order.cursor(n_prompts, seed, self.shard)
        else:
            self.cursor = PromptCursor(n_prompts, order, seed, self.shard)
        self.n_groups, self.left = 0, 0

    def give(self, rows: Sequence[PromptLike]) -> None:
        """Use these rows in place of the env's prompts: each of them once, and then no prompt.

        Raises:
            ValueError: If there are no rows, or a row cannot work.
        """
        if isinstance(rows, (str, Mapping)) or len(rows) == 0:
            raise ValueError(f"Expected the prompts given to `reset` to be a list of one or more, got {rows!r:.80}.")
        if rows is self.env.prompts:  # `_is_own` fails for a data set, which makes a new object of a row each time
            self.queue = list(self.env.prompts)
        else:
            self.queue = [row if self._is_own(row) else self.env.read_prompt(row) for row in rows]  # type: ignore[misc]

    def _is_own(self, row: PromptLike) -> bool:
        """Return whether a row is one of the env's prompt objects, which keeps its number and is not encoded again."""
        own = self.env.prompts
        return isinstance(row, Prompt) and 0 <= row.number < len(own) and own[row.number] is row

    def deal(self) -> tuple[Prompt | None, int]:
        """Return the next prompt and the number of its group, or (None, -1) if the rows of `give` have run out."""
        if self.queue is not None:
            return (self.queue.pop(0), self._new_group()) if self.queue else (None, NO_GROUP)
        assert self.cursor is not None, "seeded by the first reset"
        if self.left == 0:  # all members of the group have begun, so the next prompt is drawn
            self.cursor.advance()
            self.left, self.group = self.env.samples_per_prompt, self._new_group()
        self.left -= 1
        return self.env.prompts[self.cursor.number], self.group

    def coming(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts, or fewer if fewer are known: none if the order depends on rewards to come."""
        if self.queue is None and not isinstance(self.cursor, PromptCursor):
            return []
        ahead = copy.copy(self)  # a copy looks ahead, so that this dealer's own position does not change
        ahead.cursor, ahead.queue = copy.copy(self.cursor), None if self.queue is None else list(self.queue)
        return [prompt for prompt, _ in (ahead.deal() for _ in range(n)) if prompt is not None]

    def observe(self, prompt: Prompt, reward: float) -> None:
        """Pass the reward of a finished episode to an order by priority; other orders ignore it."""
        if isinstance(self.cursor, PriorityCursor) and self.queue is None and prompt.number >= 0:
            self.cursor.observe(prompt.number, reward)

    def _new_group(self) -> int:
        self.n_groups += 1
        return self.n_groups - 1

    def open_groups(self) -> set[int]:
        """Return the number of the group with members that have not begun, if there is one, as a set."""
        return {self.group} if self.left > 0 else set()

    def state_dict(self) -> dict[str, Any]:
        """Return the order of prompts and the position in it, ready for JSON."""
        assert self.cursor is not None, "seeded by the first reset"
        return {
            "cursor": self.cursor.state_dict(),
            "queue": None if self.queue is None else [prompt.row for prompt in self.queue],
            "n_prompts": len(self.env.prompts),
            "dealt": {"n_groups": self.n_groups, "group": self.group, "left": self.left, "size": self.group_size},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: If the saved run had another number of prompts, another `samples_per_prompt` or kind of order.
        """
        if state["n_prompts"] != len(self.env.prompts):
            raise ValueError(
                f"Expected the {state['n_prompts']} prompts of the saved run, got {len(self.env.prompts)}."
            )
        queue, dealt = state["queue"], state["dealt"]
        if queue is None and dealt["size"] != self.env.samples_per_prompt:
            raise ValueError(
                f"Expected samples_per_prompt={dealt['size']}, as the saved run has, got {self.env.samples_per_prompt}."
            )
        self.seed(state["cursor"]["seed"])
        assert self.cursor is not None, "seeded in the line above"
        # Cursors by epochs and by priority save other keys.
        if state["cursor"].keys() != self.cursor.state_dict().keys():
            raise ValueError(f"Expected the order of the saved run, got another: order={self.env.order!r}.")
        self.cursor.load_state_dict(state["cursor"])
        self.queue = None if queue is None else [self.env.read_prompt(row) for row in queue]
        self.n_groups, self.group, self.left = dealt["n_groups"], dealt["group"], dealt["left"]
