"""A language model learns to write favourable Chinese reviews, for a classifier that somebody else has trained.

    pip install "textenv[chinese]"
    python examples/zh_reviews.py --data FOLDER

FOLDER holds ranked.tsv: lines of several Chinese reviews separated by tabs, the best first. A tenth is held out.

1. A fresh GPT-2 with one token per character learns to write the reviews.
2. A reward model, the judge, learns from the rankings; nothing is trained on its scores. It, the classifier of step 3
   and a logistic regression on the differences in characters and pairs of characters are measured on held-out rankings.
3. PPO tunes the model of step 1. The reward is the probability of "positive" by the naive Bayes classifier that the
   package snownlp (MIT) brings; the divergence from the start is penalised. Each iteration prints its mean reward and
   five random texts.
4. The models of steps 1 and 3 continue the beginnings of held-out reviews (other reviews may begin alike), and the four
   of `PROMPTS`. The samples are those of the first five prompts.
5. Pairs of other texts, one before and one after, wait in ratings.db: `textenv rate --db OUT/ratings.db --web` asks
   somebody which is better, without saying which is which. After that, this command prints the share of wins.

examples/README.md has the figures. Printed and kept in `--out`: the tables (results.md, results.json), the log of
samples (samples.log), curves.png, and all models as Hugging Face folders. After Ctrl-C the same command resumes:
finished stages are found in `--out`, and tuning and PPO continue where they were last saved (the curves then begin
there).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recipe import check_settings, read_data, stage, train
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import (
    Evaluation,
    KLPenalty,
    Ranking,
    char_tokenizer,
    evaluate,
    export,
    make_agent,
    pair_accuracy,
    sample_table,
    sft,
    train_reward_model,
    wilson_interval,
)
from textenv.feedback.store import FeedbackStore
from textenv.metrics import Broken, Distinct, Perplexity
from textenv.rewards import SnowNLP
from textenv.rewards.preference import Preference
from textenv.rewards.text_model import TextModel
from textenv.tasks.zh_reviews import PROMPTS, ZhReviews, openings, part_of, read_rankings

Rows = Sequence[Sequence[str]]  # rankings, the best review first


class Size(NamedTuple):
    """The size of the model, and the length of its training."""

    width: int
    tuning_epochs: float
    judge_epochs: float
    n_iterations: int  # of PPO
    n_texts: int  # of an evaluation
    n_envs: int = 64
    n_characters: int = 64  # a review is cut there
    n_opening: int = 3  # characters of a review that are a prompt
    max_new_tokens: int = 32


FULL = Size(128, 2.5, 2.0, 40, 400)
SMOKE = Size(16, 1.0, 1.0, 2, 8, n_envs=8, max_new_tokens=8)
KL_COEF = 0.05
LEARNING_RATE = 3e-4
OPENINGS = "beginnings of held-out reviews"
N_SAMPLES = 5  # printed of each iteration, and at the end
N_PAIRS = 30  # to be rated


class EpochLog(BaseCallback):
    """Prints each iteration's mean reward and some of its texts, and appends them to a file."""

    def __init__(self, file: Path, seed: int) -> None:
        super().__init__()
        self.file, self.random = file, random.Random(seed)
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.infos += [info for info in self.locals["infos"] if "end_reason" in info]
        return True

    def _on_rollout_end(self) -> None:
        epoch = self.num_timesteps // (self.model.n_steps * self.model.n_envs) - 1
        mean = np.mean([info["episode"]["r"] for info in self.infos])
        samples = self.random.sample(self.infos, min(N_SAMPLES, len(self.infos)))
        texts = [f"{number}. {info['prompt']}{info['text']}" for number, info in enumerate(samples, start=1)]
        head = f"epoch {epoch} mean-reward: {mean:.4f}\nRandom Sample {len(texts)} text(s) of model output:"
        lines = "\n".join([head, *texts])
        print(lines)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(lines + "\n")
        self.infos = []


