"""A small model learns from a larger one by writing: on-policy distillation, without a reward.

    python examples/distill.py

The teacher is the built-in demo model (2 layers of 64), which PPO first trains to write positive reviews. The student,
a new GPT-2 of 1 layer of 32 with the same tokenizer, learns to write reviews of all moods from the corpus. Then it
writes on its own, and each token costs log student - log teacher: it comes to write as the teacher does, and has the
teacher's mood, although it never sees the reward. `--off` switches the teacher off: nothing changes then.
Expect, in about two minutes on one core: KL(student, teacher) falls from 0.75 to 0.04 nats a token, and the mood rises
from 0.47 to 0.98 (the teacher's: 0.96).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import EpisodeMetrics, KLPenalty, Pretrained, demo_model, export, generate, make_agent, pretrain
from textenv import Preds, Prompt, TextEnv, demo

N_TOKENS = 32  # of a review
PROMPTS = demo.prompts()


def mood(prompt: Prompt, preds: Preds, done: bool) -> float:
    return demo.score(prompt + preds.text) if done else 0.0


class Divergences(BaseCallback):
    """Keeps the nats a token of each rollout, as the KL penalty logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def _on_rollout_end(self) -> None:
        self.found.append(self.logger.name_to_value["kl/token"])

    def _on_step(self) -> bool:
        return True


def mean_mood(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """Return the mean score of four texts for each prompt."""
    env = TextEnv(PROMPTS, tokenizer, reward=mood, max_new_tokens=N_TOKENS, score_at="done")
    model = make_agent(env, str(folder), seed=seed)
    texts = generate(model, PROMPTS * 4, tokenizer, max_new_tokens=N_TOKENS, seed=seed)
    return float(np.mean([demo.score(text.prompt + text.text) for text in texts]))


def make_teacher(start: Path, tokenizer: PreTrainedTokenizerBase, n_tokens: int, seed: int, out: Path) -> Path:
    """Train the demo model with the reward, and write it into a folder; one that is there is used again."""
    if out.is_dir():
        return out
    env = TextEnv(PROMPTS, tokenizer, reward=mood, max_new_tokens=N_TOKENS, score_at="done")
    rate = LinearSchedule(1.5e-3, 0.0, 1.0)
    model = make_agent(env, Pretrained(str(start)), seed=seed, learning_rate=rate, batch_size=512, target_kl=0.05)
    model.learn(n_tokens, callback=KLPenalty(0.05))
    return Path(export(model, tokenizer, out))


def make_student(tokenizer: PreTrainedTokenizerBase, n_epochs: float, seed: int, out: Path) -> Path:
    """Train a smaller model on reviews of all moods, and write it into a folder; one that is there is used again."""
    if out.is_dir():
        return out
    eos = tokenizer.eos_token_id
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **shape))
    pretrain(model, tokenizer, demo.reviews(4000, seed=0), n_epochs=n_epochs, batch_size=64, learning_rate=3e-3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the seed of training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), help="where the models go, and come from")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--off", action="store_true", help="switch the teacher off, as a control")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()

    start = demo_model(n_epochs=0.2) if args.smoke else demo_model()
    tokenizer = AutoTokenizer.from_pretrained(start)
    teacher = make_teacher(start, tokenizer, 4096 if args.smoke else 56_000, args.seed, args.out / "teacher")
    student = make_student(tokenizer, 0.1 if args.smoke else 3.0, args.seed, args.out / "student")

    env = TextEnv(PROMPTS, tokenizer, reward="zero", max_new_tokens=N_TOKENS)
    model = make_agent(
        env,
        Pretrained(str(student)),
        gamma=0.0,  # each token answers for its own divergence
        vf_coef=0.0,  # and there is nothing to predict
        n_epochs=1,
        batch_size=512,
        learning_rate=LinearSchedule(3e-3, 0.0, 1.0),
        seed=args.seed,
    )
    divergences = Divergences()
    penalty = KLPenalty(0.0 if args.off else 1.0, reference=str(teacher))
    model.learn(4096 if args.smoke else 120_000, callback=[penalty, EpisodeMetrics(), divergences])

    folder = Path(export(model, tokenizer, args.out / "distilled", overwrite=True))
    moods = {path.name: mean_mood(path, tokenizer, args.seed) for path in (teacher, student, folder)}
    figures = {"before": divergences.found[0], "after": float(np.mean(divergences.found[-3:])), "mood": moods}
    print(f"KL(student, teacher): {figures['before']:.3f} nats a token before, {figures['after']:.3f} after")
    print("mean mood: " + ", ".join(f"{name} {value:.2f}" for name, value in moods.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
