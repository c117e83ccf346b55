r"""RLHF on pairs of an assistant's replies: reward models, and PPO with four models; of a new or a pretrained model.

    python examples/hh.py --data FOLDER
    python examples/hh.py --data FOLDER --model runs/smollm2

FOLDER holds pairs of dialogues in the format of Anthropic's hh-rlhf (.jsonl or .jsonl.gz, "chosen" and "rejected");
the name "Anthropic/hh-rlhf" reads them from the Hugging Face hub. They are preferences about harm and often offensive,
and what a model learns from them may be so, too: texts are kept in `--out`, and none is printed.
`python examples/real_model.py runs/smollm2` makes the folder of a pretrained model, SmolLM2-135M-Instruct.

1. Without --model, a small GPT-2, with a tokenizer of its own, learns to continue the chosen dialogues. A pretrained
   model needs no such stage: it reads the dialogues as plain text, as the small one does.
2. A reward model starts from that model and learns which reply of a pair was chosen. On held-out pairs it is compared
   with two baselines: the lengths of the replies, and their words without order. With --model it is made of the lower
   half of the layers, which stay as they are, and its score head learns from one half of the pairs; a second one, the
   judge, learns from the other half.
3. PPO with four models: the actor (adapters on the model of step 1), the critic (which starts from the reward model),
   the reward model, frozen, and the reference, which is the actor without its adapters.
4. Both models reply to held-out dialogues, before and after.

A reward model has never read a reply without a word, and scores it like a good one, so that PPO may find silence. A
gate in front of it pays such a reply -2 standard deviations, whatever the reward model would say.

examples/README.md has the figures. The settings of the small reward model were chosen on quarters of the training
pairs, those of the pretrained one by cross-validation on them; the held-out pairs are always the same.
`examples/configs/hh.yml` and `examples/configs/smollm2/hh.yml` have the same stages for `textenv`.

Printed and kept in `--out`: the tables of the reward models (pairs.md, pairs.json, judge.md, ...) and of the policy
before and after (results.md, results.json) with 95 % intervals, curves.png, and the models as Hugging Face folders.
samples.txt has the replies to the first five held-out prompts, before and after. After Ctrl-C the same command resumes:
finished stages are found in `--out`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from recipe import check_settings, read_data, stage, train
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config
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
    sample_table,
    score_texts,
    sft,
    train_reward_model,
    wilson_interval,
)
from textenv.metrics import Broken, Distinct, Perplexity, difference, mean_of
from textenv.rewards import make_reward
from textenv.tasks.hh import HH, Pair, hold_out, part_of, read_pairs


class Settings(NamedTuple):
    """The settings that go with the size of a model: of the reward models, of PPO, and of the evaluation."""

    reward_train: Literal["all", "head"]  # the weights that learn
    reward_epochs: float  # for "all"
    reward_batch: int  # pairs
    reward_rate: float  # the peak of the learning rate, for "all"
    reward_layers: int | None  # the lowest layers of the model, of which a reward model is made; None for all
    max_tokens: int  # that a reward model reads; longer texts lose their start
    max_prompt_tokens: int
    max_new_tokens: int
    n_tokens: int  # of PPO
    n_envs: int
    n_steps: int
    n_epochs: int
    final_rate: float  # of learning, as a share of the first
    lora: int  # the rank of the adapters
    critic_scale: float  # a factor on PPO's learning rate
    kl: float
    n_prompts: int  # of the evaluation


FRESH = Settings("all", 2.0, 16, 3e-4, None, 128, 96, 32, 40_960, 64, 32, 4, 0.0, 16, 0.3, 0.05, 250)
PRETRAINED = Settings("head", 1.0, 8, 1e-4, 15, 80, 32, 24, 16_384, 32, 32, 2, 1.0, 8, 0.03, 0.03, 120)
SMOKE = {"n_tokens": 512, "n_envs": 8, "n_prompts": 8}
N_HELD_OUT = 500  # pairs that the small model is measured on; a tenth of all where a pretrained one is trained
LEARNING_RATE = 1e-3
BLANK = -2.0  # the reward of a reply without a word, in standard deviations
PENALTIES = (0.1, 0.03, 0.01, 0.003)  # of squared weights, for the baselines to choose from


def tune(pairs: Sequence[Pair], held_out: Sequence[Pair], folder: Path, smoke: bool, seed: int) -> dict[str, Any]:
    """Train a fresh GPT-2 to continue the chosen dialogues."""
    vocab_size, n_layers, width, n_epochs = (300, 1, 32, 0.5) if smoke else (2048, 2, 128, 3.0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=256,
        n_layer=n_layers,
        n_embd=width,
        n_head=width // 32,
        activation_function="gelu_pytorch_tanh",
        initializer_range=0.04,
        bos_token_id=0,  # of the tokenizer that `tune` trains
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    texts, others = ([pair.prompt + pair.chosen for pair in part] for part in (pairs, held_out))
    options = {"packing": True, "batch_size": 8, "learning_rate": 3e-3, "resume": True, "overwrite": True}
    tuned = sft.tune(config, texts, folder, held_out=others, n_epochs=n_epochs, seed=seed, **options)
    assert tuned.held_out_loss is not None
    return {"n_steps": tuned.n_steps, "held_out_perplexity": tuned.perplexity(tuned.held_out_loss)}


def learn_reward(
    pairs: Sequence[Pair], held_out: Sequence[Pair], start: str, folder: Path, settings: Settings, seed: int
) -> dict[str, Any]:
    """Train a reward model; return its figures and those of the baselines, on the same held-out pairs."""
    train_reward_model(
        start,
        AutoTokenizer.from_pretrained(start),
        [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in pairs],
        folder,
        first_layers=settings.reward_layers,
        train=settings.reward_train,
        n_epochs=settings.reward_epochs,
        batch_size=settings.reward_batch,
        learning_rate=settings.reward_rate,
        max_tokens=settings.max_tokens,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    margins = {
        "length alone": baseline(pairs, held_out, lengths),
        "bag of words": baseline(pairs, held_out, word_counts(pairs)),
        "reward model": score_margins(folder, held_out),
    }
    words = right(margins["bag of words"])
    rows = {
        name: {**figures_of(own)._asdict(), "more": difference(mean_of(right(own)), mean_of(words))._asdict()}
        for name, own in margins.items()
    }
    return rows


def score_margins(folder: Path, pairs: Sequence[Pair]) -> np.ndarray:
    """Return how much higher a reward model scores the better text of each pair, (N,)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    better, worse = (
        score_texts(model, tokenizer, [pair.prompt + getattr(pair, reply) for pair in pairs])
        for reply in ("chosen", "rejected")
    )
    return better - worse


