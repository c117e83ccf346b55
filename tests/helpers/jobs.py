"""Jobs: functions that the tests of several processes run in each process, by name."""

import errno
import io
import os
import warnings

import numpy as np
import torch
from rich.console import Console
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from torch.distributed.tensor import DTensor

import agents.checkpoints.shard_files
import agents.distributed.collectives
import agents.policies.value_norm
import agents.rollout.advantages
import agents.rollout.minibatches
import agents.steps.kl_penalty
import agents.steps.reward_shaping
from agents import (
    AdaptiveCoef,
    Checkpoints,
    CriticWarmup,
    DropEpisodes,
    EpisodeMetrics,
    Evaluate,
    KLPenalty,
    LastLayers,
    LoRA,
    RewardCurves,
    RewardShaping,
    SampleTable,
    SeparateCritic,
    SharedCritic,
    TrainingWarnings,
    export,
    load_checkpoint,
    save_checkpoint,
)
from agents.callbacks.finite_updates import FiniteUpdates
from agents.distributed.gradients import SharedGradient
from agents.distributed.sharding import local, released
from agents.models.backbone import Backbone
from agents.models.sampling import TokenDistribution
from agents.policies.actor_critic import LMActorCritic
from tests.helpers.models import randomise_critic, tiny_mixture
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import TOKENIZER, numbers_of_draws, tiny_agent, tiny_config, tiny_env
from textenv import AllowedMask, PrioritySampling
from textenv.rewards import DROPPED

torch.set_num_threads(1)
N_LANES = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = [LETTERS[i % 26] + LETTERS[(7 * i) % 26] * (i % 5) for i in range(40)]
GROUP_OF_LANE = np.array([0, 0, 0, 1, 0, 1, 1, 1])  # of 8 / size lanes a process: sizes differ, some are 0


def rank_and_size():
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def uneven(prompt, preds, done):
    """Reward prompts very differently, so that the statistics of one process differ from those of all."""
    return (sum(preds.ids) / 40 + 3.0 * (prompt.number % 2) + 0.2 * prompt.number) if done else 0.0


def uneven_or_dropped(prompt, preds, done):
    """Reward as `uneven` does, but drop the episodes of some prompts: more in one process than in another."""
    return DROPPED if done and prompt.number % 5 == 2 else uneven(prompt, preds, done)


def choose_by_row():
    """Patch sampling: each token depends on its row alone and never ends the text, so any number of processes agree."""
    if LMActorCritic.act.__name__ == "scripted_act":  # patched by an earlier job of this process
        return
    chosen, act = [], LMActorCritic.act

    def scripted_act(self, observations, *args, **kwargs):
        weights = torch.arange(observations.shape[1], device=observations.device) + 3
        # tokens 1 to 31 of 33: token 0 ends the text
        chosen[:] = [(observations.clamp(min=0) * weights).sum(dim=1) % 31 + 1]
        return act(self, observations, *args, **kwargs)

    LMActorCritic.act = scripted_act
    TokenDistribution.get_actions = lambda self, *args: chosen[0]


def group_by_lane(counts, n_groups, rng, members=None):
    """Assign this process's sequences, one per lane, to minibatches by `GROUP_OF_LANE` of their global lane."""
    rank, size = rank_and_size()
    group = GROUP_OF_LANE[np.arange(len(counts)) * size + rank]
    return [np.flatnonzero(group == number) for number in range(n_groups)]


def switch_off(name):
    """Disable one of the exchanges between the processes, so that their results differ from those of one process."""
    alone = lambda what, value: [value]  # noqa: E731
    if name == "weights":
        evaluate = SharedGradient.evaluate

        def unweighted(self, batch, actions):
            batch.share = 1.0
            return evaluate(self, batch, actions)

        SharedGradient.evaluate = unweighted
    elif name in ("advantages", "returns"):
        module = agents.rollout.advantages if name == "advantages" else agents.policies.value_norm

        def moments(what, values):
            return len(values), float(np.mean(values)), float(np.var(values))

        module.moments = moments
    elif name == "scores":
        agents.steps.reward_shaping.gather = lambda what, scores: [scores] * (rank_and_size()[0] + 1)
    elif name == "divergence":
        agents.steps.kl_penalty.gather = alone
    else:
        assert name is None


