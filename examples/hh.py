r"""RLHF on pairs of an assistant's replies: supervised tuning, a reward model, and PPO with four models.

    python examples/hh.py --data FOLDER

FOLDER holds pairs of dialogues in the format of Anthropic's hh-rlhf (.jsonl or .jsonl.gz, "chosen" and "rejected");
the name "Anthropic/hh-rlhf" reads them from the Hugging Face hub. They are preferences about harm and often offensive,
and what a model learns from them may be so, too: texts are kept in `--out`, and none is printed.

1. A small GPT-2, with a tokenizer of its own, learns to continue the chosen dialogues.
2. A reward model starts from that GPT-2 and learns which reply of a pair was chosen. On held-out pairs it is compared
   with two baselines: the lengths of the replies, and their words without order.
3. PPO with four models: the actor (adapters on the model of step 1), the critic (which starts from the reward model),
   the reward model, frozen, and the reference, which is the actor without its adapters.
4. Both models reply to held-out dialogues, before and after.

Expect, with 1,800 pairs of hh-rlhf's harmless-base, of which 500 are held out, in 6 to 7 minutes on one core: the
reward model is right on 0.64 of the held-out pairs (at least 0.60 with 95 % confidence; 0.55 by length, 0.62 by words),
and PPO raises the mean reward from 1.0 to 2.3 standard deviations of the scores of people's replies, 6 nats from the
reference. It also finds a gap in the reward model: 18 % of the replies become blank (1 % before). All settings were
chosen on quarters of the training pairs; the held-out pairs are always the same.

Printed and kept in `--out`: the tables of the reward model (pairs.md, pairs.json) and of the policy before and after
(results.md, results.json) with 95 % intervals, curves.png, and the models as Hugging Face folders. After Ctrl-C the
same command resumes: finished stages are found in `--out`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recipe import check_settings, read_data, stage, train
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.utils import logging as transformers_logging

from agents import (
    Evaluation,
    KLPenalty,
    LoRA,
    Ranking,
    RewardFigures,
    RewardModelCritic,
    calibration,
    evaluate,
    export,
    make_agent,
    pair_accuracy,
    sft,
    train_reward_model,
    wilson_interval,
)
from textenv.metrics import Distinct, Perplexity, Scores, mean_of
from textenv.tasks.hh import HH, Pair, hold_out, read_pairs


class Size(NamedTuple):
    """The size of the models, the length of their training, and the number of measured pairs and prompts."""

    vocab_size: int
    n_layers: int
    width: int
    tuning_epochs: float
    reward_epochs: float
    n_tokens: int  # of PPO
    n_held_out: int  # pairs
    n_prompts: int  # of the evaluation
    n_envs: int = 64


FULL = Size(2048, 2, 128, 3.0, 2.0, 40_960, 500, 250)
SMOKE = Size(300, 1, 32, 0.5, 1.0, 512, 10, 8, n_envs=8)
MAX_PROMPT_TOKENS = 96
MAX_NEW_TOKENS = 32
MAX_TOKENS = MAX_PROMPT_TOKENS + MAX_NEW_TOKENS  # that the reward model reads; longer texts lose their start
KL_COEF = 0.05
LEARNING_RATE = 1e-3
PENALTIES = (0.1, 0.03, 0.01, 0.003)  # of squared weights, for the baselines to choose from


def tune(pairs: Sequence[Pair], held_out: Sequence[Pair], folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train a fresh GPT-2 to continue the chosen dialogues."""
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=256,
        n_layer=size.n_layers,
        n_embd=size.width,
        n_head=size.width // 32,
        activation_function="gelu_pytorch_tanh",
        initializer_range=0.04,
        bos_token_id=0,  # of the tokenizer that `tune` trains
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    texts, others = ([pair.prompt + pair.chosen for pair in part] for part in (pairs, held_out))
    options = {"packing": True, "batch_size": 8, "learning_rate": 3e-3, "resume": True, "overwrite": True}
    tuned = sft.tune(config, texts, folder, held_out=others, n_epochs=size.tuning_epochs, seed=seed, **options)
    assert tuned.held_out_loss is not None
    return {"n_steps": tuned.n_steps, "held_out_perplexity": tuned.perplexity(tuned.held_out_loss)}


