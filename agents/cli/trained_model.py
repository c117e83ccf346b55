"""The commands evaluate, generate, export and doctor, and the loading of the model that a command uses."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.utils import get_device
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textenv.checks.trust import Trust
from textenv.env import TextEnv
from textenv.huggingface.positions import n_positions
from textenv.huggingface.weights import from_pretrained
from textenv.prompts.prompts import PromptLike
from textenv.text import demo_corpus as demo
from textenv.text.named_tokenizer import DEMO

from ..checkpoints.adapter_export import FOLDER, check_adapter, write_adapter
from ..checkpoints.checkpoint import load_checkpoint
from ..checkpoints.hf_export import check_repository, upload, write_model
from ..checkpoints.output_folders import check_output, output_folder
from ..checkpoints.saved_policy import load_policy
from ..configuration.config import ModelConfig, TrainConfig, TrustOptions
from ..distributed.world import is_main_process, world
from ..doctor.examine import check
from ..doctor.model_row import examine_config
from ..errors import CommandError, Exit
from ..evaluation.curves import draw_curves
from ..evaluation.evaluation import evaluate_together
from ..evaluation.generation import (
    USUAL_TOKENS,
    Generation,
    fitting_length,
    generate,
    no_reward,
    shorter_texts,
)
from ..evaluation.shared_episodes import run_shares
from ..files import write_text
from ..policies.lm_policy import LMPolicy
from ..runs.assemble import (
    Parts,
    assemble,
    load_lm,
    load_tokenizer,
    make_masks,
    make_metric,
    task_name,
    trust_of,
)
from ..runs.checkpoints import checkpoint_to_load
from ..runs.folder import SAMPLE, RunFolder, read_rows, to_line
from ..runs.model_card import model_card
from ..runs.policy_arguments import policy_arguments
from ..small_models.demo_model import model_folder
from ..small_models.progress import progress
from .options import DoctorOptions, EvaluateOptions, ExportFlags, ExportOptions, GenerateOptions, OneModel
from .prompt_files import prompts_for

CHUNK = 64  # prompts per call of `generate`, which runs as many side by side; then their texts are printed
# The check of an exported model: 32 tokens after each of 8 prompts take a second, and show that weights are the same.
N_COMPARED = 8
COMPARED_PROMPT = 4  # tokens
COMPARED_TOKENS = 32


class Writer(NamedTuple):
    """A policy, and everything that it needs to write texts as in training.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompts: The default prompts: the run's, or the built-in ones of the demo.
        trained_length: The most tokens of a text in training; None for a model that is not a run's.
        options: Arguments of `TextEnv` from training: stop ids, stop strings, masks, the prompt column.
    """

    policy: LMPolicy
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[PromptLike] = ()
    trained_length: int | None = None
    options: Mapping[str, Any] = {}


def newest(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[RunFolder, Path]:
    """Return a run's folder and its newest checkpoint.

    Raises:
        CommandError: If there is no intact checkpoint, or the tokenizer differs from the run's.
    """
    run = RunFolder.open(path)
    checkpoint = checkpoint_to_load(run)
    if checkpoint is None:
        raise CommandError(f"Expected a checkpoint in {run.checkpoints}, got none: textenv train --resume {path}")
    run.check_vocabulary(tokenizer.get_vocab())
    return run, checkpoint


def load_newest(path: str, parts: Parts) -> RunFolder:
    """Load a run's newest checkpoint into its agent; return the run's folder."""
    run, checkpoint = newest(path, parts.tokenizer)
    load_checkpoint(parts.agent, checkpoint)
    return run


def open_writer(
    name: str, config: TrainConfig | None, options: TrustOptions, prompts: Sequence[PromptLike] = ()
) -> Writer:
    """Return the writer of a run, with its newest policy, or of a model by name or folder.

    A run's rewards and loggers are not built, and its prompts are read only if `prompts` is empty.

    Args:
        name: The folder of the run, or the model.
        config: The run's configuration; None for a model.
        options: The permissions of the command line.
        prompts: The prompts to continue, instead of the run's.
    """
    trust = trust_of(options)
    if sys.stderr.isatty():  # a model of 135 M parameters takes many seconds, in which nothing else is said
        print(f"textenv: loading {name}", file=sys.stderr, flush=True)
    if config is None:
        transformers_logging.disable_progress_bar()
        tokenizer = load_tokenizer(name, trust)
        policy = make_policy(name, tokenizer, ModelConfig(), trust)
        return Writer(policy, tokenizer, prompts or (demo.prompts() if name == DEMO else ()))
    parts = Parts(config, trust)
    policy = open_policy(name, parts)
    env = parts.unscored(prompts)
    training = {
        "stop_ids": env.rules.stop_ids,
        "stop_strings": env.rules.stop_strings,
        "mask": make_masks(config.env, trust),
    }
    training |= {key: config.env.args[key] for key in ("prompt_column",) if key in config.env.args}
    return Writer(policy, parts.tokenizer, env.prompts, env.rules.max_new_tokens, training)


def open_policy(path: str, parts: Parts) -> LMPolicy:
    """Return a run's newest policy, for writing texts only: its critic and optimizer are not loaded."""
    _, checkpoint = newest(path, parts.tokenizer)
    policy = make_policy(parts.folder, parts.tokenizer, parts.config.model, parts.trust, as_trained=True)
    load_policy(policy, checkpoint)
    return policy.to(get_device(parts.config.device))


