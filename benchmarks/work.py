"""The shared work of all benchmarks (model, prompts, lengths, seeds), and paired timing of two sides."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agents import make_agent
from textenv import TextEnv, Tokenizer, TokenMask
from textenv.episodes.scores import ScoreAt
from textenv.rewards.base import RewardLike

RANK = 8  # of adapters
REAL: dict[str, Any] = {"n_lanes": 32, "prompt_tokens": 41, "new_tokens": 32}  # rows of a real model


@dataclass(frozen=True)
class Work:
    """The shape of a model, and of the texts it writes. The defaults are the small model of all CPU rows."""

    n_layer: int = 4
    width: int = 256
    n_head: int = 4
    vocab_size: int = 5000
    n_lanes: int = 64
    prompt_tokens: int = 16
    new_tokens: int = 48
    device: str = "cpu"

    def config(self) -> GPT2Config:
        """Return a GPT-2 without dropout; its logits at random weights are nearly uniform."""
        return GPT2Config(
            n_layer=self.n_layer,
            n_embd=self.width,
            n_head=self.n_head,
            vocab_size=self.vocab_size,
            n_positions=max(256, self.prompt_tokens + self.new_tokens),
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )

    def prompts(self, n: int = 4096, seed: int = 0) -> list[list[int]]:
        """Return n prompts of random token ids (without 0, the end token)."""
        return np.random.default_rng(seed).integers(1, self.vocab_size, (n, self.prompt_tokens)).tolist()

    def agent(
        self,
        rows: Sequence[Any] | None = None,
        stop_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        mask: TokenMask | None = None,
        reward: RewardLike | None = None,
        score_at: ScoreAt = "done",
        samples_per_prompt: int = 1,
        **kwargs: Any,
    ) -> PPO:
        """Return PPO as `make_agent` builds it, on an env of this work."""
        env = TextEnv(
            self.prompts() if rows is None else rows,
            IdTokenizer(self.vocab_size) if tokenizer is None else tokenizer,
            reward=reward or score,
            score_at=score_at,
            max_new_tokens=self.new_tokens,
            stop_ids=stop_ids,
            mask=mask,
            samples_per_prompt=samples_per_prompt,
        )
        settings = {"n_envs": self.n_lanes, "seed": 0, "device": self.device, **kwargs}
        return make_agent(env, self.config(), **settings)

    def plain_model(self, model: PPO) -> PreTrainedModel:
        """Return the language model that peers generate with: the agent's own."""
        return model.policy.lm.backbone.model


@dataclass(frozen=True)
class FolderWork(Work):
    """Work on the model of a folder."""

    folder: str = ""

    def config(self) -> Any:
        """Return the folder, from which `make_agent` loads the model."""
        return self.folder

    def plain_model(self, model: PPO) -> PreTrainedModel:
        """Return the folder's own model, which has no adapters."""
        return AutoModelForCausalLM.from_pretrained(self.folder).to(self.device)


class IdTokenizer:
    """A tokenizer that writes ids as decimal numbers: prompts are given as ids, and texts are hardly used."""

    eos_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def score(prompt: Any, preds: Any, done: bool) -> float:
    """Return the share of even tokens: a reward that takes almost no time."""
    return float(np.mean(preds.ids % 2 == 0))


def rollout(model: PPO, keep_cache: bool = False) -> int:
    """Collect one rollout as SB3's `OnPolicyAlgorithm.learn` does; return its number of tokens.

    An update drops the cached keys and values, so that a rollout begins by reading unfinished episodes anew.
    `keep_cache` keeps them, which is the steady state inside a long rollout.
    """
    if model._last_obs is None:
        model._setup_learn(1)
    callback = CallbackList([])
    callback.init_callback(model)
    if not keep_cache:
        model.policy.set_training_mode(True)  # as `PPO.train` does, which drops the cache
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.n_steps * model.n_envs


class Row(NamedTuple):
    """One line of the table."""

    claim: str
    ours: str
    theirs: str
    ratio: float | None
    spread: str
    target: str
    met: bool | None
    peaks: tuple[float, float] | None = None  # GB by which each side raised the peak of CUDA's memory

    @classmethod
    def missing(cls, claim: str, why: str, target: str) -> Row:
        """Return the row for a peer that is not installed, with the way to install it."""
        return cls(claim, "-", why, None, "-", target, None)


class Pairs(NamedTuple):
    """The result of alternating A and B: work per second of each, and the ratios A / B, pair by pair."""

    a: float
    b: float
    ratios: list[float]
    peaks: tuple[float, float] | None = None  # the largest of each, in GB; None on a CPU

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        return f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"


