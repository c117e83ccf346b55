"""The families of causal models and encoder-decoders that the installed transformers has, each as a default config."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from agents.doctor.model_row import COLUMNS, ModelRow, described, examine_config
from agents.models.probe import CAUSAL_FLAGS

# The server imports the modules once; each examination is a fork of it.
APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload(["tests.helpers.families", "peft"])

Kind = Literal["causal", "seq2seq"]
RANDOM = ("drop", "jitter")  # in the names of rates by which a model is random in training mode
RATE = 0.3

INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 4}
INDEXER |= {"indexer_compress_ratio": 2}
# Fields of families that cannot be examined with their defaults, and why.
OVERRIDES: dict[str, dict[str, Any]] = {
    # With the defaults, some None or missing, transformers builds no model, or its forward fails.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "xmod": {"default_language": "en_XX"},
    # transformers refuses dropout of attention (`DiffLlamaAttention.__init__`).
    "diffllama": {"attention_dropout": 0.0},
    # The second entry says how often the list of kinds is repeated; it must fit the number of layers.
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    # Positions along two axes need texts of exactly the product of their sizes in training.
    "reformer": {"axial_pos_embds": False},
    # By default all layers have attention; most of those of the published checkpoints are convolutions.
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
}

# The families of which no small model can be built, and why.
UNBUILT = {
    "gemma3n": "transformers needs timm for its vision tower, which no extra installs; see gemma3n_text",
    "gemma4_assistant": "transformers refuses the defaults of its config",
    "gemma4_unified_assistant": "a drafter, which reads the keys and values of another model",
}
NOT_BUILT = "not built"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.helpers.families"
HEAD = """# Models

What `LMPolicy` does with each family of causal models and encoder-decoders of transformers {version}.

`{command}` prints this page, and no row is written by hand. Each family is built small
from the defaults of its config, with large random weights and with every rate of dropout and jitter above 0, and is
trained for two rollouts.

- **result**: *exact*: log-probabilities of the rollout and of the update, values and gradients equal those of the model
  alone, which reads one prefix at a time without padding or cache; again after an update. Several texts begin with the
  same prompts, which are read once where the model allows that. With LoRA, the same holds but for gradients, which are
  not compared. *refused*: `LMPolicy` raises the error in the last column. *not built*: no small model of the family can
  be built, for the reason in the last column.
- **cache**: whether rollouts decode from cached keys and values; without them, the time of a rollout grows with the
  square of the length.
- **attention**: the implementation of attention that transformers chooses.
- **critic**: `SharedCritic`, and `SeparateCritic` with a trunk of the same family.
- **LoRA**: the endings of the names of the layers that `LoRA()` adapts by default.
- **remarks**: the error, or the warnings.

A model may differ from the defaults of its family, for example in the kinds of its layers, their windows and scales, or
in its rotary embeddings: `textenv doctor --model NAME` prints the row of one model, by its own config.

{counts}.

"""


class Family(NamedTuple):
    """One entry of transformers' mappings from a config's `model_type` to a class, and a flag of its config or ""."""

    kind: Kind
    model_type: str
    flag: str = ""

    def __str__(self) -> str:
        """Return the name of the family in tables and tests."""
        name = self.model_type if self.kind == "causal" else f"{self.model_type} ({self.kind})"
        return f"{name}, {self.flag}=True" if self.flag else name


def families() -> list[Family]:
    """Return all entries of both mappings, and once more with the flag those whose config has one for causal models."""
    result = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        result.append(Family("causal", name))
        defaults = {field.name: field.default for field in fields(CONFIG_MAPPING[name])}
        is_whole = not defaults.get("is_encoder_decoder")
        result += [Family("causal", name, flag) for flag in CAUSAL_FLAGS if is_whole and defaults.get(flag) is False]
    return [*result, *(Family("seq2seq", name) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)]


def default_config(family: Family) -> PreTrainedConfig:
    """Return the config of a family: the defaults of its class, with every rate of noise in training set to `RATE`.

    For an encoder-decoder in the mapping of causal models (BART), it is the config of the decoder alone.
    """
    config_class: Any = CONFIG_MAPPING[family.model_type]
    flags = {family.flag: True} if family.flag else {}
    if family.kind == "causal" and config_class().is_encoder_decoder:
        flags = {"is_encoder_decoder": False, "is_decoder": True}
    fixed = OVERRIDES.get(family.model_type, {})
    config = config_class(**fixed, **flags)
    make_random(config, fixed)
    return config


def make_random(config: PreTrainedConfig, fixed: Container[str] = ()) -> None:
    """Set every rate of dropout, layer drop and jitter of a config, and of those inside it, to `RATE`.

    Args:
        config: The config, changed in place.
        fixed: The names of fields that stay.
    """
    for field in fields(config):
        value = vars(config).get(field.name)
        if isinstance(value, PreTrainedConfig):
            make_random(value)
        elif type(value) in (int, float) and any(word in field.name for word in RANDOM) and field.name not in fixed:
            with suppress(StrictDataclassFieldValidationError):  # MPT's `attn_pdrop` must be an integer
                setattr(config, field.name, RATE)


def examine_family(family: Family) -> ModelRow:
    """Return the row of a family; "failed" also if transformers itself builds no model of its default config."""
    try:
        config = default_config(family)
    except Exception as error:
        return ModelRow("failed", remarks=f"no config: {described(error)}")
    return examine_config(config)


def examine_apart(family: Family, timeout: float = 120.0) -> ModelRow:
    """Return the row of a family, examined in a process of its own, which may crash or hang."""
    ours, theirs = APART.Pipe()
    process = APART.Process(target=_send_row, args=(family, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return ModelRow("failed", remarks=f"no result after {timeout:g} s")
        return ours.recv()
    except EOFError:
        process.join(5)
        return ModelRow("failed", remarks=f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def page(rows: dict[str, ModelRow]) -> str:
    """Return docs/models.md: the rows by family, and their counts."""
    lines = {name: cells(row) for name, row in rows.items()}
    lines |= {name: (NOT_BUILT, "", "", "", "", reason) for name, reason in UNBUILT.items() if name in rows}
    counts = Counter(line[0] for line in lines.values())
    summary = f"{len(rows)} rows: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    head = HEAD.format(version=transformers.__version__, command=COMMAND, counts=summary)
    table = [("family", *COLUMNS), ("---",) * (1 + len(COLUMNS)), *((name, *line) for name, line in lines.items())]
    return head + "".join(f"| {' | '.join(line)} |\n" for line in table)


def cells(row: ModelRow) -> tuple[str, ...]:
    """Return the cells of a row in Markdown."""
    return tuple(" ".join(cell.replace("|", "\\|").split()) for cell in row.cells)


def documented() -> dict[str, tuple[str, ...]]:
    """Return the rows of docs/models.md, by family."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    rows = (re.split(r"(?<!\\) \| ?", line.removeprefix("| ").removesuffix(" |")) for line in lines)
    return {name: tuple(others) for name, *others in rows}


def documented_version() -> str:
    """Return the version of transformers that docs/models.md was printed from."""
    found = re.search(r"of transformers ([\d.]+)\.\s", PAGE.read_text(encoding="utf-8"))
    assert found is not None, "docs/models.md does not say the version of transformers"
    return found[1]


def _send_row(family: Family, pipe: Connection) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    pipe.send(examine_family(family))


def main() -> None:
    """Examine all families, as many side by side as there are processors, and write docs/models.md."""
    every = sorted(families(), key=str)
    rows = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for family, row in zip(every, pool.map(examine_apart, every)):
            print(family, row.verdict, row.remarks, file=sys.stderr)
            rows[str(family)] = row
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