def text_length(writer: Writer, prompts: Sequence[PromptLike], requested: int | None, usual: int = USUAL_TOKENS) -> int:
    """Return the most tokens of a text: the requested number, or as in training, or as many as the model can read.

    Args:
        writer: The writer.
        prompts: The prompts that it will continue.
        requested: The number on the command line; None for none.
        usual: The number for a model that is not a run's.

    Raises:
        CommandError: If the model cannot read the requested number after the prompts, or not even one token.
    """
    wanted = requested or writer.trained_length or usual
    # The env encodes the prompts as `generate` will, and so has the length of the longest one in tokens.
    env = TextEnv(prompts, writer.tokenizer, reward=no_reward, max_new_tokens=wanted, **writer.options)
    try:
        most = fitting_length(writer.policy, env.max_prompt_tokens, wanted)
    except ValueError as error:
        raise CommandError(
            f"Expected prompts that leave the model room for a text, got one of {env.max_prompt_tokens} tokens: "
            "shorten it."
        ) from error
    if most < wanted and requested is not None:
        raise CommandError(
            f"Expected --max_new_tokens {most} or less behind prompts of up to {env.max_prompt_tokens} tokens, for "
            f"which the model has room, got {requested}."
        )
    if most < wanted:
        print(f"textenv: {shorter_texts(most, wanted, env.max_prompt_tokens)}.", file=sys.stderr)
    return most


def make_policy(
    name: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, trust: Trust, as_trained: bool = False
) -> LMPolicy:
    """Return a policy of a model, with the sampling of a configuration, for writing texts only.

    Args:
        name: The model's name or folder.
        tokenizer: Its tokenizer.
        model: The configuration.
        trust: The permission to run the model's own code.
        as_trained: Whether to add the adapters that the configuration trains, to load their weights afterwards.
    """
    env = TextEnv([[0]], tokenizer, reward=no_reward, max_new_tokens=1)  # for its spaces, which a policy needs
    # The critic serves training only, and so do adapters unless their trained weights are loaded afterwards.
    left_out = {"critic"} if as_trained else {"critic", "train"}
    arguments = {key: value for key, value in policy_arguments(model).items() if key not in left_out}
    spaces = env.observation_space, env.action_space
    # SB3 policies take a learning rate schedule; nothing is trained here.
    return LMPolicy(*spaces, lambda _: 0.0, lm=load_lm(name, trust), **arguments)  # type: ignore[arg-type]


