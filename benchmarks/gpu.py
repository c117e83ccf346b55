"""The rows of a GPU: the tests marked `gpu`, then rollout, update, iteration and groups at 135 M parameters.

    python benchmarks/gpu.py --out FOLDER [--model FOLDER]
    python benchmarks/gpu.py --out FOLDER --device cpu --smoke

Each row is measured in float32 and in bfloat16: ours by `autocast`, with weights in float32, and the peers that
generate with a copy of the weights in bfloat16. The model has the shape of SmolLM2-135M and random weights; `--model`
is a folder of saved ones. Times are those between two CUDA events, after a warm-up of both sides; a peak is how far a
side raised the memory of CUDA's allocator above what was held before it. The peer `generate_batch` is transformers'
continuous batching with as many rows as we have lanes; its pages, and the CUDA graphs that it captures, are kept from
call to call, and count as held.

The run is meant for eight minutes of one H200: no row starts after the sixth. `gpu.json` and `gpu.md` are written anew
after each row, and `tests.txt` has what pytest said. The exit code is 1 if a test failed, or a row was not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from iteration import MOST_KL, agent, kl_row
from iterations import ours
from rollout import CAP, MEAN, equal, equal_row, generate, ragged_eos
from run import describe, header
from stable_baselines3 import PPO
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from update import LEARNING_RATE, compare, compare_epochs
from work import FolderWork, Row, Settings, Work, prepare, table, vocabulary

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"n_layer": 30, "width": 576, "n_head": 9, "vocab_size": 49_152, "n_lanes": 128}
LENGTHS = {"prompt_tokens": 41, "new_tokens": 64}
GROUPS = {"prompt_tokens": 200, "new_tokens": 50}
SAMPLES = 8  # of a prompt, in a group
N_PAIRS = 3
PAGE = 256  # tokens of a page of keys and values in `generate_batch`, its default
LAST_START = 360.0  # seconds after which no row starts
TESTS_LIMIT = 180.0  # seconds for the tests


@dataclass(frozen=True)
class GpuWork(FolderWork):
    """Work on a model from a folder, in one precision."""

    autocast: str | None = None

    def agent(self, *args: Any, **kwargs: Any) -> PPO:
        """Return PPO as `Work.agent` does, with this autocast."""
        return super().agent(*args, policy_kwargs={"autocast": self.autocast}, **kwargs)

    def plain_model(self, model: PPO) -> PreTrainedModel:
        """Return a copy of the model, with weights in 16 bits if ours computes in them."""
        return deepcopy(model.policy.lm.backbone.model).to(getattr(torch, self.autocast or "float32"))


@dataclass(frozen=True)
class GpuSettings(Settings):
    """Settings of rows whose work is a `GpuWork`."""

    autocast: str | None = None

    def work(self, **kwargs: Any) -> GpuWork:
        """Return the work of a row; for `smoke` a tiny one."""
        assert self.model is not None, "random weights are saved, too"
        work = super().work(**{**SHAPE, **LENGTHS, **kwargs})
        return GpuWork(
            **{**vars(work), "vocab_size": vocabulary(self.model)}, folder=self.model, autocast=self.autocast
        )


def main() -> int:
    """Run the tests and measure all rows; return the exit code."""
    start = time.monotonic()
    args = arguments()
    prepare()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": header(args.device), "tests": run_tests(args.out)}
    rows: list[Row] = []
    failed = report["tests"]["exit_code"] != 0
    with nullcontext(args.model) if args.model else tempfile.TemporaryDirectory() as folder:
        if not args.model:
            save_random_model(Settings(smoke=args.smoke).work(**SHAPE), folder)
        # The rows that may be late come last. `generate_batch` captures graphs first, for a time that nobody knows yet.
        for measure in (equal_rows, update_rows, group_rows, iteration_rows, batch_rows, ended_rows, ragged_rows):
            for autocast in (None, "bfloat16"):
                settings = GpuSettings(1 if args.smoke else N_PAIRS, args.device, args.smoke, str(folder), autocast)
                measured = measure_in_time(measure, settings, start)
                failed |= any(row.ratio is None for row in measured)
                rows += [row._replace(claim=f"{row.claim}, {autocast or 'float32'}") for row in measured]
                write(args.out, report, rows)
    return int(failed)


def arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for gpu.json, gpu.md and tests.txt")
    parser.add_argument("--model", help="a folder of saved weights (default: random weights)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="cpu only with --smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one pair: only to see that it runs")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("Expected --device cpu with --smoke, got it without: benchmarks/run.py has the rows of a CPU.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a CUDA device, got none: --device cpu --smoke shows that the script runs.")
    return args


def run_tests(out: Path) -> dict[str, Any]:
    """Run the tests marked `gpu`; return the exit code and pytest's last line."""
    # Only the files that have the marker: to collect the whole suite takes a minute of the eight.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TESTS_LIMIT)
    except subprocess.TimeoutExpired:
        return {"exit_code": None, "summary": f"not done after {TESTS_LIMIT:.0f} s"}
    (out / "tests.txt").write_text(result.stdout + result.stderr, encoding="utf-8")
    lines = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()
    return {"exit_code": result.returncode, "summary": lines[-1]}


