"""The defaults of a configuration that depend on other keys: those of the demo model, of a recipe and of a judge."""

from __future__ import annotations

from typing import Any

from .config import ModelConfig, TrainConfig
from .recipes import RECIPES

# The defaults with the demo model: it is small and hardly trained, so it learns at a much larger learning rate and in
# fewer tokens than a pretrained model. Other models have the defaults of the dataclasses above. With these settings the
# demo reaches the reward that its tests demand; examples/quickstart.py has the same settings in Python.
DEMO_SETTINGS: dict[str, Any] = {
    "total_tokens": 56_000,
    "env.max_new_tokens": 32,
    "algorithm.learning_rate": 1.5e-3,
    "algorithm.schedule": "linear",
}
DEMO_PPO_SETTINGS: dict[str, Any] = {  # further ones for PPO_NAMES: A2C and TRPO have no such minibatches
    "algorithm.batch_size": 512,
    "algorithm.args": {"target_kl": 0.05},
}
PPO_NAMES = ("ppo", "maskable_ppo")


def default_settings(given: TrainConfig) -> dict[str, Any]:
    """Return the defaults, by dotted key, that differ from those of `TrainConfig`, by model, recipe and judge.

    Where both have a key, the recipe's counts. Arguments of the environment are given to those that the configuration
    has, and replace none of them. Where there is a judge, it says which model is the best, as in `Evaluate`.

    Args:
        given: The configuration with the defaults of `TrainConfig`.

    Example:
        >>> from agents import AlgorithmConfig, ModelConfig, TrainConfig
        >>> default_settings(TrainConfig())["algorithm.batch_size"]
        512
        >>> default_settings(TrainConfig(model=ModelConfig("gpt2")))
        {}
        >>> default_settings(TrainConfig(model=ModelConfig("gpt2"), algorithm=AlgorithmConfig(recipe="ppo")))
        {'algorithm.advantage': 'gae', 'kl.coef': 0.05}
    """
    recipe = {} if given.algorithm.recipe is None else RECIPES[given.algorithm.recipe]
    settings = _demo_settings(given) if given.model.name == ModelConfig.name else {}
    by_judge = {} if given.evaluation.judge is None else {"evaluation.best": "judge"}
    return {**settings, **recipe, **by_judge}


def _demo_settings(given: TrainConfig) -> dict[str, Any]:
    settings, algorithm = dict(DEMO_SETTINGS), given.algorithm
    if algorithm.name in PPO_NAMES:
        settings |= DEMO_PPO_SETTINGS
        n_steps = algorithm.n_steps or given.env.max_new_tokens or settings["env.max_new_tokens"]
        if n_steps * algorithm.n_envs % settings["algorithm.batch_size"]:
            # SB3 `ppo.PPO.__init__` warns of a truncated minibatch if the batch size does not divide the rollout.
            del settings["algorithm.batch_size"]
    return settings
