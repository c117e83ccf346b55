"""Supervised fine-tuning (SFT) of a causal language model on texts, or on prompts with reference answers."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textenv.checks.extras import check_extra
from textenv.huggingface.positions import n_positions
from textenv.huggingface.weights import from_pretrained
from textenv.text.tokenizer import Tokenizer

from ..checkpoints.output_folders import check_output, output_folder
from ..checkpoints.shard_files import replaced_together
from ..distributed.collectives import once
from ..models.backbone import check_fits
from ..models.pretrained import LMLike, build_model
from ..models.probe import PROBE_LENGTH, close
from ..small_models.demo_model import model_folder
from ..small_models.tokenizers import bpe_tokenizer
from ..small_models.training_loop import IGNORED
from .resumable import origin, prepare, remove_states, work_folder
from .sft_data import Row, Sample, Text, collate, encode_sample, pack, words_of

DEFAULT_MAX_TOKENS = 1024  # for models without a limit of positions (BLOOM's ALiBi)
N_MEASURED = 64  # rows of training data whose loss is measured at the end: 256 take minutes at 135 M weights


class Tuned(NamedTuple):
    """The result of `tune`; losses are means over the trained tokens, in nats per token.

    Args:
        folder: The folder of the model and its tokenizer.
        n_steps: The number of optimizer steps.
        train_loss: The loss at the end, on the first rows of the training data.
        held_out_loss_before: The loss on held-out data before training; None if there is none.
        held_out_loss: The loss on held-out data after training; None if there is none.

    Example:
        >>> from agents import sft
        >>> sft.Tuned("my-model", n_steps=1, train_loss=0.0).perplexity(3.0)
        20.085536923187668
    """

    folder: str | os.PathLike[str]
    n_steps: int
    train_loss: float
    held_out_loss_before: float | None = None
    held_out_loss: float | None = None

    @staticmethod
    def perplexity(loss: float) -> float:
        """Return the perplexity of a loss in nats per token, exp(loss)."""
        return math.exp(loss)


def tune(
    lm: LMLike,
    data: Sequence[Text],
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Sequence[Text] = (),
    packing: bool = False,
    n_epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float = 2e-5,
    max_tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> Tuned:
    """Fine-tune a causal language model on texts, or on prompts with reference answers, and save it.

    Of a (prompt, reference) pair, the reference and the end token are trained; the prompt is only read. The folder
    loads with `AutoModelForCausalLM`, and both `Pretrained` and `train_reward_model` take it.

    transformers' `Trainer` runs the training, for its schedule, its resuming and its support of large machines; TRL's
    trainer would be a further dependency for the same. It needs accelerate: `pip install "textenv[sft]"`. (`pretrain`,
    for small models from scratch, does not need it.)

    Every 500 steps, and after Ctrl-C, SIGTERM or SIGHUP, the state is saved beside the folder, in `.<name>.training`.
    `resume=True` continues from the newest intact state, to the same weights as without the interruption. The process's
    random generators are restored at the end.

    Args:
        lm: A name or path, a config (fresh weights) or a spec.
        data: Texts, or (prompt, reference) pairs, whose prompts are texts or the messages of chats. A reference
            continues its prompt: a space between the two is the first character of the reference.
        folder: The folder to write, absent or empty.
        tokenizer: The model's tokenizer; by default that of the name or path, and for a config a byte-level BPE of
            `config.vocab_size` tokens trained on the data.
        held_out: Data that is not trained on, to measure the loss before and after.
        packing: Whether several texts share a row of `max_tokens`, without attending to each other, to save padding.
        n_epochs: The number of passes over the data; may be a fraction.
        batch_size: The number of rows in a minibatch, of all processes together.
        learning_rate: The peak of a cosine schedule that warms up over the first tenth.
        max_tokens: The most tokens of a row; by default the model's number of positions. Longer texts are split, and
            longer pairs lose the start of the prompt.
        seed: The seed of fresh weights, dropout and the order of the data.
        resume: Whether to continue an interrupted run of the same arguments; it starts anew if there is none.
        overwrite: Whether an earlier language model in `folder` may be replaced, once the new one is complete.
        progress_bar: Whether to show a progress bar.

    Returns:
        The folder, the number of steps, and the losses on the training data and on `held_out`.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If there is no data, the tokenizer has no end token, the model is an encoder-decoder or cannot
            tell packed texts apart, the interrupted run had other arguments, or the folder holds files that would be
            lost.
        StageStopped: After a signal, once the state is saved.

    Example:
        >>> from agents import sft
        >>> pairs = [("The film was", " good."), ("The actors were", " great.")]
        >>> # sft.tune("gpt2", pairs, "my-model", held_out=..., n_epochs=2).held_out_loss
    """
    check_output(folder, "language model", overwrite)  # fail now rather than after the training
    if not data:
        raise ValueError("Expected at least one text, got none.")
    check_extra("sft", "accelerate", "transformers' Trainer")
    from .hf_trainer import random_state_kept, train, training_arguments

    work = work_folder(folder)
    arguments = training_arguments(work, n_epochs, batch_size, learning_rate, seed, progress_bar, True)
    with random_state_kept():
        torch.manual_seed(seed)
        lm, tokenizer = _with_tokenizer(lm, tokenizer, data)
        model = build_model(lm)
        _check_model(model, packing)
        limit = max_tokens or n_positions(model) or DEFAULT_MAX_TOKENS
        check_fits(model, len(tokenizer), limit, "lower max_tokens")
        end = cast("int", tokenizer.eos_token_id)
        rows, tests = (
            [[sample] for text in texts for sample in encode_sample(cast("Tokenizer", tokenizer), text, end, limit)]
            for texts in (data, held_out)
        )
        if packing:
            rows = pack([sample for row in rows for sample in row], limit)
        before = mean_loss(model, tests, batch_size) if tests else None
        settings = (origin(model, lm), rows, packing, n_epochs, batch_size, learning_rate, seed)
        checkpoint = prepare(work, settings, resume)
        n_steps = train(model, rows, collate, arguments, checkpoint)
        model.eval()
        after = mean_loss(model, tests, batch_size) if tests else None
        train_loss = mean_loss(model, rows[:N_MEASURED], batch_size)
    with replaced_together(output_folder(folder, "language model", overwrite)) as beside:
        once(lambda: _save(model, tokenizer, beside))
    once(lambda: remove_states(work))
    return Tuned(folder, n_steps, train_loss, before, after)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 16) -> float:
    """Return the mean loss over all trained tokens of some rows, in nats per token."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        rows_of_batch = collate(rows[start : start + batch_size])
        batch = {name: tensor.to(model.device) for name, tensor in rows_of_batch.items()}
        # transformers' `ForCausalLMLoss` shifts the labels by one and averages over those that are not IGNORED.
        n_trained = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch, use_cache=False).loss) * n_trained
        count += n_trained
    model.train(was_training)
    return total / count


