"""Checkpoints: the whole state of training in a folder of safetensors and JSON, which loads without unpickling."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from textenv.checks.json_files import read_json

from ..distributed.collectives import once, raise_together
from ..distributed.sharding import Shards, gathered, local, placed, released
from ..distributed.world import is_main_process
from ..files import replaced_folder, restore_folder
from ..policies.lm_policy import LMPolicy
from ..policies.optimizers import load_optimizer, optimizer_state
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.ended_episodes import EndedEpisode
from ..rollout.transitions import Transitions
from ..steps.step import RolloutStep, sequence_buffer, text_vec_env
from .logits_probe import check_probe, probe_logits
from .manifest import (
    CheckpointError,
    newest_intact,
    numbered,
    of_our_making,
    read_manifest,
    verify_checkpoint,
    versions,
    write_manifest,
)
from .output_folders import output_folder
from .random_states import generator_meta, generator_tensors, load_generators
from .rank_states import add_other_ranks, begin_after_furthest, reseed, take_own_rank
from .shard_files import Tensors, read_shards, read_tensors, replaced_together, write_shards

# Attributes of SB3's `BaseAlgorithm` that hold the progress of `learn`; schedules are functions of the last one.
COUNTERS = ("num_timesteps", "_total_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
# The safetensors files of every checkpoint, without suffix; each step before returns adds one, "step_<key>".
FILES = ("policy", "optimizer", "episodes", "waiting", "token_sets", "generators", "probe")
STATE = {  # the shape of state.json, for `read_json`
    "counters": dict.fromkeys(COUNTERS, float),
    "episodes": [dict],
    "env": dict,
    "param_groups": [{"params": list}],
    "python_random": list,
    "numpy_random": list,
    "minibatches": dict,
    "steps": dict,
    "remembered": dict,
}


def save_checkpoint(model: OnPolicyAlgorithm, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write everything that the next update depends on, so that a resumed run equals one that was never stopped.

    A checkpoint holds policy, critic, optimizer, schedule position, random generators, the order of prompts, unfinished
    episodes, transitions that wait for the end of their episode or group, and the state of the steps before returns.
    On a CPU the next update is the same bit for bit. With several processes, all must call it: each writes its shards,
    and rank 0 the rest, including the states of the other processes.

    Args:
        model: A model built with `make_agent`, or with `TextVecEnv` and `SequenceRolloutBuffer`. Save between
            iterations: in a callback's `_on_rollout_start`, or after `learn`.
        folder: A folder that is absent or empty. It appears whole, or not at all.
        overwrite: Whether an earlier checkpoint there may be replaced; nothing else ever is.

    Returns:
        The folder.

    Raises:
        RuntimeError: If it is called in the middle of a rollout, or between a rollout and its update.
        TypeError: If an optimizer keeps something that is neither a number nor a tensor, or an episode's
            `preds.state` holds something that JSON would change.
        FloatingPointError: If a weight is NaN or infinite: such a policy is never written.
        ValueError: An `OutputFolderError` if files in the folder would be lost.

    Example:
        >>> import tempfile
        >>> from agents import load_checkpoint, make_agent, save_checkpoint
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a", "bcd"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> model, other = (make_agent(env, config, n_envs=8, device="cpu") for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_checkpoint(other, save_checkpoint(model.learn(32), f"{folder}/step_32"))
        >>> other.num_timesteps
        32
    """
    _save(model, output_folder(folder, "checkpoint", overwrite))
    return Path(folder)


def _save(model: OnPolicyAlgorithm, written: AbstractContextManager[Path]) -> None:
    env_state = text_vec_env(model.get_env()).state_dict()
    if not is_between_iterations(model):
        raise RuntimeError("Expected to save between iterations, not inside a rollout or before its update.")
    lm = cast("LMPolicy", model.policy).lm
    with gathered(lm):
        probe = probe_logits(lm.backbone)
    with released(lm):  # back to shards, whose shapes are those of the optimizer's state
        tensors, meta = _state(model, *env_state)
        tensors["probe"] = {"logits": probe}
        with replaced_together(written) as beside:
            whole = write_shards(beside, tensors)
            once(lambda: _write(beside, whole, meta))


