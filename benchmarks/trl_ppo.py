"""The peer of `iteration.py`: TRL's PPOTrainer, by a Python with `trl==1.12.0`, the last version that has it.

See `trl_peer.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_peer import MANY, OnDemand, common, config, run


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


def ppo(work: dict[str, Any], callback: OnDemand) -> Any:
    """Return the trainer of PPO."""
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


if __name__ == "__main__":
    run(ppo)
