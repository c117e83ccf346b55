"""The built-in language model: a word tokenizer and a tiny GPT-2 trained on the demo's reviews, kept in a cache."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from textenv import demo
from textenv.model_loading import check_name
from textenv.named_tokenizer import DEMO

from .files import replaced_folder
from .from_scratch import pretrain
from .small_tokenizers import EOS_TOKEN, word_tokenizer

SHAPE = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "n_positions": 64,
    "activation_function": "gelu_pytorch_tanh",  # as gelu_new, in one kernel
    "initializer_range": 0.06,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TRAINING = {"batch_size": 64, "learning_rate": 1e-2}
N_REVIEWS = 8000
_elsewhere: dict[str, Path] = {}  # folders of this process, where the cache cannot be written to


def cache_folder() -> Path:
    """Return the folder for what is made once: `TEXTENV_CACHE`, or `textenv` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TEXTENV_CACHE") or Path(base) / "textenv")


def demo_model(folder: Path | None = None, n_epochs: float = 1.6, progress_bar: bool = True) -> Path:
    """Return the folder of a language model that writes the demo's reviews, in all moods; make it where it is missing.

    A GPT-2 of 2 layers and width 64 (about 0.1 M parameters) and one token a word, trained on 8,000 reviews, always
    from the same seed. It is made in some seconds and kept under a name that changes with the grammar and settings.
    Where the cache cannot be written to, it is kept for this process alone.

    Args:
        folder: The cache; `cache_folder()` by default.
        n_epochs: Passes over the corpus; fewer are enough to try things out.
        progress_bar: Show one while it trains.

    Returns:
        A folder for `Pretrained` and `AutoTokenizer.from_pretrained`.
    """
    texts = demo.reviews(N_REVIEWS, seed=0)
    recipe = json.dumps([SHAPE, TRAINING, n_epochs, texts, torch.__version__]).encode()
    name = f"demo-{hashlib.sha256(recipe).hexdigest()[:12]}"
    target = (folder or cache_folder()) / name
    if target.is_dir() or name in _elsewhere:
        return _elsewhere.get(name, target)
    tokenizer = word_tokenizer(demo.vocabulary())
    eos = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **SHAPE)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        model.init_weights()
    pretrain(
        model,
        tokenizer,
        texts,
        n_epochs=n_epochs,
        description="pretraining the demo model",
        progress_bar=progress_bar,
        **TRAINING,  # type: ignore[arg-type]
    )
    try:
        _write(target, model, tokenizer)
    except OSError as error:
        target = _elsewhere[name] = Path(tempfile.mkdtemp(prefix="textenv-"))
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        _write(target, model, tokenizer)
        warnings.warn(
            f"The cache {folder or cache_folder()} cannot be written to ({error}): the demo model is kept in "
            "a folder of this process alone. TEXTENV_CACHE names another cache.",
            stacklevel=2,
        )
    return target


def model_folder(name: str, progress_bar: bool = True) -> str:
    """Return what to load a model or tokenizer by: the folder of the built-in one for "demo", else the name itself.

    Raises:
        ValueError: If it is the folder of a run, or the name of nothing.
    """
    if name == DEMO:
        return str(demo_model(progress_bar=progress_bar))
    if (Path(name) / "run.json").is_file():
        raise ValueError(
            f"Expected the folder of a model, got {name!r}, that of a run: its model is {name}/model once it is "
            f"finished, and `textenv export {name} DIR` writes the newest."
        )
    check_name(name, 'the folder of a model, its name on the hub, or "demo"')
    return name


def _write(target: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with replaced_folder(target) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
