"""PPO with a model whose blocks run in other processes, as Petals serves BLOOM-176B to TextRL.

    python examples/remote_backend.py --seed 0

A small BLOOM of four blocks is first trained on the demo's product reviews (some seconds; kept in `--out`). Then two
server processes hold two of its blocks each, frozen, and listen on this machine's loopback; only tensors are sent. This
process holds the embeddings, the last norm, eight soft prompts and an output layer. PPO trains the latter two to write
positive reviews, by sending hidden states and gradients through the servers. A control trains the value head alone.
The script prints the figures of both before and after, and the traffic; `--out` gets figures, curves and checkpoints.
Expect, with seed 0, in less than four minutes of processor time (of all three processes): the reward goes from 0.51 to
0.92, four texts of five follow the grammar before and after, and the control does not change. A token costs 3 kB of
traffic when it is sampled and 32 kB in the updates.

docs/remote.md says how a model in another environment, such as a Petals client, takes the place of these servers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from remote_blocks import new_key, serving
from remote_lm import RemoteBlocks
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import (
    EpisodeMetrics,
    Evaluation,
    KLPenalty,
    RewardCurves,
    evaluate,
    make_agent,
    pretrain,
    save_checkpoint,
    word_tokenizer,
)
from textenv import Preds, Prompt, TextEnv, demo

N_BLOCKS = 4
N_VIRTUAL = 8
MAX_NEW_TOKENS = 32


class Positive(TextEnv):
    """Rewards a whole review by its mood, once it is complete (score_at="done")."""

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return demo.score(prompt + preds.text)


def small_bloom(folder: Path, smoke: bool) -> Path:
    """Return the folder of a tokenizer and a BLOOM trained on reviews of all moods; train them if it does not exist."""
    if folder.is_dir():
        return folder
    tokenizer = word_tokenizer(demo.vocabulary())
    eos = tokenizer.eos_token_id
    shape = dict(n_layer=N_BLOCKS, hidden_size=64, n_head=2, initializer_range=0.06)
    config = BloomConfig(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, **shape)
    torch.manual_seed(0)
    model = BloomForCausalLM(config)
    # As in GPT-2's training data, a text begins behind the end token of the text before it.
    reviews = [f"{tokenizer.eos_token} {review}" for review in demo.reviews(8000)]
    pretrain(model, tokenizer, reviews, n_epochs=0.1 if smoke else 1.6, learning_rate=1e-2)
    partial = folder.with_name(f".{folder.name}.partial")  # a folder that exists is taken for finished
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    return partial.rename(folder)


def measure(model: PPO, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, **kwargs) -> Evaluation:
    """Continue each prompt some times, and score the reviews."""
    settings = dict(n=args.samples, env=model.env.env, seed=args.seed)
    return evaluate(model, demo.prompts(), tokenizer, **settings, **kwargs)


def in_grammar(evaluation: Evaluation) -> float:
    """Return the share of texts that are reviews of the demo's grammar."""
    return sum(demo.parses(sample.prompt + sample.text) for sample in evaluation.generations) / len(
        evaluation.generations
    )