def scripted_updates(n_minibatches, off=None, reward="uneven", steps=(), env_kwargs=None, **kwargs):
    """Run three rollouts and their updates; return the weights afterwards, and figures that all processes share."""
    choose_by_row()
    switch_off(off)
    if n_minibatches > 1:
        agents.rollout.minibatches.even_groups = group_by_lane
    env = tiny_env(globals()[reward], **{"prompts": PROMPTS, "score_at": "done", **(env_kwargs or {})})
    n_steps = env.rules.max_new_tokens
    policy_kwargs = {"optimizer_class": torch.optim.SGD, "value_norm": "popart", **kwargs.pop("policy_kwargs", {})}
    if kwargs.get("algorithm") is not A2C:
        kwargs = {"batch_size": N_LANES * n_steps // n_minibatches, "n_epochs": 2, **kwargs}
    model = tiny_agent(env, n_envs=N_LANES, **{"learning_rate": 0.05, **kwargs}, policy_kwargs=policy_kwargs)
    shared, read = [], Backbone.read_shared
    Backbone.read_shared = lambda self, prompts: shared.append(prompts) or read(self, prompts)
    adaptive = KLPenalty(AdaptiveCoef(init=0.5, target=0.01, horizon=20))
    shaping = RewardShaping(clip=6.0, scale=True, whiten=True, missing_eos_penalty=0.1)
    model.learn(3 * N_LANES * n_steps, callback=[adaptive, shaping, *steps])
    figures = {"coef": adaptive.coef, "scores": shaping.count, "tokens": model.num_timesteps}
    return weights_of(model), figures | {"updates": model._n_updates, "shares": len(shared) > 0}


def weights_of(model):
    """Return all weights, gathered from their shards. A collective operation: every process must call it."""
    with released(model.policy.lm):
        weights = {name: gathered(weight.detach()) for name, weight in model.policy.named_parameters()}
    return {name: weight.cpu().numpy().copy() for name, weight in weights.items()}


def gathered(weight):
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def options():
    """Return the options that touch the update, each as arguments of `scripted_updates`."""
    return {
        "dropped": {"reward": "uneven_or_dropped", "steps": [DropEpisodes()]},
        "LoRA": {"policy_kwargs": {"train": LoRA(r=2)}},
        "experts": {"lm": tiny_mixture(vocab_size=33), "policy_kwargs": {"train": LoRA(r=2)}},
        "LastLayers": {"policy_kwargs": {"train": LastLayers(1)}},
        "head": {"policy_kwargs": {"train": "head"}},
        "untied": {"lm": tiny_config(tie_word_embeddings=False)},
        "SeparateCritic": {"policy_kwargs": {"critic": SeparateCritic(tiny_config()), "value_norm": None}},
        "detached": {"policy_kwargs": {"critic": SharedCritic(detach=True), "value_norm": "norm"}},
        "gradient_checkpointing": {"policy_kwargs": {"gradient_checkpointing": True}},
        "micro_batch_tokens": {"rollout_buffer_kwargs": {"micro_batch_tokens": 12, "normalize_advantage": True}},
        "bfloat16": {"policy_kwargs": {"autocast": "bfloat16"}},
        "target_kl": {"target_kl": 3e-4, "n_epochs": 4},
        "temperature": {"policy_kwargs": {"temperature": 0.7, "repetition_penalty": 1.2}},
        "warmup": {"steps": [CriticWarmup(1)]},
        "late": {"env_kwargs": {"score_at": "rollout_end"}},
        "shared prompts": {"env_kwargs": {"samples_per_prompt": 4, "prompts": [LETTERS[:22], LETTERS[4:]]}},
        "A2C": {"algorithm": A2C},
        "mask": {"algorithm": MaskablePPO, "env_kwargs": {"mask": AllowedMask(tuple(range(1, 33)))}},
        "encoder-decoder": {"lm": tiny_seq2seq(vocab_size=33)},
        "grpo": {"env_kwargs": {"samples_per_prompt": 2}, "rollout_buffer_kwargs": {"advantage": "grpo"}, "vf_coef": 0},
        "surrogate": {
            "policy_kwargs": {"surrogate": agents.ClipHigher(1e-3, 2e-3)},
            "rollout_buffer_kwargs": {"aggregation": "sequence", "normalize_advantage": True},
        },
    }


def every_option():
    """Run `scripted_updates` with each of `options`; return the results by the option's name."""
    return {name: scripted_updates(1, **kwargs) for name, kwargs in options().items()}


def groups_of_lengths(lengths, n_lanes):
    """Train one rollout of 4 steps on groups of 4 texts, which have `lengths` in turn; return the change of weights."""
    choose_by_row()
    rows = [{"prompt": LETTERS[i], "max_new_tokens": lengths[i % len(lengths)]} for i in range(8)]
    env = tiny_env(prompts=rows, samples_per_prompt=4, stop_ids=(), order="sequential")
    options = {"rollout_buffer_kwargs": {"normalize_advantage": False}, "policy_kwargs": {"value_norm": "popart"}}
    model = tiny_agent(env, n_lanes, **options)
    randomise_critic(model.policy)
    before = weights_of(model)
    model.learn(4 * n_lanes)
    return {name: weight - before[name] for name, weight in weights_of(model).items()}


def sharded_updates(shards, names=("plain",)):
    """Run `scripted_updates` with each option under each sharding; return the results by (option, sharding)."""
    results = {}
    for name in names:
        for way, shard in shards.items():
            kwargs = {"plain": {}, "popart": {"policy_kwargs": {"value_norm": "popart"}}, **options()}[name]
            policy_kwargs = {"value_norm": "norm", **kwargs.get("policy_kwargs", {}), "shard": shard}
            results[name, way] = scripted_updates(1, **{**kwargs, "policy_kwargs": policy_kwargs})
    return results


def kept_shares(shard):
    """Return the shares of weights, gradients and optimizer moments that a process keeps, and `is_gathered` after."""
    model = tiny_agent(policy_kwargs={"shard": shard, "lm": tiny_config(n_embd=32)}, n_envs=8)
    kept, step = [], model.policy.optimizer.step

    def step_and_measure(*args):
        result = step(*args)
        weights = list(model.policy.parameters())
        moments = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
        for tensors in (weights, [weight.grad for weight in weights], moments):
            assert all(isinstance(tensor, DTensor) for tensor in tensors)
            kept.append(sum(local(tensor).numel() for tensor in tensors) / sum(tensor.numel() for tensor in tensors))
        return result

    model.policy.optimizer.step = step_and_measure
    model.learn(32)
    return kept[:3], model.policy.lm.shards.is_gathered


def shared_agent(n_prompts=200, **kwargs):
    """Return an agent of 8 lanes that trains complete episodes only, and a growing list of its prompts' numbers."""
    prompts = [LETTERS[i % 26] + LETTERS[i // 26] for i in range(n_prompts)]
    env = tiny_env(uneven, prompts, score_at="done")
    model = tiny_agent(
        env,
        **{
            "n_envs": N_LANES,
            "n_steps": 6,
            "batch_size": 24,
            "rollout_buffer_kwargs": {"complete_episodes": True, "normalize_advantage": True},
            **kwargs,
        },
    )
    return model, numbers_of_draws(model)


def run_between_checkpoints(folder, n_iterations, load=None, save=None, shard=None):
    """Load, train and save; return the weights, figures before and after, prompt numbers and checkpoint warnings."""
    model, numbers = shared_agent(policy_kwargs={"shard": shard})
    penalty = KLPenalty(AdaptiveCoef(init=0.5, target=0.01, horizon=20))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load is not None:
            load_checkpoint(model, folder / load)
            penalty.attach(model)
    before = {"coef": penalty.coef, "tokens": model.num_timesteps, "weights": sum_of_weights(model)}
    total = n_iterations * N_LANES * model.n_steps
    model.learn(total, callback=penalty, reset_num_timesteps=load is None)
    if save is not None:
        save_checkpoint(model, folder / save)
    weights = weights_of(model)
    after = {"coef": penalty.coef, "tokens": model.num_timesteps, "weights": sum_of_weights(model)}
    messages = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
    return weights, before, after, numbers, messages


def sum_of_weights(model):
    return sum(float(np.abs(weight.astype(np.float64)).sum()) for weight in weights_of(model).values())


class Rows(KVWriter):
    """Keeps each row that is logged, with its step."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append((step, dict(key_values)))

    def close(self):
        pass


class RecordRank(BaseCallback):
    """Logs a figure that differs between processes, and figures that only the last process has."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        rank, size = rank_and_size()
        self.logger.record("own/rank", rank)
        if rank == size - 1:
            self.logger.record("own/last", 7)
            self.logger.record("groups/dropped", 3)


def logged_run(folder, shard=None):
    """Train with callbacks that evaluate, show, save, draw and stop early; return what this process saw."""
    model, numbers = shared_agent(learning_rate=0.0, policy_kwargs={"shard": shard})
    rows, console = Rows(), Console(file=io.StringIO())
    model.set_logger(Logger(None, [rows]))
    evaluate = Evaluate(
        ["ab", "c"], TOKENIZER, every=48, folder=folder / "best", patience=2, reward=uneven, max_new_tokens=4
    )
    callbacks = [
        EpisodeMetrics(),
        RecordRank(),
        evaluate,
        SampleTable(["ab"], TOKENIZER, every=1, max_new_tokens=3, console=console),
        Checkpoints(folder / "checkpoints", every=1, keep=2),
        RewardCurves(folder / "curves.png"),
    ]
    model.learn(100 * 48, callback=callbacks)
    export(model, None, folder / "model")
    return model.num_timesteps, rows.rows, console.file.getvalue(), sorted(evaluate.history), numbers


def measured_run(folder, shard):
    """Train with a reference, samples and checkpoints; return evaluations, number of tables and weights."""
    model, _ = shared_agent(policy_kwargs={"shard": shard})
    penalty, console = KLPenalty(0.05), Console(file=io.StringIO())
    evaluate = Evaluate(["ab"], TOKENIZER, every=48, reward=uneven, reference=penalty, max_new_tokens=4)
    table = SampleTable(["ab"], TOKENIZER, every=1, max_new_tokens=3, console=console)
    model.learn(96, callback=[penalty, evaluate, table, Checkpoints(folder / "checkpoints", every=1, keep=2)])
    return evaluate.history, console.file.getvalue().count("samples after"), weights_of(model)


def unwritable(folder, shard):
    """Save a checkpoint where rank 1 cannot write; return the number and the text of the error that is raised."""
    model, _ = shared_agent(policy_kwargs={"shard": shard})
    model.learn(48)
    save_checkpoint(model, folder / "saved")
    if rank_and_size()[0] == 1:
        agents.checkpoints.shard_files.HuggingFaceStorageWriter.write_data = full_disk
    try:
        save_checkpoint(model, folder / "saved", overwrite=True)
    except OSError as error:
        return error.errno, str(error)


def full_disk(self, plan, planner):
    raise OSError(errno.ENOSPC, "No space left on device")


def unseeded():
    """Train an agent without a seed; return the sum of its first weights, its prompts and its tokens."""
    torch.manual_seed(10 + rank_and_size()[0])  # forked processes inherit one state; started ones do not
    model, numbers = shared_agent(seed=None)
    first = sum_of_weights(model)
    model.learn(48)
    return first, numbers, model.rollout_buffer.actions.tolist()


def learn_a(learning_rate, seed=0):
    """Reward the letter a; return the first and last mean rewards, or None in a process that logs nothing."""
    likes_a = lambda prompt, preds, done: float(np.mean(preds.ids == 1)) if done else 0.0  # noqa: E731
    env = tiny_env(likes_a, PROMPTS, score_at="done", max_new_tokens=8)
    model = tiny_agent(env, n_envs=16, n_epochs=4, batch_size=64, learning_rate=learning_rate, seed=seed)
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(48 * 128, callback=EpisodeMetrics())
    rewards = [row["reward/task"] for _, row in rows.rows if "reward/task" in row]
    return (rewards[0], np.mean(rewards[-3:])) if rewards else None


def extras_together():
    """Train with doctor, warnings, NLPO, a separate critic and priority sampling; return what all processes share."""
    env = tiny_env(uneven, PROMPTS, score_at="done", order=PrioritySampling("spread"))
    kwargs = {"top_p": 0.9, "top_p_lag": 2, "critic": SeparateCritic(tiny_config())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_agent(env, n_envs=N_LANES, check=True, policy_kwargs=kwargs)
        model.learn(3 * 32, callback=[TrainingWarnings(), FiniteUpdates(), KLPenalty(0.05)])
    model.get_env().agree_on_prompts()
    return sum_of_weights(model), model.num_timesteps, model.get_env().lanes.dealer.cursor.draws.tolist()


def remote_rank(folder, addresses, key_file):
    """Train a model whose blocks a third process serves, over a connection of this rank's own."""
    from tests.helpers.remote import Remote  # only in this job: the import extends `sys.path`

    model = tiny_agent(n_envs=4, lm=Remote(folder, [], addresses, key_file).spec())
    model.learn(3 * 16)
    return weights_of(model)
