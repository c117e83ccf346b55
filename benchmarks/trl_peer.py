"""What the peers `trl_ppo.py` and `trl_grpo.py` share: one iteration of a trainer of TRL for each line on stdin.

    yes | head -3 | OMP_NUM_THREADS=1 trl-env/bin/python benchmarks/trl_ppo.py '{"n_layer": 4, ...}'

The argument holds the fields of the work, and the epochs and minibatches of an update. Each line on stdout reports the
work and the seconds of one iteration, so that the caller can alternate with its own; the first is the warm-up. The
scripts import nothing of this project, which need not be installed in their environments. With the key "save" the
trained model, its adapters merged, is written into that folder once stdin ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import trl
from transformers import GPT2Config, PrinterCallback, TrainerCallback

MANY = 10_000  # iterations; stdin ends first
LEARNING_RATE = 1e-5


class OnDemand(TrainerCallback):
    """A callback that waits for a line on stdin before each iteration, and reports the iteration at its end."""

    def __init__(self, device: str, report: Any) -> None:
        self.device = device
        self.report = report
        self.steps = 1  # that the trainer counts in an iteration
        self.n_tokens = 0  # generated; a trainer's reward function counts them
        self.scores: list[float] = []  # of completions; GRPO's reward function adds them
        self.n_updates = 0
        self.start = 0.0

    def count(self, *args: Any) -> None:
        self.n_updates += 1

    def clock(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise EOFError("stdin has ended")
        self.n_tokens = self.n_updates = 0
        self.scores = []
        self.start = self.clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        seconds = self.clock() - self.start
        done = {"tokens": self.n_tokens, "optimizer_steps": self.n_updates, "completions": len(self.scores)}
        score = sum(self.scores) / len(self.scores) if self.scores else None
        versions = {library.__name__: library.__version__ for library in (trl, transformers, torch)}
        line = {**done, "seconds": seconds, "score": score, "versions": versions}
        print(json.dumps(line), file=self.report, flush=True)
        self.wait()


def run(build: Callable[[dict[str, Any], OnDemand], Any]) -> None:
    """Run iterations of the trainer that `build` returns for the work of the command line, until stdin ends."""
    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # so that TRL's output stays out of the reports  # noqa: SIM115
    work = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    callback = OnDemand(work["device"], report)
    trainer = build(work, callback)
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    assert trainer.accelerator.device.type == work["device"], f"TRL runs on {trainer.accelerator.device}"
    with contextlib.suppress(EOFError):  # by which `OnDemand` ends the training
        trainer.train()
    if "save" in work:
        trainer.model.merge_and_unload().save_pretrained(work["save"])


def config(work: dict[str, Any], **kwargs: Any) -> GPT2Config:
    """Return the config of the same model as `work.Work.config`."""
    return GPT2Config(
        n_layer=work["n_layer"],
        n_embd=work["width"],
        n_head=work["n_head"],
        vocab_size=work["vocab_size"],
        n_positions=max(256, work["prompt_tokens"] + work["new_tokens"]),
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **kwargs,
    )


def common(work: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that both trainers share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "gradient_accumulation_steps": 1,
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": work["device"] == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
