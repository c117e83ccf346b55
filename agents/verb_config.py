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
        allow_env: An environment variable that the configuration may send to a reward's server (api_key_variable).
        trust_remote_code: Let a model from the hub run its own code.
    """

    allow: list[str] = field(default_factory=list)
    allow_env: list[str] = field(default_factory=list)
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
        model: The folder of a run, or the name or folder of a model; "demo" is the built-in one.
        prompts: A .jsonl, .csv or .txt file; by default the prompts of the run, or the built-in ones for "demo".
        n: Texts a prompt.
        max_new_tokens: The most tokens of a text; by default as many as the run was trained with, or 64 for a model,
            and fewer where it has no room for so many.
        greedy: Take the most probable token instead of sampling.
        seed: Of the sampling.
    """

    model: str
    prompts: str | None = None
    n: int = 1
    max_new_tokens: int | None = None
    greedy: bool = False
    seed: int = 0


@dataclass
class ChatOptions:
    """Talk with a model; what was said before stays in its prompt. /reset forgets it, /exit ends.

    Args:
        model: The folder of a run, or the name or folder of a model; "demo" is the built-in one.
        max_new_tokens: The most tokens of an answer; by default as many as the run was trained with, or 64 for a model,
            and at most half of what it can read.
        greedy: Take the most probable token instead of sampling.
        seed: Of the sampling.
    """

    model: str
    max_new_tokens: int | None = None
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
        allow_env: An environment variable that the configuration may send to a reward's server (api_key_variable).
        trust_remote_code: Let a model from the hub run its own code.
        sb3_zip: Write sb3.zip as well, as SB3's model.save does: it holds pickles; see agents.load_sb3_zip.
        to_hub: Upload the folder as this repository of the Hugging Face hub; a new one is private.
        overwrite: Replace an earlier export in the folder.
    """

    sb3_zip: bool = False
    to_hub: str | None = None
    overwrite: bool = False


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
        allow_env: An environment variable that the configuration may send to a reward's server (api_key_variable).
        trust_remote_code: Let a model from the hub run its own code.
        resume: Go on with a run of the same arguments that was interrupted.
        overwrite: Replace an earlier output of the same kind in --out.
        quiet: No progress bar.
    """

    resume: bool = False
    overwrite: bool = False
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
    """Train a text classifier, to be a reward or a judge; see `agents.train_classifier`.

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
        fresh: Instead of `model`, the sizes of one with fresh weights, as its transformers config has them:
            `{model_type: gpt2, n_layer: 2, n_embd: 128, n_head: 4, n_positions: 128}`.
        tokenizer: Its name or folder, where it is not the model's own.
        task: A task of `textenv tasks`, whose data set `data` then is; a tenth of it is held out.
        data: A .jsonl or .csv file with the columns chosen, rejected and perhaps prompt; or text and label. With
            `task` a folder, or the data set's name on the hub.
        from_feedback: In its place, the answers of people that `textenv rate` has put into this file.
        out: Where the model goes.
        held_out: A file that is measured and not trained on; a tenth of the prompts, with `from_feedback`.
        loss: Where scores are compared: at the last token, or at all from the first difference on.
        centring: Keeps scores around zero.
        n_epochs: Passes over the data.
        batch_size: Rankings of a minibatch.
        learning_rate: The peak.
        max_tokens: The longest text.
        seed: Of fresh weights and of the order of the data.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    from_feedback: str | None = None
    loss: Literal["last", "tokens"] = "last"
    centring: float = 0.0
    n_epochs: float = 1.0
    learning_rate: float = 1e-5


@dataclass
class RateConfig:
    """Have people score, compare or rank what a model writes; without a model, what waits for an answer already.

    Interrupted, the same command goes on: nothing is generated twice, and nothing that was answered is asked again.

    Args:
        model: The folder of a run, or the name or folder of a model; "demo" is the built-in one.
        prompts: A .jsonl, .csv or .txt file; those of the built-in reviews for "demo".
        db: Where questions and answers are kept; ratings.db by default, with --train in the folder `out`. Without a
            model a file that is not there yet is only begun where it is named.
        kind: What is asked; "score" by default, and without a model whatever waits.
        n: Completions a prompt: 1 to score, 2 to compare, 4 to rank by default. With --train, samples an update.
        rater: Who answers; the user's name by default.
        raters: How many people are to answer each question.
        low: The lowest score.
        high: The highest score.
        max_new_tokens: The most tokens of a completion; by default as many as the run was trained with, or 32 for a
            model, and fewer where it has no room for so many.
        seed: Of the sampling.
        host: With --web, the address to listen on; one that others can reach needs a token.
        port: With --web, its port; 0 takes a free one.
        token: With --web, what visitors must have: 16 letters, digits, - and _ or more.
        out: With --train, where the trained model and its checkpoints go.
        learning_rate: With --train; the small model of the demo needs about 1e-3.
        kl: With --train, the penalty on leaving the model as it was, in scores from -1 to 1 per nat.
        updates: With --train, how many at most.
    """

    model: str | None = None
    prompts: str | None = None
    db: str | None = None
    kind: Literal["score", "compare", "rank"] | None = None
    n: int | None = None
    rater: str | None = None
    raters: int = 1
    low: float = 1.0
    high: float = 5.0
    max_new_tokens: int | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    out: str | None = None
    learning_rate: float = 1e-5
    kl: float = 0.05
    updates: int | None = None


@dataclass
class RateOptions(TrustOptions):
    """What the command line alone says.

    Args:
        allow: A module that the configuration may import.
        allow_env: An environment variable that the configuration may send to a reward's server (api_key_variable).
        trust_remote_code: Let a model from the hub run its own code.
        terminal: Answer here in the terminal: the default.
        web: Answer on a page in the browser.
        train: Score samples in the terminal, with an update of the model after every one, or every n.
    """

    terminal: bool = False
    web: bool = False
    train: bool = False
