"""SmolLM2 learns to continue film reviews in a better mood, and a judge that gave no reward measures it.

    python examples/real_model.py runs/smollm2
    python examples/reviews.py --data FOLDER --model runs/smollm2 [--algorithm grpo]

FOLDER holds rt-polarity.pos and rt-polarity.neg (the sentence polarity data set of Pang and Lee); the name
"cornell-movie-review-data/rotten_tomatoes" reads the same sentences from the Hugging Face hub. The model may be any
causal one, such as "gpt2".

1. A small classifier, the judge, learns to tell good reviews from bad ones. Nothing is trained on its answers.
2. PPO with a critic, or GRPO with groups of eight samples, tunes adapters of the model. The first four words of a
   review are the prompt, VADER's sentiment of the continuation is the reward, and the divergence from the start is
   penalised.
3. Before and after, the model continues the first words of 200 held-out reviews. The table has the judge's mean
   probability of "positive", the reward, the perplexity under the start, the variety of the texts, and the shares of
   blank and broken ones, with 95 % intervals. The samples below it are those of the first five prompts.

`examples/configs/smollm2/reviews.yml` and `reviews_grpo.yml` are the same runs for `textenv train`; examples/README.md
has their figures. After Ctrl-C the same command resumes: the judge is found in `--out`, and PPO continues from its last
checkpoint (the curves then begin there).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipe import check_settings, read_data, stage, train
from rich.console import Console
from stable_baselines3 import PPO
from transformers import AutoModelForCausalLM, AutoTokenizer, DistilBertConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import Evaluation, KLPenalty, LoRA, evaluate, export, make_agent, sample_table, train_classifier
from textenv.metrics import Broken, Distinct, Perplexity
from textenv.rewards import make_reward
from textenv.tasks.reviews import LABELS, Review, Reviews, part_of, read_reviews


class Size(NamedTuple):
    """The lengths of training and evaluation."""

    n_tokens: int  # of PPO
    n_envs: int
    n_prompts: int  # of the evaluation
    judge_epochs: float
    judge_width: int


FULL = Size(16_384, 32, 200, 3.0, 128)
SMOKE = Size(1_024, 16, 8, 1.0, 16)
N_WORDS, MAX_NEW_TOKENS, N_STEPS = 4, 24, 32
KL_COEF = 0.03
N_SAMPLES = 8  # of a prompt, for GRPO


def train_judge(
    reviews: Sequence[Review],
    held_out: Sequence[Review],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    size: Size,
    seed: int,
) -> dict[str, Any]:
    """Train a classifier of moods with fresh weights."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=128,
        n_layers=1,
        dim=size.judge_width,
        hidden_dim=2 * size.judge_width,
        n_heads=2,
    )
    trained = train_classifier(
        config,
        tokenizer,
        [review.text for review in reviews],
        [review.label for review in reviews],
        folder,
        held_out=([review.text for review in held_out], [review.label for review in held_out]),
        label_names=LABELS,
        n_epochs=size.judge_epochs,
        learning_rate=5e-4,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert trained.held_out is not None
    return {"n_steps": trained.n_steps, "held_out": trained.held_out._asdict()}


def make_model(data: str, name: str, tokenizer: PreTrainedTokenizerBase, algorithm: str, size: Size, seed: int) -> PPO:
    """Return PPO with a critic, or without one for GRPO, on the prompts of training."""
    groups = {"samples_per_prompt": N_SAMPLES} if algorithm == "grpo" else {}
    env = Reviews(data, tokenizer, reward="vader", n_words=N_WORDS, max_new_tokens=MAX_NEW_TOKENS, seed=seed, **groups)
    return make_agent(
        env,
        name,
        recipe=algorithm,
        policy_kwargs={"train": LoRA(r=8)},
        n_envs=size.n_envs,
        n_steps=N_STEPS,
        batch_size=size.n_envs * N_STEPS // 4,
        n_epochs=2,
        learning_rate=1e-3,
        seed=seed,
    )


def reinforce(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, size: Size, console: Console) -> Evaluation:
    """Tune the adapters, and measure before and after on held-out prompts."""
    model = make_model(args.data, args.model, tokenizer, args.algorithm, size, args.seed)
    test = Reviews(
        args.data, tokenizer, reward="vader", part="held_out", n_words=N_WORDS, max_new_tokens=MAX_NEW_TOKENS
    )
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    metrics = [Distinct((2,)), Broken(), Perplexity(start, tokenizer)]
    judge = make_reward("classifier", model=args.out / "judge", label="positive", reads="whole")
    options = {"env": test, "judge": judge, "seed": args.seed, "progress_bar": True}
    before = evaluate(model, test.prompts[: size.n_prompts], tokenizer, metrics, **options)
    # The recipe of GRPO has a penalty of its own, in the loss.
    steps = [KLPenalty(KL_COEF)] if args.algorithm == "ppo" else []
    train(model, size.n_tokens, args.out, f"film reviews: {args.algorithm} for VADER's sentiment", steps)
    after = evaluate(model, test.prompts[: size.n_prompts], tokenizer, metrics, before=before, **options)
    export(model, tokenizer, args.out / "policy", overwrite=True)
    after.save(args.out / "results")
    console.print(sample_table({"before": before.generations[:5], "after": after.generations[:5]}))
    return after


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the reviews, or a data set's name on the hub")
    parser.add_argument("--model", required=True, help="the folder of a pretrained model, or its name on the hub")
    parser.add_argument("--algorithm", choices=("ppo", "grpo"), default="ppo", help="with a critic, or with groups")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/reviews"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console, size = time.perf_counter(), Console(), SMOKE if args.smoke else FULL
    reviews = read_data(read_reviews, args.data)
    settings = {name: getattr(args, name) for name in ("data", "model", "algorithm", "seed", "smoke")}
    check_settings(args.out, settings)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = part_of(reviews, "train"), part_of(reviews, "held_out")
    stage(args.out / "judge.json", train_judge, *parts, tokenizer, args.out / "judge", size, args.seed)
    print(reinforce(args, tokenizer, size, console).to_markdown())
    print(f"results, curves and models: {args.out}   {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
