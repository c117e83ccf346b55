"""Claims of GRPO: a whole iteration of groups, against TRL's GRPOTrainer, and PPO with a shared critic against GRPO.

    TRL_GRPO_PYTHON=trl-env/bin/python python benchmarks/grpo.py [--quick] [--model FOLDER]

An iteration is rollout, reward function, the reference of the KL penalty, and an update of 2 epochs of 4 minibatches,
ours as `learn` runs it. TRL has the same model, prompts, reward function, KL coefficient, and adapters where there are
any; both sides write completions of equal length. `--model` is a folder of a pretrained model with a chat template,
for the rows of a real model: the prompts are then messages of a user, in that template.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iterations import Done, alternate, has_trl, ours, time_row, trl, trl_row
from stable_baselines3 import PPO
from transformers import AutoTokenizer
from work import RANK, REAL, FolderWork, Row, Settings, Work, run_script

from agents import KLPenalty, LoRA

N_EPOCHS, N_MINIBATCHES = 2, 4
KL_COEF = 0.02
SMALL = {"n_lanes": 64, "prompt_tokens": 64, "new_tokens": 32}
MOST_CRITIC = 1.1  # the target for the time of PPO with a shared critic, against GRPO
INSTALL = (
    "python -m venv trl-env && trl-env/bin/pip install trl==1.16.0 peft vaderSentiment, then set "
    "TRL_GRPO_PYTHON=trl-env/bin/python"
)


@dataclass(frozen=True)
class GroupWork(FolderWork):
    """Work on groups of samples, of all weights (rank 0) or of adapters; without a folder, on the small model."""

    samples: int = 8
    rank: int = 0

    def config(self) -> Any:
        """Return the model's folder, or the config of the small model."""
        return self.folder or Work.config(self)

    def texts(self) -> list[str]:
        """Return the prompts as texts of equal lengths: numbers, or messages of a user in the model's template."""
        if not self.folder:
            return [" ".join(map(str, row)) for row in self.prompts()]
        return chat_prompts(self.folder)

    def rows(self) -> list[list[int]]:
        """Return the ids of these texts."""
        if not self.folder:
            return self.prompts()
        return AutoTokenizer.from_pretrained(self.folder)(self.texts(), add_special_tokens=False)["input_ids"]


def measure(settings: Settings) -> list[Row]:
    """Measure all rows; those of a real model if there is a folder of one."""
    small = vars(settings.work(**SMALL))
    works = [GroupWork(**small, samples=2 if settings.smoke else 8, rank=rank) for rank in (0, RANK)]
    rows = [against_trl(settings, work, "4 layers of 256", 3.0) for work in works]
    rows.append(critic_row(settings, works[0]))
    if settings.model is None:
        return [*rows, Row.missing("GRPO iteration, a real model", "--model FOLDER", ">= 2.2x, 2.8x")]
    real = {**vars(settings.real_work()), "prompt_tokens": REAL["prompt_tokens"]}  # the length of `chat_prompts`
    for samples, must in ((4, 2.2), (8, 2.8)):
        work = GroupWork(**real, samples=2 if settings.smoke else samples, rank=RANK)
        rows.append(against_trl(settings, work, Path(settings.model).name, must))
    return rows


def against_trl(settings: Settings, work: GroupWork, name: str, must: float) -> Row:
    """Alternate iterations of ours with iterations of TRL, which waits in a process of its own."""
    trained = f"LoRA of rank {work.rank}" if work.rank else "all weights"
    shape = f"P{work.prompt_tokens} T{work.new_tokens} n{work.samples}"
    claim = f"GRPO iteration with KL, {name}, {trained}, {shape}, against TRL 1.16"
    python = os.environ.get("TRL_GRPO_PYTHON", "")
    if not has_trl(python, "1.16.0"):
        return Row.missing(claim, INSTALL, f">= {must}x")
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch, "prompts.json")
        prompts.write_text(json.dumps(work.texts()), encoding="utf-8")
        updates = {"n_epochs": N_EPOCHS, "n_minibatches": N_MINIBATCHES, "kl_coef": KL_COEF}
        with trl(python, "trl_grpo.py", {**asdict(work), **updates, "prompts": str(prompts)}) as peer:
            result, done = alternate(iteration(work, "grpo"), peer, settings.n_pairs)
    return trl_row(claim, result, done, "", must)


def critic_row(settings: Settings, work: GroupWork) -> Row:
    """Compare an iteration of PPO with a shared critic with one of GRPO, on the same number of tokens."""
    result, _ = alternate(iteration(work, "grpo"), iteration(work, "gae"), settings.n_pairs)
    claim = f"PPO iteration with a shared critic, groups of {work.samples}, time against GRPO"
    return time_row(claim, result, MOST_CRITIC)


def iteration(work: GroupWork, advantage: str) -> Callable[[], Done]:
    """Return a function that runs one iteration of ours, with a critic or without."""
    kwargs: dict[str, Any] = {"vf_coef": 0.0} if advantage != "gae" else {}
    model: PPO = work.agent(
        work.rows(),
        samples_per_prompt=work.samples,
        n_epochs=N_EPOCHS,
        batch_size=work.n_lanes * work.new_tokens // N_MINIBATCHES,
        learning_rate=1e-5,
        rollout_buffer_kwargs={"advantage": advantage},
        policy_kwargs={"train": LoRA(r=work.rank) if work.rank else "all"},
        **kwargs,
    )
    KLPenalty(KL_COEF).attach(model)
    return ours(model, work.device)


def chat_prompts(folder: str) -> list[str]:
    """Return texts of equal numbers of tokens: messages of a user in the template of the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": f"Tell me about the number {i}."}] for i in range(1000, 2000)]
    texts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    lengths = [len(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [text for text, length in zip(texts, lengths, strict=True) if length == lengths[0]]


if __name__ == "__main__":
    run_script(__doc__, measure)
