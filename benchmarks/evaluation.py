"""The processor time of an evaluation in several processes: all texts by rank 0, and each process its share.

    torchrun --nproc_per_node 2 benchmarks/evaluation.py                      # the demo's model
    torchrun --nproc_per_node 2 benchmarks/evaluation.py --model FOLDER --prompts 256

Both ways give the same texts. A row has the seconds of processor time of the busiest process, which are those that the
others wait for where each has a core of its own; the smallest of three turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from agents import is_main_process, make_agent
from agents.distributed.collectives import gather
from agents.evaluation.evaluation import Evaluation, evaluate, evaluate_together
from agents.runs.assemble import load_tokenizer
from agents.small_models.demo_model import model_folder
from textenv import Preds, Prompt, TextEnv, demo
from textenv.checks.trust import Trust

TURNS = 3


def score(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Reward positive words."""
    return demo.score(preds.text) if done else 0.0


def busiest(work: Callable[[], Evaluation | None]) -> tuple[float, Evaluation | None]:
    """Return the processor seconds of the process that works most, and this process's result."""
    gather("the start", None)
    start = time.process_time()
    result = work()
    return max(gather("processor time", time.process_time() - start)), result


def main() -> None:
    """Measure both ways in turn, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the folder of a model (default: the demo's)")
    parser.add_argument("--prompts", type=int, default=64, help="the number of prompts, one text each (default: 64)")
    parser.add_argument("--tokens", type=int, default=24, help="the most tokens of a text (default: 24)")
    args = parser.parse_args()
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder, Trust())
    prompts = (demo.prompts() * args.prompts)[: args.prompts]
    env = TextEnv(prompts, tokenizer, reward=score, max_new_tokens=args.tokens)
    model = make_agent(env, folder, n_envs=len(gather("the processes", None)), device="cpu", seed=0)
    evaluate(model, prompts[:2], tokenizer, env=env)  # loads packages
    ways: dict[str, Callable[[], Evaluation | None]] = {
        "rank 0 alone": lambda: evaluate(model, prompts, tokenizer, env=env) if is_main_process() else None,
        "shared": lambda: evaluate_together(model, prompts, tokenizer, env=env),
    }
    turns = [{way: busiest(work) for way, work in ways.items()} for _ in range(TURNS)]
    if is_main_process():
        texts = [[text.text for text in result.generations] for turn in turns for _, result in turn.values() if result]
        assert all(other == texts[0] for other in texts), "the same texts"
        least = {way: min(turn[way][0] for turn in turns) for way in ways}
        print(", ".join(f"{way}: {seconds:.2f} s" for way, seconds in least.items()), flush=True)


if __name__ == "__main__":
    main()
