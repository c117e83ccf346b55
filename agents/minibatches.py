"""How sequences are dealt to the minibatches of an epoch."""

from __future__ import annotations

import warnings

import numpy as np

from .distributed import gather

MIN_SEQUENCES = 4  # a minibatch of fewer does not learn reliably


def count_minibatches(n_transitions: int, batch_size: int | None, n_sequences: int) -> int:
    """Return the number of minibatches of an epoch, which depends on sizes alone.

    Args:
        n_transitions: Of the rollout: steps times lanes.
        batch_size: Transitions of a minibatch, on average; None for one minibatch of all.
        n_sequences: How many whole sequences there are to deal.

    Raises:
        ValueError: If `batch_size` does not divide the rollout, or there are fewer sequences than minibatches.
    """
    if batch_size is not None and n_transitions % batch_size != 0:
        raise ValueError(
            f"Expected `batch_size` to divide n_steps * n_envs = {n_transitions}, got {batch_size}: each epoch has the "
            "same number of minibatches of whole sequences."
        )
    n_minibatches = 1 if batch_size is None else n_transitions // batch_size
    if n_sequences < n_minibatches:
        raise ValueError(
            f"Expected at least one sequence for each of {n_minibatches} minibatches, got {n_sequences}: raise "
            "batch_size, or n_steps or n_envs (with complete_episodes, more steps finish more episodes)."
        )
    if n_sequences < MIN_SEQUENCES * n_minibatches:
        warnings.warn(
            f"{n_sequences} sequences in {n_minibatches} minibatches are fewer than {MIN_SEQUENCES} in each: "
            "advantages can hardly be told from noise. Raise batch_size, and n_envs where the rollout is no larger.",
            stacklevel=3,
        )
    return n_minibatches


def even_groups(counts: np.ndarray, n_groups: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal sequences to groups at random, about even in transitions; return the places of each group's.

    Args:
        counts: Transitions of each sequence, (S,).
        n_groups: How many groups.
        rng: Where the randomness comes from.
    """
    # Longest first fills evenly; the noise makes each epoch's groups new.
    keys = counts * rng.uniform(0.7, 1.3, size=len(counts))
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    loads = np.zeros(n_groups)
    for sequence in np.argsort(-keys):
        lightest = int(loads.argmin())
        groups[lightest].append(int(sequence))
        loads[lightest] += counts[sequence]
    return [np.array(groups[i]) for i in rng.permutation(n_groups)]


def deal(
    counts: np.ndarray, n_dropped: int, n_transitions: int, batch_size: int | None, rng: np.random.Generator
) -> list[tuple[np.ndarray, float | None]]:
    """Deal the sequences of a rollout to the minibatches of an epoch: as many in each of several processes.

    Args:
        counts: Transitions of each sequence of this process, (S,).
        n_dropped: Sequences that were left out.
        n_transitions: Of the rollout: steps times lanes of this process.
        batch_size: Transitions of a minibatch, of all processes, on average; None for one minibatch of all.
        rng: Where the randomness comes from.

    Returns:
        The places of each minibatch's sequences and, with several processes, the weight of its losses here (see
        `SharedGradient`). With a weight of 0 a sequence stands in for none.

    Raises:
        ValueError: As `count_minibatches`; in all processes, also where only one of them has no sequence.
    """
    sizes = gather("minibatches", (len(counts), n_dropped))
    n_sequences = sum(size[0] for size in sizes)
    n = count_minibatches(n_transitions * len(sizes), batch_size, n_sequences + sum(size[1] for size in sizes))
    n = min(n, n_sequences)  # fewer, where episodes were dropped
    if len(sizes) == 1:
        return [(group, None) for group in even_groups(counts, n, rng)]
    idle = [rank for rank, size in enumerate(sizes) if size[0] == 0]
    if idle:
        raise ValueError(
            f"Expected a sequence to train on in each of {len(sizes)} processes, got none in rank {idle}: raise n_envs "
            "or n_steps, or start fewer processes."
        )
    groups = even_groups(counts, n, rng)
    trained = np.array([int(counts[group].sum()) if len(group) else 0 for group in groups])
    total = np.sum(gather("the weights of minibatches", trained), axis=0)
    shares = trained * len(sizes) / np.maximum(total, 1)
    return [(group if len(group) else np.array([0]), float(share)) for group, share in zip(groups, shares, strict=True)]
