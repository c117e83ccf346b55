"""The states in a checkpoint that differ between processes, also for loading with another number of processes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from torch import Tensor

from ..distributed.collectives import gather
from ..distributed.world import is_main_process, world
from ..policies.lm_policy import LMPolicy
from ..rollout.vec_env import TextVecEnv

# The states that each process has of its own. All other states are the same in every process, and are written once.
OWN_TENSORS = ("episodes", "waiting", "token_sets", "generators")
TABLE = "prompts"  # of the state of a `PriorityCursor`
OWN_META = ("episodes", "env", "python_random", "numpy_random", "minibatches", "remembered")


def add_other_ranks(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Add the states of the other processes to those of rank 0, in place; all processes must call it.

    The tensors of rank r get the names "rank<r>_<name>"; its other states become an entry of the list "ranks". The
    table of prompts drawn by priority is the same in all processes, and is written with rank 0 alone.
    """
    if not is_main_process():
        cursor = {name: part for name, part in meta["env"]["cursor"].items() if name != TABLE}
        meta["env"] = {**meta["env"], "cursor": cursor}
    own = {name: tensors[name] for name in OWN_TENSORS}, {name: meta[name] for name in OWN_META}
    for rank, (their_tensors, their_meta) in enumerate(gather("a checkpoint", own)[1:], start=1):
        tensors.update({f"rank{rank}_{name}": content for name, content in their_tensors.items()})
        meta.setdefault("ranks", []).append(their_meta)


def take_own_rank(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> bool:
    """Replace the states of rank 0 with those that were saved for this process's rank, in place.

    Returns:
        Whether there are as many processes as when the checkpoint was saved; if not, nothing is replaced.
    """
    here, others = world(), meta.get("ranks", [])
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    if size != 1 + len(others):
        return False
    if rank > 0:
        tensors.update({name: tensors[f"rank{rank}_{name}"] for name in OWN_TENSORS})
        whole = meta["env"]["cursor"]
        meta.update(others[rank - 1])
        if TABLE in whole:
            meta["env"]["cursor"][TABLE] = whole[TABLE]
    return True


def begin_after_furthest(env: TextVecEnv, meta: Mapping[str, Any]) -> np.ndarray:
    """Begin new episodes after the furthest prompt that any of the saved processes had drawn.

    A warning counts what is lost: running episodes, episodes that waited for their group, and generators' states.

    Returns:
        The observations, (B, L).
    """
    here = world()
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    states = [meta["env"], *(other["env"] for other in meta.get("ranks", []))]
    # Prompts drawn by priority have no order, and so no position: all processes have agreed on the next draws.
    has_order = "position" in states[0]["cursor"]
    chosen = max(states, key=_n_drawn) if has_order else states[0]
    dealer = env.lanes.dealer
    dealer.load_state_dict({**chosen, "dealt": {**chosen["dealt"], "left": 0}})
    # Fresh generators, seeded by the run's seed and its progress, so that loading twice gives the same.
    seeds = np.random.SeedSequence([chosen["cursor"]["seed"], sum(state["n_steps"] for state in states), rank])
    env.env.np_random = seeding.np_random(int(seeds.generate_state(1)[0]))[0]
    env.lanes.n_steps = max(state["n_steps"] for state in states)
    if rank == 0:
        n_running = sum(len(state["prompts"]) for state in states)
        n_waiting = sum(len(state["waiting"]) for state in states)
        passed = f" {_n_passed_over(states)} prompts of the order are passed over." if has_order else ""
        warnings.warn(
            f"The checkpoint was written by {len(states)} processes and is loaded by {size}: {n_running} running "
            f"episodes, {n_waiting} that waited for their group, and the states of random generators are lost.{passed}",
            stacklevel=3,
        )
    return env.lanes.reset()


def reseed(policy: LMPolicy, states: Mapping[str, Tensor]) -> None:
    """Give each process its own sampling generator, seeded by the next number of the generator saved for rank 0."""
    here = world()
    policy.predict_generator.set_state(states["predict"])
    policy.generator.set_state(states["policy"])
    seed = int(torch.randint(2**31, (), generator=policy.generator))
    # Seeds two apart: `LMPolicy` gives the two generators of a process neighbouring seeds.
    policy.generator.manual_seed(seed + 2 * (0 if here is None else here.rank))


def _n_drawn(state: Mapping[str, Any]) -> int:
    """Return how far a process was in the order of prompts that all processes share, counted in draws."""
    return state["cursor"]["epoch"] * state["n_prompts"] + state["cursor"]["position"]


def _n_passed_over(states: list[Mapping[str, Any]]) -> int:
    """Return the number of draws before the furthest one that slower processes had not made yet.

    Process r of W makes the draws r, r + W, r + 2 W, ... of the shared order.
    """
    furthest, size = max(map(_n_drawn, states)), len(states)
    return sum(
        len(range(_n_drawn(state) + (rank - _n_drawn(state)) % size, furthest, size))
        for rank, state in enumerate(states)
    )