class NGrams:
    """The baseline: a weight for each character and pair of characters; the score of a review is the sum of its own.

    It is logistic regression on the n-grams in which the better and the worse review differ.

    Args:
        rankings: The rankings to learn from.
        min_count: Rarer n-grams have no weight.
        decay: The factor of the squared weights in the loss.
    """

    def __init__(self, rankings: Rows, min_count: int = 3, decay: float = 1e-3) -> None:
        texts = [text for ranking in rankings for text in ranking]
        counts = Counter(gram for text in texts for gram in self.grams(text))
        self.index = {gram: i for i, gram in enumerate(g for g, count in counts.items() if count >= min_count)}
        self.weight = torch.zeros(len(self.index), 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=50, line_search_fn="strong_wolfe")
        bags, [better, worse] = self.bags(texts), torch.tensor(pairs(rankings)).T

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            scores = functional.embedding_bag(*bags, mode="sum")[:, 0]
            value = -functional.logsigmoid(scores[better] - scores[worse]).mean() + decay * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @staticmethod
    def grams(text: str) -> list[str]:
        return sorted({*text, *map("".join, itertools.pairwise(text))})

    def bags(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        known = [[self.index[gram] for gram in self.grams(text) if gram in self.index] for text in texts]
        starts = np.cumsum([0, *map(len, known[:-1])])
        return torch.tensor([i for row in known for i in row]), self.weight, torch.tensor(starts)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return functional.embedding_bag(*self.bags(texts), mode="sum")[:, 0].numpy()


def pairs(rankings: Rows) -> list[tuple[int, int]]:
    """Return all pairs of a better and a worse review of one ranking, as indices among all reviews."""
    starts = np.cumsum([0, *map(len, rankings)]).tolist()
    per_ranking = [(start, Ranking(ranking).pairs()) for start, ranking in zip(starts, rankings, strict=False)]
    return [(start + better, start + worse) for start, indices in per_ranking for better, worse in indices]


def measure(score: Callable[[Sequence[str]], np.ndarray], rankings: Rows) -> dict[str, float]:
    """Return how often the better review scores higher: of all pairs, and of the best and the worst of each line."""
    scores = score([text for ranking in rankings for text in ranking])
    [better, worse], ends = np.array(pairs(rankings)).T, np.cumsum([len(ranking) for ranking in rankings])
    best, worst = scores[np.array([0, *ends[:-1]])], scores[ends - 1]
    accuracy = pair_accuracy(scores[better] - scores[worse])
    low, high = wilson_interval(accuracy, len(rankings))  # a line counts as one trial, since its pairs share reviews
    extremes = pair_accuracy(best - worst)
    return {"accuracy": accuracy, "low": low, "high": high, "best_against_worst": extremes, "n_pairs": len(better)}


def tune(parts: dict[str, Rows], folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train a fresh GPT-2 to write reviews, with a tokenizer of their characters."""
    texts, held_out = ([text for ranking in parts[part] for text in ranking] for part in ("train", "held_out"))
    tokenizer = char_tokenizer([*texts, *PROMPTS, *PROMPTS], min_count=2)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=size.n_characters,
        n_layer=2,
        n_embd=size.width,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # As answers to their first character, long reviews lose their end; as texts they would be split, and the model
    # would learn to begin midway.
    tuned = sft.tune(
        config,
        [(text[:1], text[1:]) for text in texts],
        folder,
        tokenizer=tokenizer,
        held_out=[(text[:1], text[1:]) for text in held_out],
        packing=True,
        n_epochs=size.tuning_epochs,
        learning_rate=3e-3,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert tuned.held_out_loss is not None
    return {"n_steps": tuned.n_steps, "held_out_perplexity": tuned.perplexity(tuned.held_out_loss)}


def learn_rankings(rankings: Rows, tuned: Path, folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train a reward model that starts from the language model; its loss is over all tokens, not the last alone."""
    trained = train_reward_model(
        tuned,
        AutoTokenizer.from_pretrained(tuned),
        [Ranking(ranking) for ranking in rankings],
        folder,
        loss="tokens",
        n_epochs=size.judge_epochs,
        learning_rate=1e-3,
        seed=seed,
        overwrite=True,
    )
    return {"n_rankings": len(rankings), "last_loss": float(trained.losses[-20:].mean())}


def compare(parts: dict[str, Rows], out: Path) -> dict[str, Any]:
    """Measure the judge, the classifier of the reward and the baseline on the held-out rankings."""
    judge, classifier = TextModel(out / "judge"), SnowNLP()
    scorers = {
        "judge": lambda texts: judge.logits(texts)[:, 0],
        "character n-grams": NGrams(parts["train"]),
        "SnowNLP": lambda texts: np.array([classifier.score_text(text) for text in texts]),
    }
    return {name: measure(score, parts["held_out"]) for name, score in scorers.items()}


def accuracy_table(figures: dict[str, Any]) -> str:
    lines = ["| held-out pairs | all ordered pairs | best against worst |", "|---|---|---|"]
    for name, row in figures.items():
        if name != "cpu_seconds":
            interval = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"| {name} | {interval} | {row['best_against_worst']:.3f} |")
    return "\n".join(lines)


def reinforce(parts: dict[str, Rows], out: Path, size: Size, seed: int, console: Console) -> dict[str, Evaluation]:
    """Tune with PPO, and measure before and after on held-out beginnings and on the four of `PROMPTS`."""
    tuned = out / "tuned"
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tuned)
    reward, limits = SnowNLP(reads="whole"), {"max_new_tokens": size.max_new_tokens}
    env = ZhReviews(parts["train"], tokenizer, reward=reward, n_characters=size.n_opening, **limits)
    model = make_agent(
        env, str(tuned), n_envs=size.n_envs, seed=seed, learning_rate=LinearSchedule(LEARNING_RATE, 0.0, 1.0)
    )
    start = AutoModelForCausalLM.from_pretrained(tuned)
    metrics = [Perplexity(start, tokenizer), Distinct((2,), split=list), Broken()]
    judge = Preference(out / "judge", stats="stored")  # in standard deviations of its scores of real reviews
    prompts = {
        OPENINGS: openings(parts["held_out"], size.n_opening)[: size.n_texts],
        "the four prompts": [prompt for prompt in PROMPTS for _ in range(size.n_texts // len(PROMPTS))],
    }
    options = {"reward": reward, "judge": judge, "reference": str(tuned), "seed": seed, **limits}
    before = {name: evaluate(model, rows, tokenizer, metrics, **options) for name, rows in prompts.items()}
    train(
        model,
        size.n_iterations * size.n_envs * size.max_new_tokens,
        out,
        "Chinese reviews: PPO for SnowNLP's sentiment",
        [KLPenalty(KL_COEF), EpochLog(out / "samples.log", seed)],
    )
    after = {
        name: evaluate(model, rows, tokenizer, metrics, before=before[name], **options)
        for name, rows in prompts.items()
    }
    export(model, tokenizer, out / "policy", overwrite=True)
    for name in prompts:
        shown = {"before": before[name].generations, "after": after[name].generations}
        console.print(sample_table({title: texts[:N_SAMPLES] for title, texts in shown.items()}))
    return after


def ratings(result: Evaluation, file: Path) -> str:
    """Put pairs of texts of the same prompt into a store of feedback, once; return what raters have said of them."""
    asked = file.is_file()
    with FeedbackStore(file) as store:
        assert result.before is not None
        rows = zip(result.before.generations, result.generations, strict=True)
        # The first texts are in the table of samples, which says what was written before and after.
        for before, after in itertools.islice(() if asked else rows, N_SAMPLES, N_SAMPLES + N_PAIRS):
            texts = [before.text, after.text]
            store.add(str(after.prompt), texts, "compare", models=["before", "after"], run=str(file.parent))
        decided = [better for answer in store.answers() for better, _ in answer.pairs()]
        n_ties = sum(answer.value in ("tie", "both_bad") for answer in store.answers())
    if not decided:
        return f"rated: nothing yet; textenv rate --db {file} --web asks"
    share = sum(better == 1 for better in decided) / len(decided)
    low, high = wilson_interval(share, len(decided))
    return f"rated: after is better in {share:.3f} [{low:.3f}, {high:.3f}] of {len(decided)} pairs; {n_ties} tied"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds ranked.tsv")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/zh_reviews"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start, console, out = time.perf_counter(), Console(), args.out
    size = SMOKE if args.smoke else FULL
    rankings = read_data(read_rankings, args.data)
    parts: dict[str, Rows] = {
        part: [tuple(text[: size.n_characters] for text in texts) for texts in part_of(rankings, part)]
        for part in ("train", "held_out")
    }
    check_settings(out, {"data": str(args.data.resolve()), "seed": args.seed, **size._asdict()})
    stage(out / "tune.json", tune, parts, out / "tuned", size, args.seed)
    stage(out / "judge.json", learn_rankings, parts["train"], out / "tuned", out / "judge", size, args.seed)
    accuracies = stage(out / "accuracies.json", compare, parts, out)
    after = reinforce(parts, out, size, args.seed, console)
    rated = ratings(after[OPENINGS], out / "ratings.db")
    tables = [accuracy_table(accuracies), *(f"{name}:\n\n{result.to_markdown()}" for name, result in after.items())]
    tables.append(rated)
    (out / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    results = {"accuracies": accuracies, **{name: result.to_dict() for name, result in after.items()}}
    (out / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"{time.perf_counter() - start:.0f} seconds; curves, log of samples and models are in {out}")


if __name__ == "__main__":
    main()
