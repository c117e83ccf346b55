"""Which prompt a lane gets next: the env's own, each to a group of samples, or the rows given to `reset`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from textenv.lane_hooks import PromptHost
from textenv.lane_state import NO_GROUP
from textenv.priority import PriorityCursor, PrioritySampling
from textenv.prompt_cursor import PromptCursor
from textenv.prompts import Prompt, PromptLike


class PromptDealer:
    """Hands out prompts one after the other: each of the env's to `samples_per_prompt` episodes, a group.

    A group is one draw of the cursor; its members are dealt one behind the other, to whichever lanes come for them.
    Groups are numbered in the order in which they are dealt, from 0 at each seed. Rows given to `reset` are dealt
    once each, as groups of one.

    Args:
        env: The environment.

    Attributes:
        shard: (r, w) where w processes deal the env's prompts, set before the first `seed`: each draw of the order
            goes to one of them. Draws by priority are each process's own, with rewards and a generator of its own.
    """

    def __init__(self, env: PromptHost) -> None:
        self.env = env
        self.shard = (0, 1)
        self.cursor: PromptCursor | PriorityCursor | None = None
        self.queue: list[Prompt] | None = None
        self.n_groups = 0  # dealt so far
        self.group = NO_GROUP  # of the env's prompts, the current one
        self.left = 0  # how many members of it are still to be dealt

    @property
    def group_size(self) -> int:
        """How many episodes a group has."""
        return self.env.samples_per_prompt if self.queue is None else 1

    def seed(self, seed: int) -> None:
        """Start the order of prompts and the numbers of groups anew."""
        order, n_prompts = self.env.order, len(self.env.prompts)
        if isinstance(order, PrioritySampling):
            self.cursor = order.cursor(n_prompts, seed + self.shard[0])
        else:
            self.cursor = PromptCursor(n_prompts, order, seed, self.shard)
        self.n_groups, self.left = 0, 0

    def give(self, rows: Sequence[PromptLike]) -> None:
        """Deal these rows instead of the env's prompts, once each, and then nothing."""
        if isinstance(rows, (str, Mapping)) or len(rows) == 0:
            raise ValueError(f"Expected the prompts given to `reset` to be a list of one or more, got {rows!r:.80}.")
        if rows is self.env.prompts:  # looked up again, a row of a data set would be another object
            self.queue = list(self.env.prompts)
        else:
            self.queue = [row if self._is_own(row) else self.env.read_prompt(row) for row in rows]  # type: ignore[misc]

    def _is_own(self, row: PromptLike) -> bool:
        """Whether a row is a prompt object of the env: it then keeps its number, and is not encoded again."""
        own = self.env.prompts
        return isinstance(row, Prompt) and 0 <= row.number < len(own) and own[row.number] is row

    def deal(self) -> tuple[Prompt | None, int]:
        """Return the next prompt and its group, or None where the rows given have run out."""
        if self.queue is not None:
            return (self.queue.pop(0), self._new_group()) if self.queue else (None, NO_GROUP)
        assert self.cursor is not None
        if self.left == 0:
            self.cursor.advance()
            self.left, self.group = self.env.samples_per_prompt, self._new_group()
        self.left -= 1
        return self.env.prompts[self.cursor.number], self.group

    def coming(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts that will be dealt, or as many as are known: none where rewards decide."""
        if self.queue is None and not isinstance(self.cursor, PromptCursor):
            return []
        ahead = copy.copy(self)
        ahead.cursor, ahead.queue = copy.copy(self.cursor), None if self.queue is None else list(self.queue)
        return [prompt for prompt, _ in (ahead.deal() for _ in range(n)) if prompt is not None]

    def observe(self, prompt: Prompt, reward: float) -> None:
        """Take note of what an episode has earned, where the order goes by it."""
        if isinstance(self.cursor, PriorityCursor) and self.queue is None and prompt.number >= 0:
            self.cursor.observe(prompt.number, reward)

    def _new_group(self) -> int:
        self.n_groups += 1
        return self.n_groups - 1

    def open_groups(self) -> set[int]:
        """Return the group of which members are still to be dealt, if there is one."""
        return {self.group} if self.left > 0 else set()

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        assert self.cursor is not None
        return {
            "cursor": self.cursor.state_dict(),
            "queue": None if self.queue is None else [prompt.row for prompt in self.queue],
            "n_prompts": len(self.env.prompts),
            "dealt": {"n_groups": self.n_groups, "group": self.group, "left": self.left, "size": self.group_size},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: If it was saved with another number of prompts, of samples of each, or kind of order.
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
        assert self.cursor is not None
        if state["cursor"].keys() != self.cursor.state_dict().keys():
            raise ValueError(f"Expected the order of the saved run, got another: order={self.env.order!r}.")
        self.cursor.load_state_dict(state["cursor"])
        self.queue = None if queue is None else [self.env.read_prompt(row) for row in queue]
        self.n_groups, self.group, self.left = dealt["n_groups"], dealt["group"], dealt["left"]
