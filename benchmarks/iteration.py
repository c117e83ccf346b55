"""Claims 4 and 5: tokens per second of a whole PPO iteration, against TRL 1.12 and against stock Stable-Baselines3.

    TRL_PYTHON=trl-env/bin/python python benchmarks/iteration.py [--quick]

An iteration is rollout, reward function and update (4 epochs of 4 minibatches), ours as `learn` runs it. TRL has the
same model, prompts, reward function and KL penalty, and a critic of its own, since it knows no shared one; ours is
measured with either. Then the cost of the penalty, in iterations of ours with and without it. Stock SB3 has our policy
without cache and its own `RolloutBuffer`, in which each token is a sample; no KL on either side. It is measured twice:
as our policy reads such samples, in buckets of similar lengths, and padded to the observation's width, as a policy
written straight for SB3 reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from iterations import Done, alternate, has_trl, ours, time_row, trl, trl_row
from stable_baselines3 import PPO
from stable_baselines3.common.utils import configure_logger
from torch import Tensor
from work import Row, Settings, Work, run_script, timed

from agents import KLPenalty, LMPolicy, SeparateCritic, SharedCritic
from agents.models.observations import unpack_observations
from agents.models.sampling import TokenDistribution
from agents.steps.kl_penalty import Estimator
from textenv.episodes.rules import PADDING, SEPARATOR

N_EPOCHS = 4
SEQUENCES = 16  # per minibatch
KL_COEF = 0.05
MOST_KL = 1.15  # allows one forward of the reference beside a rollout and 4 epochs of forward and backward
N_SAMPLED_STEPS = 3  # measured steps of the slow rollout: near its start, middle and end
INSTALL = "python -m venv trl-env && trl-env/bin/pip install trl==1.12.0, then set TRL_PYTHON=trl-env/bin/python"


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    sizes = ((16, 48, 30), (64, 128, 100))
    stock = [stock_sb3(settings, *size, policy) for size in sizes for policy in (LMPolicy, PaddedPolicy)]
    trl_rows = [against_trl(settings, "shared critic", 2.0), against_trl(settings, "separate critic", 1.0)]
    return [*trl_rows, *kl_rows(settings), *stock]


def against_trl(settings: Settings, critic: str, must: float) -> Row:
    """Alternate iterations of ours with iterations of TRL, which waits in a process of its own."""
    claim = f"PPO iteration with KL, {critic}, against TRL 1.12"
    python = os.environ.get("TRL_PYTHON", "")
    if not has_trl(python, "1.12.0"):
        return Row.missing(claim, INSTALL, f">= {must}x")
    work = settings.work()
    spec = SharedCritic() if critic == "shared critic" else SeparateCritic(work.config())
    model = agent(work, policy_kwargs={"critic": spec})
    KLPenalty(KL_COEF).attach(model)
    task = {**asdict(work), "n_epochs": N_EPOCHS, "n_minibatches": n_minibatches(work)}
    with trl(python, "trl_ppo.py", {**task, "kl_coef": KL_COEF}) as peer:
        result, done = alternate(ours(model, work.device), peer, settings.n_pairs)
    return trl_row(claim, result, done, "; critic of its own", must)


def kl_rows(settings: Settings) -> list[Row]:
    """Compare iterations with a penalty with iterations without: by the estimator "k1", and by "exact"."""
    work = settings.work()
    without = ours(agent(work), work.device)
    return [kl_row(settings, work, without, *case) for case in (("k1", MOST_KL), ("exact", None))]


def kl_row(
    settings: Settings, work: Work, without: Callable[[], Done], estimator: Estimator, most: float | None
) -> Row:
    """Compare an iteration with a penalty with one without."""
    model = agent(work)
    KLPenalty(KL_COEF, estimator=estimator).attach(model)
    result, _ = alternate(without, ours(model, work.device), settings.n_pairs)
    return time_row(f"PPO iteration with KL ({estimator}), time against without", result, most)


def stock_sb3(settings: Settings, prompt_tokens: int, new_tokens: int, must: float, policy: type[LMPolicy]) -> Row:
    """Alternate iterations of ours with a part of stock SB3's."""
    work = settings.work(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    slow = StockPart(work, policy)
    result, _ = alternate(ours(agent(work), work.device), slow, settings.n_pairs)
    claim = (
        f"PPO iteration, P{work.prompt_tokens} T{work.new_tokens}, against SB3 with one sample a token, {READS[policy]}"
    )
    share = f"extrapolated from {slow.share:.1%} of rollout, {slow.share / N_EPOCHS:.1%} of update"
    texts = f"{result.a:,.0f} tokens/s", f"{result.b:,.1f} tokens/s; {share}"
    return Row(claim, *texts, result.ratio, result.spread, f">= {must}x", result.ratio >= must)


def agent(work: Work, **kwargs: Any) -> PPO:
    """Return our agent, with as many minibatches as the peers."""
    batch_size = work.n_lanes * work.new_tokens // n_minibatches(work)
    return work.agent(n_epochs=N_EPOCHS, batch_size=batch_size, **kwargs)


def n_minibatches(work: Work) -> int:
    """Return the number of minibatches of an epoch."""
    return max(1, work.n_lanes // SEQUENCES)


class PaddedPolicy(LMPolicy):
    """Our policy, but with each sample of the update padded to the width of the observation."""

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, lengths = unpack_observations(obs)
        # (B, L) -> hidden states (B, H) and logits (B, V) at the last token of each row
        hidden, logits = self.lm.backbone(ids, torch.arange(len(ids), device=ids.device), lengths - 1)
        distribution = TokenDistribution(logits)
        return self.lm.critic(hidden)[:, None], distribution.log_prob(actions), distribution.entropy()


READS = {LMPolicy: "read in our buckets", PaddedPolicy: "padded"}


class StockPart:
    """A part of an iteration of PPO with SB3's `RolloutBuffer`, scaled to the whole.

    It takes three steps of the rollout, of all lanes, at 1/6, 3/6 and 5/6 of the completion, which read as many tokens
    as the average step. Then `PPO.train` makes one update of one epoch on as many samples, from completions of all
    lengths. Stepping the env, and computing rewards and advantages, are not counted.
    """

    def __init__(self, work: Work, policy: type[LMPolicy]) -> None:
        self.work = work
        self.n_steps = min(N_SAMPLED_STEPS, work.new_tokens)
        self.share = self.n_steps / work.new_tokens
        self.rng = np.random.default_rng(3)
        # The env is taken from our agent. The sampled steps are one rollout of stock PPO, in one minibatch.
        self.model = PPO(
            policy,
            work.agent().env,
            n_steps=self.n_steps,
            batch_size=self.n_steps * work.n_lanes,
            n_epochs=1,
            learning_rate=1e-5,
            policy_kwargs={"lm": work.config(), "cache": False},
            seed=0,
            device=work.device,
        )
        self.model.set_logger(configure_logger(verbose=0))

    def __call__(self) -> Done:
        rollout = timed(self.rollout, self.work.device).seconds
        self.fill()
        update = timed(lambda: self.model.train() or 0, self.work.device).seconds
        seconds = (rollout + N_EPOCHS * update) / self.share
        return Done(self.work.n_lanes * self.work.new_tokens, N_EPOCHS * n_minibatches(self.work), seconds)

    def rollout(self) -> int:
        """Decode the sampled steps, as `collect_rollouts` does."""
        self.model.policy.set_training_mode(False)
        for step in range(self.n_steps):
            since = int((step + 0.5) / self.share)
            observations = self.observations(np.full(self.work.n_lanes, since))
            with torch.no_grad():
                self.model.policy(self.model.policy.obs_to_tensor(observations)[0])
        return self.n_steps

    def fill(self) -> None:
        """Fill the buffer with samples of all lengths; their values do not change the time."""
        buffer, n_lanes = self.model.rollout_buffer, self.work.n_lanes
        buffer.reset()
        lengths = np.linspace(0, self.work.new_tokens - 1, self.n_steps * n_lanes).astype(int)
        zeros = torch.zeros(n_lanes)
        for since in self.rng.permutation(lengths).reshape(self.n_steps, n_lanes):
            actions = self.rng.integers(1, self.work.vocab_size, (n_lanes, 1))
            log_probs = torch.full((n_lanes,), -float(np.log(self.work.vocab_size)))
            rewards = self.rng.normal(size=n_lanes)
            buffer.add(self.observations(since), actions, rewards, np.zeros(n_lanes), zeros, log_probs)
        buffer.compute_returns_and_advantage(zeros, np.zeros(n_lanes))

    def observations(self, since: np.ndarray) -> np.ndarray:
        """Return observations (B, L) of random prompts and a number of tokens behind them."""
        width = self.work.prompt_tokens + 1 + self.work.new_tokens
        rows = self.rng.integers(1, self.work.vocab_size, (len(since), width))
        rows[:, self.work.prompt_tokens] = SEPARATOR
        rows[np.arange(width) > self.work.prompt_tokens + since[:, None]] = PADDING
        return rows


if __name__ == "__main__":
    run_script(__doc__, measure)
