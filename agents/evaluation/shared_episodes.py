"""Episodes that several processes run together, each its share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from textenv.env import TextEnv
from textenv.lanes.prompt_dealer import PromptDealer
from textenv.prompts.prompts import Prompt, PromptLike
from textenv.vector import unwrap_text_env

from ..distributed.collectives import gather, raise_together
from ..distributed.world import world
from ..policies.lm_policy import LMPolicy
from .generation import FinalStep, run_episodes

Row = TypeVar("Row")
Result = TypeVar("Result")


def run_together(
    policy: LMPolicy,
    env: TextEnv,
    rows: Sequence[PromptLike],
    deterministic: bool = False,
    seed: int = 0,
    n_envs: int = 64,
    progress_bar: bool = False,
) -> list[FinalStep]:
    """Run episodes as `run_episodes` does, each process as many of them; all processes must call it.

    The texts are those of one process, since the draws of an episode follow from its number. The logits of a row may
    differ in their last bits with the number of rows beside it, and very seldom a token with them.

    Args:
        policy: The policy; if its weights are sharded, they must be gathered (`gathered`).
        env: The environment, the same in all processes.
        rows: The prompts, the same in all processes.
        deterministic: Whether to take the most probable token instead of sampling.
        seed: The seed of the sampling.
        n_envs: The largest number of episodes that a process runs side by side.
        progress_bar: Whether the process of the first rows shows its progress.

    Returns:
        The last step of every episode, in the order of the rows, in each process.

    Raises:
        Exception: What the env's hooks raise, in the process where they do; a `ProcessStopped` in the others.
    """
    here, sampling = world(), (deterministic, seed, n_envs)
    if here is None:
        return run_episodes(policy, env, rows, *sampling, progress_bar)

    def run(share: Sequence[PromptLike], start: int) -> list[FinalStep]:
        steps = run_episodes(policy, env, share, *sampling, progress_bar and start == 0, first=start)
        return [_with_prompt(step, None) for step in steps]

    dealer = PromptDealer(unwrap_text_env(env))
    dealer.give(rows)  # as `run_episodes` reads them: all processes have the prompts, whose rows may hold any object
    assert dealer.queue is not None, "just given"
    steps = run_shares(run, rows, -(-len(rows) // here.size))
    return [_with_prompt(step, prompt) for step, prompt in zip(steps, dealer.queue, strict=True)]


def _with_prompt(step: FinalStep, prompt: Prompt | None) -> FinalStep:
    return step._replace(info=step.info | {"prompt": prompt})


def run_shares(run: Callable[[Sequence[Row], int], list[Result]], rows: Sequence[Row], size: int) -> list[Result]:
    """Return the results of all rows, in their order, in each process; all processes must call it.

    Each share is run by one process, which runs it as it would alone: with a size that does not depend on the number of
    processes, the results do not either.

    Args:
        run: A function from the rows of a share, and the number of rows before it, to one result or more for each row.
        rows: The rows.
        size: The number of rows in a share. The processes take shares in turn.

    Raises:
        Exception: What `run` raises, in the process where it does; a `ProcessStopped` in the others.

    Example:
        >>> run_shares(lambda rows, start: [(start, row) for row in rows], "abc", size=2)
        [(0, 'a'), (0, 'b'), (2, 'c')]
    """
    here = world()
    rank, n_processes = (0, 1) if here is None else (here.rank, here.size)
    starts = range(0, len(rows), size)
    try:
        own = {start: run(rows[start : start + size], start) for start in starts[rank::n_processes]}
    except Exception as error:
        raise_together(error)  # the others, which wait below, stop with it
        raise
    found = {start: results for of_rank in gather("shares", own) for start, results in of_rank.items()}
    return [result for start in starts for result in found[start]]
