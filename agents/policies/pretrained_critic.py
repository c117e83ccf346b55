"""Critics that `textenv critic` has fitted: their folder, the spec that loads it, and the checks that it fits."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import safetensors.torch
import torch
from safetensors import SafetensorError
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from textenv.checks.json_files import read_json
from textenv.huggingface.weights import from_config, from_pretrained
from textenv.text.tokenizer import Tokenizer

from ..models.critic import CriticSpec, TrunkCritic, ValueHead
from ..models.interface import LanguageModel
from ..models.layers import trunk_of
from ..models.pretrained import Pretrained, refuse_shared
from .actor_critic import LMActorCritic

TENSORS, ABOUT, CONFIG = "critic.safetensors", "critic.json", "config.json"
SHAPE = {  # of critic.json, for `read_json`
    "format": int,
    "hidden_size": int,
    "detach": bool,
    "built_as": (str, None),
    "tokens": {"size": int, "sha256": str},
    "returns": {"mean": float, "deviation": float, "rollouts": int},
    "held_out": {"before": (float, None), "after": (float, None)},
}
FORMAT = 1  # the version of the folder
PROBE = "probe"  # the tensor with the policy's hidden states, beside the critic's weights
N_TOKENS, N_PROMPT = 8, 2  # the probe: a prompt of two tokens and six more
TOLERANCE = 1e-3  # of the norm of the probe's hidden states: devices and kernels differ by less in float32
# The classes whose trunks may become critics. Both have their config in the folder, without a head's weights.
BUILDERS: dict[str, Any] = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
}
MAKE = "fit one, `textenv critic CONFIG.yml --out DIR`"


@runtime_checkable
class NamesTokens(Protocol):
    """A tokenizer that has the string of each token, as every Hugging Face tokenizer does."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the tokens' strings."""


class Returns(NamedTuple):
    """The statistics of the returns that a critic was fitted to, in units of reward."""

    mean: float
    deviation: float
    n_rollouts: int


