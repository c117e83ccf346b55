"""An encoder-decoder of transformers (T5, BART): its encoder reads the prompt, its decoder the tokens after it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from textenv.huggingface.positions import n_positions

from .backbone import Backbone, at, head_input, whole_states
from .buckets import bucket_by_length
from .decoder_positions import rows_at
from .interface import LengthError
from .kept_states import States
from .prefix_cache import Alike, ColumnLayer, PrefixCache, by_layer, copies_of, texts
from .probe import PROBE_LENGTH
from .prompt_layout import SharedPrompts
from .shared_encodings import empty_cache, read_encoded


class Seq2SeqBackbone(Backbone):
    """An encoder-decoder of transformers with the members of `Backbone`; `read` also takes the prompts' lengths.

    The encoder reads the prompt. The decoder reads the config's `decoder_start_token_id` and then the tokens after the
    prompt, replies of a multi-turn environment included: its column k has read k of them, and predicts the next.

    Logits may be the output embedding of the hidden states, scaled (T5) or with a bias (`final_logits_bias` of BART).
    With any other head the whole model is run, without a cache. `TextEnv` leaves out the tokens with which a tokenizer
    closes a text; for an encoder that was trained with them, pass prompts as lists of token ids. An empty prompt, which
    `TextEnv` refuses, is read as the start token alone.

    Args:
        model: The model. In training mode too, its modules stay in evaluation mode, without dropout or other noise.
        vocab_size: V, the number of tokens of the tokenizer. Embedding rows beyond it are never sampled nor scored.
        n_positions: Ignored: encoder and decoder have a limit each, which `check_length` checks.

    Raises:
        ValueError: If the model has fewer embedding rows, or no `decoder_start_token_id`.
    """

    is_encoder_decoder = True

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        start = getattr(model.config, "decoder_start_token_id", None)  # T5's config may have no such field
        if start is None:
            raise ValueError(
                "Expected a config with `decoder_start_token_id`, got None: set it to the token with which the decoder "
                "begins (pad_token_id for T5, eos_token_id for BART)."
            )
        self.start = int(start)
        # `T5ForConditionalGeneration.forward` of transformers scales the hidden states; other configs lack the flag.
        self.head_scale = model.config.d_model**-0.5 if model.config.to_dict().get("scale_decoder_outputs") else 1.0
        super().__init__(model, vocab_size, 0)  # no limit to check here: `n_positions` counts both halves together

    @cached_property
    def longest_prompt(self) -> int | None:
        """The longest prompt that the encoder's positions allow, in tokens; None where they set no limit."""
        return n_positions(self.model, "encoder")

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise LengthError if the encoder cannot read a prompt of `n_tokens`, or the decoder `n_written` tokens."""
        limit = self.longest_prompt
        if limit is not None and n_tokens > limit:
            fact = f"Expected prompts to fit the encoder's {limit} positions, got up to {n_tokens} tokens"
            raise LengthError(fact, "lower max_prompt_tokens", None)
        limit = self.longest
        if limit is not None and n_written + 1 > limit:
            raise LengthError(
                f"Expected completions to fit the decoder's {limit} positions, of which its first token takes one, got "
                f"up to {n_written} tokens",
                "lower max_new_tokens",
                n_written + 1 - limit,
            )

    def new_cache(self) -> Seq2SeqCache | None:
        """Return an empty cache of keys and values; None if decoding from one would not be exact."""
        return Seq2SeqCache(self) if self.is_cacheable else None  # type: ignore[arg-type]  # `read` takes one argument more

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H)."""
        logits = self.model.get_output_embeddings()(hidden * self.head_scale)
        bias = self.model._buffers.get("final_logits_bias")
        return (logits if bias is None else logits + bias)[:, : self.vocab_size]

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor, n_prompt: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the decoder's hidden states at the positions (rows, cols) of whole rows.

        Args:
            ids: Prompts and the tokens after them, (B, T), padded on the right.
            rows: The row of each position, (N,).
            cols: The column of `ids` after which to read, (N,): that of a prompt's last token, or a later one.
            n_prompt: The number of prompt tokens of each row, (B,).

        Returns:
            Hidden states (N, H), and None if `head_is_linear`, else logits (N, V).

        Raises:
            ValueError: If a column is inside a prompt, or a prompt or completion is longer than the model can read.
        """
        columns = cols + 1 - n_prompt[rows]  # (N,): in the decoder, where column 0 is the start token
        # Stacked, (3,), for a single synchronisation with the device.
        first, last, width = torch.stack([columns.min(), columns.max(), n_prompt.max()]).tolist()
        if first < 0:
            raise ValueError(f"Expected columns from a prompt's last token on, got one {-first} before it.")
        encoder_ids, encoder_mask, decoder_ids = self.split(ids, n_prompt, width, last + 1)
        if self.head_is_linear:
            hidden = self._encode(encoder_ids, encoder_mask)
            return self._decode(decoder_ids, hidden, encoder_mask)[rows, columns], None  # (N, H)
        with head_input(self.model) as seen:
            logits = self._whole(encoder_ids, encoder_mask, decoder_ids)
        return at(whole_states(seen, logits), rows, columns), at(logits, rows, columns)

    def read_shared(self, shared: SharedPrompts) -> tuple[Tensor, Tensor | None]:
        """Return what `read` does for whole sequences, each distinct prompt of which is encoded once.

        Only where `shares_prompts`, and so `head_is_linear`.

        Raises:
            ValueError: As `read` does.
        """
        width = shared.prompts.shape[1]
        self.check_length(width, max((part.ids.shape[1] for part in shared.completions), default=0))
        is_prompt = (torch.arange(width, device=shared.prompts.device) < shared.n_prompt[:, None]).long()  # (G, P)
        cache, start = empty_cache(), torch.full_like(shared.prompts[:, :1], self.start)
        first = self._decode(start, self._encode(shared.prompts, is_prompt), is_prompt, cache=cache)  # (G, 1, H)
        return read_encoded(first, cache, self._decode_on, shared), None

    @property
    def most_columns(self) -> None:
        """No limit: prompts and completions are not in one attention."""

    def _whole(self, encoder_ids: Tensor, encoder_mask: Tensor, decoder_ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the model's own forward, without a cache."""
        output = self.model(
            input_ids=encoder_ids,
            attention_mask=encoder_mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=torch.ones_like(decoder_ids),
            use_cache=False,
        )
        return output.logits[..., : self.vocab_size]

    def split(self, ids: Tensor, n_prompt: Tensor, width: int, n_decoder: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoder's tokens (B, width), their mask (B, width), and the decoder's tokens (B, n_decoder).

        Both halves are padded on the right. The decoder needs no mask: no position that is read attends to its padding.
        """
        width = max(width, 1)
        self.check_length(width, n_decoder - 1)
        device = ids.device
        encoder_ids = ids[:, :width].masked_fill((n_prompt == 0)[:, None], self.start)
        encoder_mask = torch.arange(width, device=device) < n_prompt.clamp(min=1)[:, None]  # (B, width)
        columns = n_prompt[:, None] - 1 + torch.arange(n_decoder, device=device)  # (B, n_decoder)
        decoder_ids = ids.gather(1, columns.clamp(0, ids.shape[1] - 1))  # (B, n_decoder)
        decoder_ids[:, 0] = self.start  # replaces the prompt's last token
        return encoder_ids, encoder_mask.long(), decoder_ids

    def prefill_rows(
        self,
        encoder_ids: Tensor,
        encoder_mask: Tensor,
        decoder_ids: Tensor,
        mask: Tensor,
        position_ids: Tensor,
        copies: list[int] | None = None,
    ) -> EncoderDecoderCache:
        """Return the keys and values of prompts (B, S), padded on the right, and of left-padded decoder rows (B, T).

        Of prompts that have a number in `copies`, (B,), in common, one is encoded; None encodes all.
        """
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if copies is None or len(set(copies)) == len(copies):
            hidden = self._encode(encoder_ids, encoder_mask)
        else:
            rows = list(dict(zip(copies, range(len(copies)), strict=True)).values())  # one of each number
            hidden = self._encode(encoder_ids[rows], encoder_mask[rows])[copies]  # (B, S, H)
        self._decode(decoder_ids, hidden, encoder_mask, mask, position_ids, cache)
        return cache

    def decode(
        self, ids: Tensor, encoder_mask: Tensor, mask: Tensor, position_ids: Tensor, cache: EncoderDecoderCache
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, H) and logits (B, V) after one more token of each row, (B, 1)."""
        states = self._decode_on(ids, encoder_mask, mask, cache, position_ids)[:, 0]  # (B, H)
        return states, self.logits(states)

    def _decode_on(
        self,
        ids: Tensor,
        encoder_mask: Tensor,
        mask: Tensor,
        cache: EncoderDecoderCache,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the decoder's hidden states, (B, T, H), given a cache that has the keys and values of the prompts."""
        # With cached keys and values of the prompt (`EncoderDecoderCache.is_updated`), cross-attention ignores the
        # encoder's output (`modeling_bart.BartAttention.forward`): only the output's shape is used, for the mask.
        shape = (*encoder_mask.shape, self.model.config.d_model)
        hidden = torch.zeros((), device=ids.device, dtype=self.model.dtype).expand(shape)
        return self._decode(ids, hidden, encoder_mask, mask, position_ids, cache)

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
        if mask is None:  # without one, T5Gemma's decoder would pass over tokens that equal pad, such as its first one
            mask = torch.ones_like(ids)
        decoder = self.model.get_decoder()
        with rows_at(decoder, position_ids):
            output = decoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=encoder_hidden,
                encoder_attention_mask=encoder_mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def probe_inputs(self) -> tuple[Any, ...]:
        """Return the arguments of `read` for one row: a prompt of `PROBE_LENGTH` tokens, then one token fewer."""
        ids = torch.arange(2 * PROBE_LENGTH - 1, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + ids.shape[1] - 1, zero + PROBE_LENGTH

    def plain_logits(self, ids: Tensor, n_prompt: Tensor) -> Tensor:
        """Return the logits (T, V) at each token from the prompt's last one on, by the model's own forward."""
        n = int(n_prompt)
        return self._whole(*self.split(ids, n_prompt, n, ids.shape[1] - n + 1))[0]

    def decoding_modes(self) -> Iterator[tuple[bool, bool]]:
        """Yield the only mode of a `Seq2SeqCache`, which needs a linear head."""
        if self.head_is_linear:
            yield False, False


class Seq2SeqCache(PrefixCache):
    """A `PrefixCache` of the decoder's tokens, with the keys and values of each row's prompt for cross-attention.

    A row is decoded from the cache only if its prompt also ends at the same token as before. The prompt of a new row is
    encoded once: for all rows that begin with it, and for those that go on with different tokens if read in one
    forward. Its keys and values stay until the row is replaced or the weights change. They are aligned on the left, in
    as many columns as the longest prompt has. Rows stay in order: a row's slot is its index.

    Args:
        backbone: The encoder-decoder.
    """

    backbone: Seq2SeqBackbone  # type: ignore[assignment]  # its `read` also takes the lengths of the prompts

    def _forget_rows(self) -> None:
        super()._forget_rows()
        self.prompt_layers: list[ColumnLayer] = []  # of cross-attention, one per layer of the decoder
        self.n_prompt: Tensor | None = None  # (B,) of the last read

    def _read(self, ids: Tensor, lengths: Tensor, n_prompt: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        known = self._grew_by_one(ids, lengths, n_prompt)
        since = lengths - n_prompt  # (B,) tokens after the prompt; the decoder also has the start token
        # Stacked, (3, B), for a single synchronisation with the device in a step.
        is_known, counts, prompts = torch.stack([known.long(), since, n_prompt]).tolist()
        fresh = [row for row, is_old in enumerate(is_known) if not is_old]
        if not any(is_known):
            self._begin_again()
        self.slots = np.arange(len(ids))
        self._make_room(max(counts) + 1, max((counts[row] for row in fresh), default=0))
        n_tokens = np.array(prompts) + np.array(counts)
        # The decoder's part of a text begins where the prompt ends.
        known_texts = dict(zip(fresh, texts(ids, fresh, np.maximum(n_tokens - 1, prompts)), strict=True))
        own = [np.array([prompts[row], counts[row], *text]) for row, text in known_texts.items()]
        # Under this key a prompt is kept for episodes that begin: the encoder has read all of their text.
        keys = {row: np.array([n := prompts[row], 0, *text[:n]]).tobytes() for row, text in known_texts.items()}
        unread = list(self._copy_kept(fresh, own, n_tokens).values())
        for bucket in bucket_by_length(np.array([n_tokens[rows[0]] for rows in unread], dtype=np.int64)):
            similar: list[Alike] = [unread[i] for i in bucket]
            first = [rows[0] for rows in similar]
            widths = max(prompts[row] for row in first), max(counts[row] for row in first)
            numbers = self._number(first, prompts, keys)
            states = self._fill(ids, since, n_prompt, similar, numbers, *widths)
            for i, row in enumerate(first):
                if keys[row] not in self.kept:
                    n = max(prompts[row], 1)
                    self._keep(keys[row], n, states, i, n)
        width = max(*prompts, 1)
        for layer in self.prompt_layers:
            layer.keys, layer.values = (buffer[:, :, :width] for buffer in layer.buffers)  # (B, heads, width, size)
        # (B, T) to (B, 1): the newest token of each row, or the start token if there is none after the prompt.
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
        """Return whether at least one of the rows extends its row by one token, after the same prompt."""
        return bool(self._grew_by_one(ids, lengths, n_prompt).any())

    def _grew_by_one(self, ids: Tensor, lengths: Tensor, n_prompt: Tensor) -> Tensor:
        """Return which rows extend the row of the last read by one token, after the same prompt, (B,) bool."""
        known = self.growth(ids, lengths) == 1
        if self.n_prompt is None or len(self.n_prompt) != len(n_prompt):
            return known
        return known & (n_prompt == self.n_prompt)

    def _number(self, rows: list[int], prompts: list[int], keys: dict[int, bytes]) -> list[int] | None:
        """Return a number for the prompt of each of some rows, (R,), counted from 0; prompts that are equal have one.

        Args:
            rows: The rows, (R,), which are about to be read.
            prompts: The number of tokens of each row's prompt, (B,).
            keys: The prompts themselves, by row.
        """
        if not self.is_sharing:
            return None
        numbers: dict[bytes, int] = {}
        for row in rows:
            if keys[row] in numbers:
                self.prefill_tokens -= prompts[row]
                self.shared_tokens += prompts[row]
            numbers.setdefault(keys[row], len(numbers))
        return [numbers[keys[row]] for row in rows]

    def _fill(
        self,
        ids: Tensor,
        since: Tensor,
        n_prompt: Tensor,
        similar: list[Alike],
        numbers: list[int] | None,
        width: int,
        n_since: int,
    ) -> States:
        """Encode the prompts of some rows, read all but the last of their decoder tokens, and write keys and values.

        Returns:
            Those of the prompts.
        """
        rows = torch.tensor([alike[0] for alike in similar], device=ids.device)  # (R,)
        encoder_ids, encoder_mask, decoder_ids = self.backbone.split(ids[rows], n_prompt[rows], width, n_since + 1)
        # At least 1: cross-attention computes the prompt's keys and values only when the decoder reads a token.
        n_read = max(n_since, 1)
        # The index of the decoder token that each column holds; negative in padding.
        source = torch.arange(n_read, device=ids.device) - (n_read - since[rows, None].clamp(min=1))  # (R, n_read)
        positions = source.clamp(min=0)  # (R, n_read)
        # The decoder's tokens move from the left to the right of their rows: (R, n_since + 1) to (R, n_read).
        states = self.backbone.prefill_rows(
            encoder_ids, encoder_mask, decoder_ids.gather(1, positions), (source >= 0).long(), positions, numbers
        )
        slots, copies = torch.from_numpy(np.concatenate(similar)), copies_of(similar)
        if n_since > 0:
            self._write(slots, len(ids), by_layer(states.self_attention_cache), copies)
        of_prompts = by_layer(states.cross_attention_cache)
        self._write_prompts(slots, len(ids), of_prompts, copies)
        return of_prompts

    def _write_prompts(self, slots: Tensor, n_rows: int, states: States, copies: Tensor | None = None) -> None:
        """Write the keys and values of some rows' prompts; the arguments are those of `_write`."""
        while len(self.prompt_layers) < len(states):
            self.prompt_layers.append(ColumnLayer())
        for layer, (keys, values) in zip(self.prompt_layers, states, strict=True):
            n_columns = keys.shape[2]
            layer.allocate(n_rows, n_columns, keys, values)
            layer.columns = max(layer.columns, n_columns)
            for buffer, new in zip(layer.buffers, (keys, values), strict=True):
                new = new if copies is None else new[copies.to(new.device)]
                buffer[slots.to(buffer.device), :, :n_columns] = new.to(buffer.dtype)

    def _write_kept(self, rows: list[int], states: States) -> None:
        """Write the keys and values of a prompt, (heads, T, size), into several rows."""
        of_row = [(keys[None], values[None]) for keys, values in states]
        self._write_prompts(torch.tensor(rows), len(self.slots), of_row)

    def _width(self) -> int:
        return self.prompt_layers[0].columns
