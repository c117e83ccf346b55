"""A tiny model whose blocks threads of the test process serve over real sockets, and the same model in one piece."""

import sys
import threading
from contextlib import contextmanager
from multiprocessing.connection import Listener
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.command import ROOT
from tests.helpers.models import N_TOKENS, tiny

sys.path.insert(0, str(ROOT / "examples"))  # Python does so for scripts of that folder

import remote_blocks
import remote_chain
import remote_wire
from remote_blocks import Blocks
from remote_lm import RemoteBlocks, RemoteLM, SessionCache, load_without_blocks

N_BLOCKS = 4
N_POSITIONS = 63
KEY = b"known to both sides"

__all__ = [
    "KEY",
    "N_POSITIONS",
    "Remote",
    "RemoteBlocks",
    "RemoteLM",
    "SessionCache",
    "Whole",
    "blocks_of_all",
    "decode",
    "listen",
    "load_without_blocks",
    "remote_blocks",
    "remote_chain",
    "remote_wire",
    "rows_of",
    "save",
    "served",
]


class Remote(NamedTuple):
    """A saved model and the servers of its blocks."""

    folder: Path
    hosts: list[Blocks]
    addresses: tuple
    key_file: Path

    def spec(self, **kwargs) -> RemoteBlocks:
        return RemoteBlocks(str(self.folder), self.addresses, str(self.key_file), **{"virtual": (4, 9, 4), **kwargs})

    def build(self, **kwargs) -> RemoteLM:
        return self.spec(**kwargs).build_backend(N_TOKENS, N_POSITIONS)

    def whole(self):
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()


def listen(host, key=KEY, **kwargs) -> Listener:
    """Serve some blocks until the listener is closed."""
    listener = Listener(("127.0.0.1", 0), backlog=16)
    threading.Thread(target=remote_wire.serve, args=(listener, key, host), kwargs=kwargs, daemon=True).start()
    return listener


def save(folder: Path, family: str = "bloom", config=None, dtype=torch.float32, **overrides) -> Path:
    """Save a tiny model of four blocks, built from a family's config or the given one."""
    torch.manual_seed(0)
    layers = "n_layer" if family in ("bloom", "gpt2") else "num_hidden_layers"
    config = config or tiny(family, **{layers: N_BLOCKS}, **overrides)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@contextmanager
def served(folder: Path, family: str = "bloom", **kwargs):
    """Serve a model of four blocks: one server has the first three, another the last."""
    save(folder / "model", family, **kwargs)
    (folder / "key").write_bytes(KEY)
    hosts = [Blocks(folder / "model", 0, 3), Blocks(folder / "model", 3, 4)]
    listeners = [listen(host) for host in hosts]
    addresses = tuple(listener.address for listener in reversed(listeners))  # the order of addresses must not matter
    yield Remote(folder / "model", hosts, addresses, folder / "key")
    for listener in listeners:
        listener.close()


def blocks_of_all(remote: Remote) -> list[torch.Tensor]:
    """Return copies of all weights that the servers hold."""
    return [weight.detach().clone() for host in remote.hosts for weight in host.trunk.parameters()]


class Whole(nn.Module):
    """The slow reference for a `RemoteLM`: one process, the same virtual tokens and head, no cache."""

    is_encoder_decoder = False
    takes_cache = True

    def __init__(self, remote: Remote, lm: RemoteLM):
        super().__init__()
        self.model = remote.whole().requires_grad_(False)
        self.virtual = nn.Parameter(lm.virtual.detach().clone())
        self.head = nn.Linear(lm.hidden_size, len(lm.head.weight), bias=False)
        self.head.weight.data.copy_(lm.head.weight)
        self.vocab_size, self.hidden_size = lm.vocab_size, lm.hidden_size

    @property
    def device(self):
        return self.virtual.device

    def check_length(self, n_tokens, n_written=0):
        """Accept any length."""

    def forward(self, ids, rows, cols):
        hidden, _ = self.read(ids, rows, cols)
        return hidden, self.logits(hidden)

    def read(self, ids, rows, cols):
        embedded = self.model.get_input_embeddings()(ids)
        # (n_virtual, H) -> (B, n_virtual, H) in front of (B, L, H)
        embedded = torch.cat([self.virtual.expand(len(ids), -1, -1), embedded], dim=1)
        hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden[rows, cols + len(self.virtual)], None

    def logits(self, hidden):
        return self.head(hidden)[:, : self.vocab_size]

    def new_cache(self):
        """Return no cache: every row is read in full."""


def rows_of(lengths, width, seed=0):
    """Return random tokens (B, width): those behind a row's length are padding, which must not matter."""
    rng = np.random.default_rng(seed)
    return torch.as_tensor(rng.integers(0, N_TOKENS, (len(lengths), width)))


def decode(lm, seed, n_steps):
    """Decode rows that grow, stay, or are replaced at random; return the largest difference from full reads."""
    rng = np.random.default_rng(seed)
    n_rows, width = 6, 24
    ids = torch.as_tensor(rng.integers(0, N_TOKENS, (n_rows, width)))
    lengths = torch.as_tensor(rng.integers(0, 5, n_rows))
    cache, largest = lm.new_cache(), 0.0
    for _ in range(n_steps):
        with torch.no_grad():
            hidden, logits = cache.read(ids, lengths)
            expected = lm(ids, torch.arange(n_rows), lengths.clamp(min=1) - 1)
        largest = max(largest, *(float((a - b).abs().max()) for a, b in zip((hidden, logits), expected)))
        ids, lengths = ids.clone(), lengths.clone()
        for row in range(n_rows):
            choice = rng.random()
            if (
                choice < 0.15 or lengths[row] + 1 >= width
            ):  # another text, sometimes exactly as long as the old one would be
                ids[row] = torch.as_tensor(rng.integers(0, N_TOKENS, width))
                lengths[row] = int(lengths[row] + 1) % 8 if choice < 0.05 else int(rng.integers(0, 7))
            elif choice < 0.9:
                lengths[row] += 1
    return largest
