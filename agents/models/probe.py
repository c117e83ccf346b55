"""The probe of a language model: a few tokens show whether it can be trained exactly, and how it decodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .interface import CachedModel

PROBE_LENGTH = 4  # tokens: three to read first, and one more to decode from their keys and values
PROBE_LOGIT = 100.0  # the probe's largest logit, after scaling: beyond the soft cap of Gemma-2 (30)
PROBE_TOLERANCE = 1e-3  # of the largest logit: kernels differ by about 1e-6 in float32, a wrong mask by much more
# The largest difference of two states, as a share of their Euclidean norm, that rounding explains in float32; types of
# fewer bits have 8 epsilons (`state_tolerance`). Kernels of float32 differ by about 1e-6; one token too many or too few
# in the attention of fresh weights makes a difference of 1e-3.
STATE_TOLERANCE = 1e-4
# Quantisers round activations too, with a scale for each forward. In 16 bits and TF32, a model of 30 layers differs by
# 1 to 2 %, where kernels differ by the shape of a batch.
COARSE_TOLERANCE = 0.05
ABSENT = -1e30  # a logit at or below it stands for a token that the model rules out: Chameleon writes finfo.min there
CAUSAL_FLAGS = ("is_decoder", "causal")  # fields of a config that make BERT and its kin, and XLM, causal
# The numbers of tokens (of the decoder, for an encoder-decoder) of two rows at three steps of a decoding cache. Row 0
# grows by one token in each. Row 1 never does, so that the cache must read it anew, beside a row that grows: at last
# with 3 tokens, which end in the same column as the 4 of row 0 and begin in a later one.
STEPS = ((2, 1), (3, 1), (4, 3))

Result = TypeVar("Result")


class Probed(CachedModel, Protocol):
    """A model of transformers that the probe examines: `Backbone`, which has the attributes that are set here."""

    model: PreTrainedModel
    training: bool
    head_is_linear: bool
    is_cacheable: bool
    no_cache_because: str
    attends_by_row: bool
    hidden_size: int

    def train(self, mode: bool = True) -> Any:
        """Set the mode."""

    def plain_logits(self, ids: Tensor, n_prompt: Tensor) -> Tensor:
        """Return the logits (T, V) of one row (1, T), by the model's own forward, without a cache."""
        ...

    def decoding_modes(self) -> Iterable[tuple[bool, bool]]:
        """Return values of (`attends_by_row`, `takes_new_rows`) to try, the fastest first."""
        ...


