"""The critic on a real model: PPO with a critic in several settings, without one, and GRPO, by their held-out score.

    python benchmarks/critic.py --model FOLDER --reviews FOLDER [--json FILE]

Each run trains adapters of rank 8 on continuations of 32 tokens of the first four words of reviews, scored by VADER's
sentiment, and then continues 24 held-out openings four times each. A prompt is seen once, so that the mean score of a
rollout is that of unseen prompts, too. `--json` is a file to which each run adds a line with its curves; its runs are
not repeated. A run takes about four minutes of one core. `--settings` and `--seeds` choose the runs; see `SETTINGS`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from iterations import Scores
from stable_baselines3 import PPO
from transformers import AutoTokenizer
from work import RANK, add_line, find_line, prepare

from agents import CriticWarmup, KLPenalty, LoRA, Pretrained, SeparateCritic, SharedCritic, evaluate, make_agent
from textenv import TextEnv
from textenv.rewards import Vader
from textenv.tasks.reviews import Review, part_of, read_reviews

N_WORDS, N_HELD_OUT, N_SAMPLES = 4, 24, 4
KL_COEF = 0.02
LOGGED = ("explained_variance", "value_loss", "approx_kl", "clip_fraction", "entropy_loss")


@dataclass(frozen=True)
class Setting:
    """The difference of a setting from `make_agent` with the benchmark's sizes.

    Attributes:
        about: What it shows.
        samples: The samples of each prompt.
        warmup: The rollouts on which the critic is trained alone.
        algorithm: Arguments of the algorithm.
        policy: Arguments of the policy.
        buffer: Arguments of the rollout buffer.
        separate: Whether the critic has a trunk of its own, the start of the policy's model.
    """

    about: str
    samples: int = 1
    warmup: int = 0
    algorithm: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    buffer: dict[str, Any] = field(default_factory=dict)
    separate: bool = False


ONE: dict[str, Any] = {"gae_lambda": 1.0}
DETACHED: dict[str, Any] = {"critic": SharedCritic(detach=True)}
SETTINGS = {
    "shared": Setting("shared critic, as `make_agent` builds it: lambda 0.95"),
    "lambda-1": Setting("the same, lambda 1", algorithm=ONE),
    "head-1": Setting("lambda 1, head at the policy's rate", algorithm=ONE, policy={"head_lr_scale": 1.0}),
    "head-10": Setting("lambda 0.95, head at 10 times that", policy={"head_lr_scale": 10.0}),
    "detached": Setting("lambda 0.95, the value loss stops at the head", policy=DETACHED),
    "popart": Setting("lambda 0.95, popart", policy={"value_norm": "popart"}),
    "warmup": Setting("lambda 0.95, one rollout for the critic alone", warmup=1),
    "separate": Setting(
        "lambda 0.95, a trunk of its own at 3e-5",
        policy={"critic_lr_scale": 0.03, "head_lr_scale": 7.4},
        separate=True,
    ),
    "none": Setting("no critic, lambda 1", algorithm={**ONE, "vf_coef": 0.0}),
    "none-8": Setting("no critic, lambda 1, 8 samples a prompt", 8, algorithm={**ONE, "vf_coef": 0.0}),
    "grpo": Setting(
        "GRPO, mean only, 8 samples a prompt", 8, algorithm={"vf_coef": 0.0}, buffer={"advantage": "grpo_mean"}
    ),
}


class Curves(Scores):
    """Records the score of each rollout, and what PPO logs of the update behind it."""

    def __init__(self, with_gradients: bool) -> None:
        super().__init__()
        self.with_gradients = with_gradients
        self.rows: list[dict[str, float]] = []

    def _on_rollout_end(self) -> None:
        self._finish_row()
        buffer = self.model.rollout_buffer
        own = {"tokens": self.model.num_timesteps, "score": float(np.mean(self.scores))}
        own |= {"value_mean": float(buffer.values.mean()), "value_std": float(buffer.values.std())}
        own |= {"return_mean": float(buffer.returns.mean()), "return_std": float(buffer.returns.std())}
        if self.with_gradients:
            own |= gradient_norms(self.model)
        self.scores = []
        self.rows.append(own)

    def _on_training_end(self) -> None:
        self._finish_row()

    def _finish_row(self) -> None:
        """Add what the update behind the last rollout logged."""
        if self.rows:
            logged = self.logger.name_to_value
            self.rows[-1] |= {name: float(logged[f"train/{name}"]) for name in LOGGED if f"train/{name}" in logged}


def gradient_norms(model: PPO) -> dict[str, float]:
    """Return the norms of the gradients of the policy loss and of the value loss, on the first minibatch to come."""
    buffer, policy = model.rollout_buffer, model.policy
    state = buffer.rng.bit_generator.state
    samples = next(iter(buffer.get(model.batch_size)))
    buffer.rng.bit_generator.state = state
    policy.set_training_mode(True)
    head = [weight for name, weight in policy.named_parameters() if "critic" in name and weight.requires_grad]
    trunk = [weight for name, weight in policy.named_parameters() if "critic" not in name and weight.requires_grad]
    norms: dict[str, float] = {}
    for loss in ("policy", "value"):
        policy.zero_grad()
        values, log_probs, _ = policy.evaluate_actions(samples.observations, samples.actions)
        if loss == "policy":
            ((log_probs - samples.old_log_prob).exp() * samples.advantages).mean().neg().backward()
        else:
            (model.vf_coef * (values.flatten() - samples.returns).square().mean()).backward()
        for part, weights in (("trunk", trunk), ("head", head)):
            squares = [float(weight.grad.square().sum()) for weight in weights if weight.grad is not None]
            norms[f"norm_{loss}_{part}"] = sum(squares) ** 0.5
    policy.zero_grad()
    return norms


def run(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one setting from one seed, and return its curves and its held-out score."""
    setting, tokenizer, vader = SETTINGS[name], AutoTokenizer.from_pretrained(args.model), Vader()
    reviews = read_reviews(args.reviews)
    rules: dict[str, Any] = {"reward": vader, "max_new_tokens": args.new_tokens}
    env = TextEnv(
        openings(part_of(reviews, "train")), tokenizer, samples_per_prompt=setting.samples, score_at="done", **rules
    )
    lm = Pretrained(args.model)
    policy: dict[str, Any] = {"train": LoRA(r=RANK), **setting.policy}
    if setting.separate:
        policy["critic"] = SeparateCritic(lm)
    sizes = {"n_envs": args.lanes, "n_epochs": 2, "batch_size": args.lanes * args.new_tokens // 4}
    options = {"learning_rate": args.rate, "device": "cpu", "seed": seed, **sizes, **setting.algorithm}
    model = make_agent(env, lm, policy_kwargs=policy, rollout_buffer_kwargs=dict(setting.buffer), **options)
    curves, start = Curves(args.gradients and model.vf_coef > 0), time.process_time()
    steps = [CriticWarmup(setting.warmup)] if setting.warmup else []
    model.learn(args.tokens, callback=[KLPenalty(KL_COEF), *steps, curves], log_interval=None)
    seconds, held_out = time.process_time() - start, openings(part_of(reviews, "held_out"))[:N_HELD_OUT]
    result = {"setting": name, "seed": seed, "tokens": args.tokens, "seconds": round(seconds, 1), "curve": curves.rows}
    for kind, greedy in (("sampled", False), ("greedy", True)):
        n = 1 if greedy else N_SAMPLES
        figures = evaluate(model, held_out, tokenizer, n=n, deterministic=greedy, seed=1, n_envs=96, **rules).figures
        result[kind] = figures["reward"].value
    return result


def openings(reviews: Sequence[Review]) -> list[str]:
    """Return the first words of those reviews that have more."""
    texts = [review.text.split() for review in reviews]
    return [" ".join(words[:N_WORDS]) for words in texts if len(words) > N_WORDS]


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of each run: seeds outside, so that every setting has one before any has two."""
    for seed in args.seeds:
        for name in args.settings:
            key = {"setting": name, "seed": seed, "tokens": args.tokens}
            row = find_line(args.json, key)
            if row is None:
                row = run(args, name, seed)
                add_line(args.json, row)
            yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over seeds as a Markdown table, with the smallest and the largest in brackets."""
    columns = ("rollouts, first half", "second half", "held out", "greedy", "explained variance")
    lines = [f"| setting | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        halves = [np.array_split([point["score"] for point in row["curve"]], 2) for row in own]
        numbers = [[float(np.mean(half)) for half in side] for side in zip(*halves, strict=True)]
        numbers += [[row[kind] for row in own] for kind in ("sampled", "greedy")]
        # The values of the first rollout are those of a head of zeros.
        numbers.append([float(np.mean([point["explained_variance"] for point in row["curve"][1:]])) for row in own])
        cells = [f"{statistics.mean(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in numbers]
        cells[-1] = cells[-1] if any(numbers[-1]) else "-"
        lines.append(f"| {name}: {SETTINGS[name].about} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parser_of_runs(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of benchmarks that train a real model on reviews, with several seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of saved weights")
    parser.add_argument("--reviews", required=True, help="a folder of reviews, or a data set, as for `read_reviews`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="add a line for each run to this file")
    parser.add_argument("--smoke", action="store_true", help="few tokens and lanes: only to see that it runs")
    return parser


def arguments() -> argparse.Namespace:
    """Return the options, of which `--smoke` makes all small."""
    parser = parser_of_runs(__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=6144, help="the tokens of a run")
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate")
    parser.add_argument("--gradients", action="store_true", help="measure gradients of both losses; a sixth more time")
    args = parser.parse_args()
    args.lanes, args.new_tokens = (16, 4) if args.smoke else (32, 32)
    args.tokens = 128 if args.smoke else args.tokens
    return args


def main() -> None:
    """Run all settings, and print the table."""
    args = arguments()
    prepare()
    rows = []
    for row in results(args):
        rows.append(row)
        print(f"{row['setting']} seed {row['seed']}: {row['sampled']:.3f}, {row['seconds']} s", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
