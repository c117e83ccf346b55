"""The states in a checkpoint that each of several processes has of its own, and what another number of them takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from torch import Tensor

from ..distributed.collectives import gather
from ..distributed.world import world
from ..policies.lm_policy import LMPolicy
from ..rollout.vec_env import TextVecEnv

# All else is the same in every process, and written once.
OWN_TENSORS = ("episodes", "waiting", "token_sets", "generators")
OWN_META = ("episodes", "env", "python_random", "numpy_random", "minibatches", "remembered")


def add_other_ranks(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Add the other processes' own states to those that a checkpoint keeps of this one, in place.

    All processes must call it. The tensors of rank r are named "rank<r>_<name>"; the rest is a list under "ranks".
    """
    own = {name: tensors[name] for name in OWN_TENSORS}, {name: meta[name] for name in OWN_META}
    for rank, (their_tensors, their_meta) in enumerate(gather("a checkpoint", own)[1:], start=1):
        tensors.update({f"rank{rank}_{name}": content for name, content in their_tensors.items()})
        meta.setdefault("ranks", []).append(their_meta)


def take_own_rank(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> bool:
    """Replace the states of rank 0 by those saved of this process's rank, in place.

    Returns:
        Whether there are as many processes as were saved; otherwise nothing is replaced.
    """
    here, others = world(), meta.get("ranks", [])
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    if size != 1 + len(others):
        return False
    if rank > 0:
        tensors.update({name: tensors[f"rank{rank}_{name}"] for name in OWN_TENSORS})
        meta.update(others[rank - 1])
    return True


def begin_behind(env: TextVecEnv, meta: Mapping[str, Any]) -> np.ndarray:
    """Begin new episodes behind the furthest prompt that any of the saved processes had drawn.

    A warning says which states are given up: those of running episodes, of episodes that wait, and of generators.

    Returns:
        The observations, (B, L).
    """
    here = world()
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    states = [meta["env"], *(other["env"] for other in meta.get("ranks", []))]
    has_order = "position" in states[0]["cursor"]
    chosen = max(states, key=_n_drawn) if has_order else states[rank % len(states)]
    dealer = env.lanes.dealer
    dealer.load_state_dict({**chosen, "dealt": {**chosen["dealt"], "left": 0}})
    # Fresh generators, which follow from the seed and from how far training was.
    seeds = np.random.SeedSequence([chosen["cursor"]["seed"], sum(state["n_steps"] for state in states), rank])
    cursor_seed, env_seed = (int(number) for number in seeds.generate_state(2))
    if not has_order:  # draws by priority, from a generator of each process's own
        dealer.cursor.rng = np.random.default_rng(cursor_seed)  # type: ignore[union-attr]
    env.env.np_random = seeding.np_random(env_seed)[0]
    env.lanes.n_steps = max(state["n_steps"] for state in states)
    if rank == 0:
        n_running = sum(len(state["prompts"]) for state in states)
        n_waiting = sum(len(state["waiting"]) for state in states)
        passed = f" {_n_passed_over(states)} prompts of the order are passed over." if has_order else ""
        warnings.warn(
            f"The checkpoint is of {len(states)} processes, and {size} go on with it. Given up are {n_running} running "
            f"episodes, {n_waiting} that waited for their group, and the states of random generators.{passed}",
            stacklevel=3,
        )
    return env.lanes.reset()


def reseed(policy: LMPolicy, states: Mapping[str, Tensor]) -> None:
    """Give each process a sampling generator of its own, seeded by the next number of the one saved for rank 0."""
    here = world()
    policy.predict_generator.set_state(states["predict"])
    policy.generator.set_state(states["policy"])
    seed = int(torch.randint(2**31, (), generator=policy.generator))
    # An even distance: `LMPolicy` seeds two generators of a process with neighbouring numbers.
    policy.generator.manual_seed(seed + 2 * (0 if here is None else here.rank))


def _n_drawn(state: Mapping[str, Any]) -> int:
    """Return the number of draws that the order of prompts of all processes had made when one of them was saved."""
    return state["cursor"]["epoch"] * state["n_prompts"] + state["cursor"]["position"]


def _n_passed_over(states: list[Mapping[str, Any]]) -> int:
    """Return how many draws before the furthest were never made: those of slower processes.

    Process r of W takes the draws r, r + W, r + 2 W, ... of one order.
    """
    furthest, size = max(map(_n_drawn, states)), len(states)
    return sum(
        len(range(_n_drawn(state) + (rank - _n_drawn(state)) % size, furthest, size))
        for rank, state in enumerate(states)
    )
