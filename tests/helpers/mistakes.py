"""Jobs for several processes in which a setting is wrong or something goes wrong."""

import os
import signal
import time
from contextlib import nullcontext

import torch
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from agents import (
    Checkpoints,
    DataParallel,
    LMPolicy,
    SequenceRolloutBuffer,
    Sharded,
    TextVecEnv,
    latest_checkpoint,
    load_checkpoint,
)
from agents.distributed import collectives, world
from agents.doctor.examine import check
from tests.helpers.jobs import N_LANES, PROMPTS, Rows, rank_and_size, shared_agent, uneven, weights_of
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import tiny_agent, tiny_config, tiny_env
from textenv.rewards import waiting_for_people

# Policies that cannot be sharded, by the name of the case.
UNSHARDED = {"NLPO": {"top_p": 0.9, "top_p_lag": 2}}


def refused(case):
    """Build, and where needed train, what several processes must refuse; raises the refusal."""
    collectives.ANSWER_SECONDS = 1.0
    env = tiny_env(uneven, PROMPTS, score_at="done")
    if case == "lanes":
        return tiny_agent(env, n_envs=3)
    if case == "normalize_advantage":
        return tiny_agent(env, normalize_advantage=True)
    if case == "TRPO":
        return tiny_agent(env, algorithm=TRPO)
    if case == "settings":
        return tiny_agent(env, n_epochs=1 + rank_and_size()[0])
    if case == "critic_lambda":
        return tiny_agent(env, rollout_buffer_kwargs={"critic_lambda": rank_and_size()[0] / 2})
    if case == "batch":
        return tiny_agent(env, batch_size=10).learn(16)
    if case == "alone":
        return collectives.gather("saving" if rank_and_size()[0] == 0 else "training", 0)
    if case == "by hand":
        return PPO(LMPolicy, **by_hand(env)).learn(16)
    if case == "reward":
        return tiny_agent(tiny_env(fails_in_one, PROMPTS, score_at="done")).learn(16)
    if case in UNSHARDED:
        return tiny_agent(env, policy_kwargs={"shard": Sharded(), **UNSHARDED[case]})
    if case == "gathered encoder-decoder":
        return tiny_agent(env, lm=tiny_seq2seq(vocab_size=33), policy_kwargs={"shard": Sharded(gather=False)})
    if case == "doctor":
        return check(tiny_agent(env, policy_kwargs={"shard": Sharded()}))
    if case == "save":
        return tiny_agent(env, policy_kwargs={"shard": Sharded()}).save(os.devnull)
    if case == "shard":
        return tiny_agent(env, policy_kwargs={"shard": Sharded(offload=rank_and_size()[0] == 0)})
    assert case == "nothing"
    PPO(LMPolicy, **by_hand(env)).learn(16, callback=DataParallel())
    return "trained"


def refusals(cases):
    """Run `refused` for each case; return its result or its error by the case's name."""
    results = {}
    for case in cases:
        try:
            results[case] = refused(case)
        except Exception as error:
            results[case] = error
    return results


def fails_in_one(prompt, preds, done):
    if rank_and_size()[0] == 1:
        raise OSError("the scorer is gone")
    return 0.0


def by_hand(env):
    return {
        "env": TextVecEnv(env, 4),
        "n_steps": 4,
        "batch_size": 16,
        "n_epochs": 1,
        "normalize_advantage": False,
        "rollout_buffer_class": SequenceRolloutBuffer,
        "policy_kwargs": {"lm": tiny_config()},
        "device": "cpu",
    }


def join_as_initialised():
    """Join a process group that the script itself has initialised."""
    rank, size = rank_and_size()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    return collectives.gather("ranks", rank), collectives.from_main("a rank", rank)


def leave_late(seconds):
    """Leave the group, rank 1 only after some seconds; return the monotonic time, which all processes share."""
    here = world.world()
    if here.rank == 1:
        time.sleep(seconds)
    world.leave(here.store, here.rank, here.size)
    return time.monotonic()


def join(seconds):
    """Join the other processes within some seconds; return rank, size and seed."""
    world.JOIN_SECONDS = seconds
    here = world.world()
    return here.rank, here.size, here.seed


def killed(where, folder, n_iterations=4, shard=None):
    """Train, saving each iteration; rank 1 kills itself in the third rollout or second update of the first attempt."""
    collectives.ANSWER_SECONDS = 1.0
    model, _ = shared_agent(policy_kwargs={"shard": shard})
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    done, two_iterations = model.num_timesteps, 2 * N_LANES * model.n_steps
    is_victim = rank_and_size()[0] == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def kill(*args):
        if model.num_timesteps >= two_iterations:
            os.kill(os.getpid(), signal.SIGKILL)

    if is_victim and where == "update":
        model.policy.optimizer.register_step_pre_hook(kill)
    if is_victim and where == "rollout":
        act = model.policy.lm.act
        model.policy.lm.act = lambda *args, **kwargs: (kill(), act(*args, **kwargs))[1]
    total = n_iterations * N_LANES * model.n_steps
    model.learn(total - done, callback=Checkpoints(folder, every=1, keep=9), reset_num_timesteps=done == 0)
    return weights_of(model), model.num_timesteps, done


class Sleeper(BaseCallback):
    """A part of training that sleeps, or stops the whole process, at its first call of the third rollout in rank 1.

    From the second rollout on, when all processes are at the same point, the watch has a short timeout.
    """

    def __init__(self, seconds, timeout, waits_for_people=False):
        super().__init__()
        self.seconds, self.timeout, self.waits_for_people = seconds, timeout, waits_for_people
        self.n_rollouts, self.start = 0, None

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.n_rollouts += 1
        if self.n_rollouts == 2:
            world.world().watch.timeout = self.timeout

    def __call__(self, *args):
        if self.n_rollouts == 3 and self.start is None and rank_and_size()[0] == 1:
            self.start = time.monotonic()
            if self.seconds is None:
                os.kill(os.getpid(), signal.SIGSTOP)
            with waiting_for_people() if self.waits_for_people else nullcontext():
                time.sleep(self.seconds)


def hangs(where, seconds, timeout, shard=None):
    """Train; rank 1 sleeps in a reward, a forward of the rollout, or a forward or an optimizer step of the update.

    Returns:
        The rows of the log or the error; when it ended, and when it fell asleep, by the clock of all processes.
    """
    collectives.ANSWER_SECONDS = 1.0
    nap = Sleeper(seconds, timeout, waits_for_people=where == "people")
    reward = uneven
    if where in ("reward", "people"):
        reward = lambda *args: nap() or 0.0  # noqa: E731
    model = tiny_agent(tiny_env(reward, PROMPTS, score_at="done"), n_envs=4, policy_kwargs={"shard": shard})
    if where == "optimizer":
        model.policy.optimizer.register_step_pre_hook(nap)
    if where in ("rollout", "forward"):
        lm, name = model.policy.lm, {"rollout": "act", "forward": "evaluate_chunk"}[where]
        method = getattr(lm, name)
        setattr(lm, name, lambda *args, **kwargs: (nap(), method(*args, **kwargs))[1])
    if where == "collective" and rank_and_size()[0] == 1:
        return collectives.gather("one", 1), torch.distributed.barrier()
    if where == "collective":
        return collectives.gather("one", 0), collectives.gather("two", 0)
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    result = rows.rows
    try:
        model.learn(3 * 16, callback=nap)
    except Exception as error:
        result = error
    return result, time.monotonic(), nap.start
