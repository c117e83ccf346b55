"""What each of several processes has of its own in a checkpoint, and how another number of them goes on without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from torch import Tensor

from .distributed import gather
from .policies import LMPolicy
from .vec_env import TextVecEnv
from .world import world

OWN_TENSORS = ("episodes", "waiting", "token_sets", "generators")
OWN_META = ("episodes", "env", "python_random", "numpy_random", "minibatches", "remembered")


def add_other_ranks(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Put beside what a checkpoint keeps of this process what it keeps of the others, in place; all must call it."""
    own = {name: tensors[name] for name in OWN_TENSORS}, {name: meta[name] for name in OWN_META}
    for rank, (their_tensors, their_meta) in enumerate(gather("a checkpoint", own)[1:], start=1):
        tensors.update({f"rank{rank}_{name}": content for name, content in their_tensors.items()})
        meta.setdefault("ranks", []).append(their_meta)


def choose_own(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> bool:
    """Put what was kept of this process in the place of rank 0's; False where there were as many processes not."""
    here, others = world(), meta.get("ranks", [])
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    if size != 1 + len(others):
        return False
    if rank > 0:
        tensors.update({name: tensors[f"rank{rank}_{name}"] for name in OWN_TENSORS})
        meta.update(others[rank - 1])
    return True


def go_on_elsewhere(env: TextVecEnv, meta: Mapping[str, Any]) -> np.ndarray:
    """Begin new episodes behind the furthest prompt that any of the saved processes had drawn; say what is given up.

    Returns:
        The observations, (B, L).
    """
    here = world()
    rank, size = (0, 1) if here is None else (here.rank, here.size)
    states = [meta["env"], *(one["env"] for one in meta.get("ranks", []))]
    has_order = "position" in states[0]["cursor"]
    chosen = max(states, key=_place) if has_order else states[rank % len(states)]
    dealer = env.lanes.dealer
    dealer.load_state_dict({**chosen, "dealt": {**chosen["dealt"], "left": 0}})
    seeds = np.random.SeedSequence([chosen["cursor"]["seed"], sum(one["n_steps"] for one in states), rank])
    drawn, hooks = (int(one) for one in seeds.generate_state(2))
    if not has_order:  # draws by priority, from a generator of each process's own
        dealer.cursor.rng = np.random.default_rng(drawn)  # type: ignore[union-attr]
    env.env.np_random = seeding.np_random(hooks)[0]
    env.lanes.n_steps = max(one["n_steps"] for one in states)
    if rank == 0:
        n_running = sum(len(one["prompts"]) for one in states)
        n_waiting = sum(len(one["waiting"]) for one in states)
        passed = f" {_passed_over(states)} prompts of the order are passed over." if has_order else ""
        warnings.warn(
            f"The checkpoint is of {len(states)} processes, and {size} go on with it. Given up are {n_running} running "
            f"episodes, {n_waiting} that waited for their group, and the states of random generators.{passed}",
            stacklevel=3,
        )
    return env.lanes.reset()


def reseed(policy: LMPolicy, states: Mapping[str, Tensor]) -> None:
    """Have each process sample from what follows of rank 0's generator, and on its own."""
    here = world()
    policy.predict_generator.set_state(states["predict"])
    policy.generator.set_state(states["policy"])
    seed = int(torch.randint(2**31, (), generator=policy.generator))
    policy.generator.manual_seed(seed + 2 * (0 if here is None else here.rank))


def _place(state: Mapping[str, Any]) -> int:
    """Return how many draws of the order of all processes lie behind one of them."""
    return state["cursor"]["epoch"] * state["n_prompts"] + state["cursor"]["position"]


def _passed_over(states: list[Mapping[str, Any]]) -> int:
    """Return how many draws before the furthest nobody has taken: those of processes that were slower."""
    furthest, size = max(map(_place, states)), len(states)
    return sum(len(range(_place(one) + (rank - _place(one)) % size, furthest, size)) for rank, one in enumerate(states))
