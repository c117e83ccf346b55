"""The arguments of the verbs other than `train`, as dataclasses: names, types, defaults and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..configuration.config import ModelConfig, Named, TrainConfig, TrustOptions

RATED_TOKENS = 32  # the most tokens of a text to rate from a model that is not a run: people must read all of it


@dataclass
class EvaluateOptions:
    """Evaluate a run's model before and after training, on the same prompts.

    Args:
        run: The folder of the run.
        metrics: Metrics in addition to the run's own, by name or {id: NAME, args: {...}}.
        judge: A reward that the run was not trained on, by name or {id: NAME, args: {...}}; by default the run's own
            judge, if it has one.
        n_prompts: The number of prompts.
        n: The number of texts per prompt.
        seed: The seed of the sampling.
    """

    run: str
    metrics: list[Named | str] = field(default_factory=list)
    judge: Named | str | None = None
    n_prompts: int = 64
    n: int = 1
    seed: int = 0


@dataclass
class GenerateOptions:
    """Write texts that continue prompts, and print each as a line of JSON.

    Args:
        model: The folder of a run, or the name, folder or GGUF file of a model; "demo" is the built-in one.
        prompts: A .jsonl, .json, .csv or .txt file of prompts; by default the run's own prompts, or the built-in
            prompts for "demo". Any other model needs a file.
        encoding: The encoding of the file of prompts, such as gb18030, utf-16 or cp1252.
        n: The number of texts per prompt.
        max_new_tokens: The most tokens of a text; by default as many as in the run's training, or 64 for a model, and
            fewer if the model can read fewer.
        greedy: Take the most probable token instead of sampling.
        seed: The seed of the sampling.
    """

    model: str
    prompts: str | None = None
    encoding: str = "utf-8"
    n: int = 1
    max_new_tokens: int | None = None
    greedy: bool = False
    seed: int = 0


@dataclass
class ChatOptions:
    """Chat with a model, which sees the whole conversation. /reset starts a new one, /exit ends.

    Args:
        model: The folder of a run, or the name, folder or GGUF file of a model; "demo" is the built-in one.
        max_new_tokens: The most tokens of an answer; by default as many as in the run's training, or 64 for a model,
            and at most half of what the model can read.
        greedy: Take the most probable token instead of sampling.
        seed: The seed of the sampling.
    """

    model: str
    max_new_tokens: int | None = None
    greedy: bool = False
    seed: int = 0


@dataclass
class ExportOptions:
    """Write a run's newest model as a Hugging Face folder, and check that it generates the same texts.

    Args:
        run: The folder of the run.
        folder: The folder to write.
    """

    run: str
    folder: str


@dataclass
class ExportFlags(TrustOptions):
    """Options of `textenv export`: only the command line has them.

    Args:
        sb3_zip: Also write sb3.zip, as SB3's model.save does: it contains pickles; see agents.load_sb3_zip.
        to_hub: Upload the folder to this repository, as you/model, of the Hugging Face hub; a new one is private.
        overwrite: Replace an earlier export in the folder.
        adapter: Also write the adapter of LoRA alone, as a folder of peft, into adapter/ in the folder.
    """

    sb3_zip: bool = False
    adapter: bool = False
    to_hub: str | None = None
    overwrite: bool = False


@dataclass
class ExaminedRun:
    """Name what went wrong in a run, by the files that it left.

    Args:
        run: The folder of the run: finished, broken, or going on.
    """

    run: str


@dataclass
class DoctorOptions(TrustOptions):
    """Options of `textenv doctor` alone.

    Args:
        json: Print one line of JSON with the findings.
    """

    json: bool = False


@dataclass
class OneModel:
    """Say what holds for one model: exact, or refused and why; cache, attention, critics, layers for LoRA.

    No weights are loaded: a small model with the same switches is built and trained for a moment.

    Args:
        model: The folder of a model, its config.json or GGUF file, or its name on the hub.
    """

    model: str | None = None


@dataclass
class ShowOptions:
    """Print an episode of a run's newest model token by token, with reward, value and KL divergence.

    Args:
        run: The folder of the run.
        prompt: The number of the prompt, from 0.
        seed: The seed of the sampling.
        credit: Instead, write credit.json into the run: the critic's value before each token of this many episodes,
            of the prompts from `prompt` on, beside the mean return of continuations from there.
        continuations: The number of continuations of each prefix for `credit`.
    """

    run: str
    prompt: int = 0
    seed: int = 0
    credit: int | None = None
    continuations: int = 32


@dataclass
class CompareOptions:
    """Draw runs, or folders of seeds, in one picture, and say whether the first is better than each of the others.

    Args:
        runs: The folders of the runs, or of the runs of several seeds.
        out: The picture to write, a PNG file.
    """

    runs: list[str]
    out: str = "compare.png"


@dataclass
class StageOptions(TrustOptions):
    """Options of `textenv sft`, `classifier`, `reward-model` and `critic`: only the command line has them.

    Args:
        resume: Continue an interrupted training; repeat its other arguments.
        overwrite: Replace an earlier output of the same kind in --out.
        quiet: Show no progress bar.
    """

    resume: bool = False
    overwrite: bool = False
    quiet: bool = False


@dataclass
class StageConfig:
    """The arguments that `sft`, `classifier` and `reward-model` share.

    Args:
        model: The model to train from: a name on the hub, a folder or a GGUF file; "demo" is the built-in one.
        task: A task that `textenv tasks` lists: `data` is then its data set, of which a tenth is held out.
        data: The training data: a file; with `task`, a folder or the data set's name on the hub.
        out: The folder to write the trained model to.
        held_out: A file of data to evaluate on, which is not trained on.
        encoding: The encoding of the files, such as gb18030, utf-16 or cp1252.
        batch_size: The number of texts in a minibatch.
        max_tokens: The most tokens of a text: longer texts are cut; by default as many as the model can read.
        seed: The seed of fresh weights and of the order of the data.
    """

    model: str = ModelConfig.name
    task: str | None = None
    data: str | None = None
    out: str | None = None
    held_out: str | None = None
    encoding: str = "utf-8"
    batch_size: int = 16
    max_tokens: int | None = None
    seed: int = 0


@dataclass
class SFTConfig(StageConfig):
    """Fine-tune a causal model on texts, or on prompts with reference answers; see `agents.sft.tune`.

    Args:
        fresh: A model with fresh weights instead of `model`: its type and sizes, as in its transformers config, such as
            `{model_type: gpt2, n_layer: 2, n_embd: 128, n_head: 4, vocab_size: 2048}`. Its tokenizer is
            made from the texts.
        fresh_tokenizer: The tokenizer of a `fresh` model: byte pairs, `vocab_size` of them, or one token per character,
            which suits Chinese.
        task_args: For the task ReasoningGym, in the place of `data`: the items, as in `env.args` of `textenv train`.
        data: A .txt (one text per line), .jsonl, .json or .csv file; with `task`, a folder or the data set's name on
            the hub.
        text_column: The column of texts.
        prompt_column: The column of prompts, if the data has prompts and references.
        reference_column: The column of references: texts that continue the prompts.
        packing: Put several texts into one row, to save padding.
        n_epochs: The number of passes over the data.
        batch_size: The number of rows in a minibatch.
        learning_rate: The peak of the learning rate.
        max_tokens: The most tokens of a row; by default as many as the model can read. Longer texts become several
            rows.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    fresh_tokenizer: Literal["byte_pairs", "characters"] = "byte_pairs"
    task_args: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    packing: bool = False
    n_epochs: float = 1.0
    learning_rate: float = 2e-5


