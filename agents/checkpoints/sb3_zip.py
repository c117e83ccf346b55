"""The zip files of Stable-Baselines3's `model.save`, read without unpickling unless the user trusts them."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm


def load_sb3_zip(path: str | os.PathLike[str], model: BaseAlgorithm, trust: bool = False) -> BaseAlgorithm:
    """Load a zip file that SB3's `model.save` wrote.

    Such a file holds pickles, which run their author's code as soon as they are loaded. Checkpoints and exports
    (`save_checkpoint`, `export`) hold none.

    Args:
        path: The zip file.
        model: A model built with the same arguments as the saved one.
        trust: False reads weights and optimizer into `model`, and unpickles nothing. True has SB3 load the whole file,
            counters and arguments included: only for a file whose origin you know.

    Returns:
        `model`, or with `trust` the new model that SB3 made, on the env of `model`.

    Raises:
        ValueError: If it is not such a file, belongs to another model, or holds anything but tensors as weights.

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
        # SB3 `base_class.set_parameters` calls `save_util.load_from_zip_file` with `load_data=False`: weights are read
        # by `torch.load(weights_only=True)`, and the pickles in the entry "data" are left alone.
        model.set_parameters(str(file), device=model.device)
    except pickle.UnpicklingError as error:
        raise ValueError(f"Expected tensors alone among the weights in {file}, got something else: {error}") from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"Expected a file that {type(model).__name__}.save wrote of a model built as this one, got {file}: {error}"
        ) from error
    return model
