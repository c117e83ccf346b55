"""The peer of `grpo.py` and `real.py`: TRL's GRPOTrainer, by a Python with `trl==1.16.0`, `peft` and `vaderSentiment`.

See `trl_peer.py`. The argument also has the size of the groups, the rank of the adapters (0: all weights), the folder
of the model ("": the small one) and a file of prompts. The key "task" is for `real.py`: VADER gives the reward, texts
may end by EOS, and the key holds what `GRPOConfig` and `LoraConfig` get besides.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_peer import MANY, OnDemand, common, config, run
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

NEVER = "<never>"  # a token beyond the model's vocabulary, never sampled: all completions run to the limit


def grpo(work: dict[str, Any], callback: OnDemand) -> Any:
    """Return the trainer of GRPO, on a model from a folder if there is one."""
    callback.steps = work["n_epochs"] * work["n_minibatches"]  # GRPOTrainer counts each step of the optimizer
    prompts = json.loads(Path(work["prompts"]).read_text(encoding="utf-8"))
    folder = work["folder"] or saved_random(work)  # GRPOTrainer reads the reference of all weights from a folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder) if work["folder"] else number_words(work)
    task = work.get("task", {"trainer": {}, "adapters": {}})
    if "task" not in work:
        tokenizer.add_special_tokens({"eos_token": NEVER, "pad_token": NEVER})
        model.generation_config.eos_token_id = None
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        assert {len(row) for row in ids} == {work["prompt_tokens"]}, "TRL reads prompts of other lengths"
    score = vader() if "task" in work else even_share

    def counted(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        scores = [score(text, row) for text, row in zip(completions, completion_ids, strict=True)]
        callback.n_tokens += sum(len(row) for row in completion_ids)
        callback.scores += scores
        return scores

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
        **{**common(work), **task["trainer"]},
    )
    shape = {"r": work["rank"], "target_modules": "all-linear", "task_type": "CAUSAL_LM", **task["adapters"]}
    adapters = LoraConfig(**shape) if work["rank"] else None
    return GRPOTrainer(
        model=model,
        reward_funcs=counted,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Counted()],
        peft_config=adapters,
    )


def even_share(text: str, ids: list[int]) -> float:
    """Return the share of even tokens."""
    return float(np.mean(np.array(ids) % 2 == 0))


def vader() -> Callable[[str, list[int]], float]:
    """Return the function of VADER's compound score, which reads the completion alone as ours does."""
    analyzer = SentimentIntensityAnalyzer()
    return lambda text, ids: analyzer.polarity_scores(text)["compound"]


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


if __name__ == "__main__":
    run(grpo)
