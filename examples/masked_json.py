"""A model that has never seen JSON writes valid JSON: a mask enforces a schema, and PPO learns the values.

    python examples/masked_json.py

A tiny model with fresh weights rates a product, character by character. `JSONSchemaMask` (`pip install
"textenv[grammar]"`) allows only tokens that can still lead to JSON of the schema, and sb3-contrib's MaskablePPO learns
to give the highest rating. Expect, in about half a minute on two cores: all texts are valid before and after, and the
mean rating goes from about 50 to above 90. With `--no-mask`, for comparison, hardly any text is valid, so that plain
PPO has nothing to learn from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from transformers import GPT2Config

from agents import Generation, generate, make_agent
from textenv import CharTokenizer, JSONSchemaMask, Preds, Prompt, TextEnv

TOKENIZER = CharTokenizer('abcdefghijklmnopqrstuvwxyz0123456789{}:," ')
PROMPTS = ["rate the tea ", "rate the lamp ", "rate the chair "]
SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 6},
        "rating": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["reason", "rating"],
    "additionalProperties": False,
}
LIMITS = {"max_new_tokens": 36, "max_prompt_tokens": 15}  # room for the longest JSON and its end token: none is cut


def rating(text: str) -> int | None:
    """Return the rating in JSON of the schema, or None for any other text."""
    try:
        review = json.loads(text)
    except ValueError:
        return None
    if not isinstance(review, dict) or review.keys() != {"reason", "rating"}:
        return None
    reason, number = review["reason"], review["rating"]
    is_valid = isinstance(reason, str) and len(reason) <= 6 and type(number) is int and 0 <= number <= 100
    return number if is_valid else None


def high_rating(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return the rating of a valid text over 100, and 0 for any other text."""
    return (rating(preds.text) or 0) / 100 if done else 0.0


def describe(samples: list[Generation]) -> dict[str, float | None]:
    """Return the share of samples that are valid, and their mean rating (None if there are none)."""
    ratings = [number for sample in samples if (number := rating(sample.text)) is not None]
    return {"valid": len(ratings) / len(samples), "rating": round(float(np.mean(ratings)), 1) if ratings else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-mask", action="store_true", help="plain PPO, which may write any text")
    parser.add_argument("--seed", type=int, default=0, help="the seed of training and sampling (default: 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    mask = () if args.no_mask else JSONSchemaMask(SCHEMA)
    env = TextEnv(PROMPTS, TOKENIZER, reward=high_rating, score_at="done", mask=mask, **LIMITS)
    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=len(TOKENIZER), n_positions=64, bos_token_id=0, eos_token_id=0
    )
    algorithm = PPO if args.no_mask else MaskablePPO
    model = make_agent(env, config, n_envs=32, algorithm=algorithm, learning_rate=3e-3, seed=args.seed)
    figures, n_samples = {}, 5 if args.smoke else 40  # of each prompt
    for name, n_tokens in (("before", 0), ("after", 1024 if args.smoke else 30_000)):
        if n_tokens:
            model.learn(n_tokens, progress_bar=True)
        samples = generate(model, PROMPTS * n_samples, TOKENIZER, mask=mask, seed=args.seed, max_new_tokens=36)
        figures[name] = describe(samples)
        print(f"{name:6} {figures[name]['valid']:4.0%} valid, mean rating {figures[name]['rating']}; such as:")
        print("\n".join(f"       {sample.prompt}| {sample.text}" for sample in samples[:3]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
