"""What the verbs do that work with a trained model, or look at one before it is trained."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from textenv.env import TextEnv
from textenv.json_files import read_json
from textenv.prompts import PromptLike
from textenv.prompts import read_rows as read_prompts

from .assemble import Parts, Trust, assemble, load_lm, load_tokenizer, make_metric, policy_arguments, task_name
from .checkpoint import load_checkpoint
from .config import ModelConfig, TrainConfig
from .curves import draw_curves
from .doctor import check
from .evaluation import evaluate
from .exporting import check_repository, export, upload
from .files import write_text
from .generation import generate, no_reward
from .model_card import model_card
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
    """A policy with its tokenizer, to write with."""

    policy: LMPolicy
    tokenizer: PreTrainedTokenizerBase


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
        return Writer(parts.agent.policy, parts.tokenizer)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(name, trust)
    return Writer(make_policy(name, tokenizer, ModelConfig(), trust), tokenizer)


def make_policy(name: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, trust: Trust) -> LMPolicy:
    """Return a model as a policy that samples as a configuration says, to write and not to train with."""
    env = TextEnv([[0]], tokenizer, reward=no_reward, max_new_tokens=1)
    arguments = {key: value for key, value in policy_arguments(model).items() if key not in ("train", "critic")}
    spaces = env.observation_space, env.action_space
    return LMPolicy(*spaces, lambda _: 0.0, lm=load_lm(name, trust), **arguments)  # type: ignore[arg-type]


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
    try:
        prompts: list[PromptLike] = list(read_prompts(chosen.prompts))
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected prompts in {chosen.prompts}, got: {error}") from error
    writer = open_writer(chosen.model, config, options)
    for start in range(0, len(prompts), CHUNK):
        for one in generate(
            writer.policy,
            prompts[start : start + CHUNK],
            writer.tokenizer,  # type: ignore[arg-type]
            chosen.n,
            max_new_tokens=chosen.max_new_tokens,
            deterministic=chosen.greedy,
            seed=chosen.seed + start,
        ):
            row = {"prompt": str(one.prompt), "text": one.text, "end_reason": str(one.end_reason)}
            line = json.dumps(row, ensure_ascii=False)
            print(line if line.isprintable() else json.dumps(row), flush=True)  # JSON lets C1 control codes through
    return Exit.DONE


def export_run(config: TrainConfig, chosen: ExportOptions, options: ExportFlags) -> int:
    """Write a run's newest model with its adapters merged, its card, curves and samples, and upload it where asked.

    Raises:
        CommandError: If the folder does not generate the same, or the upload fails.
    """
    if options.to_hub is not None:
        check_repository(options.to_hub)
    parts = assemble(config, trust_of(options))
    run = load_newest(chosen.run, parts)
    folder = export(parts.agent, parts.tokenizer, chosen.folder)
    _describe(folder, run, config)
    again = make_policy(str(folder), parts.tokenizer, config.model, Trust())
    texts = []
    for policy in (parts.agent.policy, again):
        prompts = list(parts.env.prompts)[:N_COMPARED]
        room = {"max_new_tokens": min(COMPARED_TOKENS, parts.env.rules.max_new_tokens), "deterministic": True}
        texts.append([one.ids for one in generate(policy, prompts, parts.tokenizer, **room)])  # type: ignore[arg-type]
    if texts[0] != texts[1]:
        place = next(i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1])
        raise CommandError(f"Expected {folder} to generate what the run does, got another text at prompt {place}.", 1)
    if options.sb3_zip:
        parts.agent.save(folder / "sb3.zip")
        print(
            f"{folder / 'sb3.zip'}: holds pickles, as all of SB3's files; whoever gets it reads its weights without "
            "them by agents.load_sb3_zip"
        )
    print(f"{folder}: generates the same as {run.path} on {len(texts[0])} prompts")
    if options.to_hub is not None:
        print(f"uploading {folder}", flush=True)
        print(f"{upload(folder, options.to_hub)}: a new repository is private until its settings say otherwise")
    return Exit.DONE


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
    if rows and find_spec("matplotlib") is not None:
        curves = "curves.png"
        draw_curves(folder / curves, {run.path.name: rows}, task_name(config))
    write_text(folder / "README.md", model_card(config, run.read_about(), table, samples, reward, curves))
