"""A language model learns to write favourable film reviews; a judge that gave no reward measures them.

    python examples/reviews.py --data FOLDER

FOLDER holds rt-polarity.pos and rt-polarity.neg (the sentence polarity data set of Pang and Lee); the name
"cornell-movie-review-data/rotten_tomatoes" reads the same sentences from the Hugging Face hub.

1. A small GPT-2, with a tokenizer of its own, learns to write reviews from all sentences, good and bad.
2. A classifier learns from one half of the labelled sentences: its probability of "positive" is the reward. Another
   classifier, the judge, learns from the other half; nothing is trained on its answers.
3. PPO tunes the model with that reward and a penalty on its divergence from the model of step 1.
4. The models of steps 1 and 3 continue the first words of held-out reviews, which none of the models has seen.

Expect, in ten minutes on one core: the judge's mean probability of "positive" goes from 0.49 to 0.70, the reward
from 0.49 to 0.80, the perplexity under the model of step 1 from 351 to 287, distinct-2 from 0.88 to 0.83; the texts
become half as long. A model that has read 9,600 sentences one and a half times, and nothing else, does not write good
English, before or after.

Printed and kept in `--out`: the table before/after with 95 % intervals (results.md, results.json), curves.png, and the
models as Hugging Face folders. After Ctrl-C the same command resumes: finished stages are found in `--out`, and PPO
continues from its last checkpoint (the curves then begin there).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recipe import check_settings, read_data, stage, train
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DistilBertConfig, GPT2Config, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import Evaluation, KLPenalty, evaluate, export, make_agent, sample_table, sft, train_classifier
from textenv.metrics import Distinct, Perplexity, Scores, mean_of
from textenv.rewards.text_model import TextModel
from textenv.tasks.reviews import LABELS, Review, Reviews, part_of, read_reviews


class Size(NamedTuple):
    """The size of the models, and the length of their training."""

    vocab_size: int
    n_layers: int
    width: int
    tuning_epochs: float
    classifier_epochs: float
    n_tokens: int  # of PPO
    n_prompts: int  # of the evaluation
    n_envs: int = 64
    n_positions: int = 128
    max_new_tokens: int = 40


FULL = Size(4096, 4, 256, 1.5, 3.0, 90_000, 400)
SMOKE = Size(300, 1, 32, 0.5, 1.0, 1_024, 8, n_envs=16)
KL_COEF = 0.05
LEARNING_RATE = 2e-4


class Judge:
    """The metric `judge`: the mean probability of "positive" that a classifier gives to prompt and text."""

    def __init__(self, folder: Path) -> None:
        self.model = TextModel(folder)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        logits = self.model.logits([prompt + text for prompt, text in zip(prompts, texts, strict=True)])  # (B, 2)
        positive = logits[:, LABELS.index("positive")].astype(np.float64)
        return {"judge": mean_of(np.exp(positive - np.logaddexp.reduce(logits, axis=1)))}


def tune(reviews: Sequence[Review], held_out: Sequence[Review], folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train a fresh GPT-2 to write reviews."""
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.n_positions,
        n_layer=size.n_layers,
        n_embd=size.width,
        n_head=max(1, size.width // 64),
        bos_token_id=0,  # of the tokenizer that `tune` trains
        eos_token_id=0,
        resid_pdrop=0.0,  # no dropout: too few passes to overfit
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    tuned = sft.tune(
        config,
        [review.text for review in reviews],
        folder,
        held_out=[review.text for review in held_out],
        packing=True,
        n_epochs=size.tuning_epochs,
        batch_size=4,
        learning_rate=1e-3,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert tuned.held_out_loss is not None
    return {"n_steps": tuned.n_steps, "held_out_perplexity": tuned.perplexity(tuned.held_out_loss)}


def classify(
    reviews: Sequence[Review],
    held_out: Sequence[Review],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    size: Size,
    seed: int,
) -> dict[str, Any]:
    """Train a classifier of moods."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=size.n_positions,
        n_layers=1,
        dim=size.width // 2,
        hidden_dim=size.width,
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
        n_epochs=size.classifier_epochs,
        learning_rate=5e-4,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert trained.held_out is not None
    return {"n_steps": trained.n_steps, "held_out": trained.held_out._asdict()}


def reinforce(data: str, out: Path, size: Size, seed: int, console: Console) -> Evaluation:
    """Tune with PPO, and measure before and after on held-out prompts."""
    tuned = str(out / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    limits = {"max_new_tokens": size.max_new_tokens, "max_prompt_tokens": 24, "truncation_side": "left"}
    env, test = (
        Reviews(data, tokenizer, classifier=out / "reward", part=part, **limits) for part in ("train", "held_out")
    )
    model = make_agent(env, tuned, n_envs=size.n_envs, seed=seed, learning_rate=LEARNING_RATE, n_epochs=2)
    metrics = [Judge(out / "judge"), Perplexity(AutoModelForCausalLM.from_pretrained(tuned), tokenizer), Distinct((2,))]
    prompts = test.prompts[: size.n_prompts]
    options = {"env": test, "reference": tuned, "seed": seed, "progress_bar": True}
    before = evaluate(model, prompts, tokenizer, metrics, **options)
    train(
        model,
        size.n_tokens,
        out,
        "film reviews: PPO for a classifier's probability of a good mood",
        [KLPenalty(KL_COEF)],
    )
    after = evaluate(model, prompts, tokenizer, metrics, before=before, **options)
    export(model, tokenizer, out / "policy", overwrite=True)
    before.save(out / "before")
    after.save(out / "results")
    console.print(sample_table({"before": before.generations[:6], "after": after.generations[:6]}))
    return after


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the reviews, or a data set's name on the hub")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/reviews"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console, size = time.perf_counter(), Console(), SMOKE if args.smoke else FULL
    reviews = read_data(read_reviews, args.data)
    check_settings(args.out, {"data": args.data, "seed": args.seed, "smoke": args.smoke})
    train_part, held_out = part_of(reviews, "train"), part_of(reviews, "held_out")
    stage(args.out / "tuned.json", tune, train_part, held_out, args.out / "tuned", size, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tuned")
    for half, name in enumerate(("reward", "judge")):
        own, seed = train_part[half::2], 2 * args.seed + half
        stage(args.out / f"{name}.json", classify, own, held_out, tokenizer, args.out / name, size, seed)
    after = reinforce(args.data, args.out, size, args.seed, console)
    print(after.to_markdown())
    print(f"results, curves and models: {args.out}   {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
