"""Claim 6: the cost per step of Stable-Baselines3, the env and the buffer, as a share of the model's decode step.

    python benchmarks/overhead.py [--quick]

Ours is a whole rollout with a model that returns token 0 at once: SB3's loop, the env with its reward, the buffer and
the returns. The peer is the real model alone: decode steps from cached keys and values, on observations of that
rollout.
"""

from __future__ import annotations

from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from stable_baselines3 import PPO
from torch import Tensor
from work import Pairs, Row, Settings, rollout, run_script, timed

from agents.policies.actor_critic import Step

LANES = (64, 1024)
DECODED = 16  # timed steps of the model, which begin after a third of the completion
MOST = 0.10  # the target: a tenth of the model's step


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    return [overhead(settings, n_lanes) for n_lanes in LANES]


def overhead(settings: Settings, n_lanes: int) -> Row:
    """Time a rollout without a model and decode steps of the model, in turns."""
    work = settings.work(n_lanes=n_lanes)
    model = work.agent()
    seen = no_op_rollout(model)
    first = work.new_tokens // 3
    observations = seen[first : first + 1 + DECODED]
    decode(model, observations, settings.device)  # a warm-up
    times: list[tuple[float, float]] = []
    for _ in range(settings.n_pairs):
        seconds = timed(lambda: len(no_op_rollout(model)), settings.device).seconds
        times.append((seconds / work.new_tokens, decode(model, observations, settings.device)))
    result = Pairs(*map(median, zip(*times, strict=True)), [ours / theirs for ours, theirs in times])
    return Row(
        f"SB3, env and buffer a step, {work.n_lanes:,} lanes, as a share of the model's decode step",
        f"{1000 * result.a:.2f} ms/step",
        f"{1000 * result.b:.2f} ms/step",
        result.ratio,
        result.spread,
        f"<= {MOST:.2f} (less is better)",
        result.ratio <= MOST,
    )


def no_op_rollout(model: PPO) -> list[Tensor]:
    """Collect a rollout from a model that answers at once; return the observations that it was asked about."""
    seen: list[Tensor] = []
    zeros = torch.zeros(model.n_envs, device=model.device)
    actions = zeros.long()

    def act(observations: Tensor, *args: Any) -> Step:
        seen.append(observations)
        return Step(actions, zeros + 0, zeros, None)

    with patch.object(model.policy.lm, "act", act), patch.object(model.policy.lm, "values", return_value=zeros):
        rollout(model)
    return seen


@torch.no_grad()
def decode(model: PPO, observations: list[Tensor], device: str) -> float:
    """Return the seconds of a step of the model; reading the first observation is not counted."""
    lm, generator = model.policy.lm, model.policy.generator
    lm.drop_caches()
    lm.act(observations[0], False, generator, lm.rollout_cache)

    def run() -> int:
        for observation in observations[1:]:
            lm.act(observation, False, generator, lm.rollout_cache)
        return len(observations) - 1

    seconds, n_steps, _ = timed(run, device)
    return seconds / n_steps


if __name__ == "__main__":
    run_script(__doc__, measure)
