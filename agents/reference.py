"""What a policy is compared with: a frozen language model, which shares the policy's weights where those are frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from .actor_critic import LMActorCritic
from .backbone import Backbone
from .distributed import broadcast_weights
from .encoder_decoder import Seq2SeqBackbone
from .interface import BackendSpec, LanguageModel
from .pretrained import LMLike, build_model
from .sequences import Chunk, SequenceBatch
from .sharding import Shards, gathered
from .trainable import adapted_layers, adapters_off


def start_of(policy: LMActorCritic) -> LMActorCritic:
    """Return the policy as it is before training, to be read by the functions below.

    With LoRA it is the policy itself, read without its adapters. Otherwise it is a frozen copy that holds what is
    trained a second time; weights that are frozen in the policy are shared, so that with `LastLayers(n)` the reference
    costs the memory of n layers. A sharded policy's copy is sharded, and whole.
    """
    if adapted_layers(policy):
        return policy
    return copy_of(policy, [weight for weight in policy.parameters() if not weight.requires_grad])


def copy_of(lm: LMActorCritic, shared: list[nn.Parameter] | None = None) -> LMActorCritic:
    """Return a frozen copy without critic, which shares the weights `shared` with `lm`; sharded if that is."""
    lm.drop_caches()
    if lm.shards is not None:
        return lm.shards.twin()
    kept: dict[int, object] = {id(weight): weight for weight in shared or []}
    if lm.lagged is not None:
        kept[id(lm.lagged)] = None  # it samples nothing
    return copy.deepcopy(lm, kept | {id(lm.critic): nn.Identity()}).requires_grad_(False).eval()


def build_reference(lm: LMLike, policy: LMActorCritic, n_positions: int) -> LMActorCritic:
    """Build another language model with the policy's vocabulary, sampling and precision, and freeze it.

    Args:
        lm: A name or path, a config, a spec, or the `BackendSpec` of a model that is not transformers'.
        policy: The policy that is to be compared with it.
        n_positions: The longest sequence that will be asked for, in tokens.

    Raises:
        ValueError: If it has fewer tokens or positions than needed, or is an encoder-decoder where the policy is none.
    """
    # Fresh weights are drawn, also where a checkpoint's are to follow: a resumed run must go on with the same numbers.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        backbone, name = _build_backbone(lm, policy.backbone.vocab_size, n_positions)
    if backbone.is_encoder_decoder != policy.backbone.is_encoder_decoder:
        kinds = ("an encoder-decoder", "a causal model")
        expected, got = kinds if policy.backbone.is_encoder_decoder else kinds[::-1]
        raise ValueError(f"Expected {expected} as `reference`, as the policy is, got {got}, {name}.")
    sampling = replace(policy.sampling, top_p_lag=None)
    built = LMActorCritic(backbone, nn.Identity(), sampling, policy.autocast, cache=False)
    if policy.shards is not None:
        broadcast_weights(built)
        built.requires_grad_(False).shards = Shards(built, policy.shards.spec)
        return built.eval()
    return built.to(policy.backbone.device).requires_grad_(False).eval()


def _build_backbone(lm: LMLike, vocab_size: int, n_positions: int) -> tuple[LanguageModel, str]:
    """Return a language model and what it is called."""
    if isinstance(lm, BackendSpec):
        return lm.build_backend(vocab_size, n_positions), type(lm).__name__
    model = build_model(lm, train=None)
    backbone_class = Seq2SeqBackbone if model.config.is_encoder_decoder else Backbone
    return backbone_class(model, vocab_size, n_positions), type(model).__name__


@torch.no_grad()
def log_probs(reference: LMActorCritic, policy: LMActorCritic, batch: SequenceBatch, actions: Tensor) -> Tensor:
    """Return what the reference says of actions, (N,), in nats."""
    with gathered(reference), _frozen(reference, policy):
        return reference.log_probs(batch, actions)


@torch.no_grad()
def divergences(reference: LMActorCritic, policy: LMActorCritic, batch: SequenceBatch) -> Tensor:
    """Return KL(policy, reference) over the whole vocabulary at each transition, (N,), in nats.

    Both read the same forwards; log-probabilities over the vocabulary are held for a part of the transitions at once.
    """
    result = torch.zeros(len(batch), device=batch.tokens.device)
    with gathered(reference):
        for chunk in batch.chunks():
            both = zip(policy.log_probabilities(chunk), _log_probabilities(reference, policy, chunk), strict=True)
            # An impossible token counts 0, and would be 0 * infinity.
            parts = [
                (ours.softmax(dim=-1) * (ours - theirs)).masked_fill(ours.isneginf(), 0.0).sum(dim=-1)
                for ours, theirs in both
            ]
            result[torch.as_tensor(chunk.transitions, device=result.device)] = torch.cat(parts)
    return result


def _log_probabilities(reference: LMActorCritic, policy: LMActorCritic, chunk: Chunk) -> Iterator[Tensor]:
    parts = reference.log_probabilities(chunk)
    while True:
        with _frozen(reference, policy):  # the policy's own turn is between two parts
            part = next(parts, None)
        if part is None:
            return
        yield part


def _frozen(reference: LMActorCritic, policy: LMActorCritic) -> AbstractContextManager[None]:
    return adapters_off(policy) if reference is policy else nullcontext()


def own_tensors(reference: LMActorCritic, policy: LMActorCritic) -> dict[str, Tensor]:
    """Return the weights and buffers that the policy does not hold, each once: tied ones under their first name.

    What a device map has offloaded is left out: it never changes, and is read from where the model comes from.
    """
    shared = {id(tensor) for tensor in (*policy.parameters(), *policy.buffers())}
    tensors: dict[str, Tensor] = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in shared and not tensor.is_meta}