def examine(config: TrainConfig | OneModel, options: DoctorOptions) -> int:
    """Print the doctor's report, or its row for one model; return the exit code, 1 if training would go wrong."""
    if isinstance(config, OneModel):
        return _examine_model(str(config.model), options)
    report = check(Parts(config, trust_of(options)).agent)
    print(json.dumps({"findings": [finding._asdict() for finding in report.findings]}) if options.json else report)
    return Exit.DONE if report.ok else Exit.FAILED


def _examine_model(name: str, options: DoctorOptions) -> int:
    folder = name if Path(name).is_file() else model_folder(name)
    config = from_pretrained(AutoConfig, folder, trust_remote_code=options.trust_remote_code)
    transformers_logging.set_verbosity_error()  # of tokens that equal pad, which are read on purpose
    row = examine_config(config)
    print(json.dumps({"model": name, **row._asdict()}) if options.json else f"{name}: {type(config).__name__}\n{row}")
    return Exit.DONE if row.verdict == "exact" else Exit.FAILED


def evaluate_run(config: TrainConfig, chosen: EvaluateOptions, options: TrustOptions) -> int:
    """Evaluate a run's model before and after training; print the table, and write it into the run's folder.

    Raises:
        CommandError: If the run has no intact checkpoint.
    """
    if chosen.judge is not None:
        config.evaluation.judge = chosen.judge
    config.model.shard = None  # each process writes the texts of its own share, with all weights
    parts = assemble(config, trust_of(options))
    RunFolder.open(chosen.run)
    checkpoint_to_load(RunFolder(chosen.run))  # refuses a damaged checkpoint before the first evaluation
    metrics = parts.metrics + [make_metric(metric, parts.trust) for metric in chosen.metrics]
    prompts = list(parts.held_out.prompts)[: chosen.n_prompts]
    arguments = {"n": chosen.n, "seed": chosen.seed, "env": parts.held_out, "judge": parts.judge, "progress_bar": True}
    measured = partial(evaluate_together, parts.agent, prompts, parts.tokenizer, metrics, **arguments)  # type: ignore[arg-type]
    before = measured()
    run = load_newest(chosen.run, parts)
    after = measured(before=before)
    if after is not None:
        print(after.to_markdown())
        after.save(run.path / "evaluation")
    return Exit.DONE


def generate_lines(config: TrainConfig | None, chosen: GenerateOptions, options: TrustOptions) -> int:
    """Print a line of JSON for each text, chunk by chunk; return the exit code."""
    prompts = prompts_for("generate", chosen.model, chosen.prompts, chosen.encoding, is_run=config is not None)
    writer = open_writer(chosen.model, config, options, prompts)
    prompts = prompts or list(writer.prompts)
    most = text_length(writer, prompts, chosen.max_new_tokens)
    # In a terminal the lines themselves show how far it is; a bar would tear them.
    is_shown = is_main_process() and not sys.stdout.isatty()
    here = world()
    a_turn = CHUNK if here is None else CHUNK * here.size

    def lines_of(n_before: int, share: Sequence[PromptLike], start: int) -> list[str]:
        texts = generate(
            writer.policy,
            share,
            writer.tokenizer,  # type: ignore[arg-type]
            chosen.n,
            max_new_tokens=most,
            deterministic=chosen.greedy,
            seed=chosen.seed + n_before + start,  # otherwise equal prompts in two chunks would get equal texts
            **writer.options,
        )
        return [_line(text) for text in texts]

    for begin in progress(range(0, len(prompts), a_turn), description="prompts", unit="chunk", is_shown=is_shown):
        turn = prompts[begin : begin + a_turn]
        for line in run_shares(partial(lines_of, begin), turn, CHUNK):
            print(line, flush=True)
    return Exit.DONE


def _line(text: Generation) -> str:
    """Return a text and its prompt as a line of JSON."""
    # A chat as it was given, so that the line can be a prompt again, and not as the template renders it.
    asked = text.prompt.messages or str(text.prompt)
    row = {"prompt": asked, "text": text.text, "end_reason": str(text.end_reason)}
    line = json.dumps(row, ensure_ascii=False)
    # JSON escapes U+0000 to U+001F only; control characters U+0080 to U+009F, which terminals obey, need ASCII.
    return line if line.isprintable() else json.dumps(row)