class Rows:
    """The two rows of the probe, and the positions at which they are read.

    One row has a token that equals the pad token, among its first ones, as real texts may have where the pad token is
    the end token. The other has none.

    Args:
        model: The model.
        vocab_size: V, the number of tokens that can be sampled.
        device: The device of the tokens.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, device: torch.device) -> None:
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)  # CPM-Ant's config has none
        others = [token for token in range(vocab_size) if token != pad][: 4 * PROBE_LENGTH] or [0]
        n_prompt = (PROBE_LENGTH, PROBE_LENGTH - 1) if model.config.is_encoder_decoder else (1, 1)
        self.lengths = tuple(n + PROBE_LENGTH - 1 for n in n_prompt)  # of the whole rows, in tokens
        tokens = [[others[(first + i) % len(others)] for i in range(max(self.lengths))] for first in (0, PROBE_LENGTH)]
        if pad is not None and 0 <= pad < vocab_size:
            tokens[1][1] = pad
        self.ids = torch.tensor(tokens, device=device)  # (2, T): row 1 of an encoder-decoder has one column of padding
        self.n_prompt = torch.tensor(n_prompt, device=device)  # (2,)
        self.is_encoder_decoder = model.config.is_encoder_decoder
        positions = [(row, n - 1 + i) for row, n in enumerate(n_prompt) for i in range(PROBE_LENGTH)]
        self.rows, self.cols = torch.tensor(positions, device=device).T  # (2 * PROBE_LENGTH,) each

    @property
    def further(self) -> tuple[Tensor, ...]:
        """The last arguments of `read`, of a backbone and of a cache: for an encoder-decoder the prompts' lengths."""
        return (self.n_prompt,) if self.is_encoder_decoder else ()

    def cut(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the first columns of ids, the rows and columns of the positions in them, and their indices."""
        kept = (self.cols < width).nonzero().flatten()
        return self.ids[:, :width], self.rows[kept], self.cols[kept], kept

    def changed(self, width: int) -> Tensor:
        """Return the ids with other tokens after the first columns."""
        ids = self.ids.clone()
        ids[:, width:] = self.ids[:, :1]  # of each row, and not the pad token
        return ids


@torch.no_grad()
def probe(backbone: Probed) -> None:
    """Test a model on a few tokens, and set the attributes of `Backbone` that say how it is read.

    The model's own forward of each row alone, without mask, padding and cache, is the truth. Compared with it are: the
    rows without their last token (a later token must not change anything), both rows in one batch, the forward that the
    update uses, training mode, and a decoding cache. Where the head alone or a cache differs, the slower way replaces
    it; any other difference is an error.

    Args:
        backbone: The model; its attributes are set.

    Raises:
        ValueError: If hidden states or logits depend on later tokens, on other rows, on chance or on training mode; if
            they are not finite; or if the model's forward or backward pass fails.
    """
    model = backbone.model
    was_training = backbone.training
    backbone.train(False)
    rows = Rows(model, backbone.vocab_size, backbone.device)
    truth = _choose_head(backbone, rows)
    backbone.hidden_size = truth.hidden.shape[-1]
    tolerance = state_tolerance(model)
    _check_causal(backbone, rows, truth, tolerance)
    _check_noise(backbone, rows, truth, tolerance)
    _check_update(backbone, rows)
    backbone.train(False)
    _choose_cache(backbone, rows, truth, tolerance)
    backbone.train(was_training)


def state_tolerance(model: PreTrainedModel) -> float:
    """Return the largest relative difference of hidden states that rounding alone makes."""
    if _is_quantised(model):
        return COARSE_TOLERANCE
    epsilon = max((torch.finfo(weight.dtype).eps for weight in model.parameters()), default=0.0)
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2.0**-10)  # TF32 has the 10 bits of float16
    return max(STATE_TOLERANCE if epsilon < 2.0**-10 else COARSE_TOLERANCE, 8 * epsilon)


def _is_quantised(model: PreTrainedModel) -> bool:
    return hasattr(model, "hf_quantizer") or not all(weight.is_floating_point() for weight in model.parameters())


def _has_experts(model: PreTrainedModel) -> bool:
    """Return whether a token may be computed together with others that the same expert gets."""
    return any("expert" in name and value for name, value in model.config.get_text_config().to_dict().items())


def close(a: Tensor, b: Tensor, tolerance: float = PROBE_TOLERANCE) -> bool:
    """Return whether logits agree up to `tolerance` of the largest of `b`, and rule out the same tokens."""
    present = _without_absent(a, b)
    if present is None:
        return False
    scale = max(1.0, float(present[1].abs().max()))
    return bool(torch.allclose(*present, atol=tolerance * scale))


def _without_absent(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return both in float32, with 0 for tokens that are ruled out; None if they rule out others or differ in shape."""
    a, b = a.float(), b.float()
    is_absent = b <= ABSENT
    if not torch.equal(a <= ABSENT, is_absent):
        return None
    return a.masked_fill(is_absent, 0.0), b.masked_fill(is_absent, 0.0)


class States(NamedTuple):
    """The hidden states (N, H) and logits (N, V) at some positions."""

    hidden: Tensor
    logits: Tensor

    def at(self, positions: Tensor | list[int]) -> States:
        """Return the states of some of the positions."""
        return States(self.hidden[positions], self.logits[positions])

    def differ(self, others: tuple[Tensor, Tensor], tolerance: float) -> bool:
        """Return whether others differ from these by more than rounding, or are not finite.

        That is |a - b| > `tolerance` * |b| (Euclidean norms) of the hidden states or the logits at any position.
        """
        return not all(agree(got, expected, tolerance) for got, expected in zip(others, self, strict=True))


def agree(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether |got - expected| <= `tolerance` * |expected|, Euclidean norms over the last dimension."""
    present = _without_absent(got, expected)
    if present is None:
        return False
    difference, size = (present[0] - present[1]).norm(dim=-1), present[1].norm(dim=-1)
    return bool((difference <= tolerance * size + torch.finfo(torch.float32).tiny).all())  # NaN is not <=


def attempt(compute: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return the result and "", or None and the error in words: models of transformers raise errors of every kind."""
    try:
        return compute(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {first_line:.200}".rstrip(".")  # it stands inside a sentence


def _choose_head(backbone: Probed, rows: Rows) -> States:
    """Set `head_is_linear`; return the states that the update reads at the 2 * PROBE_LENGTH positions.

    The logits are scaled up, since a soft cap bends large ones only. Those of fresh weights are small, and trained
    weights may replace these after the probe.
    """
    model, name = backbone.model, type(backbone.model).__name__
    head, tolerance = model.get_output_embeddings(), max(PROBE_TOLERANCE, state_tolerance(model))
    with _scaled(head) as scale:
        expected, error = attempt(lambda: backbone.plain_logits(rows.ids[:1, : rows.lengths[0]], rows.n_prompt[:1]))
        if expected is None:
            raise ValueError(
                f"Expected a model that reads token ids alone, got {name}, whose forward fails on {PROBE_LENGTH} of "
                f"them with {error}. Does it need other inputs, or another version of transformers?"
            )
        if expected.isnan().any() or (expected == torch.inf).any():
            raise ValueError(
                f"Expected finite logits, got NaN or infinity from {name} on {PROBE_LENGTH} tokens: its weights are "
                "damaged, or too large for their type."
            )
        scale()
        expected = torch.cat(
            [
                backbone.plain_logits(rows.ids[i : i + 1, : rows.lengths[i]], rows.n_prompt[i : i + 1])
                for i in range(len(rows.ids))
            ]
        )
        errors: list[str] = []
        for backbone.head_is_linear in (True, False) if head is not None else (False,):
            got, error = attempt(lambda: backbone(rows.ids, rows.rows, rows.cols, *rows.further))
            if got is not None and close(got[1], expected, tolerance):
                break
            errors.append(error or "it gives other logits for both rows together than for each alone")
        else:
            raise ValueError(
                "Expected a model that computes the same for a row whatever rows are beside it, got "
                f"{name}: {', and '.join(dict.fromkeys(errors))}. Use another model."
            )
    return States(*backbone(rows.ids, rows.rows, rows.cols, *rows.further))  # at the logits' own scale


@contextmanager
def _scaled(head: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Yield a function that scales the head's outputs, so that the largest one so far becomes `PROBE_LOGIT`."""
    largest, factor = [1e-6], [1.0]

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        largest.append(float(output.abs().max()))
        return output * factor[0]

    def scale() -> None:
        factor[0] = PROBE_LOGIT / max(largest)

    handle = nullcontext() if head is None else head.register_forward_hook(hook)
    with handle:
        yield scale


def _check_causal(backbone: Probed, rows: Rows, truth: States, tolerance: float) -> None:
    """Raise ValueError if later tokens of a row change what the model computes at earlier ones.

    The rows are read without their last column, and then without all columns after the first position of row 0; before
    that, with other tokens in these columns. Then all shapes stay, and so does all rounding, even in 16 bits.
    """
    is_coarse = _is_quantised(backbone.model) or _has_experts(backbone.model)
    for width in (rows.ids.shape[1] - 1, int(rows.n_prompt.max())):
        shorter, at_rows, at_cols, kept = rows.cut(width)
        for ids, largest in (
            (rows.changed(width), tolerance if is_coarse else STATE_TOLERANCE),
            (shorter, tolerance),
        ):
            states = States(*backbone(ids, at_rows, at_cols, *rows.further))
            if truth.at(kept).differ(states, largest):
                _refuse_not_causal(backbone, at_rows, truth.at(kept), states, largest)


def _refuse_not_causal(backbone: Probed, at_rows: Tensor, truth: States, shorter: States, tolerance: float) -> None:
    """Raise the ValueError of a model in which later tokens change the states at earlier ones."""
    of_row_0 = (at_rows == 0).nonzero().flatten()  # the row without a pad token
    if not truth.at(of_row_0).differ(shorter.at(of_row_0), tolerance):
        raise ValueError(
            f"Expected a model that reads its pad token like any other, as it may be sampled, got "
            f"{type(backbone.model).__name__}, which takes it for padding: set pad_token_id in its config to an id "
            "that the tokenizer does not use."
        )
    raise ValueError(
        f"Expected a causal model, got {type(backbone.model).__name__}, in which a token changes what is computed at "
        "earlier ones: it would be trained on probabilities that depend on tokens yet to be sampled. Cure: "
        f"{causal_cure(backbone.model)}."
    )


def causal_cure(model: PreTrainedModel) -> str:
    """Return what to do about a model that is not causal."""
    config = model.config.get_text_config()
    flags = [f"set {name}=True in its config" for name in CAUSAL_FLAGS if getattr(config, name, None) is False]
    return [*flags, "use a causal language model, or switch bidirectional attention off in its config"][0]


def _check_update(backbone: Probed, rows: Rows) -> None:
    """Raise ValueError if the backward pass of an update fails, or gives a gradient that is not finite."""
    vectors = small_weights(backbone.parameters())
    if not vectors:
        return
    # The embedded tokens' gradient takes the backward pass through whole layers: Reformer's refuse in a function of
    # their own.
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # CTRL scales its embedded tokens in place, which a leaf forbids

    def differentiate() -> bool:
        with torch.enable_grad(), backbone.model.get_input_embeddings().register_forward_hook(keep):
            logits = backbone(rows.ids, rows.rows, rows.cols, *rows.further)[1].float()
            gradients = torch.autograd.grad(logits.logsumexp(dim=-1).sum(), [*embedded, *vectors], allow_unused=True)
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    is_finite, error = attempt(differentiate)
    if not is_finite:
        raise ValueError(
            f"Expected a model that can be trained, got {type(backbone.model).__name__}, whose backward pass "
            f"{f'fails with {error}' if error else 'gives a gradient that is not finite'}. Use another model."
        )


def small_weights(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trained norms and biases, or all trained weights if there are none.

    They are in every layer, and their gradients take little memory beside a model that may fill it.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    return [weight for weight in trained if weight.ndim == 1] or trained


def _check_noise(backbone: Probed, rows: Rows, truth: States, tolerance: float) -> None:
    """Raise ValueError if two forwards in training mode differ from each other or from evaluation mode."""
    backbone.train(True)
    for _ in range(2):
        if truth.differ(backbone(rows.ids, rows.rows, rows.cols, *rows.further), tolerance):
            raise ValueError(
                f"Expected a model that computes the same in every forward, got {type(backbone.model).__name__}, which "
                "computes something else in training mode, or draws random numbers (dropout, jitter, sampled experts) "
                "in evaluation mode too: set the probability of that noise to 0 in its config."
            )


def _choose_cache(backbone: Probed, rows: Rows, truth: States, tolerance: float) -> None:
    """Set `attends_by_row`, `takes_new_rows` and `no_cache_because` to the fastest decoding that is exact."""
    backbone.is_cacheable = False
    # transformers sets `PreTrainedModel._is_stateful` in classes whose cache cannot go back to an earlier token.
    if backbone.model._is_stateful:
        backbone.no_cache_because = "it keeps a state of the text read so far, not keys and values alone"
    else:
        reasons: list[str] = []
        for by_row, takes_new_rows in backbone.decoding_modes():
            backbone.is_cacheable, backbone.attends_by_row, backbone.takes_new_rows = True, by_row, takes_new_rows
            decoded, error = attempt(lambda: list(_decode(backbone, rows)))
            if decoded is not None and not any(
                truth.at(positions).differ(states, tolerance) for states, positions in decoded
            ):
                backbone.no_cache_because = ""
                return
            reasons.append(error or "its logits differ from those of whole texts")
        backbone.is_cacheable = False
        backbone.no_cache_because = reasons[-1] if reasons else "its head is not linear"
    backbone.attends_by_row = backbone.takes_new_rows = False
    warnings.warn(
        f"{type(backbone.model).__name__} does not decode exactly from cached keys and values "
        f"({backbone.no_cache_because}): it runs without a cache, in time that grows with the square of the length.",
        stacklevel=2,
    )


def _decode(backbone: Probed, rows: Rows) -> Iterator[tuple[tuple[Tensor, Tensor], list[int]]]:
    """Yield a decoding cache's states (2, H) and (2, V) at each of `STEPS`, and the indices of their positions."""
    cache = backbone.new_cache()
    assert cache is not None, "called only while `is_cacheable`"
    for counts in STEPS:
        lengths = rows.n_prompt + torch.tensor(counts, device=rows.ids.device) - 1  # (2,) tokens of each row
        width = int(lengths.max())
        states = cache.read(rows.ids[:, :width], lengths, *rows.further)
        yield states, [row * PROBE_LENGTH + n - 1 for row, n in enumerate(counts)]
