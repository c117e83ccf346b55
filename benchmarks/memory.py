"""Claim 7: bytes per token in the rollout buffer, and the rise of peak memory in an update.

    python benchmarks/memory.py [--smoke]

The buffer is fed made-up observations of 4,096 columns over 151,936 tokens; all arrays it holds are counted, each
once. The update runs in a process of its own, with a model that is nearly all head. On a CPU its peak is the kernel's
(Linux), on CUDA the allocator's. Nothing here is timed, so one run gives the figure.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from work import Row, Settings, Work, prepare, rollout, run_script

from agents import SequenceRolloutBuffer
from textenv.episodes.rules import PADDING, SEPARATOR

VOCABULARY, COLUMNS, PROMPT_TOKENS = 151_936, 4096, 64
SHAPES = ((4031, 8), (128, 64))  # steps and lanes: completions that fill the columns, and a short rollout
MOST_BYTES = 64  # per token
MOST_GROWTH = 0.25  # of a float32 [tokens, V] tensor


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    shapes = ((60, 4), (30, 8)) if settings.smoke else SHAPES
    columns = 128 if settings.smoke else COLUMNS
    rows = [row for n_steps, n_lanes in shapes for row in buffer_rows(n_steps, n_lanes, columns, settings.device)]
    return [*rows, peak_row(settings)]


def buffer_rows(n_steps: int, n_lanes: int, columns: int, device: str) -> list[Row]:
    """Count bytes after the last step of a rollout, and while a minibatch is in use."""
    buffer = SequenceRolloutBuffer(
        n_steps,
        spaces.Box(SEPARATOR, VOCABULARY - 1, (columns,), np.int64),
        spaces.Discrete(VOCABULARY),
        device,
        n_envs=n_lanes,
        normalize_advantage=True,
    )
    buffer.reset()
    feed(buffer, columns, torch.device(device))
    n_tokens = n_steps * n_lanes
    counts = {"collecting": n_bytes([vars(buffer)])}
    buffer.compute_returns_and_advantage(torch.zeros(n_lanes, device=device), np.zeros(n_lanes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few sequences per minibatch
        counts["update"] = max(n_bytes([vars(buffer), vars(s.observations), s]) for s in buffer.get(n_tokens // 4))
    return [
        Row(
            f"buffer, {n_steps:,} steps of {n_lanes} lanes, L={columns:,}, {phase}",
            f"{count / n_tokens:.1f} bytes/token",
            f"{MOST_BYTES} bytes/token",
            count / n_tokens / MOST_BYTES,
            "-",
            "<= 1.00 (less is better)",
            count / n_tokens <= MOST_BYTES,
        )
        for phase, count in counts.items()
    ]


def feed(buffer: SequenceRolloutBuffer, columns: int, device: torch.device) -> None:
    """Fill the buffer as SB3 does, with ragged completions: observations are fresh arrays in each step."""
    rng = np.random.default_rng(0)
    n_prompt = min(PROMPT_TOKENS, columns // 4)
    longest = min(buffer.buffer_size, columns - n_prompt - 1)
    observations = np.full((buffer.n_envs, columns), PADDING, dtype=np.int64)
    ends, lengths = np.zeros(buffer.n_envs, dtype=int), np.zeros(buffer.n_envs, dtype=int)
    for _ in range(buffer.buffer_size):
        starts = lengths == ends
        for lane in np.flatnonzero(starts):
            observations[lane] = PADDING
            observations[lane, :n_prompt] = rng.integers(0, VOCABULARY, n_prompt)
            observations[lane, n_prompt] = SEPARATOR
            lengths[lane], ends[lane] = 0, rng.integers(longest // 2, longest) + 1
        actions = rng.integers(0, VOCABULARY, buffer.n_envs)
        numbers = torch.zeros(buffer.n_envs, device=device)
        buffer.add(observations.copy(), actions[:, None], numbers.cpu().numpy(), starts, numbers[:, None], numbers + 0)
        observations[np.arange(buffer.n_envs), n_prompt + 1 + lengths] = actions
        lengths += 1


def n_bytes(things: Iterable[Any]) -> int:
    """Return the bytes of all arrays and tensors in nested containers; what shares memory is counted once."""
    blocks: dict[int, int] = {}

    def visit(thing: Any) -> None:
        if isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            blocks[thing.ctypes.data] = max(thing.nbytes, blocks.get(thing.ctypes.data, 0))
        elif isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            blocks[storage.data_ptr()] = max(storage.nbytes(), blocks.get(storage.data_ptr(), 0))
        elif isinstance(thing, (dict, list, tuple)):
            for item in thing.values() if isinstance(thing, dict) else thing:
                visit(item)

    visit(list(things))
    return sum(blocks.values())


def peak_row(settings: Settings) -> Row:
    """Measure an update of one minibatch in a fresh process."""
    work = settings.work(n_layer=1, width=32, n_head=2, vocab_size=VOCABULARY, n_lanes=64, new_tokens=64)
    # Makes glibc return freed blocks at once. Otherwise blocks that it keeps would count, in some runs only.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 23)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        growth = pool.submit(peak_growth, work).result()
    n_tokens = work.n_lanes * work.new_tokens
    tensor = 4 * n_tokens * work.vocab_size
    return Row(
        f"update, growth of the peak, V={work.vocab_size:,}, {n_tokens:,} tokens a minibatch",
        f"{growth / 1e9:.2f} GB",
        f"{tensor / 1e9:.2f} GB (one float32 [tokens, V])",
        growth / tensor,
        "-",
        f"<= {MOST_GROWTH} (less is better)",
        growth / tensor <= MOST_GROWTH,
    )


def peak_growth(work: Work) -> int:
    """Return by how many bytes the second update raises the peak over what is resident before it."""
    prepare()
    model = work.agent(n_epochs=1, batch_size=work.n_lanes * work.new_tokens)
    rollout(model)
    model.train()  # the first update loads libraries and creates the optimizer's state
    return growth_of(model.train, work.device)


def growth_of(work: Callable[[], None], device: str) -> int:
    """Return by how many bytes some work raises the peak over what is resident before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Resets this process's peak (VmHWM). `ru_maxrss` would not do: it starts at the peak of the parent process.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Return a size in /proc/self/status, such as VmRSS, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    run_script(__doc__, measure)
