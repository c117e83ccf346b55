"""A real model side by side: GRPO of ours and of TRL 1.16, by CPU seconds and by completions.

    TRL_GRPO_PYTHON=trl-env/bin/python python benchmarks/real.py --model FOLDER --reviews FOLDER [--json FILE]

Both sides train adapters of rank 8 to continue the first four words of film reviews with 24 tokens that VADER likes:
8 samples a prompt, 4 prompts and 8 optimizer steps an iteration, the same settings where both have one (README.md lists
them). For each seed they train in turns, an iteration each, each side in a process of its own on one thread. Then one
evaluator continues the same 200 held-out openings with both. `--json` is a file to which each run
adds a line with its curve; its runs are not repeated. `--smoke` is only to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from critic import openings, parser_of_runs
from grpo import INSTALL, N_EPOCHS, N_MINIBATCHES
from iterations import Done, has_trl, ours, trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from work import RANK, Row, add_line, find_line, prepare, table

from agents import RECIPES, LoRA, evaluate, export, make_agent
from textenv import TextEnv
from textenv.checks.extras import check_extra, needs
from textenv.metrics import Distinct, Perplexity
from textenv.rewards import Vader
from textenv.tasks.reviews import part_of, read_reviews

SAMPLES = 8  # of a prompt
RATE = 1e-3  # the learning rate
KL_COEF = RECIPES["grpo"]["kl.coef"]
WINDOW = 3  # iterations whose completions a reward is the mean of
MUST = 2.0  # times our CPU seconds that TRL takes to the same reward
NAMES = {"ours": "ours", "trl": "TRL 1.16"}

Side: TypeAlias = Callable[[], Done]  # runs one iteration
Curve: TypeAlias = list[dict[str, float]]  # after each iteration: sums so far, and the mean score of its completions


@contextmanager
def our_side(args: argparse.Namespace, seed: int, folder: Path) -> Iterator[Side]:
    """Yield iterations of ours; write the model into the folder in the end."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    env = TextEnv(
        prompts_of(args, "train"),
        tokenizer,
        reward=Vader(),
        score_at="done",
        max_new_tokens=args.new_tokens,
        samples_per_prompt=SAMPLES,
        seed=seed,
    )
    model = make_agent(
        env,
        args.model,
        n_envs=args.lanes,
        recipe="grpo",
        policy_kwargs={"train": LoRA(r=RANK)},
        n_epochs=N_EPOCHS,
        batch_size=args.lanes * args.new_tokens // N_MINIBATCHES,
        learning_rate=RATE,
        seed=seed,
        device="cpu",
    )
    yield ours(model, "cpu")
    export(model, tokenizer, folder)


@contextmanager
def trl_side(args: argparse.Namespace, seed: int, folder: Path) -> Iterator[Side]:
    """Yield iterations of TRL's GRPOTrainer, which writes its model into the folder in the end."""
    prompts = folder.with_name("prompts.json")
    prompts.write_text(json.dumps(prompts_of(args, "train")), encoding="utf-8")
    # What differs from TRL's defaults, besides the sizes: README.md says why.
    trainer = {"learning_rate": RATE, "lr_scheduler_type": "constant", "loss_type": "grpo", "seed": seed}
    work = {
        "device": "cpu",
        "folder": args.model,
        "prompts": str(prompts),
        "n_lanes": args.lanes,
        "samples": SAMPLES,
        "new_tokens": args.new_tokens,
        "n_epochs": N_EPOCHS,
        "n_minibatches": N_MINIBATCHES,
        "kl_coef": KL_COEF,
        "rank": RANK,
        "task": {"trainer": trainer, "adapters": {"lora_alpha": LoRA().alpha}},
        "save": str(folder),
    }
    with trl(os.environ["TRL_GRPO_PYTHON"], "trl_grpo.py", work) as peer:
        yield peer


SIDES = {"ours": our_side, "trl": trl_side}


def prompts_of(args: argparse.Namespace, part: Any) -> list[str]:
    """Return the openings of the reviews of a part."""
    return openings(part_of(read_reviews(args.reviews), part))


