"""Jobs of processes whose rollouts are written by engines: one each, or one that all share."""

import os
import signal
import warnings

import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import EngineLost, EngineRollouts, LocalEngine, load_checkpoint, save_checkpoint
from agents.distributed.world import world
from agents.engines.protocol import Request
from agents.engines.wire import Wire
from tests.helpers.engines import Background, often
from tests.helpers.jobs import LETTERS, N_LANES, choose_by_row, weights_of
from tests.helpers.training import tiny_agent, tiny_config, tiny_env

PROMPTS = [LETTERS[i] * (1 + i % 3) for i in range(26)]
N_STEPS = 8


class Rollouts(BaseCallback):
    """Keeps the texts, log-probabilities and figures of each rollout."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer, logged = self.model.rollout_buffer, self.logger.name_to_value
        figures = {name: value for name, value in logged.items() if name.startswith("engine/")}
        self.rows.append((buffer.actions.copy(), buffer.log_probs.copy(), buffer.behaviour_log_probs.copy(), figures))


def agent(env_kwargs=None, **kwargs):
    env = tiny_env(prompts=PROMPTS, **(env_kwargs or often(4)))
    settings = {"n_envs": N_LANES, "n_steps": N_STEPS, "batch_size": N_LANES * N_STEPS, "learning_rate": 0.03}
    return tiny_agent(env, policy_kwargs={"optimizer_class": torch.optim.SGD}, **{**settings, **kwargs})


def trained(engine, n_rollouts=4, ahead=False, load=None, save=None, callbacks=(), **kwargs):
    """Train; return the rollouts of this process, and the weights afterwards."""
    model, rollouts = agent(**kwargs), Rollouts()
    steps = [*callbacks] if engine is None else [EngineRollouts(engine, ahead=ahead), *callbacks]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The checkpoint was written by")
        if load is not None:
            load_checkpoint(model, load)
    model.learn(n_rollouts * N_LANES * N_STEPS, callback=[*steps, rollouts], reset_num_timesteps=load is None)
    if save is not None:
        save_checkpoint(model, save)
    return rollouts.rows, weights_of(model)


def engine_in_each(ahead=False, n_rollouts=4, load=None, save=None, kwargs=None):
    """Train with an engine inside each process; return what `trained` does, and the number of loads."""
    engine = Background()
    return *trained(engine, n_rollouts, ahead, load, save, **(kwargs or {})), engine.n_loads


def chosen_by_row(by_engine):
    """Train on tokens that depend on their row alone, which an engine inside this process or the policy writes.

    Each text is as long as a rollout: in a request for the rest of a text, the separator would be elsewhere in the row.
    """
    choose_by_row()
    whole = {"stop_ids": (), "max_new_tokens": N_STEPS}
    return trained(Background() if by_engine else None, n_rollouts=3, env_kwargs=whole)


class Ends(Background):
    """An engine that ends at its second question."""

    def generate(self, requests, temperature, seed):
        if self.calls:
            raise EngineLost("Expected an answer of the engine's process, got its end, by signal 9.")
        return super().generate(requests, temperature, seed)


def engine_of_rank_1_ends(when):
    """Train with engines of which that of rank 1 ends in the second rollout, or refuses the first weights."""
    engine = Background()
    if world().rank == 1 and when == "writing":
        engine = Ends()
    if world().rank == 1 and when == "loading":
        engine = Background(tiny_config(n_embd=32))
    return trained(engine)


class Kills(BaseCallback):
    """Kills the engine that this process has started, before its third rollout begins."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.n_rollouts = engine, 0

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.n_rollouts += 1
        if self.n_rollouts == 3 and self.engine._process is not None:
            os.kill(self.engine._process.pid, signal.SIGKILL)


def local_engines():
    """Train with a `LocalEngine` each, and with one for all, which is killed; then one cannot be started.

    Returns:
        By name, what `trained` returns and how often this process has sent weights; or the error's type and text.
    """
    n_loads, send = [], Wire.send
    Wire.send = lambda self, header, tensors=(): n_loads.append(header.get("do")) or send(self, header, tensors)

    def counted(engine, ahead):
        n_loads.clear()
        return *trained(engine, ahead=ahead), n_loads.count("load")

    def start():
        return LocalEngine(tiny_config(), vocab_size=33, shared=True)

    results = {}
    with LocalEngine(tiny_config(), vocab_size=33) as engine:
        results["each"] = counted(engine, ahead=False)
    with start() as engine:
        results |= {"shared": counted(engine, ahead=False), "ahead": counted(engine, ahead=True)}
        results["killed"] = error_of(lambda: trained(engine, callbacks=[Kills(engine)]))
    assert engine._process is None or not engine._process.is_alive()
    if world().rank == 0:
        LocalEngine._start = lambda *_: Request(1)  # raises a TypeError
    results["refused"] = error_of(start)
    return results


def error_of(call):
    """Return the type and the text of the error that a call raises; None if it raises none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None