def export_run(config: TrainConfig, chosen: ExportOptions, options: ExportFlags) -> int:
    """Write a run's newest model with merged adapters, its card, curves and samples, and upload it on request.

    Returns:
        The exit code.

    Raises:
        CommandError: If the exported model does not generate the same texts, or the upload fails.
        OutputFolderError: If the folder has files that would be lost.
    """
    if options.to_hub is not None:
        check_repository(options.to_hub)
    target = {"overwrite": options.overwrite, "keep": [chosen.run]}
    check_output(chosen.folder, "language model", **target)  # type: ignore[arg-type]  # before anything is loaded
    run, folder = RunFolder.open(chosen.run), Path(chosen.folder)
    parts = Parts(config, trust_of(options))
    policy, tokenizer = open_policy(chosen.run, parts), parts.tokenizer
    if options.adapter:
        check_adapter(policy.backbone.model)
    with output_folder(folder, "language model", **target) as draft:  # type: ignore[arg-type]
        write_model(policy.backbone, tokenizer, draft)
        if options.adapter:
            write_adapter(policy.backbone, draft / FOLDER)
        _describe(draft, run, config)
        _check_same(policy, make_policy(str(draft), tokenizer, config.model, Trust()), tokenizer)
        if options.sb3_zip:
            load_newest(chosen.run, parts)
            parts.agent.save(draft / "sb3.zip")
    if options.sb3_zip:
        print(
            f"{folder / 'sb3.zip'}: holds pickles, as all of SB3's files do; agents.load_sb3_zip reads its weights "
            "without them"
        )
    if options.adapter:
        print(f"{folder / FOLDER}: the adapter alone, for {config.model.name}")
    print(f"{folder}: generates the same as {run.path} on {N_COMPARED} prompts")
    if options.to_hub is not None:
        print(f"uploading {folder}", flush=True)
        print(f"{upload(folder, options.to_hub)}: a new repository is private until its settings say otherwise")
    return Exit.DONE


def _check_same(policy: LMPolicy, exported: LMPolicy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that an exported model generates the same texts as the run's policy, after prompts of random tokens.

    Raises:
        CommandError: If it does not.
    """
    shape = (N_COMPARED, COMPARED_PROMPT)
    prompts: list[PromptLike] = np.random.default_rng(0).integers(len(tokenizer), size=shape).tolist()
    # As many tokens as the model can read after the prompt; a model without a limit of positions can read all.
    room = (n_positions(policy.backbone.model) or COMPARED_TOKENS + COMPARED_PROMPT) - COMPARED_PROMPT
    settings = {"max_new_tokens": min(COMPARED_TOKENS, room), "deterministic": True}
    ours, theirs = (
        [text.ids for text in generate(model, prompts, tokenizer, **settings)]  # type: ignore[arg-type]
        for model in (policy, exported)
    )
    if ours != theirs:
        number = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        raise CommandError(
            f"Expected the exported model to generate what the run does, got another text at prompt {number}: nothing "
            "was written.",
            Exit.FAILED,
        )


def _describe(folder: Path, run: RunFolder, config: TrainConfig) -> None:
    """Write the card of a run's model, and its samples and curves if there are any, into the model's folder."""
    table, reward = "Not evaluated yet.", None
    if run.is_finished():
        table = (run.path / "results.md").read_text(encoding="utf-8")
        reward = run.read_results()["figures"].get("reward")
    samples, rows = read_rows(run.samples, SAMPLE), read_rows(run.metrics)
    if samples:
        write_text(folder / run.samples.name, "".join(map(to_line, samples)))
    curves = None
    if rows and find_spec("matplotlib") is None:
        print('without a picture of the curves, which pip install "textenv[plot]" brings')
    elif rows:
        curves = "curves.png"
        draw_curves(folder / curves, {run.path.name: rows}, task_name(config))
    write_text(folder / "README.md", model_card(config, run.read_about(), table, samples, reward, curves))