def _state(
    model: OnPolicyAlgorithm, arrays: Mapping[str, np.ndarray], env_meta: Mapping[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """Return the state to save: tensors by file, and the rest, which fits JSON; the env's state is passed in."""
    buffer = sequence_buffer(model)
    # A process sees only its own shard of sharded weights, and all must raise if one of them finds a NaN.
    broken = [name for name, weight in named_tensors(model.policy) if not bool(local(weight).isfinite().all())]
    error = FloatingPointError(f"Expected finite weights to save, got a NaN or infinity in {', '.join(broken[:3])}.")
    raise_together(error if broken else None)
    optimizer, groups = optimizer_state(model.policy.optimizer)
    tensors: Tensors = {
        "policy": dict(named_tensors(model.policy)),
        "optimizer": optimizer,
        "episodes": {name: torch.as_tensor(array) for name, array in arrays.items()},
        "waiting": _waiting_tensors(buffer),
        "token_sets": buffer.token_sets.state_dict(buffer.waiting_sets()),
        "generators": generator_tensors(model),
    }
    assert model._last_episode_starts is not None and model.ep_info_buffer is not None
    tensors["episodes"]["episode_starts"] = torch.as_tensor(model._last_episode_starts)
    meta: dict[str, Any] = {
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "episodes": list(model.ep_info_buffer),
        "env": env_meta,
        "param_groups": groups,
        **generator_meta(model),
        # States that this model loaded for steps that are not attached again yet: they are saved as they came.
        "steps": {name: state for name, (_, state) in buffer.saved_steps.items()},
        "remembered": buffer.remembered | {name: item.state_dict() for name, item in buffer.remembering.items()},
    }
    tensors.update({f"step_{name}": content for name, (content, _) in buffer.saved_steps.items()})
    for step in buffer.before_returns:
        if isinstance(step, RolloutStep) and step.is_kept:
            tensors[f"step_{step.key}"], meta["steps"][step.key] = step.state_dict()
    add_other_ranks(tensors, meta)
    return tensors, meta


def _write(folder: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    for name, content in tensors.items():
        safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(_json(meta), encoding="utf-8")
    write_manifest(folder, meta["counters"]["num_timesteps"])


def is_between_iterations(model: OnPolicyAlgorithm) -> bool:
    """Whether the model can be saved: it has trained on all samples, and its observation is the env's current one."""
    buffer, env = sequence_buffer(model), text_vec_env(model.get_env())
    # SB3's `RolloutBuffer.get` sets `generator_ready`, `reset` clears it: a full buffer without it was not trained on.
    if 0 < buffer.pos < buffer.buffer_size or (buffer.full and not buffer.generator_ready):
        return False
    return np.array_equal(model._last_obs, env.lanes.tokens)  # type: ignore[arg-type]


def load_checkpoint(model: OnPolicyAlgorithm, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint into a model that was built like the saved one.

    Continue with `model.learn(remaining, reset_num_timesteps=False, callback=...)` and the same callbacks. A
    `KLPenalty` among them takes its reference from the checkpoint.

    If the number of processes has changed, weights, optimizer, steps and counters are loaded, and the order of prompts
    continues after the furthest prompt that any process had drawn. A warning counts what is lost: running episodes,
    episodes that waited for their group, and the states of random generators.

    Args:
        model: A model built with the same arguments as the saved one.
        folder: A folder that `save_checkpoint` wrote. Its files are verified, and none of them is unpickled. If the
            loaded model gives other logits than the saved one gave, a warning says so, with both versions.

    Raises:
        CheckpointError: If a file is missing, damaged or of another model or format; the model is then unchanged. Also
            if somebody edited a file and its hash in the manifest; the model may then be changed.

    Example:
        >>> from agents import latest_checkpoint, load_checkpoint
        >>> # if folder := latest_checkpoint("run"): load_checkpoint(model, folder)
    """
    path = Path(folder)
    once(lambda: restore_folder(path))
    verify_checkpoint(path)
    lm = cast("LMPolicy", model.policy).lm
    with of_our_making(path):
        tensors, meta = _read(path, lm.shards)
        _load(model, tensors, meta)
        with gathered(lm):
            check_probe(lm.backbone, tensors["probe"]["logits"], read_manifest(path)["versions"], versions())


def _read(path: Path, shards: Shards | None) -> tuple[Tensors, dict[str, Any]]:
    """Return the saved state: tensors by file, and the rest."""
    meta = read_json(path / "state.json", STATE)
    tensors: Tensors = {}
    for file in path.glob("*.safetensors"):
        tensors[file.stem] = read_tensors(file)
    for name, content in read_shards(path, shards).items():
        tensors[name].update(content)
    for name in (*FILES, *(f"step_{step}" for step in meta["steps"])):
        if name not in tensors:
            raise CheckpointError(f"{path / name}.safetensors: missing.")
    return tensors, meta


def _load(model: OnPolicyAlgorithm, tensors: Tensors, meta: dict[str, Any]) -> None:
    lm, buffer, env = cast("LMPolicy", model.policy).lm, sequence_buffer(model), text_vec_env(model.get_env())
    if lm.shards is not None:
        lm.shards.bring(False)
    weights = dict(named_tensors(model.policy))
    check_same_shapes(weights, tensors["policy"])
    _check_same_optimizer(model.policy.optimizer, meta["param_groups"])
    is_other_size = not take_own_rank(tensors, meta)
    episodes = {name: tensor.numpy() for name, tensor in tensors["episodes"].items()}
    episode_starts = episodes.pop("episode_starts")
    try:  # SB3 `base_class._setup_learn` resets the env if `_last_obs` is None, which would drop the loaded episodes
        if is_other_size:
            model._last_obs, episode_starts = begin_after_furthest(env, meta), np.ones(env.num_envs, dtype=bool)
        else:
            model._last_obs = env.load_state_dict(episodes, meta["env"])
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model._last_episode_starts = episode_starts
    model.policy.set_training_mode(True)  # drops keys and values that were cached under the old weights
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(placed(tensors["policy"][name], weight))
    load_optimizer(model.policy.optimizer, tensors["optimizer"], meta["param_groups"])
    buffer.reset()
    if not is_other_size:
        _load_waiting(buffer, tensors["waiting"])
        buffer.token_sets.load_state_dict(tensors["token_sets"])
    for name in COUNTERS:
        setattr(model, name, meta["counters"][name])
    # SB3 `base_class._setup_learn` makes these two anew only if `reset_num_timesteps` is true or they are None.
    model.ep_info_buffer = deque(meta["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    # Steps that `learn` attaches later take their states from `saved_steps`; those already attached take them now.
    buffer.saved_steps = {name: (tensors[f"step_{name}"], state) for name, state in meta["steps"].items()}
    buffer.expected_steps = list(meta["steps"])
    for step in buffer.before_returns:
        if isinstance(step, RolloutStep) and step.key in buffer.saved_steps:
            step.load_state_dict(*buffer.saved_steps.pop(step.key))
    buffer.remembered = dict(meta["remembered"])
    for name in buffer.remembering.keys() & buffer.remembered.keys():
        buffer.remembering[name].load_state_dict(buffer.remembered.pop(name))
    if is_other_size:
        reseed(cast("LMPolicy", model.policy), tensors["generators"])
    else:
        load_generators(model, tensors["generators"], meta)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of a folder, by timesteps, whose files are all intact; None if there is none.

    Args:
        folder: The folder that holds checkpoints, under any names, as `Checkpoints` writes it.

    Example:
        >>> from agents import latest_checkpoint
        >>> latest_checkpoint("no-such-folder") is None
        True
    """
    return newest_intact(folder, name=None)[0]


def save_step(model: OnPolicyAlgorithm, folder: str | os.PathLike[str], keep: int) -> Path:
    """Save a checkpoint as "step_<timesteps>" in a folder, and remove all but the newest `keep`.

    Raises:
        OSError: If it cannot be written, or does not read back as it was written; the older ones then stay.
    """
    newest = Path(folder) / f"step_{model.num_timesteps:012d}"  # 12 digits: names sort as numbers do
    _save(model, replaced_folder(newest))  # replaces only an earlier, perhaps damaged checkpoint of this step
    try:
        verify_checkpoint(newest)  # first, since the older ones that are removed below are known to be intact
    except CheckpointError as error:
        raise OSError(errno.EIO, str(error)) from error
    # Checkpoints with more timesteps are another run's, or damaged: they are neither counted nor removed.
    for old in [path for path in numbered(folder) if path <= newest][keep:]:
        if is_main_process():
            shutil.rmtree(old)
    return newest


def named_tensors(policy: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield each weight and buffer of a policy once: tied ones under their first name, offloaded ones not at all."""
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):  # torch leaves out tied duplicates
        if not tensor.is_meta:  # offloaded weights are frozen, and are loaded with the model itself
            yield name, tensor


def check_same_shapes(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the saved tensors have the names and shapes of a model's."""
    differing = sorted(weights.keys() ^ saved.keys())
    differing += sorted(name for name in weights.keys() & saved.keys() if weights[name].shape != saved[name].shape)
    if differing:
        raise CheckpointError(f"Expected the weights of the model that was saved, got others: {differing[:5]} differ.")


def _check_same_optimizer(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    own = [(len(group["params"]), sorted(group)) for group in optimizer.state_dict()["param_groups"]]
    if own != [(len(group["params"]), sorted(group)) for group in groups]:
        raise CheckpointError(
            f"Expected the optimizer that was saved, got {type(optimizer).__name__} with other weights or options."
        )


def _waiting_tensors(buffer: SequenceRolloutBuffer) -> dict[str, Tensor]:
    """Return the transitions that wait in the buffer for a later rollout.

    Their names are "lane.field" for unfinished episodes, "step:lane.field" for finished ones.
    """
    arrays: dict[str, Any] = {}
    for lane, transitions in buffer.waiting.items():
        arrays.update({f"{lane}.{name}": array for name, array in _arrays(transitions).items()})
    for (step, lane), episode in buffer.waiting_episodes.items():
        numbers = {
            "group": np.array(episode.group),
            "n_prompt": np.array(episode.n_prompt),
            "is_dropped": np.array(episode.is_dropped),
        }
        fields = {**_arrays(episode.part), **numbers, "tokens": episode.tokens}
        arrays.update({f"{step}:{lane}.{name}": array for name, array in fields.items()})
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def _arrays(transitions: Transitions) -> dict[str, np.ndarray]:
    """Return the arrays of transitions by name, each once."""
    arrays = transitions._asdict()
    if transitions.is_by_policy:
        del arrays["behaviour_log_probs"]  # the same array as `log_probs`
    if np.isinf(transitions.reference_log_probs).all():
        del arrays["reference_log_probs"]
    return arrays


def _load_waiting(buffer: SequenceRolloutBuffer, tensors: Mapping[str, Tensor]) -> None:
    """Put the transitions that `_waiting_tensors` returned back into the buffer."""
    fields_of: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        origin, name = key.split(".")
        fields_of.setdefault(origin, {})[name] = tensor.numpy().copy()
    buffer.waiting, buffer.waiting_episodes = {}, {}
    for origin, fields in fields_of.items():
        fields.setdefault("behaviour_log_probs", fields["log_probs"])
        fields.setdefault("reference_log_probs", np.full_like(fields["log_probs"], np.inf))
        transitions = Transitions(*(fields[name] for name in Transitions._fields))
        if ":" in origin:
            step, lane = map(int, origin.split(":"))
            buffer.waiting_episodes[step, lane] = EndedEpisode(
                int(fields["group"]),
                fields["tokens"],
                int(fields["n_prompt"]),
                transitions,
                bool(fields["is_dropped"]),
            )
        else:
            buffer.waiting[int(origin)] = transitions


def _json(meta: Mapping[str, Any]) -> str:
    """Return the state as JSON; refuse a `preds.state` of users' episodes that JSON would change."""
    text = json.dumps(meta, ensure_ascii=False, default=_plain)
    states = [
        [env["states"], [episode["preds"]["state"] for episode in env["waiting"]]]
        for env in (meta["env"], json.loads(text)["env"])
    ]
    if states[0] != states[1]:  # as a tuple does, which becomes a list, or a number as a key, which becomes a text
        raise TypeError("Expected `preds.state` to hold what JSON brings back as it was: texts, numbers, lists, dicts.")
    return text


def _plain(value: Any) -> Any:
    """Return a numpy scalar as a Python number, for `json.dumps`."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"Expected what a checkpoint keeps to fit JSON, got {value!r:.80} (in `preds.state`?).")
