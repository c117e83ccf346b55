"""The probe of shared prompts: a few tokens show whether a model takes keys and values from outside exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import set_mode
from .probe import Rows, agree, attempt, small_weights, state_tolerance
from .prompt_layout import Prompts, SharedPrompts, lay_out
from .trainable import is_checkpointing

# Three rows of two prompts, of two tokens and of one: keys and values are copied to two rows, and padded on the left.
N_PROMPT, LENGTHS = (2, 2, 1), (4, 4, 3)

# States (N, ...) at some transitions: hidden states, then perhaps logits, or None.
AtTransitions: TypeAlias = tuple[Tensor | None, ...]


class Sharing(NamedTuple):
    """Whether prompts can be shared."""

    plainly: bool = False  # where no layer is under activation checkpointing
    in_checkpoints: bool = False  # by layers under activation checkpointing; false if there were none

    def now(self, model: PreTrainedModel, training: bool) -> bool:
        """Return whether prompts can be shared by a model in training or evaluation mode."""
        return self.in_checkpoints if training and is_checkpointing(model) else self.plainly


def examine_sharing(
    read: Callable[..., AtTransitions],
    read_shared: Callable[[SharedPrompts], AtTransitions],
    model: PreTrainedModel,
    vocab_size: int | None = None,
) -> Sharing:
    """Return whether prompts can be shared in evaluation mode and, under activation checkpointing, in training mode.

    Args:
        read: As for `shares_prompts`.
        read_shared: As for `shares_prompts`.
        model: The model behind both, left in evaluation mode.
        vocab_size: As for `shares_prompts`.
    """
    set_mode(model, training=False)
    plainly, in_checkpoints = shares_prompts(read, read_shared, model, vocab_size), False
    # `shared_encodings` hands the layers caches that a recomputation would find already filled.
    if plainly and is_checkpointing(model) and not model.config.is_encoder_decoder:
        set_mode(model, training=True)
        in_checkpoints = shares_prompts(read, read_shared, model, vocab_size)
        set_mode(model, training=False)
    return Sharing(plainly, in_checkpoints)


def shares_prompts(
    read: Callable[..., AtTransitions],
    read_shared: Callable[[SharedPrompts], AtTransitions],
    model: PreTrainedModel,
    vocab_size: int | None = None,
) -> bool:
    """Return whether rows that share their prompts have the states and the gradient of whole rows.

    Args:
        read: Returns the states at (rows, cols) of whole rows; takes the arguments of `Backbone.read`.
        read_shared: Returns the states at the transitions of rows that share their prompts.
        model: The model behind both, in the mode that is examined.
        vocab_size: The number of tokens that can be read; None for all rows of the embeddings.
    """
    n_tokens = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings if vocab_size is None else vocab_size
    first, second = Rows(model, n_tokens, model.device).ids[:, : max(LENGTHS)]  # (T,) each
    ids = torch.stack([second, torch.cat([second[:2], first[2:]]), first])  # (3, T)
    positions = [(row, col) for row, n in enumerate(LENGTHS) for col in range(N_PROMPT[row] - 1, n)]
    rows, cols = np.array(positions).T  # (N,) each
    prompts = Prompts(*(np.array(numbers) for numbers in ((0, 0, 1), N_PROMPT, LENGTHS)))
    shared = lay_out(ids, prompts, rows, cols, max(LENGTHS))
    whole = [ids, *(torch.as_tensor(array, device=ids.device) for array in (rows, cols))]
    if model.config.is_encoder_decoder:
        whole.append(torch.as_tensor(prompts.n_prompt, device=ids.device))
    vectors = small_weights(model.parameters())

    def results(is_shared: bool) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(vectors)):
            states = [part for part in (read_shared(shared) if is_shared else read(*whole)) if part is not None]
            gradients = _gradient(states[0], vectors) if vectors else torch.zeros(1)
        return (*(part.detach() for part in states), gradients)

    expected, _ = attempt(lambda: results(False))
    got, _ = attempt(lambda: results(True))
    if expected is None or got is None:
        return False
    tolerance = state_tolerance(model)
    return all(agree(*pair, tolerance) for pair in zip(got, expected, strict=True))


def _gradient(hidden: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """Return the gradient of a sum of hidden states, with a factor of its own for each number, in one vector."""
    factors = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
    gradients = torch.autograd.grad((hidden.float() * factors).sum(), weights, allow_unused=True)
    return torch.cat([gradient.flatten().float().cpu() for gradient in gradients if gradient is not None])