def run(lm: RemoteBlocks, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, name: str) -> dict:
    """Train one policy, and return its figures."""
    out, start = args.out / name, time.perf_counter()
    env = Positive(demo.prompts(), tokenizer, max_new_tokens=MAX_NEW_TOKENS, score_at="done")
    model = make_agent(
        env,
        lm,
        n_envs=args.lanes,
        seed=args.seed,
        learning_rate=LinearSchedule(args.learning_rate, 0.0, 1.0),
        batch_size=args.lanes // 4 * MAX_NEW_TOKENS,
        target_kl=0.05,
    )
    backend = model.policy.lm.backbone
    n_trained = sum(weight.numel() for weight in backend.parameters() if weight.requires_grad)
    before = measure(model, tokenizer, args)
    earlier = Counter(backend.chain.traffic)
    penalty = KLPenalty(args.kl)
    curves = RewardCurves(out / "curves.png", title=f"PPO through remote blocks: {name}")
    model.learn(args.tokens, callback=[penalty, EpisodeMetrics(), curves], progress_bar=True)
    traffic = backend.chain.traffic - earlier
    after = measure(model, tokenizer, args, before=before, reference=penalty)
    after.save(out / "evaluation")
    save_checkpoint(model, out / "checkpoint")
    return {
        "trained": n_trained,
        "tokens": model.num_timesteps,
        "rewards": [result.figures["reward"] for result in (before, after)],  # value and interval
        "in_grammar": [in_grammar(result) for result in (before, after)],
        "distinct": [len({sample.text for sample in result.generations}) for result in (before, after)],
        "kl": after.figures["kl"].value,
        "samples": [[sample.prompt + sample.text for sample in result.generations[:3]] for result in (before, after)],
        "traffic": {verb: [traffic[verb, "messages"], traffic[verb, "bytes"]] for verb, _ in traffic},
        "seconds": round(time.perf_counter() - start, 1),
    }


def report(figures: dict[str, dict]) -> str:
    """Return the figures of both policies, and samples of the first, as Markdown."""
    lines = ["| policy | weights trained | reward before | after | in the grammar | distinct texts | KL, nats a text |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in figures.items():
        rewards = [f"{r:.3f} [{low:.3f}, {high:.3f}]" for r, low, high in row["rewards"]]
        grammar, distinct = " -> ".join(f"{x:.0%}" for x in row["in_grammar"]), " -> ".join(map(str, row["distinct"]))
        lines += [f"| {name} | {row['trained']:,} | {' | '.join(rewards)} | {grammar} | {distinct} | {row['kl']:.2f} |"]
    for name, row in figures.items():
        lines += ["", f"Traffic while {name!r} was trained on {row['tokens']:,} tokens:", ""]
        lines += ["| request | messages | MB | bytes a token |", "|---|---|---|---|"]
        for verb, (messages, size) in row["traffic"].items():
            lines += [f"| {verb} | {messages:,} | {size / 1e6:.1f} | {size / row['tokens']:,.0f} |"]
    lines += ["", "| before | after |", "|---|---|"]
    lines += [f"| {' | '.join(pair)} |" for pair in zip(*next(iter(figures.values()))["samples"], strict=True)]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the seed of training and sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/remote"), help="where the results go")
    parser.add_argument("--tokens", type=int, help="the number of tokens to train on (default: 16384)")
    parser.add_argument("--lanes", type=int, help="the number of texts written side by side (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the first learning rate, which falls to 0")
    parser.add_argument("--kl", type=float, default=0.05, help="the coefficient of the KL penalty")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    for name in ("tokens", "lanes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"Expected --{name} of 1 or more, got {getattr(args, name)}.")
    args.lanes = args.lanes or (8 if args.smoke else 64)
    args.samples = 1 if args.smoke else 5
    args.tokens = args.tokens or (512 if args.smoke else 16_384)
    return args


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    folder = small_bloom(args.out / "base", args.smoke)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    key_file = new_key(args.out / "key")
    figures = {}
    with serving(folder, key_file, bounds=[0, N_BLOCKS // 2, N_BLOCKS]) as servers:
        addresses = tuple(server.address for server in servers)
        for name, trains in (("soft prompts and output layer", True), ("control", False)):
            # Soft prompts start as end tokens, which the model knows in front of a text, and so disturb it little.
            virtual = (tokenizer.eos_token_id,) * N_VIRTUAL
            lm = RemoteBlocks(str(folder), addresses, str(key_file), virtual, trains)
            figures[name] = run(lm, tokenizer, args, "control" if not trains else "trained")
    text = report(figures)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (args.out / "figures.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\n{time.perf_counter() - start:.0f} seconds; figures, curves and checkpoints: {args.out}")


if __name__ == "__main__":
    main()
