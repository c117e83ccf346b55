"""The peer of `iteration.py`: one PPO iteration of TRL 1.12 for each line on stdin, by a Python with `trl==1.12.0`.

    yes | head -3 | OMP_NUM_THREADS=1 trl-env/bin/python benchmarks/trl_peer.py '{"n_layer": 4, ...}'

The argument holds the fields of `work.Work`, and the epochs and minibatches of an update. Each line on stdout reports
the work and the seconds of one iteration, so that the caller can alternate with its own; the first is the warm-up. The
script imports nothing of this project, which need not be installed in its environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", TRL_EXPERIMENTAL_SILENCE="1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PrinterCallback, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

MANY = 10_000  # iterations; stdin ends first


class EvenShare(nn.Module):
    """A stand-in for PPOTrainer's reward model: the share of even tokens up to each column."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self.prompt_tokens = prompt_tokens
        self.backbone = self.read
        self.score = nn.Identity()
        self.n_tokens = 0  # generated tokens it has seen

    def read(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        is_even = (input_ids[:, self.prompt_tokens :] % 2 == 0).float()  # (B, T)
        self.n_tokens += is_even.numel()
        share = is_even.cumsum(1) / torch.arange(1, is_even.shape[1] + 1, device=is_even.device)
        return SimpleNamespace(hidden_states=[nn.functional.pad(share, (self.prompt_tokens, 0))[:, :, None]])


class OnDemand(TrainerCallback):
    """A callback that waits for a line on stdin before each iteration, and reports the iteration at its end."""

    def __init__(self, reward: EvenShare, device: str, report: Any) -> None:
        self.reward = reward
        self.device = device
        self.report = report
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
            sys.exit()
        self.reward.n_tokens = self.n_updates = 0
        self.start = self.clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        done = {"tokens": self.reward.n_tokens, "optimizer_steps": self.n_updates}
        versions = {library.__name__: library.__version__ for library in (trl, transformers, torch)}
        line = {**done, "seconds": self.clock() - self.start, "reward": "share of even tokens", "versions": versions}
        print(json.dumps(line), file=self.report, flush=True)
        self.wait()


def main(work: dict[str, Any], report: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    prompts = np.random.default_rng(0).integers(1, work["vocab_size"], (4096, work["prompt_tokens"]))
    never = work["vocab_size"]  # an id that is never sampled: all completions run to the limit
    reward = EvenShare(work["prompt_tokens"])
    callback = OnDemand(reward, work["device"], report)
    trainer = PPOTrainer(
        args=settings(work),
        processing_class=SimpleNamespace(pad_token_id=never, eos_token_id=never),
        model=GPT2LMHeadModel(config(work)),
        ref_model=None,  # a copy of the policy
        reward_model=reward,
        value_model=GPT2ForSequenceClassification(config(work, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.optimizer.optimizer.register_step_post_hook(callback.count)
    assert trainer.accelerator.device.type == work["device"], f"TRL runs on {trainer.accelerator.device}"
    trainer.train()


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


def settings(work: dict[str, Any]) -> PPOConfig:
    return PPOConfig(
        output_dir=tempfile.mkdtemp(),
        # With `gradient_accumulation_steps` above 1, TRL steps the optimizer once in so many minibatches.
        per_device_train_batch_size=work["n_lanes"],
        gradient_accumulation_steps=1,
        num_mini_batches=work["n_minibatches"],
        num_ppo_epochs=work["n_epochs"],
        local_rollout_forward_batch_size=work["n_lanes"],
        total_episodes=MANY * work["n_lanes"],
        response_length=work["new_tokens"],
        temperature=1.0,
        kl_coef=work["kl_coef"],
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=work["device"] == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # so that TRL's output stays out of the reports  # noqa: SIM115
    main(json.loads(sys.argv[1]), report)
