"""A server of frozen blocks of a causal language model, for a client that holds the rest of it.

    python examples/remote_blocks.py FOLDER --first 0 --last 2 --key-file KEY --port 7001

FOLDER was written by `save_pretrained` (safetensors); only the weights of those blocks are read. The server prints the
port it listens on, at 127.0.0.1 unless `--host` says otherwise. The key authenticates clients, but nothing is
encrypted: keep that address, and reach other machines through a tunnel (ssh -L). `examples/remote_backend.py` starts
two servers.
"""

from __future__ import annotations

import argparse
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import pairwise
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any, NamedTuple

import torch
from remote_wire import MAX_HELD, read_key, serve
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedConfig, PreTrainedModel

START_SECONDS = 120.0  # allowed for loading torch on a busy machine
PER_LAYER = ("layer_types", "no_rope_layers")  # lists of a config with an entry per block, which can be sliced
INDICES = ("layer_idx", "layer_id", "layer_number")  # names of a block's number, which selects its part of the cache


def blocks_of(trunk: nn.Module) -> tuple[str, nn.ModuleList, nn.Module]:
    """Return the name and the list of a model's blocks, and the norm behind them: the child that follows the list.

    Raises:
        ValueError: If the model does not consist of one list of blocks with a norm behind it.
    """
    children = list(trunk.named_children())
    indices = [index for index, (_, child) in enumerate(children) if isinstance(child, nn.ModuleList)]
    behind = children[indices[-1] + 1 :][:1] if indices else []
    if len(indices) != 1 or not behind or not type(behind[0][1]).__name__.endswith("Norm"):
        types = {name: type(child).__name__ for name, child in children}
        raise ValueError(f"Expected one list of blocks with a norm behind it, got {types}: not made for such a model.")
    name, blocks = children[indices[0]]
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks, behind[0][1]


