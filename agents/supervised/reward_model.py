"""The training of reward models from rankings or labels, and the scoring of texts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textenv.huggingface.positions import n_positions
from textenv.huggingface.weights import from_config
from textenv.rewards.base import check_choice
from textenv.rewards.reward_stats import RewardStats
from textenv.rewards.text_reader import ReadAs, Scored, TextReader, longest

from ..checkpoints.output_folders import check_output, output_folder
from ..checkpoints.shard_files import replaced_together
from ..distributed.collectives import once
from ..models.backbone import check_fits
from ..models.critic import check_causal, score_head
from ..models.layers import disable_dropout, fuse_activations, keep_first_layers, trunk_of
from ..models.pretrained import LMLike, LMSpec, PretrainedRewardModel, refuse_16_bits
from ..small_models.progress import progress
from ..small_models.training_loop import fit, similar_lengths
from .accuracy import RewardFigures, figures
from .preferences import Labelled, Ranking
from .ranking_data import Example, check_data, common_closing, encode_all
from .resumable import ResumableFit, origin, prepare, remove_states, work_folder
from .reward_losses import Loss, loss_at_last, loss_at_tokens
from .score_head_fit import fit_score_head
from .shared_loss import shared_loss

Trained: TypeAlias = Literal["all", "head"]
DEFAULT_MAX_TOKENS = 1024  # for models without a limit of positions (BLOOM's ALiBi)


class RewardTraining(NamedTuple):
    """The result of `train_reward_model`.

    Args:
        folder: The folder of the model, its tokenizer and `reward_stats.json`.
        losses: The loss of each step, (n_steps,); a single one, of all data, where the head alone was fitted.
        stats: The mean and standard deviation of the training texts' scores.
        held_out: The figures on held-out data; None if there is none.
    """

    folder: Path
    losses: np.ndarray
    stats: RewardStats
    held_out: RewardFigures | None


def train_reward_model(
    lm: LMLike,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Ranking] | Sequence[Labelled],
    folder: str | os.PathLike[str],
    *,
    held_out: Sequence[Ranking] | Sequence[Labelled] = (),
    first_layers: int | None = None,
    train: Trained = "all",
    loss: Loss = "last",
    centring: float = 0.0,
    n_epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float = 1e-5,
    max_tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> RewardTraining:
    """Train a causal model with a linear score head, and save it as `AutoModelForSequenceClassification` loads it.

    A text's score is read at its last token. BOS is in front of it once. No end token is added, even if the tokenizer
    would add one, so that a critic that starts from this model can value a text before the policy ends it; an end token
    that all texts already have stays. The saved config says how the texts were read, and the rewards, `score_texts` and
    `RewardModelCritic` follow it (`TextReader`). Padding is known from the lengths, so the pad token may be the end
    token, or occur in a text (transformers' own forward passes over a closing token that is the pad token). Rankings
    are trained by the Bradley-Terry loss over all their pairs, with one forward per text (Ouyang et al., 2022, equation
    1); labels by the squared error. Dropout is off.

    The training loop is that of `pretrain`: with transformers' `Trainer`, collator, loss and evaluation of rankings
    would still be our own. Every 500 steps, and after Ctrl-C, SIGTERM or SIGHUP, the state is saved beside the folder,
    in `.<name>.training`. `resume=True` continues from the newest intact state, on a CPU to the same weights bit for
    bit.

    Args:
        lm: The name or path of a language or reward model, a config, a spec that builds a reward model, or a live one,
            which is trained itself.
        tokenizer: The model's tokenizer.
        data: `Ranking`s (pairs are rankings of two; equal texts are left out, with a warning), or `Labelled` texts.
        folder: The folder to write, absent or empty.
        held_out: Data of the same kind that is not trained on, to measure the accuracy.
        first_layers: The number of the model's lowest layers that the reward model has, for less time and memory here,
            in the reward and in a critic that starts from it; by default all.
        train: "all" trains all weights. "head" leaves the model as it is and fits the score head alone, on its last
            states, by L-BFGS with a penalty that cross-validation chooses: each text is read once, and a few hundred
            rankings are enough, where training all weights needs thousands. `learning_rate` and `n_epochs` do nothing
            then, and a run that was interrupted begins anew. A second call that starts from the saved folder, with
            "all" and a low learning rate, goes on from there (Kumar et al., 2022).
        loss: "last" compares the scores at the last tokens. "tokens" takes the mean over all columns from the first
            difference of two texts to the end of the longer one; after its end, the shorter text keeps its last score.
        centring: The factor of (sum of both scores)^2 in the loss, which centres the scores at 0: comparisons alone
            leave their mean undetermined (Eisenstein et al., 2023, equation 2).
        n_epochs: The number of passes over the data; may be a fraction.
        batch_size: The number of rankings, or of labelled texts, in a minibatch.
        learning_rate: The peak of a one-cycle schedule.
        max_tokens: Longer texts lose their start, here and in the reward; by default the limit of model and tokenizer.
            In training alone, the other texts of a ranking lose as many tokens of the start that they share with it.
        seed: The seed of a fresh head and of the order of the data.
        resume: Whether to continue an interrupted run of the same arguments; it starts anew if there is none.
        overwrite: Whether an earlier reward model in `folder` may be replaced, once the new one is complete.
        progress_bar: Whether to show a progress bar.

    Returns:
        The folder, the loss of each step, the scores' mean and deviation, and the figures on `held_out`.

    Raises:
        ValueError: If there is no data, a ranking has fewer than two texts, the model is not causal or has fewer than
            `first_layers`, the interrupted run had other arguments, or the folder holds files that would be lost.
        StageStopped: After a signal, once the state is saved.

    Example:
        >>> from agents import Ranking, RewardModelCritic, train_reward_model
        >>> pairs = [Ranking((" good.", " bad."), prompt="The film was")]
        >>> # train_reward_model("gpt2", AutoTokenizer.from_pretrained("gpt2"), pairs, "my-reward-model")
        >>> policy_kwargs = dict(critic=RewardModelCritic("my-reward-model"))
    """
    check_output(folder, "reward model", overwrite)  # fail now rather than after the training
    check_choice("loss", loss, get_args(Loss))
    check_choice("train", train, get_args(Trained))
    if train == "head" and loss == "tokens":
        raise ValueError('Expected loss "last" with train="head", which reads the last states alone, got "tokens".')
    check_data("data", data)
    model = build_reward_model(lm, seed)
    if first_layers is not None:
        keep_first_layers(model, first_layers)
    limit = max_tokens or min(tokenizer.model_max_length, n_positions(model) or DEFAULT_MAX_TOKENS)
    check_fits(model, len(tokenizer), limit, "lower max_tokens")
    _set_special_tokens(model, tokenizer)
    read_as = ReadAs(is_chat=all(isinstance(example, Ranking) and example.is_chat for example in data))
    reader = TextReader(tokenizer, limit, read_as=read_as)
    examples = encode_all("data", reader, data)
    tests = encode_all("held_out", reader, held_out) if held_out else []
    work = work_folder(folder)
    if train == "head":
        losses, scores = _fit_head(model, examples, centring, batch_size, seed, progress_bar)
    else:
        lengths = [max(map(len, example.ids)) for example in examples]
        n_steps = max(1, round(n_epochs * len(examples) / batch_size))
        arguments = (origin(model, lm), examples, loss, centring, n_steps, batch_size, learning_rate, seed)
        losses = fit(
            model,
            similar_lengths(lengths, batch_size, np.random.default_rng(seed)),
            shared_loss(model, lambda indices: _loss(model, [examples[i] for i in indices], loss, centring)),
            n_steps,
            learning_rate,
            description="reward model",
            progress_bar=progress_bar,
            run=ResumableFit(work, prepare(work, arguments, resume)),
        )
        scores = _scores(model, [ids for example in examples for ids in example.ids], batch_size)
    replace(read_as, closing=common_closing(tokenizer, examples)).store(model.config)
    stats = RewardStats(float(scores.mean()), max(float(scores.std()), 1e-6))  # equal scores: nothing to divide by
    saved = copy.deepcopy(tokenizer)
    saved.model_max_length = limit  # a reward cuts texts where the training did
    with replaced_together(output_folder(folder, "reward model", overwrite)) as beside:
        once(lambda: _save(model, saved, stats, beside))
    if train == "all":
        once(lambda: remove_states(work))
    measured = _measure(model, tests, loss, centring, batch_size) if tests else None
    return RewardTraining(Path(folder), losses.cpu().numpy(), stats, measured)


def build_reward_model(lm: LMLike, seed: int = 0) -> PreTrainedModel:
    """Build a model with a single score from a name or path, a config (fresh weights) or a spec, without dropout.

    Args:
        lm: The name or path of a language or reward model, a config, a spec that builds a reward model, or a live one,
            which is trained itself.
        seed: The seed of a fresh score head.

    Raises:
        ValueError: If it has no linear score head, has trainable weights of 16 bits, or is not causal.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(lm, PreTrainedConfig):
            config = copy.deepcopy(lm)
            config.num_labels = 1
            model = from_config(AutoModelForSequenceClassification, config)
        elif isinstance(lm, PreTrainedModel):
            refuse_16_bits(model := lm)
        elif isinstance(lm, LMSpec):
            model = lm.build()
        else:
            model = PretrainedRewardModel(str(lm), num_labels=1).build()
        score_head(model)
        fuse_activations(model)
        check_causal(trunk_of(model))
    disable_dropout(model)
    return model


def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Scored], batch_size: int = 32
) -> np.ndarray:
    """Return the scores of texts, (N,), each read at its last token.

    Args:
        model: A reward model, as `AutoModelForSequenceClassification` loads it or `build_reward_model` builds it.
        tokenizer: Its tokenizer; the side on which it pads does not matter.
        texts: The N texts, prompt included, or conversations (lists of messages) for the tokenizer's chat template.
            `TextReader` says with which special tokens they are read. Texts beyond the limit of model or tokenizer lose
            their start.
        batch_size: The number of texts in a forward.

    Raises:
        ValueError: If a text has no token.

    Example:
        >>> from transformers import GPT2Config, GPT2ForSequenceClassification
        >>> from agents import score_texts, word_tokenizer
        >>> model = GPT2ForSequenceClassification(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, num_labels=1))
        >>> score_texts(model, word_tokenizer(["good", "film"]), ["good film", "film"]).shape
        (2,)
    """
    reader = TextReader(tokenizer, longest(model, tokenizer), read_as=ReadAs.of(model.config))
    ids = [reader.encode(text) for text in texts]
    if not all(ids):
        raise ValueError(f"Expected texts of at least one token, got {texts[ids.index([])]!r}.")
    was_training = model.training
    model.eval()
    scores = _scores(model, ids, batch_size)
    model.train(was_training)
    return scores


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stats: RewardStats, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stats.save(folder)


