"""The dealer of prompts to lanes: the env's own, each to a group of samples, or the rows given to `reset`."""

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
    """Deals one prompt at a time: each of the env's to `samples_per_prompt` episodes, which are a group.

    A group is one draw of the cursor. Its members are dealt one after the other, to lanes as they become free. Groups
    are numbered in the order in which they are dealt, from 0 after each `seed`. Rows given to `reset` are dealt once
    each, as groups of one.

    Args:
        env: The environment.

    Attributes:
        shard: (r, w) if w processes share the env's prompts: this one, the r-th, deals every w-th draw of the order.
            Set it before the first `seed`. Draws by priority are not shared: each process has its own rewards and
            random generator.
        cursor: The order of the env's prompts; None before the first `seed`.
        queue: The rows given to `reset` that are still to be dealt; None if it was given none.
        n_groups: How many groups have been dealt.
        group: The number of the current group of the env's prompts.
        left: How many members of that group are still to be dealt.
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
        """How many episodes a group has."""
        return self.env.samples_per_prompt if self.queue is None else 1

    def seed(self, seed: int) -> None:
        """Start the order of prompts and the numbers of groups anew.

        Args:
            seed: The seed of the order.
        """
        order, n_prompts = self.env.order, len(self.env.prompts)
        if isinstance(order, PrioritySampling):
            self.cursor = order.cursor(n_prompts, seed + self.shard[0])  # other draws in each process
        else:
            self.cursor = PromptCursor(n_prompts, order, seed, self.shard)
        self.n_groups, self.left = 0, 0

    def give(self, rows: Sequence[PromptLike]) -> None:
        """Deal these rows in place of the env's prompts: once each, and then nothing.

        Raises:
            ValueError: If there are none, or one cannot work.
        """
        if isinstance(rows, (str, Mapping)) or len(rows) == 0:
            raise ValueError(f"Expected the prompts given to `reset` to be a list of one or more, got {rows!r:.80}.")
        if rows is self.env.prompts:  # `_is_own` cannot tell: a data set makes a new object of a row each time
            self.queue = list(self.env.prompts)
        else:
            self.queue = [row if self._is_own(row) else self.env.read_prompt(row) for row in rows]  # type: ignore[misc]

    def _is_own(self, row: PromptLike) -> bool:
        """Return whether a row is a prompt object of the env, which keeps its number and is not encoded again."""
        own = self.env.prompts
        return isinstance(row, Prompt) and 0 <= row.number < len(own) and own[row.number] is row

    def deal(self) -> tuple[Prompt | None, int]:
        """Return the next prompt and the number of its group, or (None, -1) if the rows given have run out."""
        if self.queue is not None:
            return (self.queue.pop(0), self._new_group()) if self.queue else (None, NO_GROUP)
        assert self.cursor is not None, "seeded by the first reset"
        if self.left == 0:  # the group is complete: the next draw
            self.cursor.advance()
            self.left, self.group = self.env.samples_per_prompt, self._new_group()
        self.left -= 1
        return self.env.prompts[self.cursor.number], self.group

    def coming(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts, or as many as are known: none if the order depends on rewards to come."""
        if self.queue is None and not isinstance(self.cursor, PromptCursor):
            return []
        ahead = copy.copy(self)  # deals in place of this dealer, which stays where it is
        ahead.cursor, ahead.queue = copy.copy(self.cursor), None if self.queue is None else list(self.queue)
        return [prompt for prompt, _ in (ahead.deal() for _ in range(n)) if prompt is not None]

    def observe(self, prompt: Prompt, reward: float) -> None:
        """Tell an order by priority the reward of a finished episode; other orders ignore it."""
        if isinstance(self.cursor, PriorityCursor) and self.queue is None and prompt.number >= 0:
            self.cursor.observe(prompt.number, reward)

    def _new_group(self) -> int:
        self.n_groups += 1
        return self.n_groups - 1

    def open_groups(self) -> set[int]:
        """Return the number of the group of which members are still to be dealt, if there is one."""
        return {self.group} if self.left > 0 else set()

    def state_dict(self) -> dict[str, Any]:
        """Return the order and what has been dealt, ready for JSON."""
        assert self.cursor is not None, "seeded by the first reset"
        return {
            "cursor": self.cursor.state_dict(),
            "queue": None if self.queue is None else [prompt.row for prompt in self.queue],
            "n_prompts": len(self.env.prompts),
            "dealt": {"n_groups": self.n_groups, "group": self.group, "left": self.left, "size": self.group_size},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

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