class Blocks:
    """The frozen blocks `first` to `last` - 1 of a model: a `remote_wire.Host`.

    The model's own forward runs them, so that masks and positions (rotary, ALiBi) are the model's. Hooks replace the
    embeddings by the given hidden states, and take the hidden states in front of the last norm.

    Args:
        folder: The folder of the model.
        first: The first block, counted from 0.
        last: The block behind the last one.
        device: The device that computes, in float32.

    Raises:
        ValueError: If the model has no such blocks, or they depend on their place in the model.
    """

    def __init__(self, folder: str | Path, first: int, last: int, device: str = "cpu") -> None:
        config = AutoConfig.from_pretrained(folder)
        if not 0 <= first < last <= config.num_hidden_layers:
            raise ValueError(f"Expected some of the model's {config.num_hidden_layers} blocks, got {first} to {last}.")
        self.first, self.last, self.hidden_size = first, last, config.hidden_size
        config.vocab_size, config.pad_token_id = 1, None  # the client has the embeddings; transformers needs a row
        trunk = AutoModel.from_config(_config_of(config, first, last), dtype=torch.float32)
        self.trunk: PreTrainedModel = trunk.requires_grad_(False).eval().to(device)
        name, blocks, norm = blocks_of(self.trunk)
        with torch.device("meta"):  # the whole model, without memory for its weights
            _check_same(blocks, blocks_of(AutoModel.from_config(config))[1][first:last])
        blocks.load_state_dict(_weights(Path(folder), name, first, last))
        self._input: Tensor | None = None  # (B, T, H), read by the first block in place of the embeddings
        self._output: Tensor | None = None  # (B, T, H), taken in front of the last norm
        blocks[0].register_forward_pre_hook(lambda module, inputs: (self._input, *inputs[1:]))
        norm.register_forward_pre_hook(self._keep)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._output = inputs[0]

    def _run(self, hidden: Tensor, cache: DynamicCache | None = None) -> Tensor:
        hidden = hidden.to(self.trunk.device)
        self._input, self._output = hidden, None
        self.trunk(inputs_embeds=hidden.detach(), past_key_values=cache, use_cache=cache is not None)
        assert self._output is not None, "the forward did not reach the norm"
        return self._output

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        return self._run(hidden)

    def backward(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = hidden.to(self.trunk.device).requires_grad_()
            return torch.autograd.grad(self._run(hidden), hidden, gradient.to(hidden.device))[0]

    def open(self, max_length: int) -> DynamicCache:
        return DynamicCache()

    @torch.no_grad()
    def step(self, session: DynamicCache, hidden: Tensor) -> Tensor:
        return self._run(hidden, session)


def _config_of(config: PreTrainedConfig, first: int, last: int) -> PreTrainedConfig:
    """Return the config of a model of these blocks alone, counted from 0, as their cache counts them."""
    result = deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            if name in PER_LAYER:
                setattr(result, name, value[first:last])
            elif any(entry != value[0] for entry in value):
                raise ValueError(f"Expected blocks that are alike, got `{name}`: {value}: not made for such a model.")
    result.num_hidden_layers = last - first
    return result


def _check_same(blocks: nn.ModuleList, originals: nn.ModuleList) -> None:
    """Raise ValueError for blocks that are built differently when they are counted from 0."""
    for block, original in zip(blocks, originals, strict=True):
        built, wanted = _settings(block), _settings(original)
        differing = sorted(name for name in built.keys() | wanted.keys() if built.get(name) != wanted.get(name))
        if differing:
            raise ValueError(
                f"Expected blocks that do not depend on their place in the model, got {type(block).__name__} with "
                f"another {', '.join(differing)}: not made for such a model."
            )


def _settings(block: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of all modules of a block, except for the block's number."""
    plain = (int, float, str, tuple, list, type(None))
    settings: dict[str, Any] = {}
    for name, module in block.named_modules(prefix="block"):
        settings[name] = type(module)
        own = {key: value for key, value in vars(module).items() if key not in (*INDICES, "training") and key[0] != "_"}
        settings |= {f"{name}.{key}": value for key, value in own.items() if isinstance(value, plain)}
    return settings


def _weights(folder: Path, name: str, first: int, last: int) -> dict[str, Tensor]:
    """Read the weights of some blocks, under the names that they have in the list of blocks."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118  (no mapping)
                match = re.fullmatch(rf"(?:\w+\.)?{name}\.(\d+)\.(.+)", key)
                if match and first <= int(match[1]) < last:
                    weights[f"{int(match[1]) - first}.{match[2]}"] = content.get_tensor(key).float()
    return weights


def new_key(file: Path) -> Path:
    """Write a random key to a file that only its owner may read, and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


class Started(NamedTuple):
    """A server that this process started, and its address."""

    process: subprocess.Popen[Any]
    address: tuple[str, int]


@contextmanager
def serving(folder: Path, key_file: Path, bounds: Sequence[int]) -> Iterator[list[Started]]:
    """Start a server for each range of blocks between `bounds`; they end with the context, or with this process."""
    with ExitStack() as stack:
        processes, servers = [], []
        for first, last in pairwise(bounds):
            options = ["--first", first, "--last", last, "--key-file", key_file, "--until-stdin-closes"]
            command = [sys.executable, __file__, folder, *options]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(list(map(str, command)), stdin=pipe, stdout=pipe, text=True))
            stack.callback(_end, processes[-1])
        for process in processes:  # all load at the same time
            timer = threading.Timer(START_SECONDS, process.kill)
            timer.daemon = True
            timer.start()
            try:
                line = process.stdout.readline()
            finally:
                timer.cancel()
            if not line:
                raise RuntimeError(f"Expected a server to start, got exit code {process.wait()}; its words are above.")
            servers.append(Started(process, ("127.0.0.1", int(line))))
        yield servers


def _end(server: subprocess.Popen[Any]) -> None:
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the model")
    parser.add_argument("--first", type=int, required=True, help="the first block, counted from 0")
    parser.add_argument("--last", type=int, required=True, help="the block behind the last one")
    parser.add_argument(
        "--key-file", type=Path, required=True, help="the file of the key that client and servers share"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine's own)")
    parser.add_argument("--port", type=int, default=0, help="the port (default: a free one)")
    parser.add_argument("--device", default="cpu", help="where the blocks compute, such as cuda (default: cpu)")
    held = "tokens that the open sessions of a client may hold, empty slots included (default: %(default)s)"
    parser.add_argument("--max-held", type=int, default=MAX_HELD, help=held)
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started it")
    args = parser.parse_args()
    key = read_key(args.key_file)
    host = Blocks(args.folder, args.first, args.last, args.device)
    with Listener((args.host, args.port), backlog=16) as listener:
        print(listener.address[1], flush=True)
        if not args.until_stdin_closes:
            return serve(listener, key, host, args.max_held)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
        threading.Thread(target=serve, args=(listener, key, host, args.max_held), daemon=True).start()
        sys.stdin.read()


if __name__ == "__main__":
    main()