def read_scores(model: PreTrainedModel, ids: Tensor, is_real: Tensor) -> Tensor:
    """Return the score of each text (B,) at its last real token; padding may be on either side.

    Args:
        model: The reward model.
        ids: Tokens, (B, T).
        is_real: Whether each of them is a token rather than padding, (B, T).
    """
    columns = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    last = torch.where(is_real, columns, -1).amax(dim=1)  # (B,)
    return _token_scores(model, ids, is_real)[torch.arange(len(ids), device=ids.device), last]


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the pad token by which transformers' `...ForSequenceClassification.forward` finds a row's last token."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("Expected a tokenizer with a pad or an end token, got neither: set tokenizer.pad_token.")
    model.config.get_text_config().pad_token_id = cast("int", pad)
    model.config.pad_token_id = cast("int", pad)


def _pad(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens padded on the right, and whether each is a real token, (B, T) both."""
    lengths = torch.tensor([len(ids) for ids in texts], device=device)
    ids = torch.zeros(len(texts), int(max(map(len, texts))), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return ids.to(device), torch.arange(ids.shape[1], device=device) < lengths[:, None]


def _token_scores(model: PreTrainedModel, ids: Tensor, is_real: Tensor) -> Tensor:
    """Return the score at each token, (B, T), float32; the values at padding have no meaning."""
    return score_head(model)(_states(model, ids, is_real)).squeeze(-1).float()  # (B, T, H) -> (B, T)


def _states(model: PreTrainedModel, ids: Tensor, is_real: Tensor) -> Tensor:
    """Return the states that the score head reads, (B, T, H)."""
    positions = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T), counted from the first real token
    body = model.base_model
    read = body(input_ids=ids, attention_mask=is_real.long(), position_ids=positions, use_cache=False)
    return cast("Tensor", read.last_hidden_state)


@torch.no_grad()
def _fit_head(
    model: PreTrainedModel,
    examples: Sequence[Example],
    centring: float,
    batch_size: int,
    seed: int,
    progress_bar: bool,
) -> tuple[Tensor, np.ndarray]:
    """Fit the score head alone, in place; return its loss on all data, (1,), and the texts' scores, (N,)."""
    texts = [ids for example in examples for ids in example.ids]
    head = score_head(model)
    states = torch.zeros(len(texts), head.in_features, device=model.device)
    model.eval()
    with progress(
        total=len(texts), description="states of the reward model", unit="text", is_shown=progress_bar
    ) as bar:
        for indices in _by_length(texts, batch_size):
            ids, is_real = _pad([texts[i] for i in indices], model.device)
            lasts = is_real.sum(dim=1) - 1  # (B,)
            hidden = _states(model, ids, is_real)
            states[indices] = hidden[torch.arange(len(ids), device=ids.device), lasts].float()
            bar.update(len(indices))
    with torch.enable_grad():
        weights, loss, _ = fit_score_head(states, examples, centring, seed)
    head.weight.copy_(weights[None])
    if head.bias is not None:
        head.bias.zero_()  # a constant changes no comparison; numbers as labels are fitted through the origin
    return torch.tensor([loss]), (states @ weights).cpu().numpy()


def _by_length(texts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of minibatches of similar lengths, each text once."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def _scores(model: PreTrainedModel, texts: Sequence[list[int]], batch_size: int) -> np.ndarray:
    """Return the scores (N,) of encoded texts, read in batches of similar length."""
    result = torch.zeros(len(texts), device=model.device)
    for indices in _by_length(texts, batch_size):
        result[indices] = read_scores(model, *_pad([texts[i] for i in indices], model.device))
    return result.cpu().numpy()


def _loss(model: PreTrainedModel, examples: Sequence[Example], loss: Loss, centring: float) -> Tensor:
    """Return the mean over rankings of the mean loss of their pairs, or the mean squared error of labels."""
    ids, is_real = _pad([text for example in examples for text in example.ids], model.device)
    scores = _token_scores(model, ids, is_real)  # (B, T)
    lasts = is_real.sum(dim=1) - 1  # (B,)
    if loss == "tokens" and examples[0].label is None:
        return loss_at_tokens(ids, scores, lasts, examples, centring)
    return loss_at_last(scores[torch.arange(len(ids), device=ids.device), lasts], examples, centring)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, examples: Sequence[Example], loss: Loss, centring: float, batch_size: int
) -> RewardFigures:
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        total += float(_loss(model, batch, loss, centring)) * len(batch)
    scores = _scores(model, [ids for example in examples for ids in example.ids], batch_size)
    if examples[0].label is not None:
        labels = np.array([example.label for example in examples], dtype=float)
        # Every pair of texts with different labels once: text i against the texts before it, (i,).
        signs = [np.sign(labels[i] - labels[:i]) for i in range(len(labels))]
        margins = [((scores[i] - scores[:i]) * sign)[sign != 0] for i, sign in enumerate(signs)]
        return figures(total / len(examples), margins, is_log_odds=False)
    ends = np.cumsum([len(example.ids) for example in examples])
    margins = []
    for example, end in zip(examples, ends, strict=True):
        own = scores[end - len(example.ids) : end]
        margins.append(np.array([own[better] - own[worse] for better, worse in example.pairs]))
    return figures(total / len(examples), margins, is_log_odds=True)