class Timing(NamedTuple):
    """The cost of one run."""

    seconds: float  # of process-CPU time on a CPU, between two events of the device on a GPU
    amount: float  # of work, as the run returned it
    peak: float | None  # GB by which the run raised the peak of CUDA's memory; None on a CPU


def timed(run: Callable[[], float], device: str) -> Timing:
    """Measure a run."""
    if device == "cpu":
        start = time.process_time()
        amount = run()
        return Timing(time.process_time() - start, amount, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    amount = run()
    end.record()
    torch.cuda.synchronize()
    return Timing(begin.elapsed_time(end) / 1000, amount, (torch.cuda.max_memory_allocated() - before) / 1e9)


def largest(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[float, float] | None:
    """Return the largest peak of each side, or None on a CPU."""
    known = [[peak for peak in side if peak is not None] for side in (a, b)]
    return (max(known[0]), max(known[1])) if all(known) else None


def pairs(a: Callable[[], float], b: Callable[[], float], n_pairs: int, device: str = "cpu") -> Pairs:
    """Run A B A B ... after one warm-up of each; each returns the amount of work it did."""
    a(), b()
    sides: list[list[Timing]] = [[], []]
    for _ in range(n_pairs):
        for run, side in zip((a, b), sides, strict=True):
            side.append(timed(run, device))
    speeds = [[timing.amount / timing.seconds for timing in side] for side in sides]
    ratios = [x / y for x, y in zip(*speeds, strict=True)]
    peaks = largest(*([timing.peak for timing in side] for side in sides))
    return Pairs(statistics.median(speeds[0]), statistics.median(speeds[1]), ratios, peaks)


@dataclass(frozen=True)
class Settings:
    """The number of pairs that a benchmark measures, its device, and whether it only checks that it runs."""

    n_pairs: int = 5
    device: str = "cpu"
    smoke: bool = False
    model: str | None = None  # a folder of saved weights, for the rows of a real model

    def work(self, **kwargs: Any) -> Work:
        """Return the shared work; for `smoke` a tiny one."""
        tiny = {"n_layer": 1, "width": 32, "n_head": 2, "vocab_size": 64, "n_lanes": 4, "prompt_tokens": 4}
        if self.smoke:
            kwargs = {**tiny, **{key: value for key, value in kwargs.items() if key not in tiny}}
            kwargs["new_tokens"] = min(kwargs.get("new_tokens", 8), 8)
        return Work(device=self.device, **kwargs)

    def real_work(self, **kwargs: Any) -> FolderWork:
        """Return the work of a row on the model of the folder; for `smoke` fewer and shorter texts."""
        assert self.model is not None, "the row is for a model"
        work = self.work(**{**REAL, **kwargs})
        return FolderWork(**{**vars(work), "vocab_size": vocabulary(self.model)}, folder=self.model)


def vocabulary(folder: str) -> int:
    """Return the size of a model's whole vocabulary, which the peers read: they know no smaller one."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs instead of five")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one pair: only to see that it runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the models run (default: cpu)")
    parser.add_argument("--model", help="a folder of saved weights, for the rows of a real model")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def run_script(description: str | None, measure: Callable[[Settings], list[Row]]) -> None:
    """Run a script: parse its options, measure, print the table, write the rows."""
    args = arguments(description).parse_args()
    prepare()
    finish(measure(settings(args)), args.json)


def settings(args: argparse.Namespace) -> Settings:
    """Turn the options into settings."""
    return Settings(1 if args.smoke else 2 if args.quick else 5, args.device, args.smoke, args.model)


def prepare() -> None:
    """Set one thread, and silence libraries."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()


def finish(rows: Sequence[Row], path: Path | None) -> None:
    """Print the table as Markdown, and write the rows as JSON."""
    print(table(rows))
    if path is not None:
        path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")


def find_line(path: Path | None, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first line of a file of runs that has all items of the key, or None."""
    if path is None or not path.is_file():
        return None
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return next((row for row in rows if key.items() <= row.items()), None)


def add_line(path: Path | None, row: dict[str, Any]) -> None:
    """Add a run to the file, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| claim | ours | peer or floor | ratio | spread | target | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        met = {True: "yes", False: "NO", None: "-"}[row.met]
        peaks = ["", ""] if row.peaks is None else [f"; peak {peak:.2f} GB" for peak in row.peaks]
        sides = f"{row.ours}{peaks[0]} | {row.theirs}{peaks[1]}"
        lines.append(f"| {row.claim} | {sides} | {ratio} | {row.spread} | {row.target} | {met} |")
    return "\n".join(lines)
