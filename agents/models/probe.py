"""The probe of a language model: a few tokens show whether it is trained exactly, and from which cache it decodes."""

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
# The largest relative difference of two states (Euclidean norms) that is rounding: 8 epsilons, and at least this.
# Kernels of float32 differ by about 1e-6; one token too many or too few in the attention of fresh weights by 1e-3.
STATE_TOLERANCE = 1e-4
QUANTISED_TOLERANCE = 0.05  # quantisers round activations too, with a scale for each forward
ABSENT = -1e30  # a logit at or below it stands for a token that the model rules out: Chameleon writes finfo.min there
CAUSAL_FLAGS = ("is_decoder", "causal")  # of configs whose models are bidirectional without: BERT and its kin, XLM
# The numbers of tokens (of the decoder, for an encoder-decoder) of two rows at three steps of a decoding cache: both
# rows begin, one grows beside a shorter one, and the shorter one is replaced by a new one, which ends, but does not
# begin, in the same columns.
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

    @property
    def longest(self) -> int | None:  # type: ignore[override]  # read, never set
        """The most tokens that the model reads."""

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
        """The further arguments of `Backbone.read` and of a cache's `read`: the prompts' lengths, if it needs them."""
        return (self.n_prompt,) if self.is_encoder_decoder else ()

    def cut(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the first columns of ids, the positions (rows, cols) that are left, and which ones those are."""
        left = (self.cols < width).nonzero().flatten()
        return self.ids[:, :width], self.rows[left], self.cols[left], left


@torch.no_grad()
def probe(backbone: Probed) -> None:
    """Test a model on a few tokens, and set the attributes of `Backbone` that say how it is read.

    The model's own forward of each row alone, without mask, padding and cache, is the truth. Compared with it are: the
    rows without their last token (a later token must not change anything), both rows in one batch, the forward that the
    update uses, training mode, and a decoding cache. What differs and has a slower twin is switched off; the rest is an
    error.

    Args:
        backbone: The model; its attributes are set.

    Raises:
        ValueError: If hidden states or logits depend on later tokens, on other rows, on chance or on training mode; if
            they are not finite; or if the model's forward fails.
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
    dtypes = {weight.dtype for weight in model.parameters()}
    if hasattr(model, "hf_quantizer") or not all(dtype.is_floating_point for dtype in dtypes):
        return QUANTISED_TOLERANCE
    epsilon = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2.0**-10)  # TF32 has the 10 bits of float16
    return max(STATE_TOLERANCE, 8 * epsilon)


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether logits agree up to `PROBE_TOLERANCE` of the largest of `b`, and rule out the same tokens."""
    a, b = a.float(), b.float()
    is_absent = b <= ABSENT
    if not torch.equal(a <= ABSENT, is_absent):
        return False
    a, b = a.masked_fill(is_absent, 0.0), b.masked_fill(is_absent, 0.0)
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.allclose(a, b, atol=PROBE_TOLERANCE * scale))


class States(NamedTuple):
    """The hidden states (N, H) and logits (N, V) at some positions."""

    hidden: Tensor
    logits: Tensor

    def at(self, positions: Tensor | list[int]) -> States:
        """Return the states of some of the positions."""
        return States(self.hidden[positions], self.logits[positions])

    def differ(self, others: tuple[Tensor, Tensor], tolerance: float) -> bool:
        """Return whether others differ from these by more than rounding, or are not finite.

        That is |a - b| > `tolerance` * |b| (Euclidean norms) of any row's hidden states or logits.
        """
        for expected, got in zip(self, others, strict=True):
            expected, got = expected.float(), got.float()
            is_absent = expected <= ABSENT
            if not torch.equal(got <= ABSENT, is_absent):
                return True
            expected, got = expected.masked_fill(is_absent, 0.0), got.masked_fill(is_absent, 0.0)
            difference, size = (got - expected).norm(dim=-1), expected.norm(dim=-1)  # (N,)
            if not bool((difference <= tolerance * size + torch.finfo(torch.float32).tiny).all()):  # NaN is not <=
                return True
        return False


def attempt(compute: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return the result and "", or None and the error in words: models of transformers raise errors of every kind."""
    try:
        return compute(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"


def _choose_head(backbone: Probed, rows: Rows) -> States:
    """Set `head_is_linear`; return the states that the update reads at the 2 * PROBE_LENGTH positions.

    The logits are scaled up, which shows a soft cap: it bends large logits only. Fresh weights give small ones, and
    trained weights may replace them after the probe.
    """
    model, name = backbone.model, type(backbone.model).__name__
    head = model.get_output_embeddings()
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
            if got is not None and close(got[1], expected):
                break
            errors.append(error or "it gives other logits than for each row alone")
        else:
            raise ValueError(
                f"Expected a model that computes a row's hidden states and logits whatever rows are beside it, got "
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

    The rows are read without their last column, and then without all columns after the first position of row 0.
    """
    for width in (rows.ids.shape[1] - 1, int(rows.n_prompt.max())):
        ids, at_rows, at_cols, left = rows.cut(width)
        shorter = States(*backbone(ids, at_rows, at_cols, *rows.further))
        if truth.at(left).differ(shorter, tolerance):
            _refuse_not_causal(backbone, at_rows, truth.at(left), shorter, tolerance)


def _refuse_not_causal(backbone: Probed, at_rows: Tensor, truth: States, shorter: States, tolerance: float) -> None:
    """Raise the ValueError of a model in which later tokens change the states at earlier ones."""
    first = (at_rows == 0).nonzero().flatten()
    if not truth.at(first).differ(shorter.at(first), tolerance):
        raise ValueError(
            f"Expected a model that reads its pad token like any other, as it may be sampled, got "
            f"{type(backbone.model).__name__}, which reads another text where it occurs: set the pad token of its "
            "config to an id that the tokenizer does not use."
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
    return [*flags, "use a causal language model, and switch bidirectional attention off in its config"][0]


def _check_update(backbone: Probed, rows: Rows) -> None:
    """Raise ValueError if the backward pass of an update fails, or gives a gradient that is not finite."""
    trained = [weight for weight in backbone.parameters() if weight.requires_grad]
    if not trained:
        return
    # The gradients of norms and biases, in every layer, take little memory beside the model, which may fill a machine.
    vectors = [weight for weight in trained if weight.ndim == 1] or trained

    def differentiate() -> bool:
        with torch.enable_grad():
            logits = backbone(rows.ids, rows.rows, rows.cols, *rows.further)[1].float()
            gradients = torch.autograd.grad(logits.logsumexp(dim=-1).sum(), vectors, allow_unused=True)
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    is_finite, error = attempt(differentiate)
    if not is_finite:
        raise ValueError(
            f"Expected a model that can be trained, got {type(backbone.model).__name__}, whose backward pass "
            f"{f'fails with {error}' if error else 'gives a gradient that is not finite'}. Use another model."
        )


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
    if backbone.model._is_stateful:
        backbone.no_cache_because = "it is recurrent: it keeps a state, not keys and values"
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
        backbone.no_cache_because = reasons[-1] if reasons else "its logits are not a function of its hidden states"
    backbone.attends_by_row = backbone.takes_new_rows = False
    warnings.warn(
        f"{type(backbone.model).__name__} does not decode exactly from cached keys and values "
        f"({backbone.no_cache_because}): it runs without a cache, in time that grows with the square of the length.",
        stacklevel=2,
    )


def _decode(backbone: Probed, rows: Rows) -> Iterator[tuple[tuple[Tensor, Tensor], list[int]]]:
    """Yield the states (2, H) and (2, V) of each step of a decoding cache, and the positions of the probe there."""
    cache = backbone.new_cache()
    assert cache is not None, "called only while `is_cacheable`"
    for counts in STEPS:
        lengths = rows.n_prompt + torch.tensor(counts, device=rows.ids.device) - 1  # (2,) tokens of each row
        width = int(lengths.max())
        states = cache.read(rows.ids[:, :width], lengths, *rows.further)
        yield states, [row * PROBE_LENGTH + n - 1 for row, n in enumerate(counts)]
