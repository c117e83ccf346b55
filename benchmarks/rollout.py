"""Claims 1 and 2: tokens per second of a rollout, log-probabilities and values included, against `generate`.

    python benchmarks/rollout.py [--quick] [--model FOLDER]

Both sides have the same model, prompts of 16 tokens and 64 rows. `generate` samples what we sample (no top-k), writes
completions only, and reads each batch to its longest row. The rows of groups compare rollouts that read a prompt once
for all its samples with rollouts that read it for each. The rows of a real model, of the folder that `--model` names,
have 32 rows and prompts of 41 tokens; their `generate` has the folder's own weights, without adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from stable_baselines3 import PPO
from work import RANK, Pairs, Row, Settings, Work, pairs, rollout, run_script

from agents import LoRA
from agents.models.prefix_cache import PrefixCache

LIMITS = (8, 128)  # tokens of a ragged completion, uniform
CAP, MEAN = 128, 30  # of completions ended by EOS: the most tokens, and about the mean
Peer: TypeAlias = Callable[[PPO, Work, list[int]], Callable[[int], int]]


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    limited = ragged_limits(settings, settings.work(new_tokens=LIMITS[1]), "", 2.0)
    ours = [equal(settings, generate, 1.25), *limited, ragged_eos(settings, generate, 2.0)]
    return [*ours, *groups(settings), alone(settings), *real_model(settings)]


def equal(settings: Settings, peer: Peer, must: float | None) -> Row:
    """Compare rollouts whose completions all have as many tokens."""
    work = settings.work()
    return equal_row("equal lengths", settings, work, work.agent(), peer, must)


def equal_row(claim: str, settings: Settings, work: Work, model: PPO, peer: Peer, must: float | None) -> Row:
    """Compare rollouts of a model with a peer that writes as many tokens."""
    run = peer(model, work, [])
    result = pairs(lambda: rollout(model), lambda: run(work.new_tokens), settings.n_pairs, settings.device)
    return row(f"rollout, {claim}, against {peer.__name__}", result, must)


def ragged_limits(settings: Settings, work: Work, name: str, must: float, **kwargs: Any) -> list[Row]:
    """Compare rollouts in which each row has its own limit, lanes are refilled, and episodes straddle rollouts.

    There are two rows: the steady state, as inside a long rollout, and rollouts of 256 steps that begin, as after an
    update, by reading the unfinished episodes anew.
    """
    low, high = LIMITS if not settings.smoke else (2, 8)
    limits = np.random.default_rng(1).integers(low, high + 1, 4096)
    rows = [{"prompt": p, "max_new_tokens": int(n)} for p, n in zip(work.prompts(), limits, strict=True)]
    model = work.agent(rows, n_steps=2 * work.new_tokens, **kwargs)
    peer = generate(model, work, [])
    batches = iter(np.resize(limits, (10_000, work.n_lanes)))

    def one_batch() -> int:
        lengths = next(batches)
        peer(int(lengths.max()))
        return int(lengths.sum())

    rollout(model)  # until lanes end at different steps
    claim = f"rollout, {name}limits of {low} to {high} tokens"
    steady = pairs(lambda: rollout(model, keep_cache=True), one_batch, settings.n_pairs, settings.device)
    anew = pairs(lambda: rollout(model), one_batch, settings.n_pairs, settings.device)
    return [
        row(f"{claim}, steady state, against generate", steady, must),
        row(f"{claim}, after an update every 256 steps, against generate", anew, must),
    ]


def ragged_eos(settings: Settings, peer: Peer, must: float | None) -> Row:
    """Compare rollouts that end at each token with probability 1/30: of 30 equally likely tokens, one is a stop id."""
    work = settings.work(new_tokens=CAP)
    stop_ids = list(range(1, max(2, work.vocab_size // MEAN)))
    model = work.agent(stop_ids=stop_ids, n_steps=2 * work.new_tokens)
    run = peer(model, work, stop_ids)
    rollout(model)
    result = pairs(lambda: rollout(model), lambda: run(work.new_tokens), settings.n_pairs, settings.device)
    return row(f"rollout, ended by EOS (mean {MEAN}, cap {work.new_tokens}), against {peer.__name__}", result, must)


def groups(settings: Settings) -> list[Row]:
    """Compare rollouts of groups of 8 samples whose prompts of 200 tokens are read once, or once a sample."""
    n = 8 if not settings.smoke else 2
    work = settings.work(prompt_tokens=200, new_tokens=50)
    model = work.agent(samples_per_prompt=n, rollout_buffer_kwargs={"advantage": "grpo"})
    cache = model.policy.lm.rollout_cache
    read: dict[bool, int] = {}

    def collect(is_sharing: bool) -> int:
        PrefixCache.is_sharing = is_sharing
        before = cache.prefill_tokens
        n_tokens = rollout(model)
        read[is_sharing] = cache.prefill_tokens - before
        return n_tokens

    result = pairs(lambda: collect(True), lambda: collect(False), settings.n_pairs, settings.device)
    PrefixCache.is_sharing = True
    claim = f"rollout, groups of {n} samples, prompts of {work.prompt_tokens}, against each sample's prompt read"
    share = read[True] / read[False]
    tokens = (f"{read[True]:,} tokens", f"{read[False]:,} tokens", share, "-", f"<= {1 / n:.3f}", share <= 1 / n)
    return [row(claim, result, must=1.5), Row(f"{claim}, tokens of prompts read", *tokens)]


def alone(settings: Settings) -> Row:
    """Compare rollouts whose prompts all differ, with and without the search for prompts that were read."""
    model = settings.work(prompt_tokens=64, new_tokens=32).agent()

    def collect(is_sharing: bool) -> int:
        PrefixCache.is_sharing = is_sharing
        return rollout(model)

    result = pairs(lambda: collect(True), lambda: collect(False), settings.n_pairs, settings.device)
    PrefixCache.is_sharing = True
    return row("rollout, all prompts different, against no sharing", result, must=0.98)


def real_model(settings: Settings) -> list[Row]:
    """Compare rollouts of a real model, trained as a whole and by LoRA, and of LoRA with adapters that stay apart."""
    claim = "rollout, a real model"
    if settings.model is None:
        return [Row.missing(claim, "not measured without --model FOLDER", ">= 1.0x")]
    if find_spec("peft") is None:
        return [Row.missing(claim, 'pip install "textenv[lora]"', ">= 1.0x")]
    name = Path(settings.model).resolve().name
    rows = []
    for train, trained in (("all", "no LoRA"), (LoRA(r=RANK), f"LoRA r{RANK}")):
        options = {"learning_rate": 1e-7, "policy_kwargs": {"train": train}}
        work = settings.real_work()
        model = work.agent(**options)
        shape = f"{work.n_lanes} lanes, prompts of {work.prompt_tokens}"
        lengths = f"equal lengths of {work.new_tokens}"
        rows.append(equal_row(f"{name}, {shape}, {trained}, {lengths}", settings, work, model, generate, 1.0))
        if isinstance(train, LoRA):
            rows.append(apart(f"rollout, {name}, {shape}, {trained}, {lengths}", settings, model))
        limited = settings.real_work(new_tokens=LIMITS[1])
        rows += ragged_limits(settings, limited, f"{name}, {shape}, {trained}, ", 1.8, **options)
    return rows


def apart(claim: str, settings: Settings, model: PPO) -> Row:
    """Compare rollouts that merge adapters with rollouts that never do."""
    cache = model.policy.lm.rollout_cache
    pays_from = cache._tokens_to_merge

    def collect(tokens_to_merge: float) -> int:
        cache._tokens_to_merge = tokens_to_merge
        return rollout(model)

    result = pairs(lambda: collect(pays_from), lambda: collect(math.inf), settings.n_pairs, settings.device)
    cache._tokens_to_merge = pays_from
    return row(f"{claim}, adapters merged, against apart", result, must=None)


def row(claim: str, result: Pairs, must: float | None) -> Row:
    """Return the row of the table for two speeds."""
    ours, theirs = f"{result.a:,.0f} tokens/s", f"{result.b:,.0f} tokens/s"
    target, met = ("-", None) if must is None else (f">= {must}x", result.ratio >= must)
    return Row(claim, ours, theirs, result.ratio, result.spread, target, met, result.peaks)


def generate(model: PPO, work: Work, stop_ids: list[int]) -> Callable[[int], int]:
    """Return a function that continues a new batch of prompts with `generate`, and counts the tokens."""
    lm = work.plain_model(model)
    lm.generation_config.eos_token_id = stop_ids or None  # None: every row runs to the limit
    rng = np.random.default_rng(2)

    def run(new_tokens: int) -> int:
        ids = torch.as_tensor(rng.integers(1, work.vocab_size, (work.n_lanes, work.prompt_tokens)), device=work.device)
        with torch.no_grad():
            output = lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        since = output[:, work.prompt_tokens :]
        if not stop_ids:
            return since.numel()
        ends = torch.isin(since, torch.tensor(stop_ids, device=since.device))
        lengths = torch.where(ends.any(dim=1), ends.long().argmax(dim=1) + 1, since.shape[1])
        return int(lengths.sum())

    return run


if __name__ == "__main__":
    run_script(__doc__, measure)
