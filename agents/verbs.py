"""What the verbs do that work with a trained model, or look at one before it is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textenv import demo
from textenv.env import TextEnv
from textenv.json_files import read_json
from textenv.prompts import PromptLike
from textenv.prompts import read_rows as read_rows_of

from .assemble import (
    Parts,
    Trust,
    assemble,
    load_lm,
    load_tokenizer,
    make_masks,
    make_metric,
    policy_arguments,
    task_name,
)
from .checkpoint import load_checkpoint
from .config import DEMO, ModelConfig, TrainConfig
from .curves import draw_curves
from .doctor import check
from .evaluation import evaluate
from .exporting import check_repository, upload, write_model
from .files import write_text
from .generation import USUAL_TOKENS, fitting_length, generate, no_reward, shorter_texts
from .model_card import model_card
from .output_folders import check_output, output_folder
from .policies import LMPolicy
from .refusal import CommandError, Exit
from .run_checkpoints import checkpoint_to_load
from .run_folder import SAMPLE, RunFolder, read_rows, to_line
from .verb_config import EvaluateOptions, ExportFlags, ExportOptions, GenerateOptions, TrustOptions

CHUNK = 64  # prompts that are continued together, and printed when they are done
N_COMPARED = 8  # prompts by which an exported model is checked
COMPARED_TOKENS = 32
RESULTS = {"after": {"figures": {str: (float, None)}}}


class Writer(NamedTuple):
    """A policy with its tokenizer, to write with.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompts: What is continued where nothing else is asked for: the run's, or the built-in ones.
        most: The most tokens of a text in training; None for a model.
        options: How a text began and ended in training, as arguments of `TextEnv`.
    """

    policy: LMPolicy
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[PromptLike] = ()
    most: int | None = None
    options: Mapping[str, Any] = {}


def trust_of(options: TrustOptions) -> Trust:
    """Return what the command line allows."""
    return Trust(options.allow, options.trust_remote_code)


def load_newest(path: str, parts: Parts) -> RunFolder:
    """Bring a run's parts to its newest checkpoint, which must be intact; return its folder.

    Raises:
        CommandError: If there is none, or it is damaged.
    """
    run = RunFolder.open(path)
    checkpoint = checkpoint_to_load(run)
    if checkpoint is None:
        raise CommandError(f"Expected a checkpoint in {run.checkpoints}, got none: textenv train --resume {path}")
    run.check_vocabulary(parts.tokenizer.get_vocab())
    load_checkpoint(parts.agent, checkpoint)
    return run


def open_writer(name: str, config: TrainConfig | None, options: TrustOptions) -> Writer:
    """Return what writes: a run's newest policy, or a model by name or folder."""
    trust = trust_of(options)
    if config is not None:
        parts = assemble(config, trust)
        load_newest(name, parts)
        rules = parts.env.rules
        own = {"stop_ids": rules.stop_ids, "stop_strings": rules.stop_strings, "mask": make_masks(config.env, trust)}
        own |= {key: config.env.args[key] for key in ("prompt_column",) if key in config.env.args}
        return Writer(parts.agent.policy, parts.tokenizer, parts.env.prompts, rules.max_new_tokens, own)  # type: ignore[arg-type]
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(name, trust)
    prompts = demo.prompts() if name == DEMO else ()
    return Writer(make_policy(name, tokenizer, ModelConfig(), trust), tokenizer, prompts)


def text_length(writer: Writer, prompts: Sequence[PromptLike], given: int | None, usual: int = USUAL_TOKENS) -> int:
    """Return the most tokens of a text: what is given; else what training had, or is usual, as far as there is room.

    Args:
        writer: What writes.
        prompts: What it is to continue.
        given: What the command line says.
        usual: The number for a model that is no run's.

    Raises:
        CommandError: If there is no room for what is given, or behind the prompts for anything.
    """
    wanted = given or writer.most or usual
    env = TextEnv(prompts, writer.tokenizer, reward=no_reward, max_new_tokens=wanted, **writer.options)
    try:
        most = fitting_length(writer.policy, env.max_prompt_tokens, wanted)
    except ValueError as error:
        raise CommandError(
            f"Expected prompts that leave the model room for a text, got one of {env.max_prompt_tokens} tokens: "
            "shorten it."
        ) from error
    if most < wanted and given is not None:
        raise CommandError(
            f"Expected --max_new_tokens {most} or less behind prompts of up to {env.max_prompt_tokens} tokens, for "
            f"which the model has room, got {given}."
        )
    if most < wanted:
        print(f"textenv: {shorter_texts(most, wanted, env.max_prompt_tokens)}.", file=sys.stderr)
    return most


def make_policy(name: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, trust: Trust) -> LMPolicy:
    """Return a model as a policy that samples as a configuration says, to write and not to train with."""
    env = TextEnv([[0]], tokenizer, reward=no_reward, max_new_tokens=1)
    arguments = {key: value for key, value in policy_arguments(model).items() if key not in ("train", "critic")}
    spaces = env.observation_space, env.action_space
    return LMPolicy(*spaces, lambda _: 0.0, lm=load_lm(name, trust), **arguments)  # type: ignore[arg-type]


def read_prompts(path: str) -> list[PromptLike]:
    """Return the prompts of a file.

    Raises:
        CommandError: If there are none.
    """
    try:
        prompts = list(read_rows_of(path))
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected prompts in {path}, got: {error}") from error
    if not prompts:
        raise CommandError(f"Expected prompts in {path}, got an empty file.")
    return prompts


