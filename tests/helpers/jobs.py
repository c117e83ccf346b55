"""What the tests of several processes run in each of them."""

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
from agents.models.sampling import TokenDistribution
from agents.policies.actor_critic import LMActorCritic
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import TOKENIZER, tiny_agent, tiny_config, tiny_env
from textenv import AllowedMask, PrioritySampling
from textenv.rewards import DROPPED

torch.set_num_threads(1)
N_LANES = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = [LETTERS[i % 26] + LETTERS[(7 * i) % 26] * (i % 5) for i in range(40)]
GROUP_OF_LANE = np.array([0, 0, 0, 1, 0, 1, 1, 1])  # with 2 or 4 processes other numbers in each, and in some none


def rank_and_size():
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def uneven(prompt, preds, done):
    """A reward that differs a lot from prompt to prompt, so that a process's own statistics are not those of all."""
    return (sum(preds.ids) / 40 + 3.0 * (prompt.number % 2) + 0.2 * prompt.number) if done else 0.0


def uneven_or_dropped(prompt, preds, done):
    """The same, with no score for some prompts: more of them in one process than in another."""
    return DROPPED if done and prompt.number % 5 == 2 else uneven(prompt, preds, done)


def choose_by_row():
    """Make the next token a function of the row alone, never the end token: the same data in however many processes."""
    if LMActorCritic.act.__name__ == "scripted_act":
        return
    chosen, act = [], LMActorCritic.act

    def scripted_act(self, observations, *args, **kwargs):
        places = torch.arange(observations.shape[1]) + 3
        chosen[:] = [(observations.clamp(min=0) * places).sum(dim=1) % 31 + 1]
        return act(self, observations, *args, **kwargs)

    LMActorCritic.act = scripted_act
    TokenDistribution.get_actions = lambda self, *args: chosen[0]


def group_by_lane(counts, n_groups, rng):
    """Deal the sequences of a rollout, one a lane, by the lanes of one process that all the processes' stand for."""
    rank, size = rank_and_size()
    group = GROUP_OF_LANE[np.arange(len(counts)) * size + rank]
    return [np.flatnonzero(group == number) for number in range(n_groups)]


