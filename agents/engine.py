"""The seam to another engine that writes the tokens of a rollout: what is asked of it, and how answers are checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .backbone import Backbone
from .trainable import merged_state_dict

MOST_LOG_PROB = 1e-3  # nats above 0 that are rounding


class EngineLost(RuntimeError):
    """The engine has ended, or does not answer."""


class Request(NamedTuple):
    """A text that is to be continued."""

    tokens: np.ndarray  # (T,) int64: all there is so far, prompt and replies of an environment included
    most_new: int  # the most tokens to write, 1 or more
    stop_ids: tuple[int, ...]  # each ends the text, and is the last token of the completion


class Completion(NamedTuple):
    """What an engine wrote: up to and including the first stop id, or as many tokens as it might."""

    tokens: np.ndarray  # (n,) int64
    log_probs: np.ndarray  # (n,) float32, in nats: of the distribution that each was drawn from, temperature included


class RolloutEngine(Protocol):
    """What writes the tokens of rollouts for `EngineRollouts`.

    It samples from softmax(logits / temperature) over the tokenizer's vocabulary, and from nothing else: no top-k, no
    top-p, no penalty, none of the defaults of a checkpoint's `generation_config.json`.

    Example:
        >>> from agents.engine import RolloutEngine
        >>> def stop(engine: RolloutEngine) -> None:
        ...     engine.close()
    """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights, by the names of the transformers model, tied ones once; forget what was computed before.

        They are the trainer's own tensors: to be copied before this returns.
        """
        ...

    def generate(self, requests: Sequence[Request], temperature: float, seed: int) -> list[Completion]:
        """Continue each text, in the order of the requests.

        Args:
            requests: The texts; the same one may be there several times, and is then continued independently.
            temperature: Divides the logits.
            seed: The same weights, requests and seed should give the same completions: a resumed run then equals one
                that was never stopped.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@contextmanager
def named_weights(backbone: Backbone) -> Iterator[list[tuple[str, Tensor]]]:
    """Give the weights of a policy's language model as a model without adapters has them, tied ones once.

    Raises:
        ValueError: If some are offloaded, or adapters stand beside quantised weights.
    """
    with backbone.whole_model() as model:
        weights = unique(merged_state_dict(model))
        away = [name for name, weight in weights if weight.is_meta]
        if away:
            raise ValueError(
                f"Expected weights in memory to send, got {len(away)} that are offloaded, {away[0]!r} first."
            )
        yield weights


def unique(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return weights by name, those that share their memory under the first name alone."""
    places: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, weight in weights.items():
        places.setdefault((weight.data_ptr() or id(weight), tuple(weight.shape)), name)  # 0: empty, or offloaded
    return [(name, weights[name]) for name in places.values()]


def check_completions(requests: Sequence[Request], completions: Sequence[Completion], vocab_size: int) -> None:
    """Refuse what would be trained on wrongly.

    Raises:
        ValueError: Saying what an engine got wrong.
    """
    if len(completions) != len(requests):
        raise ValueError(f"Expected {len(requests)} completions of the engine, got {len(completions)}.")
    for request, (tokens, log_probs) in zip(requests, completions, strict=True):
        n = len(tokens)
        if not 1 <= n <= request.most_new or len(log_probs) != n:
            raise ValueError(
                f"Expected a completion of 1 to {request.most_new} tokens with as many log-probabilities, got {n} "
                f"tokens and {len(log_probs)} log-probabilities."
            )
        outside = (tokens < 0) | (tokens >= vocab_size)
        if outside.any():
            raise ValueError(
                f"Expected token ids of the tokenizer, in [0, {vocab_size}), got {tokens[outside][0]}: rows of the "
                "model's embedding beyond the tokenizer must never be sampled."
            )
        stops = np.flatnonzero(np.isin(tokens, request.stop_ids))
        if (n < request.most_new or len(stops)) and (len(stops) == 0 or stops[0] != n - 1):
            raise ValueError(
                f"Expected a completion that ends with the first of its stop ids {request.stop_ids}, or after "
                f"{request.most_new} tokens, got {n} tokens with stop ids at {stops.tolist()}: the stop token and its "
                "log-probability belong to the completion, since the policy is trained to write it."
            )
        if not (np.isfinite(log_probs).all() and (log_probs <= MOST_LOG_PROB).all()):
            raise ValueError(
                f"Expected log-probabilities, finite and not above 0, got {np.min(log_probs)} to {np.max(log_probs)}."
            )
