"""The built-in demo model: a tiny GPT-2 with a word tokenizer, trained on the demo's reviews and kept in a cache."""

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

from textenv.huggingface.weights import check_name
from textenv.text import demo_corpus as demo
from textenv.text.named_tokenizer import DEMO

from ..files import replaced_folder
from .from_scratch import pretrain
from .tokenizers import EOS_TOKEN, word_tokenizer

SHAPE = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "n_positions": 64,
    "activation_function": "gelu_pytorch_tanh",  # the same formula as GPT-2's gelu_new, in one kernel
    "initializer_range": 0.06,  # three times GPT-2's, for a twelfth of its width
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TRAINING = {"batch_size": 64, "learning_rate": 1e-2}
N_REVIEWS = 8000
_temporary: dict[str, Path] = {}  # by name, the folders of models that this process could not write into the cache


def cache_folder() -> Path:
    """Return the folder that keeps models: `TEXTENV_CACHE`, or `textenv` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TEXTENV_CACHE") or Path(base) / "textenv")


def demo_model(folder: Path | None = None, n_epochs: float = 1.6, progress_bar: bool = True) -> Path:
    """Return the folder of a small model that writes product reviews of all moods; train it if the cache has none.

    The model is a GPT-2 of 2 layers and width 64 (about 0.1 M parameters) with one token per word, trained on 8,000
    reviews from a fixed seed. Training takes some seconds. The folder's name is a hash of the reviews and the settings,
    so that a change of either makes a new model. If the cache cannot be written to, the model lives as long as the
    process.

    Args:
        folder: The cache; `cache_folder()` by default.
        n_epochs: The number of passes over the corpus; fewer are enough to try things out.
        progress_bar: Whether to show a progress bar during training.

    Returns:
        A folder for `Pretrained` and `AutoTokenizer.from_pretrained`.

    Example:
        >>> from agents import demo_model
        >>> # model = make_agent(gymnasium.make("textenv/Demo-v0"), str(demo_model()))
    """
    texts = demo.reviews(N_REVIEWS, seed=0)
    recipe = json.dumps([SHAPE, TRAINING, n_epochs, texts, torch.__version__]).encode()
    name = f"demo-{hashlib.sha256(recipe).hexdigest()[:12]}"
    target = (folder or cache_folder()) / name
    if target.is_dir() or name in _temporary:
        return _temporary.get(name, target)
    tokenizer = word_tokenizer(demo.vocabulary())
    eos = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **SHAPE)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # a fixed seed for the weights, which leaves the caller's generator alone
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
        target = _temporary[name] = Path(tempfile.mkdtemp(prefix="textenv-"))
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        _write(target, model, tokenizer)
        warnings.warn(
            f"The cache {folder or cache_folder()} cannot be written to ({error}): the demo model is kept in "
            "a folder of this process alone. TEXTENV_CACHE names another cache.",
            stacklevel=2,
        )
    return target


def model_folder(name: str, progress_bar: bool = True) -> str:
    """Return the name or folder from which transformers loads a model: the demo model's folder for "demo", else `name`.

    Args:
        name: "demo", a folder, the path of a GGUF file, or a name on the hub.
        progress_bar: Whether to show a progress bar if the demo model has to be trained.

    Raises:
        ValueError: If `name` is the folder of a run, or neither a folder nor a possible name.
    """
    if name == DEMO:
        return str(demo_model(progress_bar=progress_bar))
    if (Path(name) / "run.json").is_file():
        raise ValueError(
            f"Expected the folder of a model, got {name!r}, that of a run: its model is {name}/model once it is "
            f"finished, and `textenv export {name} DIR` writes the newest."
        )
    check_name(name, 'the folder of a model, its name on the hub, a GGUF file, or "demo"')
    return name


def _write(target: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with replaced_folder(target) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
