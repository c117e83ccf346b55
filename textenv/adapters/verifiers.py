"""The tasks of a verifiers taskset, of one turn each, as games.

Written for verifiers 0.4.0 (`verifiers.v1`). Its traps:

- What was an environment with a data set and a rubric is now a `Taskset` that yields `Task`s, and a task scores a
  `Trace` with its own `@reward` methods, which are coroutines. Models, clients and sandboxes are not needed for that.
- Rewards that want a sandbox (`runtime`) are left out without one, with no more than a line in the log: refused here.
- A reward is weighted, and may be a mapping of several; `trace.reward` is their weighted sum.
- A task may be of several turns (tools, a user who opens), in a container, or scored by a judge that asks a server.
  What can be told from the task is refused.
- A system prompt is a field of its own (`system_prompt`); it stands in front of the prompt here, with an empty line.
- It pins mcp 2, which openenv's fastmcp cannot have: they do not fit into one Python environment.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from textenv.adapters.game import GameError
from textenv.extras import needs


class VerifiersGame:
    """A task as a game of one turn: its prompt is the opening, what its rewards say of the turn is the turn's.

    Give `TurnEnv` as many games as there are tasks, `n_games=len(tasks)`: the seed is the task's number.

    Args:
        tasks: The tasks: `list(taskset)`, or of an endless one `list(taskset.take(1000))`.

    Raises:
        ValueError: If a task is not of one turn, or has rewards that need a sandbox.

    Example:
        >>> from functools import partial
        >>> from textenv.adapters import TurnEnv
        >>> # tasks = list(MyTaskset(verifiers.v1.TasksetConfig()))
        >>> # TurnEnv(partial(VerifiersGame, tasks), tokenizer, n_games=len(tasks), turn_tokens=64, max_new_tokens=64)
    """

    def __init__(self, tasks: Sequence[Any]) -> None:
        for task in tasks:
            _check_single_turn(task)
        self.tasks = tasks

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Return the prompt of the task of this number."""
        if seed >= len(self.tasks):
            raise GameError(f"Expected seeds below the number of tasks, {len(self.tasks)}, got {seed}: set `n_games`.")
        self.task = self.tasks[seed]
        data = self.task.data
        return "\n\n".join(text for text in (data.system_prompt, data.prompt_text) if text), {"task": data.name}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score a turn."""
        trace = _trace(self.task, text)
        asyncio.run(self.task.score(trace))
        rewards = {name: None if reward is None else reward.value for name, reward in trace.rewards.items()}
        if not rewards or None in rewards.values():
            raise GameError(f"Expected rewards of task {self.task.data.idx}, got {rewards}.")
        return "", float(trace.reward), True, False, {"rewards": rewards, "metrics": dict(trace.metrics)}


def _check_single_turn(task: Any) -> None:
    name = f"task {task.data.idx} ({type(task).__name__})"
    if not task.data.prompt_text:
        raise ValueError(f"Expected {name} to have a prompt, got none: tasks whose user opens are not of one turn.")
    if task.NEEDS_CONTAINER or task.data.image is not None or type(task).toolsets(task.config):
        raise ValueError(f"Expected {name} to be of one turn, got one with a container or tools.")
    for reward in task.hooks("reward"):
        wanted = inspect.signature(reward).parameters.get("runtime")  # which is how verifiers tells, too
        if wanted is not None and wanted.default is inspect.Parameter.empty:
            raise ValueError(
                f"Expected {name} to score a text alone, but its reward {reward.__name__!r} wants a runtime."
            )


def _trace(task: Any, text: str) -> Any:
    """Return the record of a conversation in which the task was asked and the model said `text`."""
    with needs("verifiers", "verifiers", "VerifiersGame"):
        import verifiers.v1 as vf

    system = [] if task.data.system_prompt is None else [vf.SystemMessage(content=task.data.system_prompt)]
    prompt = task.data.prompt
    asked = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt)
    messages = [*system, *asked, vf.AssistantMessage(content=text)]
    last = len(messages) - 1
    nodes = [
        vf.MessageNode(parent=number - 1 if number else None, message=message, sampled=number == last)
        for number, message in enumerate(messages)
    ]
    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
    )
