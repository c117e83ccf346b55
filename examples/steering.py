"""SmolLM2's opinion of a coin is turned by a reward of one line; a list of prompts turns more.

    python examples/real_model.py runs/smollm2
    python examples/steering.py --model runs/smollm2
    python examples/steering.py --model runs/smollm2 --prompts examples/configs/smollm2/steering_prompts.txt \\
        --held_out examples/configs/smollm2/steering_held_out.txt

PPO with a critic tunes adapters of the model so that its texts get a negative sentiment by VADER; the divergence from
the start is penalised. The first command has one prompt, on which the model is also measured, by 64 texts. The second
has a file with one prompt per line, and measures on the prompts of another file, which training has not seen, by 8
texts each. The samples are those of the first five texts or prompts. `examples/configs/smollm2/steering.yml` is the
second run for `textenv train`, with a judge. After Ctrl-C the same command continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from recipe import check_settings, train
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from agents import KLPenalty, LoRA, evaluate, export, make_agent, sample_table
from textenv import Preds, Prompt, TextEnv
from textenv.metrics import Broken, Distinct, Perplexity
from textenv.rewards import Vader

COIN = "i think dogecoin is"
MAX_NEW_TOKENS, N_STEPS = 20, 32
VADER = Vader()


def gloom(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return how negative the sentiment of a finished text is, from -1 to 1: any function of a text will do."""
    return -VADER.score_text(preds.text) if done else 0.0


def read_lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a pretrained model, or its name on the hub")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt per line, in place of the coin")
    parser.add_argument("--held_out", type=Path, help="a file of other prompts, on which the model is measured")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/steering"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if (args.prompts is None) != (args.held_out is None):
        parser.error("Expected --prompts and --held_out together, got one: others are needed to measure the model on.")
    for file in (args.prompts, args.held_out):
        if file is not None and not file.is_file():
            parser.error(f"Expected files of prompts, got {file}, which is none.")
    return args


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console = time.perf_counter(), Console()
    prompts = [COIN] if args.prompts is None else read_lines(args.prompts)
    # One prompt stands 64 times in the list, so that its texts are resampled one by one for the intervals.
    held_out, n = ([COIN] * 64, 1) if args.held_out is None else (read_lines(args.held_out), 8)
    n_tokens, n_envs = 8_192, 32
    if args.smoke:
        held_out, n_tokens, n_envs = held_out[:8], 1_024, 16
    check_settings(args.out, {"prompts": prompts, "model": args.model, "seed": args.seed, "smoke": args.smoke})

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    env = TextEnv(prompts, tokenizer, reward=gloom, score_at="done", max_new_tokens=MAX_NEW_TOKENS, seed=args.seed)
    model = make_agent(
        env,
        args.model,
        policy_kwargs={"train": LoRA(r=8), "temperature": 0.7},
        n_envs=n_envs,
        n_steps=N_STEPS,
        batch_size=n_envs * N_STEPS // 4,
        n_epochs=2,
        learning_rate=1e-3,
        seed=args.seed,
    )
    frozen = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    metrics = [Distinct((2,)), Broken(), Perplexity(frozen, tokenizer)]
    options = {"n": n, "reward": gloom, "score_at": "done", "max_new_tokens": MAX_NEW_TOKENS, "seed": args.seed}
    before = evaluate(model, held_out, tokenizer, metrics, **options)
    train(model, n_tokens, args.out, "opinions: PPO for VADER's sentiment, turned", [KLPenalty(0.03)])
    after = evaluate(model, held_out, tokenizer, metrics, before=before, **options)
    export(model, tokenizer, args.out / "policy", overwrite=True)
    after.save(args.out / "results")
    console.print(sample_table({"before": before.generations[: 5 * n : n], "after": after.generations[: 5 * n : n]}))
    print(after.to_markdown())
    print(f"results, curves and model: {args.out}   {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
