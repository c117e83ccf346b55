"""What the verbs beside `train` take, as dataclasses: names, types, defaults and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .config import DEMO, Named


@dataclass
class TrustOptions:
    """What the command line alone allows.

    Args:
        allow: A module that the configuration may import.
        trust_remote_code: Let a model from the hub run its own code.
    """

    allow: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class EvaluateOptions:
    """Measure a run's model as it was before training and as it is now, on the same prompts.

    Args:
        run: The folder of the run.
        metrics: Metrics by name, or their id and args, beside the run's own.
        n_prompts: How many prompts.
        n: Texts a prompt.
        seed: Of the sampling.
    """

    run: str
    metrics: list[Named | str] = field(default_factory=list)
    n_prompts: int = 64
    n: int = 1
    seed: int = 0


@dataclass
class GenerateOptions:
    """Continue prompts, and print a line of JSON for each text.

    Args:
        model: The folder of a run, or the name or folder of a model.
        prompts: A .jsonl, .csv or .txt file.
        n: Texts a prompt.
        max_new_tokens: The most tokens of a text.
        greedy: Take the most probable token instead of sampling.
        seed: Of the sampling.
    """

    model: str
    prompts: str = "prompts.txt"
    n: int = 1
    max_new_tokens: int = 64
    greedy: bool = False
    seed: int = 0


@dataclass
class ChatOptions:
    """Talk with a model; what was said before stays in its prompt. /reset forgets it, /exit ends.

    Args:
        model: The folder of a run, or the name or folder of a model.
        max_new_tokens: The most tokens of an answer.
        greedy: Take the most probable token instead of sampling.
        seed: Of the sampling.
    """

    model: str
    max_new_tokens: int = 64
    greedy: bool = False
    seed: int = 0


@dataclass
class ExportOptions:
    """Write a run's newest model as a Hugging Face folder, and check that it generates the same.

    Args:
        run: The folder of the run.
        folder: Where to.
    """

    run: str
    folder: str


@dataclass
class ExportFlags(TrustOptions):
    """What the command line alone says.

    Args:
        allow: A module that the configuration may import.
        trust_remote_code: Let a model from the hub run its own code.
        sb3_zip: Write sb3.zip as well, as SB3's model.save does: it holds pickles; see agents.load_sb3_zip.
    """

    sb3_zip: bool = False


@dataclass
class ShowOptions:
    """Replay an episode of a run's newest model token by token, with reward, value and divergence.

    Args:
        run: The folder of the run.
        prompt: The number of the prompt.
        seed: Of the sampling.
    """

    run: str
    prompt: int = 0
    seed: int = 0


@dataclass
class CompareOptions:
    """Draw the curves of several runs in one picture, and print a table.

    Args:
        runs: The folders of the runs.
        out: The picture's file.
    """

    runs: list[str]
    out: str = "compare.png"


@dataclass
class StageOptions(TrustOptions):
    """What the command line alone says.

    Args:
        allow: A module that the configuration may import.
        trust_remote_code: Let a model from the hub run its own code.
        resume: Go on with a run of the same arguments that was interrupted.
        quiet: No progress bar.
    """

    resume: bool = False
    quiet: bool = False


@dataclass
class StageConfig:
    """What all stages before PPO are told.

    Args:
        model: A name on the hub, or a folder; "demo" is the built-in one.
        task: A task of `textenv tasks`, whose data set `data` then is; a tenth of it is held out.
        data: A file; with `task` a folder, or the data set's name on the hub.
        out: Where the model goes.
        held_out: A file that is measured and not trained on.
        batch_size: Rows of a minibatch.
        max_tokens: The longest text.
        seed: Of everything random.
    """

    model: str = DEMO
    task: str | None = None
    data: str | None = None
    out: str | None = None
    held_out: str | None = None
    batch_size: int = 16
    max_tokens: int | None = None
    seed: int = 0


@dataclass
class SFTConfig(StageConfig):
    """Tune a causal model on texts, or on references that answer prompts; see `agents.sft.tune`.

    Args:
        model: A name on the hub, or a folder; "demo" is the built-in one.
        fresh: Instead of `model`, the sizes of one with fresh weights, as its transformers config has them:
            `{model_type: gpt2, n_layer: 2, n_embd: 128, n_head: 4, vocab_size: 2048}`. Its tokenizer learns from the
            texts.
        fresh_tokenizer: Whether that has byte pairs, `vocab_size` of them, or a token a character, as suits Chinese.
        task: A task of `textenv tasks`, whose data set `data` then is; a tenth of it is held out.
        data: A .txt (a text a line), .jsonl or .csv file; with `task` a folder, or the data set's name on the hub.
        out: Where the tuned model goes.
        held_out: A file that is measured and not trained on.
        text_column: The column of texts.
        prompt_column: The column of prompts, where there are prompts and references.
        reference_column: The column of references, as they go on from their prompts.
        packing: Put several texts into a row.
        n_epochs: Passes over the data.
        batch_size: Rows of a minibatch.
        learning_rate: The peak.
        max_tokens: The longest row.
        seed: Of fresh weights and of the order of the data.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    fresh_tokenizer: Literal["byte_pairs", "characters"] = "byte_pairs"
    text_column: str = "text"
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    packing: bool = False
    n_epochs: float = 1.0
    learning_rate: float = 2e-5


@dataclass
class ClassifierConfig(StageConfig):
    """Train a text classifier, to be a reward or a judge; see `agents.classifier.train_classifier`.

    Args:
        model: A name on the hub, or a folder; "demo" is the built-in one.
        fresh: Instead of `model`, the sizes of one with fresh weights, as its transformers config has them:
            `{model_type: distilbert, n_layers: 1, dim: 64, hidden_dim: 128, n_heads: 2}`.
        tokenizer: Its name or folder, where it is not the model's own.
        task: A task of `textenv tasks`, whose data set `data` then is; a tenth of it is held out.
        data: A .jsonl or .csv file with the columns text and label; with `task` a folder, or the data set's name on
            the hub.
        out: Where the classifier goes.
        held_out: A file that is measured and not trained on.
        labels: The names of the labels in their order; the task's, or those found in alphabetical order, by default.
        n_epochs: Passes over the data.
        batch_size: Texts of a minibatch.
        learning_rate: The peak.
        max_tokens: The longest text.
        seed: Of fresh weights and of the order of the data.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    labels: list[str] = field(default_factory=list)
    n_epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5


@dataclass
class RewardModelConfig(StageConfig):
    """Train a model that scores texts, from pairs or from labels; see `agents.train_reward_model`.

    Args:
        model: A name on the hub, or a folder; "demo" is the built-in one.
        task: A task of `textenv tasks`, whose data set `data` then is; a tenth of it is held out.
        data: A .jsonl or .csv file with the columns chosen, rejected and perhaps prompt; or text and label. With
            `task` a folder, or the data set's name on the hub.
        out: Where the model goes.
        held_out: A file that is measured and not trained on.
        loss: Where scores are compared: at the last token, or at all from the first difference on.
        centring: Keeps scores around zero.
        n_epochs: Passes over the data.
        batch_size: Rankings of a minibatch.
        learning_rate: The peak.
        max_tokens: The longest text.
        seed: Of a fresh head and of the order of the data.
    """

    loss: Literal["last", "tokens"] = "last"
    centring: float = 0.0
    n_epochs: float = 1.0
    learning_rate: float = 1e-5
