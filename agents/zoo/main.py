"""rl_zoo3 with two more algorithms, token_ppo and token_maskable_ppo: `python -m agents.zoo train` and `enjoy`.

Both train in lanes, with one forward per sequence, and a search draws hyper-parameters that suit a language model.
Plain rl_zoo3 can train an `LMPolicy` with its own ppo, too, but more slowly; see examples/zoo.

    python -m agents.zoo train --algo token_ppo --env textenv/Demo-v0 --gym-packages textenv \
        --conf-file examples/zoo/token_ppo.yml -f logs
    python -m agents.zoo train ... -optimize --n-trials 50 --study-name demo --storage logs/demo.log
    python -m agents.zoo enjoy --algo token_ppo --env textenv/Demo-v0 --gym-packages textenv -f logs --stochastic
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from textenv.checks.extras import check_extra

from .algorithms import TokenMaskablePPO, TokenPPO

SCRIPTS = ("train", "enjoy")
MASKED = "token_maskable_ppo"
ALGORITHMS = {"token_ppo": TokenPPO, MASKED: TokenMaskablePPO}
# The choices of a search for hyper-parameters.
EPOCHS = (1, 2, 4, 8)
MINIBATCHES = (1, 2, 4, 8)
CLIP_RANGES = (0.1, 0.2, 0.3)

Parameters = dict[str, Any]


class Trial(Protocol):
    """The methods of an Optuna trial that a search uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number between `low` and `high`, drawn on a logarithmic scale with `log`."""

    def suggest_categorical(self, name: str, choices: tuple[Any, ...]) -> Any:
        """Return one of the choices."""


def sample_token_ppo(trial: Trial, n_actions: int, n_envs: int, additional_args: Mapping[str, Any]) -> Parameters:
    """Draw hyper-parameters that suit a language model, for rl_zoo3's search.

    Three settings stay as they are: `policy_kwargs`, which name the model; the discount of 1; and `n_steps`, which
    depends on the length of texts. The range of learning rates suits models of 10^5 (1e-3) to 10^9 parameters (1e-6).

    Args:
        trial: The trial.
        n_actions: The number of tokens. It is unused, like the next two: rl_zoo3 passes all three.
        n_envs: The number of lanes.
        additional_args: The arguments of replay buffers.
    """
    return convert_token_ppo(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-6, 2e-3, log=True),
            "n_epochs": trial.suggest_categorical("n_epochs", EPOCHS),
            "n_minibatches": trial.suggest_categorical("n_minibatches", MINIBATCHES),
            "clip_range": trial.suggest_categorical("clip_range", CLIP_RANGES),
            "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 1e-3, 0.2, log=True),
            "ent_coef": trial.suggest_float("ent_coef", 1e-6, 1e-2, log=True),
            "vf_coef": trial.suggest_float("vf_coef", 0.02, 1.0, log=True),
            "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
        }
    )


def convert_token_ppo(sampled: Mapping[str, Any]) -> Parameters:
    """Return the draws of a trial as arguments of the algorithm.

    Example:
        >>> convert_token_ppo({"n_epochs": 4, "one_minus_gae_lambda": 0.25})
        {'n_epochs': 4, 'gae_lambda': 0.75}
    """
    rest = {name: value for name, value in sampled.items() if name != "one_minus_gae_lambda"}
    return {**rest, "gae_lambda": 1 - sampled["one_minus_gae_lambda"]}


def register() -> None:
    """Add the algorithms and their search spaces to rl_zoo3's tables.

    Raises:
        ImportError: If rl_zoo3 is not installed.
    """
    check_extra("zoo", "rl_zoo3", "agents.zoo")
    # rl_zoo3 looks up algorithms in `utils.ALGOS`, and the functions of a search in `hyperparams_opt`.
    search = importlib.import_module("rl_zoo3.hyperparams_opt")
    for name, algorithm in ALGORITHMS.items():
        importlib.import_module("rl_zoo3.utils").ALGOS[name] = algorithm
        search.HYPERPARAMS_SAMPLER[name] = sample_token_ppo
        search.HYPERPARAMS_CONVERTER[name] = convert_token_ppo


def evaluate_samples(masked: bool) -> None:
    """Make rl_zoo3 evaluate sampled texts, as training does, rather than the most probable ones.

    The most probable texts of the demo's model earn the full reward before any training, so that all trials of a search
    would look alike.

    Args:
        masked: Whether to sample under the env's masks, which rl_zoo3 ignores.
    """
    # rl_zoo3 `exp_manager.ExperimentManager` looks both classes up in its module and passes `deterministic=True`.
    manager = importlib.import_module("rl_zoo3.exp_manager")
    base = MaskableEvalCallback if masked else EvalCallback
    vars(manager).update(EvalCallback=_sampled(base), TrialEvalCallback=_sampled(manager.TrialEvalCallback, base))


def _sampled(*bases: type) -> type:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bases[0].__init__(self, *args, **{**kwargs, "deterministic": False})  # type: ignore[misc]

    return type(f"Sampled{bases[0].__name__}", bases, {"__init__": init})


def enjoy_masked() -> None:
    """Make rl_zoo3's enjoy apply the env's masks, which it does not pass to `predict`."""
    # rl_zoo3 `enjoy.enjoy` creates the env first, and then loads the algorithm that ALGOS names.
    enjoy = importlib.import_module("rl_zoo3.enjoy")
    create = enjoy.create_test_env
    created: list[VecEnv] = []

    def create_and_keep(*args: Any, **kwargs: Any) -> VecEnv:
        created[:] = [create(*args, **kwargs)]
        return created[0]

    class Masked(TokenMaskablePPO):
        def predict(self, *args: Any, **kwargs: Any) -> Any:
            return super().predict(*args, **{**kwargs, "action_masks": get_action_masks(created[0])})

    vars(enjoy).update(create_test_env=create_and_keep)
    enjoy.ALGOS[MASKED] = Masked


def main() -> None:
    """Run rl_zoo3's `train` or `enjoy`, whichever the first word of the command line names, with the other words."""
    script = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if script not in SCRIPTS:
        sys.exit(
            f"Expected `python -m agents.zoo {'|'.join(SCRIPTS)} ...`, got {script}: --help follows one of the two."
        )
    register()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    algorithm = parser.parse_known_args()[0].algo
    if script == "enjoy" and algorithm == MASKED:
        enjoy_masked()
    elif script == "train" and algorithm in ALGORITHMS:
        evaluate_samples(masked=algorithm == MASKED)
    sys.argv[:2] = [f"agents.zoo {script}"]  # the program's name in rl_zoo3's own --help
    getattr(importlib.import_module(f"rl_zoo3.{script}"), script)()
