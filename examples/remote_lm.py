"""The client of a causal language model whose blocks other processes hold: a `LanguageModel` of your own.

python examples/remote_lm.py runs nothing by itself: see examples/remote_backend.py

The client holds the small parts: embeddings, the last norm, the output layer, and soft prompts (virtual tokens in front
of every text; Lester et al., 2021). The last two are trained. Hidden states and gradients go through the servers of
`remote_blocks.py`. `RemoteLM` is a `LanguageModel`, and `RemoteBlocks` is the spec that policies get.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from remote_blocks import blocks_of
from remote_chain import Address, Chain, RefusedError, Server, Session, rows_a_message
from remote_wire import read_key
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agents import LengthError, RowCache

PROBE_LENGTH = 4  # tokens of the text on which the output layer is tried
PROBE_TOLERANCE = 1e-3  # of the largest logit: float32 rounds to far less


class RemoteLM(nn.Module):
    """A `LanguageModel` whose frozen blocks other processes run.

    Args:
        model: The model without its blocks.
        chain: The servers of the blocks.
        virtual: The tokens whose embeddings the virtual tokens start from, one each.
        trains: Whether virtual tokens and output layer are trained; with False nothing here learns.
        vocab_size: The number of tokens of the tokenizer.
        n_positions: The longest text, in tokens.

    Raises:
        ValueError: If the model has fewer tokens or positions than that, its output layer is not linear, or the longest
            text does not fit in a message.
    """

    is_encoder_decoder = False
    takes_cache = True

    def __init__(
        self,
        model: PreTrainedModel,
        chain: Chain,
        virtual: Sequence[int],
        trains: bool,
        vocab_size: int,
        n_positions: int,
    ) -> None:
        super().__init__()
        if model.get_input_embeddings().num_embeddings < vocab_size:
            raise ValueError(f"Expected a model with at least the {vocab_size} tokens of the tokenizer, got fewer.")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the update, in training mode, must compute what the rollout did
        self.trunk = model.base_model.requires_grad_(False)
        # A copy: where the model ties the layer to the embeddings, these stay frozen.
        self.head = copy.deepcopy(model.get_output_embeddings()).requires_grad_(trains)
        embeddings = model.get_input_embeddings().weight
        self.virtual = nn.Parameter(embeddings.detach()[list(virtual)].clone(), requires_grad=trains)  # (n, H)
        self.chain, self.vocab_size, self.hidden_size = chain, vocab_size, embeddings.shape[1]
        self.longest = len(virtual) + n_positions
        self.check_length(n_positions)
        # A backward sends the gradient and its hidden states. Refused here rather than at the first long text.
        rows_a_message(torch.empty(1, self.longest, self.hidden_size, device="meta"), 2 if trains else 1)
        self._blocks: Callable[[Tensor], Tensor] = chain
        blocks_of(self.trunk)[2].register_forward_pre_hook(self._through_blocks)
        self._check_head(model)

    @torch.no_grad()
    def _check_head(self, model: PreTrainedModel) -> None:
        ids = torch.arange(PROBE_LENGTH)[None] % self.vocab_size  # (1, T)
        embedded = self.embed(ids)
        expected = model.eval()(inputs_embeds=embedded, use_cache=False).logits[0, :, : self.vocab_size]
        difference = (self.logits(self.run(embedded)[0]) - expected).abs().max()
        if not difference <= PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"Expected logits of {type(model).__name__} to be its output layer's of the hidden states, got others."
            )

    @property
    def device(self) -> torch.device:
        return self.virtual.device

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        limit = getattr(self.trunk.config, "max_position_embeddings", None)  # BLOOM's ALiBi has no limit
        total = len(self.virtual) + n_tokens + n_written
        if limit is not None and total > limit:
            fact = f"Expected virtual tokens, prompt and completion in {limit} positions, got up to {total} tokens"
            raise LengthError(fact, "lower max_prompt_tokens or max_new_tokens", total - limit)

    def forward(self, ids: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.read(ids, rows, cols)
        return hidden, self.logits(hidden)

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, None]:
        # The virtual tokens shift all columns. (B, n + T, H) -> (N, H)
        return self.run(self.embed(ids))[rows, cols + len(self.virtual)], None

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)[..., : self.vocab_size]

    def new_cache(self) -> SessionCache:
        return SessionCache(self)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of whole rows (B, T) behind the n virtual tokens, (B, n + T, H)."""
        virtual = self.virtual.expand(len(ids), -1, -1)  # (B, n, H)
        return torch.cat([virtual, self.trunk.get_input_embeddings()(ids)], dim=1)

    def run(self, embedded: Tensor, session: Session | None = None) -> Tensor:
        """Return the hidden states (B, t, H) of embedded rows, or of a session's new tokens."""
        start = 0 if session is None else session.position
        positions = torch.arange(start, start + embedded.shape[1], device=embedded.device)[None]
        self._blocks = self.chain if session is None else session  # called by the hook in front of the last norm
        try:
            return self.trunk(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        finally:
            self._blocks = self.chain

    def _through_blocks(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._blocks(inputs[0]), *inputs[1:])


class SessionCache(RowCache):
    """Decodes in sessions of rows that had the same length when the session was opened.

    Servers take no padding masks, and all rows of a session are at one position. A row that is new, or has outgrown its
    session, therefore goes into a new session, together with all other new rows of its length. A row that does not grow
    by one token leaves its slot in the session empty, and the session ends with the last of its rows. A row that is
    unchanged gets the hidden state of the last step again. If a server refuses (its sessions hold too much, empty slots
    included), all rows are read anew, once.
    """

    backbone: RemoteLM

    def drop(self) -> None:
        """Forget everything; the sessions end."""
        super().drop()
        self.slots: dict[int, tuple[Session, int]] = {}  # of each row: its session, and its row there
        self.hidden: Tensor | None = None  # (B, H), of the last step

    def _read(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._read_on(ids, lengths)
        except RefusedError:
            self.drop()
        return self._read_on(ids, lengths)

    def _read_on(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        lengths = lengths.clamp(min=1)
        growth, counts = torch.stack([self.growth(ids, lengths), lengths]).tolist()
        is_old = [grown == 0 or (grown == 1 and self._has_room(row)) for row, grown in enumerate(growth)]
        if not any(is_old):
            self.drop()
        going_on: dict[Session, list[int]] = defaultdict(list)
        fresh: dict[int, list[int]] = defaultdict(list)
        for row, grown in enumerate(growth):
            if not is_old[row]:
                self.slots.pop(row, None)
                fresh[counts[row]].append(row)
            elif grown == 1:
                going_on[self.slots[row][0]].append(row)
        hidden = self.hidden
        hidden = (
            torch.zeros(len(ids), self.backbone.hidden_size, device=ids.device) if hidden is None else hidden.clone()
        )
        for session, rows in going_on.items():
            hidden[rows] = self._step(session, rows, ids[rows, lengths[rows] - 1])
        for length, rows in fresh.items():
            hidden[rows] = self._open(rows, ids[rows, :length])
        self.hidden = hidden
        self.remember(ids, lengths)
        return hidden, self.backbone.logits(hidden)

    def _has_room(self, row: int) -> bool:
        """Return whether a row is in a session that has room for one more token."""
        return row in self.slots and self.slots[row][0].position < self.slots[row][0].max_length

    def _step(self, session: Session, rows: list[int], newest: Tensor) -> Tensor:
        """Read one token (b,) for some rows of a session; its other rows leave it. Return hidden states (b, H)."""
        for row in [row for row, (other, _) in self.slots.items() if other is session and row not in rows]:
            del self.slots[row]
        slots = [self.slots[row][1] for row in rows]
        tokens = newest.new_zeros(session.n_rows, 1)  # an empty slot reads token 0, and its result is dropped
        tokens[slots, 0] = newest
        embedded = self.backbone.trunk.get_input_embeddings()(tokens)
        return self.backbone.run(embedded, session)[slots, 0]

    def _open(self, rows: list[int], ids: Tensor) -> Tensor:
        """Read new rows of one length, (b, T), in new sessions, each as large as a message; return (b, H)."""
        embedded, results = self.backbone.embed(ids), []
        size = rows_a_message(embedded)
        for chunk, rows_of_chunk in zip(embedded.split(size), torch.tensor(rows).split(size), strict=True):
            session = self.backbone.chain.open(len(chunk), max(self.backbone.longest, 2 * chunk.shape[1]))
            results.append(self.backbone.run(chunk, session)[:, -1])  # at the last token
            self.slots.update({row: (session, slot) for slot, row in enumerate(rows_of_chunk.tolist())})
        return torch.cat(results)


def load_without_blocks(folder: str) -> tuple[PreTrainedModel, int]:
    """Return a causal model without its blocks, and their number."""
    config = AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        raise ValueError(f"Expected a causal model in {folder}, got an encoder-decoder.")
    n_blocks, config.num_hidden_layers = config.num_hidden_layers, 0
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warning of the blocks' unused weights
    try:
        model, keys = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if keys["missing_keys"]:
        raise ValueError(f"Expected all weights outside the blocks in {folder}, got none for {keys['missing_keys']}.")
    return model, n_blocks


@dataclass(frozen=True)
class RemoteBlocks:
    """The spec of a `RemoteLM`, for `policy_kwargs=dict(lm=...)`; it can be pickled, and connects when it is built.

    Args:
        folder: The folder of the model; its blocks are not read.
        addresses: The host and port of each server, in any order.
        key_file: The file of the key; the key itself is not pickled.
        virtual: The tokens whose embeddings the virtual tokens start from: one token several times, or an instruction.
        trains: Whether virtual tokens and output layer are trained.
        seconds: The longest silence of a server that is to answer.
    """

    folder: str
    addresses: tuple[Address, ...]
    key_file: str
    virtual: tuple[int, ...] = ()
    trains: bool = True
    seconds: float = 60.0

    def build_backend(self, vocab_size: int, n_positions: int) -> RemoteLM:
        """Connect to the servers, and load the client's part of the model."""
        model, n_blocks = load_without_blocks(self.folder)
        key, traffic = read_key(self.key_file), Counter[tuple[str, str]]()
        servers = [Server(tuple(address), key, self.seconds, traffic) for address in self.addresses]
        chain = Chain(servers, n_blocks, traffic)
        return RemoteLM(model, chain, self.virtual, self.trains, vocab_size, n_positions)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
