"""The texts of a policy with what each token has earned: collected in rollouts without updates, and kept in files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm.std import tqdm

from ..models.sequences import SequenceBatch
from ..rollout.estimation import Estimation
from ..rollout.explained_variance import by_third, explained_variance, thirds
from ..rollout.transitions import Segment, batch_of, joined
from ..small_models.progress import progress
from ..steps.step import RolloutStep, sequence_buffer

FILE = "texts.safetensors"


class ValuedText(NamedTuple):
    """A finished text, and the return of each of the policy's n tokens in it."""

    tokens: np.ndarray  # (T,) int32: the prompt and the text, without its last token, after which nothing is valued
    cols: np.ndarray  # (n,) int32: the column before each token of the policy, where its value is read
    returns: np.ndarray  # (n,) float32, in units of reward
    n_prompt: int


class _Collector(BaseCallback):
    """Keeps the texts that each rollout would train, with their returns."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__()
        self.texts: list[ValuedText] = []
        self.bar = bar

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # SB3 `on_policy_algorithm.collect_rollouts` has computed returns, of a critic whose values are of no use yet.
        buffer = sequence_buffer(self.model)
        for i, part in enumerate(buffer.trained):
            segment, part = buffer.trained.segment(i), joined([part])  # a copy: the next rollout overwrites the arrays
            # With lambda 1, a return is the sum of the rewards that follow, whatever the values are.
            Estimation(buffer.gamma, gae_lambda=1.0, critic_lambda=1.0).carry(part)
            self.texts.append(ValuedText(segment.tokens, part.cols, part.returns, segment.n_prompt))
        self.bar.update()


def collect_texts(
    model: OnPolicyAlgorithm, steps: Sequence[RolloutStep], n_rollouts: int, progress_bar: bool
) -> list[ValuedText]:
    """Return the texts that end in some rollouts, with the rewards that an update would see, and train nothing.

    Texts that have not ended when the last rollout does are left out, long ones more often than short ones; the more
    rollouts, the less that counts.

    Args:
        model: The model.
        steps: The steps before returns that its training will have, besides those that are attached.
        n_rollouts: The number of rollouts.
        progress_bar: Whether to show a progress bar.
    """
    buffer = sequence_buffer(model)
    trains_parts, buffer.complete_episodes = not buffer.complete_episodes, True
    try:
        with progress(total=n_rollouts, description="rollouts", unit="rollout", is_shown=progress_bar) as bar:
            collector = _Collector(bar)
            # What SB3 `on_policy_algorithm.OnPolicyAlgorithm.learn` does, without `train` and the log.
            total = n_rollouts * model.n_steps * model.n_envs
            _, callback = model._setup_learn(total, CallbackList([*steps, collector]))
            callback.on_training_start({}, {})
            for _ in range(n_rollouts):
                assert model.env is not None, "checked by _setup_learn"
                model.collect_rollouts(model.env, callback, buffer, n_rollout_steps=model.n_steps)
            callback.on_training_end()
    finally:
        buffer.complete_episodes = not trains_parts
        buffer.waiting.clear()
        buffer.waiting_episodes.clear()
    return collector.texts


def write_texts(texts: Sequence[ValuedText], folder: Path) -> None:
    """Write texts into a folder."""
    arrays = {
        "n_tokens": np.array([len(text.tokens) for text in texts], dtype=np.int64),
        "n_valued": np.array([len(text.cols) for text in texts], dtype=np.int64),
        "n_prompt": np.array([text.n_prompt for text in texts], dtype=np.int64),
        **{name: np.concatenate([getattr(text, name) for text in texts]) for name in ("tokens", "cols", "returns")},
    }
    safetensors.numpy.save_file(arrays, folder / FILE)


def read_texts(folder: Path) -> list[ValuedText]:
    """Return the texts that `write_texts` wrote."""
    arrays = safetensors.numpy.load_file(folder / FILE)
    tokens = np.split(arrays["tokens"], arrays["n_tokens"].cumsum()[:-1])
    cols, returns = (np.split(arrays[name], arrays["n_valued"].cumsum()[:-1]) for name in ("cols", "returns"))
    n_prompt = arrays["n_prompt"].tolist()
    return [ValuedText(*fields) for fields in zip(tokens, cols, returns, n_prompt, strict=True)]


def as_batch(texts: Sequence[ValuedText], micro_batch_tokens: int | None, device: torch.device | str) -> SequenceBatch:
    """Return texts as a batch of sequences, whose transitions are the policy's tokens in their order."""
    segments = [Segment(0, 0, len(text.cols), text.tokens, True, text.n_prompt) for text in texts]
    rows = np.repeat(np.arange(len(texts)), [len(text.cols) for text in texts])  # (N,)
    return batch_of(segments, rows, np.concatenate([text.cols for text in texts]), micro_batch_tokens, None, device)


def explained(texts: Sequence[ValuedText], values: Iterable[np.ndarray]) -> tuple[float | None, dict[str, float]]:
    """Return the explained variance of the values of texts, (n,) each, and that of each third of the texts."""
    of_text = list(values)
    returns = [text.returns for text in texts]
    places = [thirds(text.cols, text.n_prompt) for text in texts]
    whole = explained_variance(np.concatenate(of_text), np.concatenate(returns))
    return whole, by_third(zip(of_text, returns, places, strict=True))


def returns_of(texts: Sequence[ValuedText]) -> np.ndarray:
    """Return the returns of all tokens of texts, (N,) float64."""
    return np.concatenate([text.returns for text in texts]).astype(np.float64)