class PretrainedCritic:
    """A critic that was fitted to rollouts of the start before the first update, by `textenv critic` or `fit_critic`.

    A fresh critic values every text at 0, so that the first updates follow advantages that are mostly noise. This one
    has learnt what the start's texts earn (as in VC-PPO; Yuan et al., 2025, "What's Behind PPO's Collapse in
    Long-CoT?", section 3.2). It is a value head on the policy's trunk, or a model of its own with a head, whatever was
    fitted; in all else it is `SharedCritic`, `SeparateCritic` or `RewardModelCritic`.

    The folder holds values in units of reward. With `value_norm` its statistics begin at those of the returns that the
    critic was fitted to, and the head is rescaled, so that values are the same with and without.

    When a policy is built, three things are checked, as far as values depend on them: a head fits the policy's trunk
    (the hidden states of a few tokens are those of the model that it was fitted on, to 1e-3 of their norm), the trunk
    of a critic of its own has the policy's tokens and positions, and the env's tokenizer is the one of the fit.

    Args:
        folder: The folder that `textenv critic` wrote.
        detach: Of a head on the policy's trunk: whether the value loss stops at the head. None is as it was fitted.

    Raises:
        ValueError: When built, if the folder is no such folder, is damaged, or does not fit; or with `detach` for a
            critic with a trunk of its own.

    Example:
        >>> from agents import PretrainedCritic
        >>> policy_kwargs = dict(lm="./my-gpt2", critic=PretrainedCritic("./my-critic"), value_norm="popart")
    """

    def __init__(self, folder: str | os.PathLike[str], detach: bool | None = None) -> None:
        self.folder: str | None = os.fspath(folder)
        self.detach = detach
        self.about: dict[str, Any] = {}
        self.config: PreTrainedConfig | None = None  # of a trunk

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle: once built, without the folder, since the saved weights are loaded next."""
        return {**self.__dict__, "folder": None} if self.about else self.__dict__.copy()

    def build(self, hidden_size: int) -> nn.Module:
        """Return the critic with its weights; after unpickling with fresh ones, which the saved ones replace."""
        if self.folder is not None:
            self.about = _read_about(self.folder)
        built_as = self.about["built_as"]
        if built_as is None:
            if hidden_size != self.about["hidden_size"]:
                raise ValueError(
                    f"Expected a critic for hidden states of {hidden_size} numbers, the policy's, got {self.folder} "
                    f"for {self.about['hidden_size']}: {MAKE}, for this model."
                )
            critic = ValueHead(hidden_size, self.about["detach"] if self.detach is None else self.detach)
        else:
            if self.detach is not None:
                raise ValueError("Expected no `detach` for a critic with a trunk of its own, got one: leave it out.")
            if self.folder is not None:
                self.config = from_pretrained(AutoConfig, self.folder)
            critic = TrunkCritic(trunk_of(from_config(BUILDERS[built_as], self.config)))
        if self.folder is not None:
            _load(critic, read_tensors(self.folder), self.folder)
        return critic

    def begin(self, lm: LMActorCritic, tokenizer: Tokenizer | None) -> None:
        """Check that the critic fits its policy, and give it the policy's units.

        Args:
            lm: The policy's model, with this critic.
            tokenizer: The env's; None where there is no env yet.
        """
        if self.folder is None:  # unpickled: it was checked before, and the saved weights have their units
            return
        tokens = self.about["tokens"]
        if tokenizer is not None and (own := tokens_of(tokenizer)) != tokens:
            raise ValueError(
                f"Expected the tokenizer that the critic {self.folder} was fitted with, of {tokens['size']} tokens, "
                f"got another, of {own['size']} tokens: use the first one, or {MAKE}, with this one."
            )
        if self.about["built_as"] is None:
            kept = read_tensors(self.folder)[PROBE]
            apart = float((probe(lm.backbone) - kept).norm() / kept.norm().clamp(min=1e-12))
            if not apart <= TOLERANCE:
                raise ValueError(
                    f"Expected the model on whose hidden states the critic {self.folder} was fitted, got another: "
                    f"those of a few tokens are {apart:.2g} of their norm apart, where rounding is below {TOLERANCE}. "
                    f"Train that model, or {MAKE}, for this one."
                )
        if lm.value_norm is not None:
            returns = self.about["returns"]
            assert isinstance(lm.critic, ValueHead), "checked by LMActorCritic"
            lm.value_norm.begin_at(returns["mean"], returns["deviation"], returns["rollouts"], lm.critic.linear)


def build_critic(spec: CriticSpec, backbone: LanguageModel, n_positions: int) -> nn.Module:
    """Return the critic of a policy.

    Args:
        spec: Its spec.
        backbone: The policy's language model.
        n_positions: The longest sequence that will be read, in tokens.

    Raises:
        ValueError: If the critic has fewer tokens or positions than the policy needs, or weights of the policy's model.
        TypeError: For `Pretrained`, which is a language model.
    """
    if isinstance(spec, Pretrained):
        raise TypeError(
            f"Expected the spec of a critic, got Pretrained({spec.name!r}), a language model: use "
            "PretrainedCritic(folder) for a folder of `textenv critic`, or SeparateCritic(Pretrained(name))."
        )
    critic = spec.build(backbone.hidden_size)
    if isinstance(critic, TrunkCritic):
        refuse_shared(critic.trunk, backbone.parameters(), "critic")
        critic.check_fits(backbone.vocab_size, n_positions)
    return critic


def begin_critic(spec: CriticSpec, lm: LMActorCritic, algorithm: BaseAlgorithm | None) -> None:
    """Check that a pretrained critic fits its policy, and give it the policy's units; others begin as they are."""
    if isinstance(spec, PretrainedCritic):
        env = None if algorithm is None else algorithm.env
        spec.begin(lm, None if env is None else env.get_attr("tokenizer", [0])[0])


