"""The peers of `iteration.py` and `grpo.py`: one iteration of a trainer of TRL for each line on stdin.

    yes | head -3 | OMP_NUM_THREADS=1 trl-env/bin/python benchmarks/trl_peer.py '{"trainer": "ppo", "n_layer": 4, ...}'

The Python needs `trl==1.12.0` for "ppo", the last version with PPO, and `trl==1.16.0` and `peft` for "grpo". The
argument holds the fields of the work, and the epochs and minibatches of an update. Each line on stdout reports the work
and the seconds of one iteration, so that the caller can alternate with its own; the first is the warm-up. The script
imports nothing of this project, which need not be installed in its environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", TRL_EXPERIMENTAL_SILENCE="1")

import numpy as np
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

MANY = 10_000  # iterations; stdin ends first
LEARNING_RATE = 1e-5
NEVER = "<never>"  # a token beyond the model's vocabulary, never sampled: all completions run to the limit


class OnDemand(TrainerCallback):
    """A callback that waits for a line on stdin before each iteration, and reports the iteration at its end."""

    def __init__(self, device: str, steps: int, report: Any) -> None:
        self.device = device
        self.steps = steps  # that the trainer counts in an iteration
        self.report = report
        self.n_tokens = 0  # generated; a trainer's reward function counts them
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
        self.n_tokens = self.n_updates = 0
        self.start = self.clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        done = {"tokens": self.n_tokens, "optimizer_steps": self.n_updates}
        versions = {library.__name__: library.__version__ for library in (trl, transformers, torch)}
        line = {**done, "seconds": self.clock() - self.start, "reward": "share of even tokens", "versions": versions}
        print(json.dumps(line), file=self.report, flush=True)
        self.wait()


class EvenShare(nn.Module):
    """A stand-in for PPOTrainer's reward model: the share of even tokens up to each column."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_tokens: int, callback: OnDemand) -> None:
        super().__init__()
        self.prompt_tokens = prompt_tokens
        self.callback = callback
        self.backbone = self.read
        self.score = nn.Identity()

    def read(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        is_even = (input_ids[:, self.prompt_tokens :] % 2 == 0).float()  # (B, T)
        self.callback.n_tokens += is_even.numel()
        share = is_even.cumsum(1) / torch.arange(1, is_even.shape[1] + 1, device=is_even.device)
        return SimpleNamespace(hidden_states=[nn.functional.pad(share, (self.prompt_tokens, 0))[:, :, None]])


def main(work: dict[str, Any], report: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    is_grpo = work["trainer"] == "grpo"
    # PPOTrainer counts an iteration as one step, GRPOTrainer each step of the optimizer.
    callback = OnDemand(work["device"], work["n_epochs"] * work["n_minibatches"] if is_grpo else 1, report)
    trainer = grpo(work, callback) if is_grpo else ppo(work, callback)
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    assert trainer.accelerator.device.type == work["device"], f"TRL runs on {trainer.accelerator.device}"
    trainer.train()


def ppo(work: dict[str, Any], callback: OnDemand) -> Any:
    """Return the trainer of PPO."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = np.random.default_rng(0).integers(1, work["vocab_size"], (4096, work["prompt_tokens"]))
    never = work["vocab_size"]
    settings = PPOConfig(
        # With `gradient_accumulation_steps` above 1, TRL steps the optimizer once in so many minibatches.
        per_device_train_batch_size=work["n_lanes"],
        num_mini_batches=work["n_minibatches"],
        num_ppo_epochs=work["n_epochs"],
        local_rollout_forward_batch_size=work["n_lanes"],
        total_episodes=MANY * work["n_lanes"],
        response_length=work["new_tokens"],
        kl_coef=work["kl_coef"],
        num_sample_generations=0,
        **common(work),
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=SimpleNamespace(pad_token_id=never, eos_token_id=never),
        model=GPT2LMHeadModel(config(work)),
        ref_model=None,  # a copy of the policy
        reward_model=EvenShare(work["prompt_tokens"], callback),
        value_model=GPT2ForSequenceClassification(config(work, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    )
    trainer.optimizer.optimizer.register_step_post_hook(callback.count)
    return trainer


def grpo(work: dict[str, Any], callback: OnDemand) -> Any:
    """Return the trainer of GRPO, on a model from a folder if there is one."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    prompts = json.loads(Path(work["prompts"]).read_text(encoding="utf-8"))
    folder = work["folder"] or saved_random(work)  # GRPOTrainer reads the reference of all weights from a folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder) if work["folder"] else number_words(work)
    tokenizer.add_special_tokens({"eos_token": NEVER, "pad_token": NEVER})
    model.generation_config.eos_token_id = None
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    assert {len(row) for row in ids} == {work["prompt_tokens"]}, "TRL reads prompts of other lengths"

    def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        callback.n_tokens += sum(len(row) for row in completion_ids)
        return [float(np.mean(np.array(row) % 2 == 0)) for row in completion_ids]

    class Counted(TrainerCallback):  # the optimizer exists once training begins
        def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            optimizer.optimizer.register_step_post_hook(callback.count)

    settings = GRPOConfig(
        per_device_train_batch_size=work["n_lanes"] // work["n_minibatches"],
        steps_per_generation=work["n_minibatches"],
        num_iterations=work["n_epochs"],
        num_generations=work["samples"],
        max_completion_length=work["new_tokens"],
        max_steps=MANY,
        beta=work["kl_coef"],
        logging_strategy="no",
        **common(work),
    )
    adapters = LoraConfig(r=work["rank"], target_modules="all-linear", task_type="CAUSAL_LM") if work["rank"] else None
    return GRPOTrainer(
        model=model,
        reward_funcs=even_share,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Counted()],
        peft_config=adapters,
    )


def saved_random(work: dict[str, Any]) -> str:
    """Return a folder of the small model with random weights."""
    folder = tempfile.mkdtemp()
    GPT2LMHeadModel(config(work)).save_pretrained(folder)
    return folder


def number_words(work: dict[str, Any]) -> Any:
    """Return a tokenizer of numbers between spaces: each is the id that it names."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(work["vocab_size"])}, "0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


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


if __name__ == "__main__":
    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # so that TRL's output stays out of the reports  # noqa: SIM115
    main(json.loads(sys.argv[1]), report)