def right(margins: np.ndarray) -> np.ndarray:
    """Return 1 for each pair in the right order, 0 for one in the wrong order, and 0.5 for a tie, (N,)."""
    return (margins > 0) + 0.5 * (margins == 0)


def figures_of(margins: np.ndarray) -> RewardFigures:
    """Return loss, accuracy and calibration on pairs."""
    loss, accuracy = float(np.logaddexp(0.0, -margins).mean()), pair_accuracy(margins)
    return RewardFigures(loss, accuracy, *wilson_interval(accuracy, len(margins)), calibration(margins), len(margins))


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


def baseline(pairs: Sequence[Pair], held_out: Sequence[Pair], features: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the margins (N,) of logistic regression on feature differences; a quarter of `pairs` sets its penalty."""
    x, tests = (
        torch.tensor(np.array([features(pair.chosen) - features(pair.rejected) for pair in part]))  # (N, F)
        for part in (pairs, held_out)
    )
    fitted, validation = x[len(x) // 4 :], x[: len(x) // 4]
    penalty = max(PENALTIES, key=lambda value: pair_accuracy((validation @ fit_linear(fitted, value)).numpy()))
    return (tests @ fit_linear(x, penalty)).numpy()


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
    titles = (
        "on held-out pairs",
        "accuracy [95 % interval]",
        "more than the bag of words",
        "calibration error",
        "pairs",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in rows.items():
        if name != "cpu_seconds":
            accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            more = "" if name == "bag of words" else "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["more"])
            lines.append(f"| {name} | {accuracy} | {more} | {row['calibration_error']:.3f} | {row['n_pairs']} |")
    return "\n".join(lines)


def make_env(pairs: Sequence[Pair], start: str, out: Path, settings: Settings) -> HH:
    """Return the dialogues with the reward model's score, in standard deviations of the scores of people's replies.

    The reward model has never read a reply without a word, and scores it like a good one; the gate pays for none.
    """
    score = {"name": "preference", "model": str(out / "reward"), "stats": "stored", "max_length": settings.max_tokens}
    has_word = {"name": "regex", "pattern": r"\w", "whole": False}
    return HH(
        pairs,
        AutoTokenizer.from_pretrained(start),
        reward={"name": "gate", "condition": has_word, "reward": score, "otherwise": BLANK},
        max_new_tokens=settings.max_new_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
    )


def make_model(env: HH, start: str, out: Path, settings: Settings, seed: int) -> PPO:
    """Return PPO with four models: the reference is the actor without its adapters."""
    return make_agent(
        env,
        start,
        n_envs=settings.n_envs,
        n_steps=settings.n_steps,
        batch_size=settings.n_envs * settings.n_steps // (8 if settings.n_epochs == 4 else 4),
        n_epochs=settings.n_epochs,
        seed=seed,
        learning_rate=LinearSchedule(LEARNING_RATE, settings.final_rate * LEARNING_RATE, 1.0),
        policy_kwargs={
            "train": LoRA(r=settings.lora, alpha=16),
            "critic": RewardModelCritic(str(out / "reward"), normalise=True),
            "critic_lr_scale": settings.critic_scale,
        },
    )


def reinforce(
    pairs: Sequence[Pair], held_out: Sequence[Pair], start: str, out: Path, settings: Settings, seed: int
) -> Evaluation:
    """Tune with PPO, and measure before and after on held-out prompts."""
    env, test = (make_env(part, start, out, settings) for part in (pairs, held_out))
    model, tokenizer, penalty = make_model(env, start, out, settings, seed), env.tokenizer, KLPenalty(settings.kl)
    lm = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    metrics = [Broken(), Distinct((2,)), Perplexity(lm, tokenizer)]
    options = {"env": test, "seed": seed, "progress_bar": True}
    if (out / "judge").is_dir():
        judge = {"model": str(out / "judge"), "stats": "stored", "max_length": settings.max_tokens}
        options["judge"] = make_reward("preference", **judge)
    prompts = test.prompts[: settings.n_prompts]
    before = evaluate(model, prompts, tokenizer, metrics, **options)
    train(model, settings.n_tokens, out, "replies: PPO for a reward model's score", [penalty])
    after = evaluate(model, prompts, tokenizer, metrics, before=before, reference=lm, **options)
    export(model, tokenizer, out / "policy", overwrite=True)
    before.save(out / "before")
    after.save(out / "results")
    with (out / "samples.txt").open("w", encoding="utf-8") as file:  # of the first five prompts; not printed
        samples = {"before": before.generations[:5], "after": after.generations[:5]}
        Console(file=file, width=120).print(sample_table(samples))
    return after


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the pairs, or a data set's name on the hub")
    parser.add_argument("--model", help="the folder of a pretrained model, or its name on the hub (default: a new one)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/hh"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps, to see that everything runs")
    return parser.parse_args()


def read_settings(args: argparse.Namespace) -> Settings:
    settings = PRETRAINED if args.model else FRESH
    if args.smoke:
        settings = settings._replace(**SMOKE, reward_layers=1 if args.model else None)
    return settings


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # no warning that the reward model's score head is new
    began, settings, out = time.process_time(), read_settings(args), args.out
    all_pairs = read_data(read_pairs, args.data)
    check_settings(out, {name: getattr(args, name) for name in ("data", "model", "seed", "smoke")})
    if args.model:
        pairs, held_out, start = part_of(all_pairs, "train"), part_of(all_pairs, "held_out"), args.model
        halves = {"pairs": pairs[: len(pairs) // 2], "judge": pairs[len(pairs) // 2 :]}
    else:
        pairs, held_out = hold_out(all_pairs, 10 if args.smoke else N_HELD_OUT)
        halves, start = {"pairs": pairs}, str(out / "tuned")
        tuned = stage(out / "tuned.json", tune, pairs, held_out, out / "tuned", args.smoke, args.seed)
        print(f"perplexity of held-out chosen dialogues after tuning: {tuned['held_out_perplexity']:.1f}")
    for name, part in halves.items():
        folder = out / ("reward" if name == "pairs" else name)
        rows = stage(out / f"{name}.json", learn_reward, part, held_out, start, folder, settings, args.seed)
        (out / f"{name}.md").write_text(pairs_table(rows) + "\n", encoding="utf-8")
        print(pairs_table(rows))
    print(reinforce(pairs, held_out, start, out, settings, args.seed).to_markdown())
    print(f"results, curves and models: {out}   {(time.process_time() - began) / 60:.1f} minutes of one core")


if __name__ == "__main__":
    main()
