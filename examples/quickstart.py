"""A language model learns to write positive reviews, through Stable-Baselines3's own PPO.

    python examples/quickstart.py

The first run trains a tiny GPT-2 on a built-in corpus of product reviews of all moods (seconds; kept in the cache).
PPO then rewards positive words, and a KL penalty keeps the model near the grammar it knows. It prints samples before
and after side by side, and writes the curves as a picture and the trained model as a Hugging Face folder to `--out`.
Expect, in less than a minute on two cores: the mean reward goes from about 0.5 to above 0.95.

On your own text, one sentence per line, with the sentiment score of vaderSentiment as the reward (minutes):

    python examples/quickstart.py --corpus positive.txt negative.txt --out runs/reviews
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import (
    Checkpoints,
    EpisodeMetrics,
    Generation,
    KLPenalty,
    Pretrained,
    RewardCurves,
    bpe_tokenizer,
    demo_model,
    export,
    generate,
    is_main_process,
    latest_checkpoint,
    load_checkpoint,
    make_agent,
    pretrain,
    sample_table,
)
from textenv import Preds, Prompt, TextEnv, demo
from textenv.rewards import Vader

N_SAMPLES = 200


class Task(NamedTuple):
    """A model and its prompts, the reward, and the settings that suit both."""

    folder: Path
    prompts: list[str]
    score: Callable[[str], float]
    parses: Callable[[str], bool] | None
    max_new_tokens: int
    learning_rate: float
    kl_coef: float
    n_tokens: int


class Positive(TextEnv):
    """Rewards a whole review by its mood, once it is complete (score_at="done")."""

    score: Callable[[str], float]

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return self.score(prompt + preds.text)


def demo_task(smoke: bool) -> Task:
    folder = demo_model(n_epochs=0.2) if smoke else demo_model()
    return Task(folder, demo.prompts(), demo.score, demo.parses, 32, 1.5e-3, 0.05, 56_000)


def corpus_task(files: Sequence[Path], out: Path, smoke: bool) -> Task:
    """Train a tokenizer and a GPT-2 on the files' lines; score by vaderSentiment."""
    vader = Vader()  # first: it says which extra it needs
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8", errors="replace").split("\n")]
    texts = [line for line in lines if len(line.split()) > 4]
    folder = out / "base"
    if not folder.is_dir():
        tokenizer = bpe_tokenizer(texts, vocab_size=4096)
        eos = tokenizer.eos_token_id
        shape = dict(n_layer=1, n_embd=32, n_head=2) if smoke else dict(n_layer=4, n_embd=256, n_head=4)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, bos_token_id=eos, eos_token_id=eos, **shape)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        pretrain(model, tokenizer, texts, n_epochs=0.05 if smoke else 3.0, batch_size=32, learning_rate=1e-3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompts = sorted({" ".join(text.split()[:3]) for text in texts})
    return Task(folder, prompts, vader.score_text, None, 48, 3e-4, 0.05, 150_000)


def sample(model: PPO, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Generation]:
    """Continue `N_SAMPLES` prompts: all in a shuffled order, over and over."""
    order = np.random.default_rng(0).permutation(len(task.prompts))
    prompts = [task.prompts[order[i % len(order)]] for i in range(N_SAMPLES)]
    return generate(model, prompts, tokenizer, max_new_tokens=task.max_new_tokens, seed=seed)


def mean_reward(task: Task, samples: Sequence[Generation]) -> float:
    return float(np.mean([task.score(generation.prompt + generation.text) for generation in samples]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the seed of training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where the results go")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text files, one sentence per line, instead of the demo")
    parser.add_argument("--tokens", type=int, help="the number of tokens to train on")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if args.tokens is not None and args.tokens < 1:
        parser.error(f"Expected --tokens of 1 or more, got {args.tokens}.")
    for path in args.corpus or ():
        if not path.is_file():
            parser.error(f"Expected text files behind --corpus, got {path}, which is none.")
    return args


def train(model: PPO, task: Task, n_tokens: int, out: Path, resume: bool) -> float:
    """Train up to `n_tokens` in all, and return tokens a second."""
    done = 0
    if resume and (checkpoint := latest_checkpoint(out / "checkpoints")):
        load_checkpoint(model, checkpoint)
        done = model.num_timesteps
        print(f"resumed from {checkpoint}")
    callbacks = [
        KLPenalty(task.kl_coef),
        EpisodeMetrics(),
        RewardCurves(out / "curves.png", title="PPO with a KL penalty"),
        Checkpoints(out / "checkpoints", every=10),
    ]
    start = time.perf_counter()
    model.learn(
        max(n_tokens - done, 0), callback=callbacks, progress_bar=is_main_process(), reset_num_timesteps=done == 0
    )
    return (model.num_timesteps - done) / (time.perf_counter() - start)


def report(console: Console, figures: dict[str, Any], before: list[Generation], after: list[Generation]) -> None:
    """Print samples before and after side by side, and the figures."""
    console.print(sample_table({"before": before[:6], "after": after[:6]}))
    console.print(
        f"mean reward {figures['reward_before']:.2f} before, [bold]{figures['reward_after']:.2f}[/bold] after (the "
        f"last {N_SAMPLES} episodes)\nof {len(after)} samples of the exported model {figures['distinct']} are distinct"
        + (f", {figures['parse_rate']:.0%} follow the grammar" if figures["parse_rate"] is not None else "")
        + f"\n{figures['tokens_per_second']} tokens a second, {figures['seconds']} seconds in all"
    )


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console = time.perf_counter(), Console()
    task = corpus_task(args.corpus, args.out, args.smoke) if args.corpus else demo_task(args.smoke)
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    env = Positive(task.prompts, tokenizer, max_new_tokens=task.max_new_tokens, score_at="done")
    env.score = task.score
    model = make_agent(
        env,
        Pretrained(str(task.folder)),
        n_envs=64,
        seed=args.seed,
        learning_rate=LinearSchedule(task.learning_rate, 0.0, 1.0),
        batch_size=16 * task.max_new_tokens,
        target_kl=0.05,
        stats_window_size=N_SAMPLES,
    )
    before = sample(model, task, tokenizer, args.seed)
    n_tokens = args.tokens or (4096 if args.smoke else task.n_tokens)
    tokens_per_second = train(model, task, n_tokens, args.out, args.resume)

    folder = export(model, tokenizer, args.out / "model", overwrite=True)
    after = sample(make_agent(env, str(folder), seed=args.seed), task, tokenizer, args.seed)
    texts = [generation.prompt + generation.text for generation in after]
    figures = {
        "reward_before": mean_reward(task, before),
        "reward_after": float(np.mean([episode["r"] for episode in model.ep_info_buffer])),
        "parse_rate": float(np.mean([task.parses(text) for text in texts])) if task.parses else None,
        "distinct": len(set(texts)),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_per_second": round(tokens_per_second),
    }
    if not is_main_process():  # one process prints for all: torchrun --nproc_per_node 2 examples/quickstart.py
        return
    report(console, figures, before, after)
    print(f"curves: {args.out / 'curves.png'}   model: {folder}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