def _with_tokenizer(
    lm: LMLike, tokenizer: PreTrainedTokenizerBase | None, data: Sequence[Text]
) -> tuple[LMLike, PreTrainedTokenizerBase]:
    """Return `lm` and its tokenizer; a config gets a fresh tokenizer by default, and the tokenizer's special tokens."""
    if isinstance(lm, PreTrainedConfig):
        lm = copy.deepcopy(lm)
        if tokenizer is None:
            tokenizer = bpe_tokenizer([words_of(text) for text in data], lm.vocab_size)
        lm.eos_token_id = tokenizer.eos_token_id
        lm.bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        lm.pad_token_id = tokenizer.pad_token_id
    elif tokenizer is None and isinstance(lm, (str, os.PathLike)):
        tokenizer = from_pretrained(AutoTokenizer, model_folder(os.fspath(lm)))
    if tokenizer is None:
        raise ValueError("Expected `tokenizer` with a spec, got None: pass the tokenizer of the model.")
    if tokenizer.eos_token_id is None:
        raise ValueError("Expected a tokenizer with an end token, got none: set tokenizer.eos_token.")
    return lm, tokenizer


@torch.no_grad()
def _check_model(model: PreTrainedModel, packing: bool) -> None:
    """Raise ValueError for an encoder-decoder, or if packed texts would attend to each other."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"Expected a causal model, got the encoder-decoder {type(model).__name__}.")
    if not packing:
        return
    # Not every attention implementation takes positions that start again at 0 as a new text. So this is tried out: the
    # second of two packed texts must have the logits that it has alone.
    was_training = model.training
    first, second = Sample([1] * PROBE_LENGTH, 1), Sample([0] * PROBE_LENGTH, 1)
    together, alone = ({**collate([row])} for row in ([first, second], [second]))
    model.eval()
    packed, plain = (
        model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits  # (1, T, V)
        for batch in (together, alone)
    )
    model.train(was_training)
    if not close(packed[:, PROBE_LENGTH:], plain):
        raise ValueError(
            f"Expected a model that tells packed texts apart by their positions, got {type(model).__name__}, in which "
            "they see each other: use packing=False."
        )
