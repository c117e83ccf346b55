"""The single-turn tasks of a verifiers taskset as games.

Written for verifiers 0.4.0 (`verifiers.v1`). Its traps:

- In this version, a `Taskset` yields `Task`s, and a task scores a `Trace` with its own `@reward` methods, which are
  coroutines. That needs no models, clients or sandboxes.
- verifiers skips rewards that need a sandbox (`runtime`) if there is none, with no more than a line in the log. They
  are refused here.
- Rewards have weights, and a reward may return several numbers by name; `trace.reward` is their weighted sum.
- A task may have several turns (tools, a user who opens), a container, or a judge that asks a server. All of this is
  refused here, as far as the task shows it.
- A system prompt is a field of its own (`system_prompt`). Here it comes before the prompt, with an empty line between.
- It pins mcp 2, and openenv's fastmcp needs mcp below 2: the two cannot share an environment.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from textenv.adapters.game import GameError
from textenv.checks.extras import needs


class VerifiersGame:
    """A task as a game of one turn: the task's prompt is the opening, and its rewards score the turn.

    The seed is the task's index, so `TurnEnv` needs `n_games=len(tasks)`.

    Args:
        tasks: The tasks: `list(taskset)`, or `list(taskset.take(1000))` for an endless taskset.

    Raises:
        ValueError: If a task has more than one turn, or rewards that need a sandbox.

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
        """Return the prompt of the task with this index, and an info.

        Raises:
            GameError: If there are fewer tasks.
        """
        if seed >= len(self.tasks):
            raise GameError(f"Expected seeds below the number of tasks, {len(self.tasks)}, got {seed}: set `n_games`.")
        self.task = self.tasks[seed]
        data = self.task.data
        return "\n\n".join(text for text in (data.system_prompt, data.prompt_text) if text), {"task": data.name}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the turn; return text, reward, terminated, truncated and info.

        Raises:
            GameError: If a reward returned no number.
        """
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
        # verifiers itself recognises a reward that needs a sandbox by this parameter
        runtime = inspect.signature(reward).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            raise ValueError(
                f"Expected {name} to score a text alone, but its reward {reward.__name__!r} wants a runtime."
            )


def _trace(task: Any, text: str) -> Any:
    """Return the trace of a conversation in which the task's prompt was answered by `text`."""
    with needs("verifiers", "verifiers", "VerifiersGame"):
        import verifiers.v1 as vf

    system = [] if task.data.system_prompt is None else [vf.SystemMessage(content=task.data.system_prompt)]
    prompt = task.data.prompt
    question = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt)
    messages = [*system, *question, vf.AssistantMessage(content=text)]
    last = len(messages) - 1
    # A chain of messages, of which the model sampled the last one only.
    nodes = [
        vf.MessageNode(parent=number - 1 if number else None, message=message, sampled=number == last)
        for number, message in enumerate(messages)
    ]
    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
    )