def switch_off(name):
    """Leave out one of the things on which the processes agree."""
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
    """Three rollouts and their updates; returns the weights afterwards, and figures on which all agree."""
    choose_by_row()
    switch_off(off)
    if n_minibatches > 1:
        agents.rollout.minibatches.even_groups = group_by_lane
    env = tiny_env(globals()[reward], PROMPTS, **{"score_at": "done", **(env_kwargs or {})})
    n_steps = env.rules.max_new_tokens
    policy_kwargs = {"optimizer_class": torch.optim.SGD, "value_norm": "popart", **kwargs.pop("policy_kwargs", {})}
    if kwargs.get("algorithm") is not A2C:
        kwargs = {"batch_size": N_LANES * n_steps // n_minibatches, "n_epochs": 2, **kwargs}
    model = tiny_agent(env, n_envs=N_LANES, **{"learning_rate": 0.05, **kwargs}, policy_kwargs=policy_kwargs)
    adaptive = KLPenalty(AdaptiveCoef(init=0.5, target=0.01, horizon=20))
    shaping = RewardShaping(clip=6.0, scale=True, whiten=True, missing_eos_penalty=0.1)
    model.learn(3 * N_LANES * n_steps, callback=[adaptive, shaping, *steps])
    weights = weights_of(model)
    figures = {"coef": adaptive.coef, "scores": shaping.count, "tokens": model.num_timesteps}
    return weights, figures | {"updates": model._n_updates}


def weights_of(model):
    """The weights, each whole: all processes call it."""
    with released(model.policy.lm):
        weights = {name: whole(weight.detach()) for name, weight in model.policy.named_parameters()}
    return {name: weight.numpy().copy() for name, weight in weights.items()}


def whole(weight):
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def options():
    """The options that touch the update, each as arguments of `scripted_updates`."""
    head = {"value_norm": None}
    return {
        "dropped": {"reward": "uneven_or_dropped", "steps": [DropEpisodes()]},
        "LoRA": {"policy_kwargs": {"train": LoRA(r=2)}},
        "LastLayers": {"policy_kwargs": {"train": LastLayers(1)}},
        "head": {"policy_kwargs": {"train": "head"}},
        "untied": {"lm": tiny_config(tie_word_embeddings=False)},
        "SeparateCritic": {"policy_kwargs": {"critic": SeparateCritic(tiny_config()), **head}},
        "detached": {"policy_kwargs": {"critic": SharedCritic(detach=True), "value_norm": "norm"}},
        "gradient_checkpointing": {"policy_kwargs": {"gradient_checkpointing": True}},
        "micro_batch_tokens": {"rollout_buffer_kwargs": {"micro_batch_tokens": 12, "normalize_advantage": True}},
        "bfloat16": {"policy_kwargs": {"autocast": "bfloat16"}},
        "target_kl": {"target_kl": 3e-4, "n_epochs": 4},
        "temperature": {"policy_kwargs": {"temperature": 0.7, "repetition_penalty": 1.2}},
        "warmup": {"steps": [CriticWarmup(1)]},
        "late": {"env_kwargs": {"score_at": "rollout_end"}},
        "A2C": {"algorithm": A2C},
        "mask": {"algorithm": MaskablePPO, "env_kwargs": {"mask": AllowedMask(tuple(range(1, 33)))}},
        "encoder-decoder": {"lm": tiny_seq2seq(vocab_size=33)},
        "grpo": {
            "env_kwargs": {"samples_per_prompt": 2},
            "rollout_buffer_kwargs": {"advantage": "grpo"},
            "vf_coef": 0.0,
        },
    }


def every_option():
    """What `scripted_updates` returns with each of `options`."""
    return {name: scripted_updates(1, **kwargs) for name, kwargs in options().items()}


def sharded_updates(shards, names=("plain",)):
    """What `scripted_updates` returns with each of some options, sharded in each of some ways."""
    results = {}
    for name in names:
        for way, shard in shards.items():
            kwargs = {"plain": {}, **options()}[name]
            policy_kwargs = {"value_norm": "norm", **kwargs.get("policy_kwargs", {}), "shard": shard}
            results[name, way] = scripted_updates(1, **{**kwargs, "policy_kwargs": policy_kwargs})
    return results


def what_is_kept(shard):
    """The shares of weights, gradients and optimizer that a process keeps, and the logits that it then samples by."""
    model = tiny_agent(policy_kwargs={"shard": shard, "lm": tiny_config(n_embd=32)}, n_envs=8)
    kept, step = [], model.policy.optimizer.step

    def noted(*args):
        result = step(*args)
        weights = list(model.policy.parameters())
        moments = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
        for tensors in (weights, [weight.grad for weight in weights], moments):
            assert all(isinstance(tensor, DTensor) for tensor in tensors)
            kept.append(sum(local(tensor).numel() for tensor in tensors) / sum(tensor.numel() for tensor in tensors))
        return result

    model.policy.optimizer.step = noted
    model.learn(32)
    return kept[:3], model.policy.lm.shards.is_gathered


def shared_agent(n_prompts=200, **kwargs):
    """An agent of 8 lanes whose segments wait for the end of their episode, and the numbers of prompts it is given."""
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
    dealer, numbers = model.get_env().lanes.dealer, []
    deal = dealer.deal

    def noted():
        prompt, group = deal()
        numbers.append(prompt.number)
        return prompt, group

    dealer.deal = noted
    return model, numbers


def part_of_a_run(folder, n_iterations, load=None, save=None, shard=None):
    """Go on from a checkpoint for some iterations and save again; returns weights, figures and the prompts dealt."""
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
    said = [str(one.message) for one in caught if "checkpoint" in str(one.message)]
    return weights, before, after, numbers, said


def sum_of_weights(model):
    return sum(float(np.abs(weight.astype(np.float64)).sum()) for weight in weights_of(model).values())


class Rows(KVWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append((step, dict(key_values)))

    def close(self):
        pass


class RecordRank(BaseCallback):
    """Logs a figure that differs between processes, and one that rank 1 alone has."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        rank, size = rank_and_size()
        self.logger.record("own/rank", rank)
        if rank == size - 1:
            self.logger.record("own/last", 7)
            self.logger.record("episode/dropped", 3)


def logged_run(folder, shard=None):
    """A run that evaluates, shows, saves, draws and stops early; what each process saw of it."""
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
    """A run that ends after an update, evaluates against its reference, shows and saves; figures and what is kept."""
    model, _ = shared_agent(policy_kwargs={"shard": shard})
    penalty, console = KLPenalty(0.05), Console(file=io.StringIO())
    evaluate = Evaluate(["ab"], TOKENIZER, every=48, reward=uneven, reference=penalty, max_new_tokens=4)
    table = SampleTable(["ab"], TOKENIZER, every=1, max_new_tokens=3, console=console)
    model.learn(96, callback=[penalty, evaluate, table, Checkpoints(folder / "checkpoints", every=1, keep=2)])
    return evaluate.history, console.file.getvalue().count("samples after"), weights_of(model)


def unwritable(folder, shard):
    """Save where one process cannot write; what is raised."""
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
    """Two agents without a seed: their first weights, prompts and samples."""
    torch.manual_seed(10 + rank_and_size()[0])  # of the server that the processes come from all have the same
    model, numbers = shared_agent(seed=None)
    first = sum_of_weights(model)
    model.learn(48)
    return first, numbers, model.rollout_buffer.actions.tolist()


def likes_a(prompt, preds, done):
    return float(np.mean(preds.ids == 1)) if done else 0.0


def learn_a(learning_rate, seed=0):
    """The first and last mean rewards of an agent that is paid for the letter a; None where nothing is logged."""
    env = tiny_env(likes_a, PROMPTS, score_at="done", max_new_tokens=8)
    model = tiny_agent(env, n_envs=16, n_epochs=4, batch_size=64, learning_rate=learning_rate, seed=seed)
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(48 * 128, callback=EpisodeMetrics())
    rewards = [row["reward/task"] for _, row in rows.rows if "reward/task" in row]
    return (rewards[0], np.mean(rewards[-3:])) if rewards else None


def beside():
    """The doctor, warnings, NLPO, a critic of its own and prompts by priority, in a natural run; the prompts drawn."""
    env = tiny_env(uneven, PROMPTS, score_at="done", order=PrioritySampling("spread"))
    kwargs = {"top_p": 0.9, "top_p_lag": 2, "critic": SeparateCritic(tiny_config())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_agent(env, n_envs=N_LANES, check=True, policy_kwargs=kwargs)
        model.learn(3 * 32, callback=[TrainingWarnings(), FiniteUpdates(), KLPenalty(0.05)])
    dealer = model.get_env().lanes.dealer
    return sum_of_weights(model), model.num_timesteps, dealer.cursor.draws.tolist()


def remote_rank(folder, addresses, key_file):
    """Train a model whose blocks a third process holds, with a connection of this rank's own."""
    from tests.helpers.remote import Remote  # not in all processes: it adds to `sys.path`

    model = tiny_agent(n_envs=4, lm=Remote(folder, [], addresses, key_file).spec())
    model.learn(3 * 16)
    return weights_of(model)
