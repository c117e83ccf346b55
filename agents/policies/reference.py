"""The reference model of the KL penalty: frozen, with the policy's own frozen weights where it has some."""

from __future__ import annotations

import copy
import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from textenv.huggingface.weights import from_pretrained, has_tokenizer

from ..distributed.collectives import broadcast_weights
from ..distributed.sharding import Shards, gathered
from ..models.backbone import Backbone
from ..models.pretrained import LOOK_UP_OPTIONS, LMLike, Pretrained, build_backbone, refuse_shared
from ..models.sequences import Chunk, PartReader, SequenceBatch
from ..models.trainable import adapted_layers, adapters_off
from ..small_models.demo_model import model_folder
from .actor_critic import LMActorCritic

# Arguments of `Pretrained` that say where its files are, for its tokenizer as well.
WHERE = ("cache_dir", "token", "local_files_only", "revision", "subfolder", "trust_remote_code", "gguf_file")


def start_of(policy: LMActorCritic) -> LMActorCritic:
    """Return a reference that computes as the policy does now, for the functions below to read.

    With LoRA it is the policy itself, read without its adapters. Otherwise it is a frozen copy that shares the weights
    that the policy keeps frozen, so that with `LastLayers(n)` the reference takes the memory of n layers. The copy of a
    sharded policy is sharded, and shares no weights.
    """
    if adapted_layers(policy):
        return policy
    return copy_of(policy, [weight for weight in policy.parameters() if not weight.requires_grad])


def copy_of(lm: LMActorCritic, shared: list[nn.Parameter] | None = None) -> LMActorCritic:
    """Return a frozen copy without a critic.

    Args:
        lm: The model to copy; the copy of a sharded model is sharded.
        shared: The weights that the copy shares with the model; by default none.
    """
    lm.drop_caches()
    if lm.shards is not None:
        return lm.shards.twin()
    # `deepcopy` uses these objects in place of copies.
    memo: dict[int, object] = {id(weight): weight for weight in shared or []}
    if lm.lagged is not None:
        memo[id(lm.lagged)] = None  # the lagged copy is for sampling, and a reference samples nothing
    return copy.deepcopy(lm, memo | {id(lm.critic): nn.Identity()}).requires_grad_(False).eval()


def build_reference(lm: LMLike, policy: LMActorCritic, n_positions: int) -> LMActorCritic:
    """Build another language model as reference, with the policy's vocabulary, sampling and precision.

    Args:
        lm: A name or path, a config, a spec, a live model, which is frozen, or the `BackendSpec` of a model that is
            not transformers'.
        policy: The policy.
        n_positions: The longest sequence that the reference will read, in tokens.

    Raises:
        ValueError: If it has fewer tokens or positions than needed, if one of reference and policy is an
            encoder-decoder and the other is not, or if a live model has weights that the policy trains.
    """
    if isinstance(lm, PreTrainedModel):
        refuse_shared(lm, (weight for weight in policy.parameters() if weight.requires_grad), "reference")
    # A model is built with fresh weights even if those of a checkpoint replace them at once. The fork keeps the
    # generators as they were, so that a resumed run draws the same numbers.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        is_sharded = policy.shards is not None
        backbone = build_backbone(lm, None, policy.backbone.vocab_size, n_positions, as_stored=is_sharded)
    if backbone.is_encoder_decoder != policy.backbone.is_encoder_decoder:
        kinds = ("an encoder-decoder", "a causal model")
        expected, got = kinds if policy.backbone.is_encoder_decoder else kinds[::-1]
        name = type(backbone.model if isinstance(backbone, Backbone) else lm).__name__
        raise ValueError(f"Expected {expected} as `reference`, as the policy is, got {got}, {name}.")
    sampling = replace(policy.sampling, top_p_lag=None)
    built = LMActorCritic(backbone, nn.Identity(), sampling, policy.autocast, cache=False)
    if policy.shards is not None:
        broadcast_weights(built)
        built.requires_grad_(False).shards = Shards(built, policy.shards.spec, as_stored=True)
        return built.eval()
    return built.to(policy.backbone.device).requires_grad_(False).eval()


