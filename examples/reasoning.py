"""SmolLM2 learns sums whose answers are checked: a short supervised stage teaches the form, PPO or GRPO the rest.

    python examples/real_model.py runs/smollm2
    python examples/reasoning.py --model runs/smollm2 [--algorithm grpo] [--shuffled]

1. Sampled as it is, the model answers in sentences, and almost no answer counts. It learns the form of an answer from
   300 solved sums and differences of two numbers below 100, from reasoning-gym (extra `reasoning`).
2. PPO with a critic, or GRPO, tunes adapters of that model: a right answer earns 1, by reasoning-gym's own score. Eight
   answers are sampled for each question, so that its tokens are read once for all of them.
3. Before and after, the model answers 300 questions that are in neither stage, sampled and greedily. The table has the
   accuracy with its 95 % interval (the reward), and the samples below it are those of the first five questions.

`--shuffled` is the control: the rewards of a rollout are shuffled over its answers, so that nothing is to be learned.
`examples/configs/smollm2/` has the same stages for `textenv sft` and `textenv train`; examples/README.md has figures.
After Ctrl-C the same command resumes: the first stage is found in `--out`, and PPO continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recipe import check_settings, stage, train
from rich.console import Console
from stable_baselines3 import PPO
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from agents import KLPenalty, LoRA, evaluate, export, make_agent, sample_table, sft
from textenv import Preds, Prompt, TextEnv
from textenv.adapters.reasoning_gym import ReasoningGym, ReasoningItems
from textenv.rewards import BatchReward

TASK, SUMS = "chain_sum", {"max_terms": 2, "max_digits": 2}
N_SOLVED, N_TRAIN, N_HELD_OUT = 300, 2_000, 300
N_SAMPLES, MAX_NEW_TOKENS, N_STEPS = 8, 6, 8
N_TOKENS = {"ppo": 16_384, "grpo": 12_288}
KL_COEF = 0.02


class Shuffled(BatchReward):
    """The rewards of a rollout in a random order: the control, in which no answer earns what it deserves."""

    score_at = "rollout_end"

    def __init__(self, reward: BatchReward, seed: int) -> None:
        self.reward, self.rng = reward, np.random.default_rng(seed)

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        return self.rng.permutation(np.asarray(self.reward.score(prompts, preds, dones))).tolist()


def teach_form(model: str, folder: Path, smoke: bool, seed: int) -> dict[str, Any]:
    """Tune the model on solved questions, of which only the answers are learned."""
    solved = ReasoningItems(TASK, SUMS, size=16 if smoke else N_SOLVED).solved("train")
    options = {"n_epochs": 1, "batch_size": 16, "learning_rate": 5e-5, "seed": seed}
    tuned = sft.tune(model, solved, folder, resume=True, overwrite=True, **options)
    return {"n_steps": tuned.n_steps, "loss": tuned.train_loss}


def make_model(env: ReasoningGym, base: str, algorithm: str, n_envs: int, shuffled: bool, seed: int) -> PPO:
    """Return PPO with a critic, or without one for GRPO."""
    trained_on: TextEnv = env
    if shuffled:
        rows = [prompt.row for prompt in env.prompts]
        limits = {"samples_per_prompt": N_SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "seed": seed}
        trained_on = TextEnv(rows, env.tokenizer, reward=Shuffled(env.reward, seed), **limits)
    return make_agent(
        trained_on,
        base,
        recipe=algorithm,
        policy_kwargs={"train": LoRA(r=8)},
        n_envs=n_envs,
        n_steps=N_STEPS,
        batch_size=n_envs * N_STEPS // 4,
        n_epochs=2,
        learning_rate=5e-4,
        seed=seed,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a pretrained model, or its name on the hub")
    parser.add_argument("--algorithm", choices=("ppo", "grpo"), default="ppo", help="with a critic, or without one")
    parser.add_argument("--shuffled", action="store_true", help="the control: rewards in a random order")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console = time.perf_counter(), Console()
    n_tokens, n_envs, n_prompts = (256, 16, 8) if args.smoke else (N_TOKENS[args.algorithm], 128, N_HELD_OUT)
    settings = {name: getattr(args, name) for name in ("model", "algorithm", "shuffled", "seed", "smoke")}
    check_settings(args.out, settings)
    base = args.out / "base"
    stage(args.out / "base.json", teach_form, args.model, base, args.smoke, args.seed)

    tokenizer = AutoTokenizer.from_pretrained(base)
    items = {"config": SUMS, "size": N_TRAIN, "max_new_tokens": MAX_NEW_TOKENS}
    env = ReasoningGym(TASK, tokenizer, samples_per_prompt=N_SAMPLES, seed=args.seed, **items)
    test = ReasoningGym(TASK, tokenizer, part="held_out", n_held_out=N_HELD_OUT, **items)
    model = make_model(env, str(base), args.algorithm, n_envs, args.shuffled, args.seed)
    prompts, options = test.prompts[:n_prompts], {"env": test, "seed": args.seed}
    before = evaluate(model, prompts, tokenizer, **options)
    # The recipe of GRPO has a penalty of its own, in the loss.
    steps = [KLPenalty(KL_COEF)] if args.algorithm == "ppo" else []
    train(model, n_tokens, args.out, f"sums: {args.algorithm} for right answers", steps)
    after = evaluate(model, prompts, tokenizer, before=before, **options)
    export(model, tokenizer, args.out / "policy", overwrite=True)
    after.save(args.out / "results")
    console.print(sample_table({"before": before.generations[:5], "after": after.generations[:5]}))
    print(after.to_markdown())
    greedy = evaluate(model, prompts, tokenizer, deterministic=True, **options).figures["reward"]
    print(f"greedily, after: {greedy.value:.3f} [{greedy.low:.3f}, {greedy.high:.3f}]")
    print(f"results, curves and models: {args.out}   {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