def learn_reward(
    pairs: Sequence[Pair], held_out: Sequence[Pair], tuned: Path, folder: Path, size: Size, seed: int
) -> dict[str, Any]:
    """Train the reward model; return its figures and those of the baselines, on the same held-out pairs."""
    rankings, tests = (
        [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in part] for part in (pairs, held_out)
    )
    trained = train_reward_model(
        str(tuned),
        AutoTokenizer.from_pretrained(tuned),
        rankings,
        folder,
        held_out=tests,
        n_epochs=size.reward_epochs,
        learning_rate=3e-4,
        max_tokens=MAX_TOKENS,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert trained.held_out is not None
    rows = {
        "length alone": baseline(pairs, held_out, lengths),
        "bag of words": baseline(pairs, held_out, word_counts(pairs)),
        "reward model": trained.held_out,
    }
    return {name: row._asdict() for name, row in rows.items()}


def lengths(text: str) -> np.ndarray:
    """Return the only feature of a reply, (1,): its length in hundreds of characters."""
    return np.array([len(text) / 100])


def word_counts(pairs: Sequence[Pair]) -> Callable[[str], np.ndarray]:
    """Return a function from a reply to its word counts (V,), of the words that at least three replies have."""
    replies = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    n_replies = Counter(word for text in replies for word in set(split_words(text)))
    index = {word: i for i, word in enumerate(sorted(word for word, n in n_replies.items() if n >= 3))}

    def count(text: str) -> np.ndarray:
        known = [index[word] for word in split_words(text) if word in index]
        return np.bincount(known, minlength=len(index)).astype(float)

    return count


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[^\sa-z]", text.lower())


def baseline(pairs: Sequence[Pair], held_out: Sequence[Pair], features: Callable[[str], np.ndarray]) -> RewardFigures:
    """Measure logistic regression on the feature differences of pairs; a quarter of them chooses its penalty."""
    x, tests = (
        torch.tensor(np.array([features(pair.chosen) - features(pair.rejected) for pair in part]))  # (N, F)
        for part in (pairs, held_out)
    )
    fitted, validation = x[len(x) // 4 :], x[: len(x) // 4]
    penalty = max(PENALTIES, key=lambda value: pair_accuracy((validation @ fit_linear(fitted, value)).numpy()))
    margins = tests @ fit_linear(x, penalty)  # (N,)
    loss, accuracy, n = float(functional.softplus(-margins).mean()), pair_accuracy(margins.numpy()), len(margins)
    return RewardFigures(loss, accuracy, *wilson_interval(accuracy, n), calibration(margins.numpy()), n)


def fit_linear(differences: Tensor, penalty: float) -> Tensor:
    """Return the weights (F,) of a Bradley-Terry model whose score is linear in the features."""
    weights = torch.zeros(differences.shape[1], dtype=differences.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.softplus(-(differences @ weights)).mean() + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def pairs_table(rows: dict[str, Any]) -> str:
    """Return the figures on held-out pairs as Markdown."""
    lines = ["| on held-out pairs | accuracy [95 % interval] | calibration error | pairs |", "|---|---|---|---|"]
    for name, row in rows.items():
        if name != "cpu_seconds":
            accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"| {name} | {accuracy} | {row['calibration_error']:.3f} | {row['n_pairs']} |")
    return "\n".join(lines)


def blank(prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Scores]:
    """Return the share of replies without a word, which a policy writes if the reward model likes silence."""
    return {"blank": mean_of([not text.strip() for text in texts])}


def reinforce(pairs: Sequence[Pair], held_out: Sequence[Pair], out: Path, size: Size, seed: int) -> Evaluation:
    """Tune with PPO, and measure before and after on held-out prompts."""
    tuned, folder = str(out / "tuned"), str(out / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    reward = {"name": "preference", "model": folder, "stats": "stored", "max_length": MAX_TOKENS}
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "max_prompt_tokens": MAX_PROMPT_TOKENS}
    env, test = (HH(part, tokenizer, reward=reward, **limits) for part in (pairs, held_out))
    model = make_agent(
        env,
        tuned,
        n_envs=size.n_envs,
        seed=seed,
        learning_rate=LinearSchedule(LEARNING_RATE, 0.0, 1.0),
        policy_kwargs={
            "train": LoRA(r=16, alpha=16),
            "critic": RewardModelCritic(folder, normalise=True),
            "critic_lr_scale": 0.3,
        },
    )
    metrics = [blank, Distinct((2,)), Perplexity(AutoModelForCausalLM.from_pretrained(tuned), tokenizer)]
    prompts = test.prompts[: size.n_prompts]
    options = {"env": test, "reference": tuned, "seed": seed, "progress_bar": True}
    before = evaluate(model, prompts, tokenizer, metrics, **options)
    train(model, size.n_tokens, out, "replies: PPO for a reward model's score", [KLPenalty(KL_COEF)])
    after = evaluate(model, prompts, tokenizer, metrics, before=before, **options)
    export(model, tokenizer, out / "policy", overwrite=True)
    before.save(out / "before")
    after.save(out / "results")
    return after


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the pairs, or a data set's name on the hub")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/hh"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # no warning that the reward model's score head is new
    start, size, out = time.process_time(), SMOKE if args.smoke else FULL, args.out
    pairs, held_out = hold_out(read_data(read_pairs, args.data), size.n_held_out)
    check_settings(out, {"data": args.data, "seed": args.seed, "smoke": args.smoke})
    tuned = stage(out / "tuned.json", tune, pairs, held_out, out / "tuned", size, args.seed)
    print(f"perplexity of held-out chosen dialogues after tuning: {tuned['held_out_perplexity']:.1f}")
    rows = stage(out / "pairs.json", learn_reward, pairs, held_out, out / "tuned", out / "reward", size, args.seed)
    (out / "pairs.md").write_text(pairs_table(rows) + "\n", encoding="utf-8")
    print(pairs_table(rows))
    after = reinforce(pairs, held_out, out, size, args.seed)
    print(after.to_markdown())
    print(f"results, curves and models: {out}   {(time.process_time() - start) / 60:.1f} minutes of one core")


if __name__ == "__main__":
    main()