def write_critic(
    folder: Path, lm: LMActorCritic, tokenizer: Tokenizer, returns: Returns, held_out: dict[str, float | None]
) -> None:
    """Write a critic whose values are in units of reward into an empty folder.

    Args:
        folder: The folder.
        lm: The policy's model, with the critic.
        tokenizer: The tokenizer of the rollouts.
        returns: The statistics of the returns that the critic was fitted to.
        held_out: The explained variance of texts that it was not fitted to, "before" and "after".

    Raises:
        ValueError: If the critic has a trunk that its config alone does not build.
    """
    critic = lm.critic
    assert isinstance(critic, ValueHead), "checked before the rollouts"
    tensors = {name: weight.detach().cpu().contiguous().clone() for name, weight in critic.state_dict().items()}
    built_as = None
    if isinstance(critic, TrunkCritic):
        built_as = builder_of(critic.trunk)
        critic.trunk.config.save_pretrained(folder)
    else:
        tensors[PROBE] = probe(lm.backbone)
    about = {
        "format": FORMAT,
        "hidden_size": critic.linear.in_features,
        "detach": critic.detach,
        "built_as": built_as,
        "tokens": tokens_of(tokenizer),
        "returns": {"mean": returns.mean, "deviation": returns.deviation, "rollouts": returns.n_rollouts},
        "held_out": held_out,
    }
    safetensors.torch.save_file(tensors, folder / TENSORS)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def builder_of(trunk: PreTrainedModel) -> str:
    """Return the name of the class whose model of the trunk's config has this trunk.

    Raises:
        ValueError: If none has, as with quantised weights, adapters, or code of its own.
    """
    own = {name: (tensor.shape, tensor.dtype) for name, tensor in trunk.state_dict().items()}
    for name, auto_class in BUILDERS.items():
        try:
            with torch.device("meta"):
                built = trunk_of(from_config(auto_class, trunk.config))
        except ValueError:  # transformers has no such model of this config
            continue
        if {name: (tensor.shape, tensor.dtype) for name, tensor in built.state_dict().items()} == own:
            return name
    raise ValueError(
        f"Expected a critic whose trunk transformers builds from its config, got {type(trunk).__name__} with other "
        "weights (quantised, with adapters, or with code of its own): fit a SharedCritic, or a SeparateCritic without."
    )


@torch.no_grad()
def probe(backbone: LanguageModel) -> Tensor:
    """Return the hidden states of a model for a few fixed tokens, (7, H) float32 on the CPU.

    They tell a model by what it computes: fresh adapters change nothing, and any other weights or architecture does.
    """
    device = backbone.device
    ids = torch.arange(N_TOKENS, device=device)[None] % backbone.vocab_size  # (1, T)
    cols = torch.arange(N_PROMPT - 1, N_TOKENS, device=device)  # (7,): from the last column of the prompt on
    n_prompt = [torch.tensor([N_PROMPT], device=device)] if backbone.is_encoder_decoder else []
    return backbone.read(ids, torch.zeros_like(cols), cols, *n_prompt)[0].float().cpu()


def tokens_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the number of a tokenizer's tokens, and a hash of their names in the order of their ids."""
    n = len(tokenizer)
    if isinstance(tokenizer, NamesTokens):
        names = tokenizer.convert_ids_to_tokens(list(range(n)))
    else:
        names = [tokenizer.decode([token]) for token in range(n)]
    return {"size": n, "sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest()}


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a critic's folder by name.

    Raises:
        ValueError: If its file is damaged.
    """
    file = Path(folder) / TENSORS
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"Expected the weights of a critic in {file}, got: {error}: {MAKE}.") from error


def _read_about(folder: str) -> dict[str, Any]:
    file = Path(folder) / ABOUT
    if not file.is_file():
        raise ValueError(f"Expected the folder of a critic, got {folder}, which has no {ABOUT}: {MAKE}.")
    about: dict[str, Any] = read_json(file, SHAPE)
    if about["format"] != FORMAT or about["built_as"] not in (None, *BUILDERS):
        raise ValueError(f"Expected a critic of format {FORMAT}, got {about['format']} in {file}: {MAKE}.")
    return about


def _load(critic: nn.Module, tensors: dict[str, Tensor], folder: str) -> None:
    """Copy the weights of a folder into a critic."""
    own = critic.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if name != PROBE}
    unlike = sorted(own.keys() ^ kept.keys())
    unlike += sorted(name for name in own.keys() & kept.keys() if own[name].shape != kept[name].shape)
    if unlike:
        raise ValueError(
            f"Expected the weights of the critic in {folder}, got others: {', '.join(unlike[:3])} differ. The file is "
            f"of another critic than {ABOUT} says: {MAKE}."
        )
    critic.load_state_dict(kept)
