"""Jobs of processes that share the episodes of evaluations."""

import torch

from agents import KLPenalty
from agents.distributed.sharding import gathered
from agents.distributed.world import world
from agents.evaluation.evaluation import evaluate, evaluate_together
from tests.helpers.jobs import LETTERS
from tests.helpers.training import TOKENIZER, length_and_letters, tiny_agent, tiny_config, tiny_env
from textenv.metrics import Distinct

MANY = [LETTERS[i : i + 1 + i % 4] for i in range(13)]  # 1 to 4 letters: lanes start and end at different steps


def judge(prompt, preds, done):
    """Judge a text by its first token."""
    return float(preds.ids[0]) if done else 0.0


def evaluated(prompts, n, shard=None, is_shared=True):
    """Evaluate an agent with everything that can be measured.

    Returns:
        How many texts this process wrote, and the evaluation as a dict, or None where this process has none.
    """
    n_written = [0]

    def reward(prompt, preds, done):
        n_written[0] += done
        return length_and_letters(prompt, preds, done)

    lm = tiny_config(initializer_range=0.3)
    model = tiny_agent(tiny_env(max_new_tokens=8), n_envs=12, lm=lm, policy_kwargs={"shard": shard})
    lm, penalty = model.policy.lm, KLPenalty(0.1)
    penalty.attach(model)
    with torch.no_grad():  # away from the reference, in the same way in all processes
        for weight in lm.parameters():
            weight.mul_(1.2)
    rows = [{"prompt": prompt, "tool": lambda: None} for prompt in prompts]  # which cannot be sent to another process
    words = {"n": n, "reward": reward, "judge": judge, "reference": penalty, "seed": 3, "n_envs": 4}
    run = evaluate_together if is_shared else evaluate
    with gathered(lm), gathered(penalty.reference):
        result = run(model, rows, TOKENIZER, [Distinct((1,), split=list)], max_new_tokens=8, **words)
    assert result is None or all(text.prompt.row["tool"]() is None for text in result.generations)
    return n_written[0], None if result is None else result.to_dict()


def fails_in(rank):
    """Evaluate with a reward that raises in one process; return nothing, since all raise."""
    here = world()

    def reward(prompt, preds, done):
        if done and here.rank == rank:
            raise KeyError("no such word")
        return 0.0

    evaluate_together(tiny_agent(), MANY, TOKENIZER, reward=reward)
