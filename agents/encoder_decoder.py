"""Encoder-decoders (T5, BART): the prompt is what the encoder reads, the tokens since are the decoder's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from textenv.model_loading import n_positions

from .backbone import PROBE_LENGTH, Backbone, close
from .cache import ColumnLayer, PrefixCache
from .interface import LengthError
from .sequences import bucket_by_length


class Seq2SeqBackbone(Backbone):
    """An encoder-decoder, read as a `Backbone` is, with how many tokens of each row are the prompt's besides.

    The encoder reads the prompt. The decoder begins with the config's `decoder_start_token_id` and goes on with the
    tokens since, replies of a multi-turn environment included; what follows the k-th of them is read in its column k.
    The logits may be scaled (T5 with tied embeddings) and have a bias (`final_logits_bias` of BART); where they are
    anything else than that of the head, the whole model is run, without a cache. An empty prompt, which `TextEnv`
    refuses, is read as the one token with which the decoder begins. `TextEnv` leaves out the tokens with which a
    tokenizer closes a text; a pretrained encoder that was trained with them is given prompts as lists of token ids.

    Args:
        model: The model.
        vocab_size: How many tokens the tokenizer has; embedding rows beyond it are never sampled and never scored.
        n_positions: Not looked at: each half has its own limit, which `check_length` knows.

    Raises:
        ValueError: If the model has fewer embedding rows than that, or no token with which the decoder begins.
    """

    is_encoder_decoder = True

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        start = model.config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "Expected a config with `decoder_start_token_id`, got None: set it to the token with which the decoder "
                "begins (pad_token_id for T5, eos_token_id for BART)."
            )
        self.start = int(start)
        # T5 with tied embeddings; a flag of the config, absent from most.
        self.head_scale = model.config.d_model**-0.5 if model.config.to_dict().get("scale_decoder_outputs") else 1.0
        super().__init__(model, vocab_size, 0)  # how long each half may get is not known here

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise ValueError where prompts are longer than the encoder can read, or completions than the decoder."""
        limit = n_positions(self.model.config)
        if limit is None:
            return
        if n_tokens > limit:
            fact = f"Expected prompts to fit the encoder's {limit} positions, got up to {n_tokens} tokens"
            raise LengthError(fact, "lower max_prompt_tokens", None)
        if n_written + 1 > limit:
            raise LengthError(
                f"Expected completions to fit the decoder's {limit} positions, of which its first token takes one, got "
                f"up to {n_written} tokens",
                "lower max_new_tokens",
                n_written + 1 - limit,
            )

    def new_cache(self) -> Seq2SeqCache | None:
        return Seq2SeqCache(self) if self.is_cacheable else None  # type: ignore[arg-type]  # `read` has one input more

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H)."""
        logits = self.model.get_output_embeddings()(hidden * self.head_scale)
        bias = self.model._buffers.get("final_logits_bias")
        return (logits if bias is None else logits + bias)[:, : self.vocab_size]

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor, n_prompt: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Run encoder and decoder on whole rows and read the decoder at the places (rows, cols).

        Args:
            ids: Prompts and the tokens since, (B, T), padded on the right.
            rows: Which rows to read, (N,).
            cols: The columns of `ids` after which to read, (N,): that of a prompt's last token, or later.
            n_prompt: How many tokens of each row are the prompt's, (B,).

        Returns:
            Hidden states (N, H), and logits (N, V) where they do not follow from those, else None.

        Raises:
            ValueError: If a column is inside a prompt, or a prompt or completion is longer than the model can read.
        """
        places = cols + 1 - n_prompt[rows]  # in the decoder, where the start token has column 0
        first, last, width = torch.stack([places.min(), places.max(), n_prompt.max()]).tolist()
        if first < 0:
            raise ValueError(f"Expected columns from a prompt's last token on, got one {-first} before it.")
        encoder_ids, encoder_mask, decoder_ids = self.split(ids, n_prompt, width, last + 1)
        if self.head_is_linear:
            hidden = self._encode(encoder_ids, encoder_mask)
            return self._decode(decoder_ids, hidden, encoder_mask)[rows, places], None  # (N, H)
        output = self.model(
            input_ids=encoder_ids,
            attention_mask=encoder_mask,
            decoder_input_ids=decoder_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        return output.decoder_hidden_states[-1][rows, places], output.logits[rows, places, : self.vocab_size]

    def split(self, ids: Tensor, n_prompt: Tensor, width: int, n_decoder: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoder's tokens (B, width), which of them are real, and the decoder's tokens (B, n_decoder).

        Both halves are padded on the right; the decoder's with whatever the row has there.
        """
        width = max(width, 1)
        self.check_length(width, n_decoder - 1)
        device = ids.device
        encoder_ids = ids[:, :width].masked_fill((n_prompt == 0)[:, None], self.start)
        encoder_mask = torch.arange(width, device=device) < n_prompt.clamp(min=1)[:, None]  # (B, width)
        columns = n_prompt[:, None] - 1 + torch.arange(n_decoder, device=device)  # (B, n_decoder)
        decoder_ids = ids.gather(1, columns.clamp(0, ids.shape[1] - 1))
        decoder_ids[:, 0] = self.start
        return encoder_ids, encoder_mask.long(), decoder_ids

    def prefill_rows(
        self, encoder_ids: Tensor, encoder_mask: Tensor, decoder_ids: Tensor, mask: Tensor, position_ids: Tensor
    ) -> EncoderDecoderCache:
        """Return the keys and values of the prompts (B, S), padded on the right, and of left-padded decoder rows."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self._encode(encoder_ids, encoder_mask)
        self._decode(decoder_ids, hidden, encoder_mask, mask, position_ids, cache)
        return cache

    def decode(
        self, ids: Tensor, encoder_mask: Tensor, mask: Tensor, position_ids: Tensor, cache: EncoderDecoderCache
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, H) and logits (B, V) after one more token of each row, (B, 1)."""
        # With its keys and values at hand, the model asks the encoder's output for its shape alone.
        shape = (*encoder_mask.shape, self.model.config.d_model)
        hidden = torch.zeros((), device=ids.device, dtype=self.model.dtype).expand(shape)
        states = self._decode(ids, hidden, encoder_mask, mask, position_ids, cache)[:, 0]  # (B, H)
        return states, self.logits(states)

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, S, H)

    def _decode(
        self,
        ids: Tensor,
        encoder_hidden: Tensor,
        encoder_mask: Tensor,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Return the decoder's hidden states, (B, T, H)."""
        with self._at(position_ids):
            output = self.model.get_decoder()(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=encoder_hidden,
                encoder_attention_mask=encoder_mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    @contextmanager
    def _at(self, position_ids: Tensor | None) -> Iterator[None]:
        """Have the decoder take its absolute positions, if it has any, from (B, T) instead of counting columns.

        These decoders take no positions as an argument; they pass them to an embedding, one for all rows. Relative
        positions (T5) need nothing: they are the same wherever a row stands.
        """
        decoder = self.model.get_decoder()

        def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            return (args, {**kwargs, "position_ids": position_ids}) if "position_ids" in kwargs else None

        def unsqueeze(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            assert position_ids is not None, "checked below"
            is_per_row = output.numel() == position_ids.numel() * output.shape[-1]
            return output.reshape(*position_ids.shape, -1) if is_per_row else output  # (B, T, H)

        with ExitStack() as stack:
            for child in decoder.children() if position_ids is not None else ():
                if isinstance(child, nn.Embedding) and child is not decoder.get_input_embeddings():
                    stack.enter_context(child.register_forward_pre_hook(replace, with_kwargs=True))
                    stack.enter_context(child.register_forward_hook(unsqueeze))
            yield

    def probe_places(self) -> tuple[Any, ...]:
        """Return a prompt of `PROBE_LENGTH` tokens and one less since, read at the end."""
        ids = torch.arange(2 * PROBE_LENGTH - 1, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + ids.shape[1] - 1, zero + PROBE_LENGTH

    def _full_logits(self, ids: Tensor, *places: Tensor) -> Tensor:
        encoder_ids, _, decoder_ids = self.split(ids, places[-1], PROBE_LENGTH, PROBE_LENGTH)
        output = self.model(input_ids=encoder_ids, decoder_input_ids=decoder_ids, use_cache=False)
        return output.logits[0, -1:, : self.vocab_size]

    def _decodes_like(self, expected: Tensor, ids: Tensor, *places: Tensor) -> bool:
        """Whether a padded prompt and left-padded decoder rows, decoded with a cache, end in the same logits."""
        if not self.head_is_linear:
            return False
        width, first = PROBE_LENGTH + 2, PROBE_LENGTH - 1
        encoder_ids, encoder_mask, decoder_ids = self.split(ids, places[-1], width, PROBE_LENGTH)
        padded = torch.cat([torch.zeros_like(ids[:, :2]), decoder_ids[:, :first]], dim=1)  # (1, 2 + T - 1)
        positions = torch.tensor([[0, 0, *range(first)]], device=ids.device)
        mask = positions.new_tensor([[0, 0, *[1] * PROBE_LENGTH]])
        cache = self.prefill_rows(encoder_ids, encoder_mask, padded, mask[:, :-1], positions)
        last = positions.new_tensor([[first]])
        return close(self.decode(decoder_ids[:, -1:], encoder_mask, mask, last, cache)[1], expected)


class Seq2SeqCache(PrefixCache):
    """A `PrefixCache` of the decoder's tokens, with the keys and values that each row's prompt has in the decoder.

    A row is decoded incrementally only where prompt and boundary are the same too. A new row is encoded once; the
    keys and values of its prompt stay until the row is another one or the weights change. Prompts are aligned on the
    left, in as many columns as the longest has.

    Args:
        backbone: The model.
    """

    backbone: Seq2SeqBackbone

    def drop(self) -> None:
        """Forget everything."""
        super().drop()
        self.prompt_layers: list[ColumnLayer] = []
        self.n_prompt: Tensor | None = None

    def _read(self, ids: Tensor, lengths: Tensor, n_prompt: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        known = self._goes_on(ids, lengths, n_prompt)
        since = lengths - n_prompt  # the decoder has one token more
        # The one synchronisation with the device in a step.
        is_known, counts, prompts = torch.stack([known.long(), since, n_prompt]).tolist()
        fresh = [row for row, is_old in enumerate(is_known) if not is_old]
        if not any(is_known):
            self.drop()
        self._make_room(max(counts) + 1, max((counts[row] for row in fresh), default=0))
        for places in bucket_by_length(np.array([counts[row] + prompts[row] for row in fresh], dtype=np.int64)):
            similar = [fresh[place] for place in places]
            widths = max(prompts[row] for row in similar), max(counts[row] for row in similar)
            self._fill(ids, since, n_prompt, torch.tensor(similar, device=ids.device), *widths)
        width = max(*prompts, 1)
        for layer in self.prompt_layers:
            layer.keys, layer.values = (buffer[:, :, :width] for buffer in layer.buffers)
        last = ids.gather(1, (lengths[:, None] - 1).clamp(min=0)).masked_fill(since[:, None] == 0, self.backbone.start)
        columns = torch.arange(self.columns + 1, device=ids.device)
        mask = columns >= self.columns - since[:, None]  # (B, columns + 1)
        is_prompt = torch.arange(width, device=ids.device) < n_prompt.clamp(min=1)[:, None]  # (B, width)
        cache = EncoderDecoderCache(self.layers, Cache(layers=list(self.prompt_layers)))
        result = self.backbone.decode(last, is_prompt.long(), mask.long(), since[:, None], cache)
        self.columns += 1
        self.remember(ids, lengths)
        self.n_prompt = n_prompt
        return result

    def has_rows_of(self, ids: Tensor, lengths: Tensor, n_prompt: Tensor) -> bool:  # type: ignore[override]
        """Whether these rows are in the cache: at least one of as many goes on where it was left."""
        return bool(self._goes_on(ids, lengths, n_prompt).any())

    def _goes_on(self, ids: Tensor, lengths: Tensor, n_prompt: Tensor) -> Tensor:
        """Return which rows are the row read before plus one token behind the same prompt, (B,) bool."""
        known = self.growth(ids, lengths) == 1
        if self.n_prompt is None or len(self.n_prompt) != len(n_prompt):
            return known
        return known & (n_prompt == self.n_prompt)

    def _fill(self, ids: Tensor, since: Tensor, n_prompt: Tensor, rows: Tensor, width: int, n_since: int) -> None:
        """Encode some rows, read all but the decoder's last token of them, and copy keys and values in."""
        encoder_ids, encoder_mask, decoder_ids = self.backbone.split(ids[rows], n_prompt[rows], width, n_since + 1)
        n_read = max(n_since, 1)  # the prompt's keys and values come with a decoder token, if only the first
        source = torch.arange(n_read, device=ids.device) - (n_read - since[rows, None].clamp(min=1))  # (R, n_read)
        positions = source.clamp(min=0)
        states = self.backbone.prefill_rows(
            encoder_ids, encoder_mask, decoder_ids.gather(1, positions), (source >= 0).long(), positions
        )
        if n_since > 0:
            self._place(rows, len(ids), states.self_attention_cache)
        prompt_states = cast("list[DynamicLayer]", states.cross_attention_cache.layers)
        while len(self.prompt_layers) < len(prompt_states):
            self.prompt_layers.append(ColumnLayer())
        for layer, state in zip(self.prompt_layers, prompt_states, strict=True):
            assert state.keys is not None and state.values is not None, "just computed"
            n_columns = state.keys.shape[2]
            layer.allocate(len(ids), n_columns, state.keys, state.values)
            layer.columns = max(layer.columns, n_columns)
            for buffer, new in zip(layer.buffers, (state.keys, state.values), strict=True):
                buffer[rows, :, :n_columns] = new.to(buffer.dtype)
