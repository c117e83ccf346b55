"""The command `critic`: the fit of a critic before the first update, from a training's configuration to a folder."""

from __future__ import annotations

import math
import sys

from ..errors import Exit
from ..runs.assemble import Parts, training_callbacks, trust_of
from ..steps.critic_warmup import CriticWarmup
from ..steps.step import RolloutStep
from ..supervised.critic_fit import fit_critic
from .options import CriticConfig
from .stage_options import StageOptions


def train_critic(config: CriticConfig, dumped: str, options: StageOptions) -> int:
    """Fit the critic of a configuration to rollouts of its model, and print its figures; return the exit code.

    Args:
        config: The configuration.
        dumped: The configuration as YAML, which a resumed fit must repeat.
        options: The options of the command line.
    """
    assert config.out is not None, "the command line has it"
    trust = trust_of(options)
    parts = Parts(config, trust, progress_bar=not options.quiet)
    callbacks = training_callbacks(config, trust)
    steps = [step for step in callbacks if isinstance(step, RolloutStep) and not isinstance(step, CriticWarmup)]
    fitted = fit_critic(
        parts.agent,
        config.out,
        steps=steps,
        n_rollouts=config.rollouts,
        n_epochs=config.n_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        about=dumped,
        resume=options.resume,
        overwrite=options.overwrite,
        progress_bar=not options.quiet,
    )
    mean, deviation = fitted.returns.mean, fitted.returns.deviation
    print(f"{fitted.n_texts} texts, {fitted.n_held_out} more held out; returns {mean:.3g}, deviation {deviation:.3g}")
    print(f"held out: explained variance {_shown(fitted.before)} -> {_shown(fitted.after)}")
    print(f"by thirds: {', '.join(f'{name} {_shown(figure)}' for name, figure in fitted.thirds.items())}")
    if not math.isfinite(fitted.after):
        print(
            "undefined: the returns of all held-out texts are equal; more --rollouts give more texts", file=sys.stderr
        )
    print(f"critic: {config.out}; use it by --model.critic pretrained --model.critic_model {config.out}")
    return Exit.DONE


def _shown(figure: float) -> str:
    return f"{figure:.3f}" if math.isfinite(figure) else "undefined"
