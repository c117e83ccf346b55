"""Claim 10: the time and the memory of an update with groups of samples, each prompt read once.

    python benchmarks/groups.py [--quick]

Both sides are `PPO.train()` on one rollout; in one of them every sequence is read whole, prompt included. A row without
groups shows what the search for equal prompts costs where there are none.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from memory import growth_of
from stable_baselines3 import PPO
from work import Row, Settings, Work, pairs, prepare, rollout, run_script

SHAPES = ((40, 32, 4, 8, 1.4), (64, 32, 8, 8, 1.9), (200, 50, 8, 4, 2.8))  # P, T, n, prompts a minibatch, target
MINIBATCHES = 2
LEARNING_RATE = 1e-12  # the same rollout is used again and again: the weights must not move, in 32 bits
MOST_ALONE = 1.02  # the target for the time without groups
MOST_MEMORY = 0.5  # the target for the growth of the peak
MOST_IN_CHECKPOINTS = 1.0  # the same with gradient checkpointing on both sides
TOLERANCE = 1e-4  # between the losses of the two sides


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    rows = [compare(settings, *shape) for shape in SHAPES]
    memory = [memory_row(settings, checkpointing) for checkpointing in (False, True)]
    return [*rows, compare(settings, 64, 32, 1, 32, MOST_ALONE), *memory]


def group_work(settings: Settings, n_prompt: int, n_new: int, n: int, n_prompts: int) -> Work:
    """Return the work of minibatches of `n_prompts` prompts with n samples each."""
    if settings.smoke:
        return settings.work(n_lanes=4, prompt_tokens=4)
    return settings.work(n_lanes=n * n_prompts * MINIBATCHES, prompt_tokens=n_prompt, new_tokens=n_new)


def agent(work: Work, n: int, checkpointing: bool = False) -> PPO:
    """Return PPO with a rollout of groups of n samples, to be trained for one epoch."""
    options = {"batch_size": work.n_lanes * work.new_tokens // MINIBATCHES, "n_epochs": 1}
    options["policy_kwargs"] = {"gradient_checkpointing": checkpointing}
    model = work.agent(samples_per_prompt=n, learning_rate=LEARNING_RATE, **options)
    rollout(model)
    return model


def compare(settings: Settings, n_prompt: int, n_new: int, n: int, n_prompts: int, target: float) -> Row:
    """Time the update with and without shared prompts."""
    work = group_work(settings, n_prompt, n_new, n, n_prompts)
    model = agent(work, min(n, work.n_lanes // 2))
    start, n_tokens = model.rollout_buffer.rng.bit_generator.state, work.n_lanes * work.new_tokens
    losses = {}

    def update(is_shared: bool) -> int:
        model.policy.lm.may_share_prompts = is_shared
        model.rollout_buffer.rng.bit_generator.state = start
        model.train()
        losses[is_shared] = model.logger.name_to_value["train/loss"]
        return n_tokens

    result = pairs(lambda: update(True), lambda: update(False), settings.n_pairs, settings.device)
    if abs(losses[True] - losses[False]) > TOLERANCE * max(1.0, abs(losses[False])):
        raise RuntimeError(f"Expected equal losses of the two sides, got {losses}: they do different work.")
    figures = [f"{1e6 / speed:,.1f} µs/token" for speed in (result.a, result.b)]
    shape = f"P{n_prompt} T{n_new} n{n}"
    if n > 1:
        claim = f"update with groups, {shape}, each prompt read once, against each sequence whole"
        return Row(claim, *figures, result.ratio, result.spread, f">= {target}x", result.ratio >= target)
    times = sorted(1 / ratio for ratio in result.ratios)
    time, spread = 1 / result.ratio, f"{times[0]:.2f}-{times[-1]:.2f}"
    claim = f"update without groups, {shape}, time against without the search for equal prompts"
    return Row(claim, *figures, time, spread, f"<= {target}x (less is better)", time <= target)


def memory_row(settings: Settings, checkpointing: bool) -> Row:
    """Measure the growth of the peak in an update, each side in a fresh process."""
    n_prompt, n_new, n, n_prompts, _ = SHAPES[-1]
    work = group_work(settings, n_prompt, n_new, n, n_prompts)
    # As in `memory.peak_row`, but for the tensors of a layer, too: blocks kept from the first update would hide them.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    growths = []
    for is_shared in (True, False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            job = pool.submit(peak_growth, work, min(n, work.n_lanes // 2), is_shared, checkpointing)
            growths.append(job.result())
    ratio, most = growths[0] / max(growths[1], 1), MOST_IN_CHECKPOINTS if checkpointing else MOST_MEMORY
    return Row(
        f"update with groups, P{n_prompt} T{n_new} n{n}{', gradient checkpointing' if checkpointing else ''}, "
        "growth of the peak, against each sequence whole",
        *(f"{growth / 1e6:,.0f} MB" for growth in growths),
        ratio,
        "-",
        f"<= {most}x (less is better)",
        ratio <= most,
    )


def peak_growth(work: Work, n: int, is_shared: bool, checkpointing: bool) -> int:
    """Return by how many bytes the second update raises the peak."""
    prepare()
    model = agent(work, n, checkpointing)
    model.policy.lm.may_share_prompts = is_shared
    model.train()  # the first update loads libraries and creates the optimizer's state
    return growth_of(model.train, work.device)


if __name__ == "__main__":
    run_script(__doc__, measure)