def examine(config: TrainConfig, options: TrustOptions) -> int:
    """Print what the doctor finds; the exit code is 1 where training would be wrong."""
    report = check(assemble(config, trust_of(options)).agent)
    print(report)
    return Exit.DONE if report.ok else Exit.FAILED


def evaluate_run(config: TrainConfig, chosen: EvaluateOptions, options: TrustOptions) -> int:
    """Print the table of before and after, and keep it in the run's folder."""
    parts = assemble(config, trust_of(options))
    RunFolder.open(chosen.run)
    checkpoint_to_load(RunFolder(chosen.run))  # a damaged one is refused before the work
    metrics = parts.metrics + [make_metric(metric, trust_of(options)) for metric in chosen.metrics]
    prompts = list(parts.held_out.prompts)[: chosen.n_prompts]
    arguments = {"n": chosen.n, "seed": chosen.seed, "env": parts.held_out, "progress_bar": False}
    before = evaluate(parts.agent, prompts, parts.tokenizer, metrics, **arguments)  # type: ignore[arg-type]
    run = load_newest(chosen.run, parts)
    after = evaluate(parts.agent, prompts, parts.tokenizer, metrics, before=before, **arguments)  # type: ignore[arg-type]
    print(after.to_markdown())
    after.save(run.path / "evaluation")
    return Exit.DONE


def generate_lines(config: TrainConfig | None, chosen: GenerateOptions, options: TrustOptions) -> int:
    """Print a line of JSON for each text, as soon as those of its chunk are written."""
    prompts = [] if chosen.prompts is None else read_prompts(chosen.prompts)
    if chosen.prompts is None and config is None and chosen.model != DEMO:
        raise CommandError(f"Expected --prompts FILE for textenv generate {chosen.model}, which is no run, got none.")
    writer = open_writer(chosen.model, config, options)
    prompts = prompts or list(writer.prompts)
    most = text_length(writer, prompts, chosen.max_new_tokens)
    for start in range(0, len(prompts), CHUNK):
        for one in generate(
            writer.policy,
            prompts[start : start + CHUNK],
            writer.tokenizer,  # type: ignore[arg-type]
            chosen.n,
            max_new_tokens=most,
            deterministic=chosen.greedy,
            seed=chosen.seed + start,
            **writer.options,
        ):
            row = {"prompt": str(one.prompt), "text": one.text, "end_reason": str(one.end_reason)}
            line = json.dumps(row, ensure_ascii=False)
            print(line if line.isprintable() else json.dumps(row), flush=True)  # JSON lets C1 control codes through
    return Exit.DONE


def export_run(config: TrainConfig, chosen: ExportOptions, options: ExportFlags) -> int:
    """Write a run's newest model with its adapters merged, its card, curves and samples, and upload it where asked.

    Raises:
        CommandError: If the folder does not generate the same, or the upload fails.
        OutputFolderError: If something stands in the folder that would be lost.
    """
    if options.to_hub is not None:
        check_repository(options.to_hub)
    target = {"overwrite": options.overwrite, "keep": [chosen.run]}
    check_output(chosen.folder, "language model", **target)  # type: ignore[arg-type]  # before the work
    parts = assemble(config, trust_of(options))
    run, folder = load_newest(chosen.run, parts), Path(chosen.folder)
    policy = cast("LMPolicy", parts.agent.policy)
    with output_folder(folder, "language model", **target) as beside:  # type: ignore[arg-type]
        write_model(policy.backbone, parts.tokenizer, beside)
        _describe(beside, run, config)
        n_compared = _check_same(policy, make_policy(str(beside), parts.tokenizer, config.model, Trust()), parts)
        if options.sb3_zip:
            parts.agent.save(beside / "sb3.zip")
    if options.sb3_zip:
        print(
            f"{folder / 'sb3.zip'}: holds pickles, as all of SB3's files; whoever gets it reads its weights without "
            "them by agents.load_sb3_zip"
        )
    print(f"{folder}: generates the same as {run.path} on {n_compared} prompts")
    if options.to_hub is not None:
        print(f"uploading {folder}", flush=True)
        print(f"{upload(folder, options.to_hub)}: a new repository is private until its settings say otherwise")
    return Exit.DONE


def _check_same(policy: LMPolicy, exported: LMPolicy, parts: Parts) -> int:
    """Check that an exported model generates what the run's policy does; return on how many prompts."""
    prompts = list(parts.env.prompts)[:N_COMPARED]
    room = {"max_new_tokens": min(COMPARED_TOKENS, parts.env.rules.max_new_tokens), "deterministic": True}
    ours, theirs = (
        [one.ids for one in generate(each, prompts, parts.tokenizer, **room)]  # type: ignore[arg-type]
        for each in (policy, exported)
    )
    if ours != theirs:
        place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        raise CommandError(
            f"Expected the exported model to generate what the run does, got another text at prompt {place}: nothing "
            "was written.",
            Exit.FAILED,
        )
    return len(prompts)


def _describe(folder: Path, run: RunFolder, config: TrainConfig) -> None:
    """Put a run's samples and curves, as far as there are some, and the card beside its model."""
    table, results = "Not evaluated yet.", run.path / "results"
    reward = None
    if results.with_suffix(".md").is_file():
        table = results.with_suffix(".md").read_text(encoding="utf-8")
        reward = read_json(results.with_suffix(".json"), RESULTS)["after"]["figures"].get("reward")
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
