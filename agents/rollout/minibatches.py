"""The division of a rollout's sequences among the minibatches of an epoch."""

from __future__ import annotations

import warnings

import numpy as np

from ..distributed.collectives import gather

MIN_SEQUENCES = 4  # with fewer sequences in a minibatch, training did not learn reliably
UNEVEN = 0.1  # the largest difference between a minibatch and their mean size, for which samples stay together
SPREAD = 0.3  # the relative noise on lengths: with it, two epochs hardly ever have a minibatch in common


def count_minibatches(n_transitions: int, batch_size: int | None, n_sequences: int, can_wait: bool = False) -> int:
    """Return the number of minibatches of an epoch.

    The number depends on sizes alone, so that it is the same in all processes of a job.

    Args:
        n_transitions: The number of transitions of the rollout: steps times lanes.
        batch_size: The mean number of transitions of a minibatch; None for one minibatch of all.
        n_sequences: The number of whole sequences.
        can_wait: Whether fewer sequences than minibatches are no mistake, since others wait for their group.

    Raises:
        ValueError: If `batch_size` does not divide the rollout, or there are fewer sequences than minibatches.
    """
    if batch_size is not None and n_transitions % batch_size != 0:
        raise ValueError(
            f"Expected `batch_size` to divide n_steps * n_envs = {n_transitions}, got {batch_size}: each epoch has the "
            "same number of minibatches of whole sequences."
        )
    n_minibatches = 1 if batch_size is None else n_transitions // batch_size
    if n_sequences < n_minibatches and not can_wait:
        raise ValueError(
            f"Expected at least one sequence for each of {n_minibatches} minibatches, got {n_sequences}: raise "
            "batch_size, or n_steps or n_envs (with complete_episodes, more steps finish more episodes)."
        )
    if 0 < n_sequences < MIN_SEQUENCES * n_minibatches:
        warnings.warn(
            f"{n_sequences} sequences in {n_minibatches} minibatches are fewer than {MIN_SEQUENCES} in each: "
            "advantages are mostly noise. Raise batch_size, and n_envs where the rollout is no larger.",
            stacklevel=3,
        )
    return n_minibatches


def even_groups(
    counts: np.ndarray, n_groups: int, rng: np.random.Generator, members: np.ndarray | None = None
) -> list[np.ndarray]:
    """Divide sequences into random groups of about equal numbers of transitions; return each group's indices.

    The samples of one prompt stay together, so that an update reads the prompt once, as long as each group is within
    `UNEVEN` of the mean size. Otherwise the samples of each prompt are divided at random into two parts, four parts,
    ..., and each part stays together; in the end, as without samples of one prompt, each sequence goes its own way.
    Which prompts, or parts, meet in a group is random in each epoch, and so is the order of the groups. With one prompt
    to a group, only the order is.

    The mean of an epoch's gradients does not depend on the division. A minibatch of few prompts has more noise from the
    choice of prompts than one of as many sequences of all prompts, and less from the comparison of samples: the
    advantages of a prompt's samples, which sum to 0, are in it together.

    Args:
        counts: The number of transitions of each sequence, (S,).
        n_groups: The number of groups.
        rng: The source of the randomness.
        members: The number of each sequence's prompt, (S,); None if no two are samples of one prompt.
    """
    if n_groups == 0:  # no group of samples is whole: there is nothing to divide, and no mean size
        return []
    every = np.arange(len(counts))
    if members is None:
        groups = _deal_units([every[i : i + 1] for i in every], counts, n_groups, rng)
        return [groups[i] for i in rng.permutation(n_groups)]
    of_prompts = [every[members == number] for number in np.unique(members)]
    n_samples = max((len(samples) for samples in of_prompts), default=0)
    n_parts = 1
    while True:
        units = [unit for samples in of_prompts for unit in np.array_split(rng.permutation(samples), n_parts)]
        units = [unit for unit in units if len(unit)]
        groups = _deal_units(units, counts, n_groups, rng)
        sizes = np.array([counts[group].sum() for group in groups])  # (n_groups,)
        is_even = bool((abs(sizes - sizes.mean()) <= UNEVEN * sizes.mean()).all())
        if n_parts >= n_samples or is_even:
            return [groups[i] for i in rng.permutation(n_groups)]
        n_parts *= 2


def _deal_units(
    units: list[np.ndarray], counts: np.ndarray, n_groups: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Divide units, each of the indices of some sequences, into groups of about equal numbers of transitions."""
    # The largest units first, each into the group with the fewest transitions so far, fill the groups evenly.
    sizes = np.array([counts[unit].sum() for unit in units])
    keys = sizes * rng.uniform(1 - SPREAD, 1 + SPREAD, size=len(units))
    groups: list[list[np.ndarray]] = [[] for _ in range(n_groups)]
    loads = np.zeros(n_groups)
    for i in np.argsort(-keys):
        lightest = int(loads.argmin())
        groups[lightest].append(units[i])
        loads[lightest] += sizes[i]
    return [np.concatenate([np.zeros(0, dtype=np.int64), *group]) for group in groups]


def deal(
    counts: np.ndarray,
    n_dropped: int,
    n_transitions: int,
    batch_size: int | None,
    rng: np.random.Generator,
    can_wait: bool = False,
    members: np.ndarray | None = None,
) -> list[tuple[np.ndarray, float | None]]:
    """Divide the sequences of a rollout among the minibatches of an epoch, the same number of them in each process.

    Args:
        counts: The number of transitions of each sequence of this process, (S,).
        n_dropped: The number of sequences that were left out.
        n_transitions: The number of transitions of this process's rollout: steps times lanes.
        batch_size: The mean number of transitions of a minibatch of all processes; None for one minibatch of all.
        rng: The source of the randomness.
        can_wait: Whether there may be fewer sequences than minibatches, or none, since others wait for their group.
        members: As in `even_groups`.

    Returns:
        For each minibatch the indices of its sequences and, with several processes, the weight of its losses in this
        process (see `SharedGradient`). A process without a sequence for a minibatch gets sequence 0 with weight 0,
        since each process must take part in each backward pass. There are no minibatches if no process has a sequence.

    Raises:
        ValueError: As `count_minibatches`; in all processes, if one of them has no sequence at all and cannot wait.
    """
    sizes = gather("minibatches", (len(counts), n_dropped))
    n_sequences = sum(size[0] for size in sizes)
    n_ended = n_sequences + sum(size[1] for size in sizes)
    n = count_minibatches(n_transitions * len(sizes), batch_size, n_ended, can_wait)
    n = min(n, n_sequences)  # dropped episodes can leave fewer sequences than minibatches
    if len(sizes) == 1:
        return [(group, None) for group in even_groups(counts, n, rng, members)]
    idle = [rank for rank, size in enumerate(sizes) if size[0] == 0]
    if idle and not can_wait:
        raise ValueError(
            f"Expected a sequence to train on in each of {len(sizes)} processes, got none in rank {idle}: raise n_envs "
            "or n_steps, or start fewer processes."
        )
    groups = even_groups(counts, n, rng, members)
    trained = np.array([int(counts[group].sum()) if len(group) else 0 for group in groups])  # (n,)
    total = np.sum(gather("the weights of minibatches", trained), axis=0)  # (n,), over processes
    shares = trained * len(sizes) / np.maximum(total, 1)  # (n,)
    return [(group if len(group) else np.array([0]), float(share)) for group, share in zip(groups, shares, strict=True)]