def save_random_model(work: Work, folder: str) -> None:
    """Save a Llama with random weights; with the default work it is shaped as SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.width,
        intermediate_size=work.width * 8 // 3,
        num_hidden_layers=work.n_layer,
        num_attention_heads=work.n_head,
        num_key_value_heads=max(1, work.n_head // 3),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure_in_time(measure: Callable[[GpuSettings], list[Row]], settings: GpuSettings, start: float) -> list[Row]:
    """Measure rows unless it is late; what raises becomes a row that says so."""
    name = measure.__name__.replace("_", " ")
    begin = time.monotonic() - start
    if begin > LAST_START:
        return [Row.missing(name, f"not started: {begin:.0f} s had passed", "-")]
    try:
        return measure(settings)
    except Exception as error:
        traceback.print_exc()
        return [Row.missing(name, f"raised {describe(error)}", "-")]
    finally:
        gc.collect()  # models and their managers are in cycles
        torch.cuda.empty_cache()
        seconds = time.monotonic() - start
        print(f"{name}, {settings.autocast or 'float32'}: {begin:.0f} to {seconds:.0f} s", file=sys.stderr, flush=True)


def equal_rows(settings: GpuSettings) -> list[Row]:
    """Compare rollouts of equal lengths with `generate`."""
    return [equal(settings, generate, 1.25)]


def batch_rows(settings: GpuSettings) -> list[Row]:
    """Compare rollouts of equal lengths, and ended by EOS, with `generate_batch`."""
    return [equal(settings, generate_batch, None), ragged_eos(settings, generate_batch, None)]


def ended_rows(settings: GpuSettings) -> list[Row]:
    """Compare rollouts ended by EOS with `generate`."""
    return [ragged_eos(settings, generate, 2.0)]


def update_rows(settings: GpuSettings) -> list[Row]:
    """Compare updates of sequences of equal lengths with the floor."""
    return compare(settings, is_ragged=False)


def ragged_rows(settings: GpuSettings) -> list[Row]:
    """Compare updates of sequences of different lengths with the floor."""
    return compare(settings, is_ragged=True)


def iteration_rows(settings: GpuSettings) -> list[Row]:
    """Compare whole iterations with a KL penalty with those without."""
    work = settings.work()
    return [kl_row(settings, work, ours(agent(work), work.device), "k1", MOST_KL)]


def group_rows(settings: GpuSettings) -> list[Row]:
    """Compare rollouts and updates of several samples a prompt with peers that read each sequence whole."""
    work = settings.work(**GROUPS)
    n_samples = min(SAMPLES, work.n_lanes)
    batch_size = work.n_lanes * work.new_tokens // (1 if settings.smoke else 4)
    model = work.agent(samples_per_prompt=n_samples, learning_rate=LEARNING_RATE, batch_size=batch_size)
    claim = f"groups of {n_samples}, P{work.prompt_tokens} T{work.new_tokens}"
    generated = equal_row(claim, settings, work, model, generate, None)
    return [generated, compare_epochs(model, settings, 1, claim)]


def generate_batch(model: PPO, work: Work, stop_ids: list[int]) -> Callable[[int], int]:
    """Return a function that continues new prompts with transformers' continuous batching, and counts the tokens.

    With stop ids it gets as many prompts as our lanes continue meanwhile, so that free rows are filled.
    """
    lm = work.plain_model(model)
    n_prompts = work.n_lanes * (max(1, 2 * CAP // MEAN) if stop_ids else 1)
    pages = -(-(work.prompt_tokens + work.new_tokens) // PAGE) + 1
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=work.n_lanes * pages,  # its own choice is nearly all of the memory that is free
        max_batch_tokens=max(PAGE, work.n_lanes * work.prompt_tokens),
        max_requests_per_batch=work.n_lanes,
        auto_switch_to_flash=lm.dtype == torch.bfloat16,  # flash attention takes 16 bits only
    )
    generation = GenerationConfig(do_sample=True, top_k=0, eos_token_id=stop_ids or -1, pad_token_id=0)
    rng = np.random.default_rng(2)

    def run(new_tokens: int) -> int:
        prompts = rng.integers(1, work.vocab_size, (n_prompts, work.prompt_tokens)).tolist()
        results = lm.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=batching,
            persistent_manager=True,
            max_new_tokens=new_tokens,
        )
        errors = [result.error for result in results.values() if result.error is not None]
        if errors or len(results) < n_prompts:
            raise RuntimeError(f"Expected {n_prompts} completions of generate_batch, got {len(results)}: {errors[:1]}")
        return sum(len(result.generated_tokens) for result in results.values())

    return run


def write(out: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write what is known so far as JSON and as a Markdown table."""
    tests = f"Tests marked `gpu`: {report['tests']['summary']}"
    measured = {**report, "rows": [row._asdict() for row in rows]}
    (out / "gpu.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(f"{report['machine']}\n\n{tests}\n\n{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