@dataclass
class ClassifierConfig(StageConfig):
    """Train a text classifier, to use as a reward or a judge; see `agents.train_classifier`.

    Args:
        fresh: A model with fresh weights instead of `model`: its type and sizes, as in its transformers config, such as
            `{model_type: distilbert, n_layers: 1, dim: 64, hidden_dim: 128, n_heads: 2}`.
        tokenizer: The name, folder or GGUF file of the tokenizer, if it is not the model's own.
        data: A .jsonl, .json or .csv file with the columns text and label; with `task`, a folder or the data set's name
            on the hub.
        labels: The names of the labels, in the order of their numbers; by default the task's labels, or the labels in
            the data in alphabetical order.
        n_epochs: The number of passes over the data.
        learning_rate: The peak of the learning rate.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    labels: list[str] = field(default_factory=list)
    n_epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5


@dataclass
class RewardModelConfig(StageConfig):
    """Train a model that scores texts, from preferences or from numbers; see `agents.train_reward_model`.

    Args:
        fresh: A model with fresh weights instead of `model`: its type and sizes, as in its transformers config, such as
            `{model_type: gpt2, n_layer: 2, n_embd: 128, n_head: 4, n_positions: 128}`.
        tokenizer: The name, folder or GGUF file of the tokenizer, if it is not the model's own.
        data: A .jsonl, .json or .csv file with the columns chosen and rejected, and optionally prompt (texts, or
            lists of messages); or text and label (a number). With `task`, a folder or the data set's name on the hub.
        from_feedback: Instead of `data`, a file of people's answers that `textenv rate` collected.
        held_out: A file of data to evaluate on, which is not trained on; with `from_feedback`, by default a tenth of
            the prompts.
        half: Train on the first or the second half of the training data alone: another reward model that learns from
            the other half can judge (`evaluation.judge`); null for all data.
        first_layers: The number of the model's lowest layers that the reward model has, to save time and memory; null
            for all.
        train: Train all weights ("all"), or fit the score head alone to the model's last states ("head"), which reads
            each text once, and for which a few hundred comparisons are enough; it leaves `n_epochs` and
            `learning_rate` aside.
        loss: Compare the scores of two texts at their last tokens ("last"), or at all tokens from their first
            difference on ("tokens").
        centring: The weight of a penalty that keeps scores around zero; 0 for none.
        n_epochs: The number of passes over the data.
        batch_size: The number of comparisons (or texts) in a minibatch.
        learning_rate: The peak of the learning rate.
    """

    fresh: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    from_feedback: str | None = None
    half: Literal["first", "second"] | None = None
    first_layers: int | None = None
    train: Literal["all", "head"] = "all"
    loss: Literal["last", "tokens"] = "last"
    centring: float = 0.0
    n_epochs: float = 1.0
    learning_rate: float = 1e-5


@dataclass
class CriticConfig(TrainConfig):
    """Fit the critic of a training before its first update; see `agents.fit_critic`.

    Args:
        out: The folder to write the critic to, for `model.critic: pretrained` and `model.critic_model: FOLDER`.
        rollouts: The number of rollouts of the start to fit to; a tenth of their texts is held out to measure on.
        n_epochs: The number of passes over their texts.
        batch_size: The number of texts in a minibatch.
        learning_rate: The peak of the learning rate of the fit; null is 1e-2 for a head on the policy's layers, and
            1e-4 for a critic that is a model of its own.
    """

    rollouts: int = 8
    n_epochs: float = 4.0
    batch_size: int = 16
    learning_rate: float | None = None


@dataclass
class RateConfig:
    """Let people score, compare or rank texts that a model writes; without a model, texts that wait in a file.

    After an interrupt the same command continues: no text is written twice, and no answered question is asked again.

    Args:
        model: The folder of a run, or the name, folder or GGUF file of a model; "demo" is the built-in one.
        prompts: A .jsonl, .json, .csv or .txt file of prompts; by default the built-in ones for "demo".
        encoding: The encoding of the file of prompts, such as gb18030, utf-16 or cp1252.
        db: The SQLite file of questions and answers; by default ratings.db, with --train in the folder `out`. Without
            a model, the file must exist or be named here.
        kind: The kind of question; by default "score", and without a model every kind that waits.
        n: The number of texts per prompt; by default 1 to score, 2 to compare, 4 to rank. With --train, the number of
            texts per update.
        rater: The name of the person who answers; by default the user's name.
        raters: The number of people who have to answer each question.
        low: The lowest score.
        high: The highest score.
        max_new_tokens: The most tokens of a text; by default as many as in the run's training, or 32 for a model, and
            fewer if the model can read fewer.
        seed: The seed of the sampling.
        host: With --web, the address to listen on; an address that others can reach needs a token.
        port: With --web, the port; 0 picks a free one.
        token: With --web, a password in the page's address: at least 16 letters, digits, - and _.
        out: With --train, the folder of the trained model and its checkpoints.
        learning_rate: With --train, the learning rate; the demo's small model needs about 1e-3.
        kl: With --train, the penalty per nat of divergence from the original model; scores are scaled to -1 to 1.
        updates: With --train, the number of updates after which to stop; null for no end.
    """

    model: str | None = None
    prompts: str | None = None
    encoding: str = "utf-8"
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
    """Options of `textenv rate`: only the command line has them.

    Args:
        terminal: Answer in this terminal, as without any of these options.
        web: Answer on a page in the browser.
        train: Score texts in the terminal, and train the model after every n of them (after each by default).
    """

    terminal: bool = False
    web: bool = False
    train: bool = False
