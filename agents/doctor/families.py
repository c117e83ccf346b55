"""The families of causal models and encoder-decoders that the installed transformers has, each as a default config."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

Kind = Literal["causal", "seq2seq"]


class Family(NamedTuple):
    """One entry of transformers' mappings from a config's `model_type` to a class."""

    kind: Kind
    model_type: str

    def __str__(self) -> str:
        """Return the name of the family in tables and tests."""
        return self.model_type if self.kind == "causal" else f"{self.model_type} ({self.kind})"


def families() -> list[Family]:
    """Return all entries of both mappings."""
    return [
        *(Family("causal", name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        *(Family("seq2seq", name) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ]


def default_config(family: Family) -> PreTrainedConfig:
    """Return the config of a family with the defaults of its class; of BART's decoder alone, for a causal model."""
    config_class: Any = CONFIG_MAPPING[family.model_type]
    config = config_class()
    if family.kind == "causal" and config.is_encoder_decoder:
        config = config_class(is_encoder_decoder=False, is_decoder=True)
    return config