def train(args: argparse.Namespace, seed: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Train these sides in turns, an iteration each, and return the curve and the held-out figures of each."""
    curves: dict[str, Curve] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in names}
        with ExitStack() as stack:
            sides = {name: stack.enter_context(SIDES[name](args, seed, folders[name])) for name in names}
            while short := [name for name in names if total(curves[name], "completions") < args.completions]:
                for name in short:
                    curves[name].append(after(curves[name], sides[name]()))
        return {name: {"held_out": held_out(args, folders[name]), "curve": curves[name]} for name in names}


def total(curve: Curve, name: str) -> float:
    """Return a sum over all iterations so far."""
    return curve[-1][name] if curve else 0


def after(curve: Curve, done: Done) -> dict[str, float]:
    """Return the point of a curve after one more iteration."""
    assert done.score is not None, "Expected completions that end in each iteration, got none."
    sums = ("completions", "tokens", "optimizer_steps", "seconds")
    return {**{name: total(curve, name) + getattr(done, name) for name in sums}, "score": done.score}


def held_out(args: argparse.Namespace, folder: str | Path) -> dict[str, float]:
    """Return the figures of the model of a folder, on openings that nothing was trained on."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(args.model), prompts_of(args, "held_out")[: args.held_out]
    rules: dict[str, Any] = {"reward": Vader(), "max_new_tokens": args.new_tokens}
    model = make_agent(TextEnv(prompts, tokenizer, **rules), str(folder), n_envs=args.lanes, device="cpu")
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    metrics = [Distinct((2,)), Perplexity(start, tokenizer)]
    figures = evaluate(model, prompts, tokenizer, metrics, seed=1, n_envs=args.lanes, **rules).figures
    return {name: figure.value for name, figure in figures.items()}


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the run of the start, and that of each side and seed; those of the file are not repeated."""
    common = {"model": Path(args.model).name, "new_tokens": args.new_tokens, "prompts": args.held_out}
    key = {"side": "start", **common}
    if (row := find_line(args.json, key)) is None:
        row = {**key, "held_out": held_out(args, args.model)}
        add_line(args.json, row)
    yield row
    sizes = {"lanes": args.lanes, "completions": args.completions, **common}
    can_run = [name for name in args.sides if name != "trl" or has_trl(os.environ.get("TRL_GRPO_PYTHON", ""), "1.16.0")]
    for seed in args.seeds:
        keys = {name: {"side": name, "seed": seed, **sizes} for name in args.sides}
        known = {name: row for name, key in keys.items() if (row := find_line(args.json, key)) is not None}
        runs = train(args, seed, [name for name in can_run if name not in known])
        for name, run in runs.items():
            known[name] = {**keys[name], **run}
            add_line(args.json, known[name])
        yield from known.values()


def smoothed(curve: Curve, window: int = WINDOW) -> list[float]:
    """Return the mean score of all completions of `window` iterations in a row, at the last one of each such row."""
    weights = np.diff([0, *(point["completions"] for point in curve)])
    scores = [point["score"] for point in curve]
    spans = [slice(end - window, end) for end in range(window, len(curve) + 1)]
    return [float(np.average(scores[span], weights=weights[span])) for span in spans]


def seconds_to_reward(curve: Curve, reward: float, window: int = WINDOW) -> float | None:
    """Return the CPU seconds up to the end of the first iteration whose smoothed score is the reward or more."""
    points = zip(curve[window - 1 :], smoothed(curve, window), strict=True)
    return next((point["seconds"] for point, score in points if score >= reward), None)


def score_at(curve: Curve, completions: float, window: int = WINDOW) -> float:
    """Return the smoothed score of the first iteration at whose end there are so many completions."""
    points = zip(curve[window - 1 :], smoothed(curve, window), strict=True)
    return next(score for point, score in points if point["completions"] >= completions)


def seconds_row(claim: str, ours: Sequence[float | None], theirs: Sequence[float | None]) -> Row:
    """Return the row for the CPU seconds of both sides, seed by seed; None where a run has not got there.

    The ratios are those of the seeds in which both have got there. The target is met if that is all of them, and missed
    if a seed of ours alone has not.
    """
    seeds = list(zip(ours, theirs, strict=True))
    ratios = [b / a for a, b in seeds if a is not None and b is not None]
    ratio = statistics.median(ratios) if ratios else None
    met = ratio >= MUST if ratio is not None and len(ratios) == len(seeds) else None
    met = False if any(a is None and b is not None for a, b in seeds) else met
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-"
    return Row(claim, median_seconds(ours), median_seconds(theirs), ratio, spread, f">= {MUST}x", met)


def median_seconds(values: Sequence[float | None]) -> str:
    """Return the median and the range of those that are known, and of how many seeds they are."""
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    share = "" if len(known) == len(values) else f", {len(known)} of {len(values)} seeds"
    return f"{statistics.median(known):,.1f} s ({min(known):,.1f} to {max(known):,.1f}){share}"


def figure_row(claim: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Return the row for a figure of both sides, with the range of the differences, ours less theirs, as its spread."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    spread = f"difference {min(differences):+.2f} to {max(differences):+.2f}"
    return Row(claim, mean_figure(ours), mean_figure(theirs), None, spread, "-", None)


def mean_figure(values: Sequence[float]) -> str:
    """Return the mean and the range."""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def rows_of(args: argparse.Namespace, start: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Return the rows of the table; `runs` has those of each side in the order of the seeds."""

    def row(is_seconds: bool, claim: str, read: Callable[[dict[str, Any]], Any]) -> Row:
        values = {name: [read(run) for run in rows] for name, rows in runs.items()}
        if len(values) == len(SIDES):
            return (seconds_row if is_seconds else figure_row)(claim, values["ours"], values["trl"])
        show = median_seconds if is_seconds else mean_figure
        cells = [show(values[name]) if name in values else "not measured" for name in SIDES]
        return Row(claim, *cells, None, "-", "-", None)

    rows = [
        row(True, f"CPU seconds to a reward of {reward}", lambda run, it=reward: seconds_to_reward(run["curve"], it))
        for reward in args.rewards
    ]
    rows.append(row(True, f"CPU seconds of {args.completions} completions", lambda run: run["curve"][-1]["seconds"]))
    for n in (args.completions * share // 4 for share in (2, 3, 4)):
        rows.append(row(False, f"reward at {n} completions", lambda run, it=n: score_at(run["curve"], it)))
    for name, value in start.items():
        claim = f"held out, {name}; {value:.2f} at the start"
        rows.append(row(False, claim, lambda run, it=name: run["held_out"][it]))
    return rows


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the smoothed reward against CPU seconds and against completions: means, and bands over the seeds."""
    with needs("plot", "matplotlib", "the picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"seconds": "CPU seconds of training, one thread", "completions": "completions"}
    grid = figure.subplots(1, len(panels), sharey=True)
    grid[0].set_ylabel(f"reward, mean of {WINDOW} iterations")
    for axes, (axis, label) in zip(grid, panels.items(), strict=True):
        for name, rows in runs.items():
            at = [[point[axis] for point in run["curve"][WINDOW - 1 :]] for run in rows]
            common = np.linspace(max(x[0] for x in at), min(x[-1] for x in at), 200)  # where all seeds have a reward
            lines = [np.interp(common, x, smoothed(run["curve"])) for x, run in zip(at, rows, strict=True)]
            axes.plot(common, np.mean(lines, axis=0), label=f"{NAMES[name]}, {len(rows)} seeds")
            axes.fill_between(common, np.min(lines, axis=0), np.max(lines, axis=0), alpha=0.2)
        axes.set_xlabel(label)
        axes.grid(True, alpha=0.3)
    grid[0].legend()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """Return the options, of which `--smoke` makes all small."""
    parser = parser_of_runs(__doc__)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="NAME")
    parser.add_argument("--completions", type=int, default=640, help="those that a side trains on")
    parser.add_argument("--rewards", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6], help="those to get to")
    args = parser.parse_args()
    args.lanes, args.new_tokens, args.held_out = (16, 4, 8) if args.smoke else (32, 24, 200)
    fewest = WINDOW * args.lanes
    args.completions = fewest if args.smoke else args.completions
    if args.completions < fewest:
        parser.error(f"Expected --completions of {fewest} or more, {WINDOW} iterations, got {args.completions}.")
    return args


def main() -> None:
    """Run all sides and seeds, print the table, and draw the picture."""
    args = arguments()
    check_extra("plot", "matplotlib", "the picture")  # before the hours of training
    prepare()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.sides}
    rows = results(args)
    start = next(rows)
    for row in rows:
        runs[row["side"]].append(row)
        reward, seconds = row["held_out"]["reward"], row["curve"][-1]["seconds"]
        print(f"{row['side']} seed {row['seed']}: {reward:.3f}, {seconds:.0f} s", file=sys.stderr)
    for name in [name for name, rows in runs.items() if len(rows) < len(args.seeds)]:
        print(f"{NAMES[name]}: not measured. {INSTALL}", file=sys.stderr)
        del runs[name]
    print(table(rows_of(args, start["held_out"], runs)))
    draw(runs, Path(tempfile.mkdtemp() if args.smoke else Path(__file__).parent, "real.png"))


if __name__ == "__main__":
    main()
