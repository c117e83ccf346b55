"""The interface of a rollout engine, which writes the tokens of rollouts, and the check of its completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ..models.backbone import Backbone
from ..models.trainable import merged_state_dict

MOST_LOG_PROB = 1e-3  # nats: rounding lifts a log-probability above 0 by no more than this


class EngineLost(RuntimeError):
    """The error of a rollout engine that has ended, or does not answer."""


class Request(NamedTuple):
    """A text to continue.

    Attributes:
        tokens: (T,) int64, the text so far: prompt, completion and the replies of an environment.
        most_new: The most tokens to write, 1 or more.
        stop_ids: Tokens that end the text; the completion includes the stop token that ends it.
    """

    tokens: np.ndarray
    most_new: int
    stop_ids: tuple[int, ...]


class Completion(NamedTuple):
    """The text that an engine wrote, up to and including the first stop id, or of `most_new` tokens.

    Attributes:
        tokens: (n,) int64.
        log_probs: (n,) float32, in nats, under the distribution that each token was drawn from, temperature included.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


class RolloutEngine(Protocol):
    """The methods of an engine that writes the tokens of rollouts for `EngineRollouts`.

    An engine samples from softmax(logits / temperature) over the tokenizer's vocabulary: without top-k, top-p or
    penalties, and without the defaults of a checkpoint's `generation_config.json`.

    In several processes each has an engine object. All of them call `load_weights` at the same point, before the first
    call of a rollout; objects that speak to one server send the weights once, from rank 0, by
    `agents.distributed.collectives.once`, as `LocalEngine(shared=True)` does. `generate` is called by each process on
    its own, at any time and any number of times.

    Example:
        >>> import numpy as np
        >>> from agents.engines.protocol import Completion, check_completions
        >>> class Uniform:  # over two tokens, of which 0 ends a text
        ...     def load_weights(self, weights): ...
        ...     def generate(self, requests, temperature, seed):
        ...         return [Completion(np.array([0]), np.log([0.5], dtype=np.float32)) for _ in requests]
        ...     def close(self): ...
        >>> requests = [Request(np.array([1, 1]), 3, (0,))]
        >>> check_completions(requests, Uniform().generate(requests, 1.0, seed=0), vocab_size=2)
    """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the engine's model, and drop caches of the old weights.

        The tensors are the trainer's own, which it changes later: copy them before this returns.

        Args:
            weights: The names in the transformers model, and the tensors; tied weights come once.
        """
        ...

    def generate(self, requests: Sequence[Request], temperature: float, seed: int) -> list[Completion]:
        """Continue each text, in the order of the requests.

        Args:
            requests: The texts; if a text comes several times, each time is continued independently.
            temperature: The number that divides the logits.
            seed: The same weights, requests and seed should give the same completions: a resumed run then equals one
                that was never stopped.

        Returns:
            A completion for each request.
        """
        ...

    def close(self) -> None:
        """Release memory and processes."""
        ...


@runtime_checkable
class BackgroundEngine(RolloutEngine, Protocol):
    """The methods of an engine that writes elsewhere, while the trainer's process does something else.

    `EngineRollouts(ahead=True)` needs one.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from agents.engines.protocol import BackgroundEngine, Completion
        >>> class Threaded:  # a server elsewhere would write in the time that its thread here waits
        ...     pool = ThreadPoolExecutor(1)  # one, so that later calls wait for earlier ones
        ...     def load_weights(self, weights): ...
        ...     def generate(self, requests, temperature, seed):
        ...         return self.start(requests, temperature, seed)()
        ...     def start(self, requests, temperature, seed):
        ...         return self.pool.submit(self.ask, requests, temperature, seed).result
        ...     def ask(self, requests, temperature, seed): ...
        ...     def close(self): ...
        >>> isinstance(Threaded(), BackgroundEngine)
        True
    """

    def start(self, requests: Sequence[Request], temperature: float, seed: int) -> Callable[[], list[Completion]]:
        """Begin to continue texts, by the weights that the engine has now, and return at once.

        Other methods that are called before the texts are complete wait for them.

        Args:
            requests: The texts, as those of `generate`.
            temperature: The number that divides the logits.
            seed: The seed, as that of `generate`.

        Returns:
            A function that waits for the completions, and returns them or raises what `generate` would raise.
        """
        ...


@contextmanager
def named_weights(backbone: Backbone) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the weights of a policy's language model by name, with adapters merged, tied weights once.

    Raises:
        ValueError: If some weights are offloaded, or there are adapters on quantised weights.
    """
    with backbone.whole_model() as model:
        weights = unique(merged_state_dict(model))
        offloaded = [name for name, weight in weights if weight.is_meta]
        if offloaded:
            raise ValueError(
                f"Expected weights in memory to send, got {len(offloaded)} that are offloaded, {offloaded[0]!r} first."
            )
        yield weights


def unique(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return weights by name; weights that share their memory come once, under their first name."""
    names: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, weight in weights.items():
        # `data_ptr` is 0 for a tensor that is empty or offloaded: such tensors are told apart by `id`.
        names.setdefault((weight.data_ptr() or id(weight), tuple(weight.shape)), name)
    return [(name, weights[name]) for name in names.values()]


def check_completions(requests: Sequence[Request], completions: Sequence[Completion], vocab_size: int) -> None:
    """Check that an engine's completions can be trained on.

    Args:
        requests: The texts that the engine was given.
        completions: The engine's answer.
        vocab_size: The number of tokens of the tokenizer.

    Raises:
        ValueError: If there are too few or too many, a token is outside the vocabulary, a text does not end where it
            should, or a log-probability is not finite or is above 0.
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
        # A text that is shorter than asked for, or has a stop id, must end with its first stop id.
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