def check_tokens(lm: LMLike, tokenizer: Any) -> None:
    """Raise ValueError if one of the policy's ids is another token for a model that is given by name.

    The model may lack tokens, and have further ones. Nothing is checked of a model without a tokenizer beside it, such
    as a config, or if one of the tokenizers has no `get_vocab`.

    Args:
        lm: The model, as for `build_reference`.
        tokenizer: The policy's tokenizer.
    """
    spec = Pretrained(str(lm)) if isinstance(lm, (str, PathLike)) else lm
    if not isinstance(spec, Pretrained) or spec.name is None or not hasattr(tokenizer, "get_vocab"):
        return
    where = {key: spec.kwargs[key] for key in WHERE if key in spec.kwargs}
    name = spec.name if LOOK_UP_OPTIONS & where.keys() else model_folder(spec.name)
    if not has_tokenizer(name, **where):
        return
    ours = {i: token for token, i in tokenizer.get_vocab().items()}
    theirs = {i: token for token, i in from_pretrained(AutoTokenizer, name, **where).get_vocab().items()}
    unlike = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if unlike:
        i = unlike[0]
        raise ValueError(
            f"Expected a `reference` with the policy's tokens, got {spec.name!r}, whose tokenizer has others for "
            f"{len(unlike)} of {len(ours)} ids, such as {theirs[i]!r} in place of {ours[i]!r} for {i}: take a model of "
            "the policy's family, or the reward 'likelihood', which reads texts with the model's own tokenizer."
        )


@torch.no_grad()
def log_probs(reference: LMActorCritic, policy: LMActorCritic, batch: SequenceBatch, actions: Tensor) -> Tensor:
    """Return the reference's log-probabilities of actions (N,), in nats."""
    with gathered(reference), _frozen(reference, policy):
        return reference.log_probs(batch, actions)


@torch.no_grad()
def divergences(reference: LMActorCritic, policy: LMActorCritic, batch: SequenceBatch) -> Tensor:
    """Return KL(policy, reference) over the whole vocabulary at each transition, (N,), in nats.

    Policy and reference take turns, so that log-probabilities (n, V) are held for n transitions at a time.
    """
    result = torch.zeros(len(batch), device=batch.tokens.device)
    first, second = reference.shared_columns, policy.shared_columns
    with gathered(reference):
        for chunk in batch.chunks(None, None if first is None or second is None else min(first, second)):
            read, start = reader(reference, policy, chunk), 0
            transitions = torch.as_tensor(chunk.transitions, device=result.device)  # (n,)
            for own in policy.log_probabilities(chunk):  # (m, V)
                part = slice(start, start := start + len(own))
                # A token of probability 0 adds 0: its log-probability is a large number, not -inf.
                result[transitions[part]] = (own.softmax(dim=-1) * (own - read(part))).sum(dim=-1)
    return result


def reader(reference: LMActorCritic, policy: LMActorCritic, chunk: Chunk) -> PartReader:
    """Return the reader of the reference's log-probabilities at a chunk of the policy's, which builds no graph."""
    if reference.shared_columns is None or reference.shared_columns < (policy.shared_columns or 0):
        chunk = chunk._replace(shared=None)
    # Adapters are off while the reference reads, not in between, where the policy reads the same chunk.
    with torch.no_grad(), _frozen(reference, policy):
        read = reference.part_reader(chunk)

    def read_part(part: slice) -> Tensor:
        with torch.no_grad(), _frozen(reference, policy):
            return read(part)

    return read_part


def _frozen(reference: LMActorCritic, policy: LMActorCritic) -> AbstractContextManager[None]:
    return adapters_off(policy) if reference is policy else nullcontext()


def own_tensors(reference: LMActorCritic, policy: LMActorCritic) -> dict[str, Tensor]:
    """Return the reference's weights and buffers that the policy does not hold; tied ones once, by their first name.

    Weights that a device map has offloaded (device "meta") are left out: they never change, and are loaded with the
    model.
    """
    shared = {id(tensor) for tensor in (*policy.parameters(), *policy.buffers())}
    # `named_parameters` and `named_buffers` of torch name a tied tensor once.
    tensors: dict[str, Tensor] = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in shared and not tensor.is_meta}


def fingerprint(reference: LMActorCritic) -> str:
    """Return a hash of the names, shapes and bytes of a reference's weights; offloaded ones are left out.

    Bytes are summed, where the weights are, so that it costs one pass over them. Buffers are no weights: models compute
    them, with roundings that depend on the device.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(reference.named_parameters()):
        if not weight.is_meta:
            total = weight.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(total)}\n".encode())
    return digest.hexdigest()
