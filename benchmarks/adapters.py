"""The savings of training adapters (LoRA) in place of all weights: time of an update, and memory of training.

    python benchmarks/adapters.py [--quick]

Both sides are `PPO.train()` on rollouts of the same model, in turns. Memory is that of gradients and optimizer state
after an update. The forward costs the same on both sides, or more by the adapters; the backward leaves out the
products that give the gradients of frozen weights, about a third of all.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from stable_baselines3 import PPO
from work import RANK, Row, Settings, pairs, rollout, run_script

from agents import LoRA

MOST = 0.10  # the target: adapters hold at most a tenth of the bytes


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    claim = f"update, LoRA (r={RANK}), against all weights"
    if find_spec("peft") is None:
        return [Row.missing(claim, 'pip install "textenv[lora]"', "-")]
    work = settings.work()
    models = [
        work.agent(n_epochs=1, learning_rate=1e-7, policy_kwargs={"train": train}) for train in ("all", LoRA(r=RANK))
    ]
    for model in models:
        rollout(model)
    full, adapted = models
    result = pairs(lambda: update(full), lambda: update(adapted), settings.n_pairs, settings.device)
    held = [n_bytes(model) for model in models]
    share = held[1] / held[0]
    return [
        Row(
            f"{claim}, time",
            f"{1e6 / result.b:,.1f} µs/token",
            f"{1e6 / result.a:,.1f} µs/token",
            result.ratio,
            result.spread,
            "-",
            None,
        ),
        Row(
            f"{claim}, gradients and optimizer state",
            f"{held[1] / 1e6:,.2f} MB",
            f"{held[0] / 1e6:,.2f} MB",
            share,
            "-",
            f"<= {MOST:.2f} (less is better)",
            share <= MOST,
        ),
    ]


def update(model: PPO) -> int:
    """Update on the rollout that the model holds, and return its number of tokens."""
    model.train()
    return model.n_steps * model.n_envs


def n_bytes(model: PPO) -> int:
    """Return the bytes of all gradients, and of the optimizer's tensors for them."""
    optimizer = model.policy.optimizer
    state = [
        tensor for entry in optimizer.state.values() for tensor in entry.values() if isinstance(tensor, torch.Tensor)
    ]
    gradients = [weight.grad for weight in model.policy.parameters() if weight.grad is not None]
    return sum(tensor.nbytes for tensor in (*state, *gradients))


if __name__ == "__main__":
    run_script(__doc__, measure)
