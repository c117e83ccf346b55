"""Run folders that are written by hand, with whatever texts and figures a test needs."""

import json

import numpy as np
import yaml

from agents import PromptScores
from agents.evaluation.prompt_scores import write_scores
from textenv.metrics import mean_of

PROMPTS = ("The film was", "A chair is", "It", "这部电影")
SIZE = 64  # tokens of a rollout
ENDS = {"eos": 0.75, "stop": 0.0, "length": 0.25, "env": 0.0}


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def row_of(i, n, noise=0.0):
    """Return the row of iteration `i` of `n`, all of whose figures follow from both numbers."""
    part = i / n
    return {
        "tokens": (i + 1) * SIZE,
        "reward/task": 0.2 + 0.6 * part + noise,
        "kl/sequence": 2 * part,
        "episode/length": 10 + 5 * part,
        **{f"episode/end_{name}": share for name, share in ENDS.items()},
        "train/entropy_loss": -2 + part,
        "train/value_loss": 0.1 * (1 - part),
        "train/explained_variance": part,
        **{f"value/explained_variance_{third}": part * k for k, third in enumerate(("first", "middle", "last"))},
        "train/clip_fraction": 0.1,
        "train/approx_kl": 0.01,
        "time/tokens_per_second": 32.0,  # an iteration takes two seconds
        "time/update_share": 0.5,
        "time/reward_share": 0.125,
        "train/loss": None if i == 1 else 0.5,
        "train/aggregation": "token",
    }


def episode(at, k, text):
    """Return the row of a trained episode, with other numbers for each of its tokens."""
    pieces = [piece for word in text.split(" ") if word for piece in (" ", word)]
    steps = np.arange(len(pieces))
    numbers = {
        "reward": np.where(steps == len(pieces) - 1, 0.25 + k, 0.0),
        "penalty": 0.01 * steps,
        "value": 0.1 + 0.05 * steps,
        "return": 0.5 + 0.01 * steps,
        "advantage": 0.3 - 0.15 * steps,
        "log_prob": -1.0 - steps,
        "entropy": 1.0 + 0.1 * steps,
        "kl": 0.05 * (steps - 1),
        "ratio": 0.9 + 0.1 * steps,
    }
    return {
        "tokens": at,
        "prompt": "The film was",
        "pieces": pieces,
        **{name: np.round(values, 6).tolist() for name, values in numbers.items()},
        "clipped": [bool(step % 2) for step in steps],
        "support": [100] * len(pieces),
        "alternatives": [[[piece, 0.5], [" bad", 0.25], ["\n", 0.125], ["<b>", 0.06], ["", 0.03]] for piece in pieces],
    }


def made_run(folder, n=6, texts=None, config=None, seed=0, rewards=(0.5, 0.75, 1.0, 0.75), finished=True, noise=None):
    """Write the folder of a run of `n` iterations with two evaluations and two tables of samples; return it.

    `texts` has the text of each prompt in each table.
    """
    folder.mkdir(parents=True)
    about = {"format": 1, "started": "2026-11-30T10:00:00+00:00", "versions": {"textenv": "0.1.0"}, "git": {}}
    (folder / "run.json").write_text(json.dumps(about))
    values = {
        "total_tokens": n * SIZE,
        "seed": seed,
        "env": {"id": "text", "prompts": "prompts.txt", "args": {"stop_strings": ["."]}, "reward": "vader"},
        "model": {"name": "gpt2", "train": "lora"},
        "algorithm": {"name": "ppo", "learning_rate": 1e-4},
        "out": str(folder),
    }
    for key, value in (config or {}).items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    (folder / "config.yml").write_text(yaml.safe_dump(values))
    noises = np.zeros(n) if noise is None else noise
    write_lines(
        folder / "metrics.jsonl",
        [{"tokens": 0, "time/evaluation_seconds": 0.5}] + [row_of(i, n, float(noises[i])) for i in range(n)],
    )
    texts = texts or [
        [" good film .", " chair .", " is .", " 很好"],
        [" very good film !", " chair .", " was .", " 很不好"],
    ]
    end = n * SIZE
    write_lines(
        folder / "samples.jsonl",
        [
            {"tokens": at, "prompt": prompt, "text": text, "end_reason": "eos", "reward": 0.5, "parts": {}}
            for at, table in zip(np.linspace(0, end, len(texts)).astype(int).tolist(), texts)
            for prompt, text in zip(PROMPTS, table)
        ],
    )
    write_lines(folder / "tokens.jsonl", [episode(at, k, texts[0][0]) for at in (SIZE, n * SIZE) for k in range(2)])
    before, after = (0.25, 0.0, 0.5, 0.25), rewards
    history = [
        {"num_timesteps": at, "figures": {"reward": float(np.mean(row))}} for at, row in ((0, before), (end, after))
    ]
    (folder / "history.json").write_text(json.dumps(history))
    scores = {at: PromptScores(PROMPTS, {"reward": mean_of(row)}) for at, row in ((0, before), (end, after))}
    write_scores(folder / "scores.json", scores)
    (folder / "best").mkdir()
    best = {"figure": "reward", "value": float(np.mean(after)), "num_timesteps": end}
    (folder / "best" / "best.json").write_text(json.dumps(best))
    if finished:
        (folder / "results.json").write_text("{}")
    return folder


def data_of(page):
    """Return the data of a page, from its file."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
