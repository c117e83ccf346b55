"""Positions of a decoder's rows that begin in different columns, for decoders that count columns themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def rows_at(decoder: PreTrainedModel, position_ids: Tensor | None) -> Iterator[None]:
    """Give a decoder with absolute positions those of `position_ids`, (B, T), inside; None leaves it alone.

    transformers' `modeling_bart.BartDecoder.forward` takes no `position_ids`: it counts columns, the same for all rows,
    and passes (T,) to its position embedding, an `nn.Embedding` that is a direct child of the decoder. Hooks replace
    that argument. T5 needs nothing: relative positions do not depend on a row's first column.
    """

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**kwargs, "position_ids": position_ids}) if "position_ids" in kwargs else None

    def unsqueeze(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # `BartLearnedPositionalEmbedding.forward` has put a dimension before (T,): of (B, T) it made (1, B, T, H).
        assert position_ids is not None, "checked below"
        is_per_row = output.numel() == position_ids.numel() * output.shape[-1]
        return output.reshape(*position_ids.shape, -1) if is_per_row else output  # (B, T, H)

    with ExitStack() as stack:
        for child in decoder.children() if position_ids is not None else ():
            if isinstance(child, nn.Embedding) and child is not decoder.get_input_embeddings():
                stack.enter_context(child.register_forward_pre_hook(replace, with_kwargs=True))
                stack.enter_context(child.register_forward_hook(unsqueeze))
        yield
