"""Stable-Baselines3's own files: read without unpickling anything, unless one trusts them."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm


def load_sb3_zip(path: str | os.PathLike[str], model: BaseAlgorithm, trust: bool = False) -> BaseAlgorithm:
    """Load a file that SB3's `model.save` wrote.

    Such a file holds pickles, which run code of its author's as soon as they are loaded. Checkpoints and exports
    (`save_checkpoint`, `export`) hold none.

    Args:
        path: The zip.
        model: A model built as the saved one was, with the same arguments.
        trust: False reads weights and optimizer into `model`, and unpickles nothing. True has SB3 load all of it,
            counters and arguments too: only for a file of which you know where it comes from.

    Returns:
        `model`, or with `trust` the model that SB3 made, on the env of `model`.

    Raises:
        ValueError: If it is no such file, of another model, or its weights come with something that is no tensor.

    Example:
        >>> from agents import load_sb3_zip
        >>> # model = load_sb3_zip("model.zip", make_agent(env, "gpt2"))
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a file that model.save wrote, got {file}, which is none.")
    if trust:
        warnings.warn(
            f"{file} is loaded with its pickles, which run whatever code its author put there: trust=True is for files "
            "of your own.",
            stacklevel=2,
        )
        return type(model).load(file, env=model.get_env(), device=model.device)
    try:
        model.set_parameters(str(file), device=model.device)
    except pickle.UnpicklingError as error:
        raise ValueError(f"Expected tensors alone among the weights in {file}, got something else: {error}") from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"Expected a file that {type(model).__name__}.save wrote of a model built as this one, got {file}: {error}"
        ) from error
    return model
