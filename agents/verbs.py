"""What the verbs do that work with a trained model, or look at one before it is trained."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3.common.utils import get_device
from transformers import PreTrainedTokenizerBase

from textenv.env import TextEnv
from textenv.prompts import PromptLike
from textenv.prompts import read_rows as read_prompts
from textenv.trust import Trust

from .assemble import Parts, assemble, load_lm, load_tokenizer, make_metric, policy_arguments, task_name, trust_of
from .backbone import n_positions
from .checkpoint import load_checkpoint, load_policy
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
from .run_folder import RunFolder, read_rows, to_line
from .verb_config import EvaluateOptions, ExportFlags, ExportOptions, GenerateOptions, TrustOptions

CHUNK = 64  # prompts that are continued together, and printed when they are done
N_COMPARED = 8  # prompts by which an exported model is checked
COMPARED_PROMPT = 4  # tokens of each
COMPARED_TOKENS = 32


class Writer(NamedTuple):
    """A policy with its tokenizer, to write with."""

    policy: LMPolicy
    tokenizer: PreTrainedTokenizerBase


def newest(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[RunFolder, Path]:
    """Return a run's folder and its newest checkpoint, which must be intact.

    Raises:
        CommandError: If there is none, it is damaged, or the tokenizer is another than the run's.
    """
    run = RunFolder.open(path)
    checkpoint = checkpoint_to_load(run)
    if checkpoint is None:
        raise CommandError(f"Expected a checkpoint in {run.checkpoints}, got none: textenv train --resume {path}")
    run.check_vocabulary(tokenizer.get_vocab())
    return run, checkpoint


def load_newest(path: str, parts: Parts) -> RunFolder:
    """Bring a run's agent to its newest checkpoint; return its folder."""
    run, checkpoint = newest(path, parts.tokenizer)
    load_checkpoint(parts.agent, checkpoint)
    return run


def open_writer(name: str, config: TrainConfig | None, options: TrustOptions) -> Writer:
    """Return what writes: a run's newest policy, or a model by name or folder.

    Of a run nothing else is built: neither its environment and rewards, nor what it logs to.
    """
    trust = trust_of(options)
    if config is None:
        tokenizer = load_tokenizer(name, trust)
        return Writer(make_policy(name, tokenizer, ModelConfig(), trust), tokenizer)
    parts = Parts(config, trust)
    _, checkpoint = newest(name, parts.tokenizer)
    policy = make_policy(parts.folder, parts.tokenizer, config.model, trust, as_trained=True)
    load_policy(policy, checkpoint)
    return Writer(policy.to(get_device(config.device)), parts.tokenizer)


def make_policy(
    name: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, trust: Trust, as_trained: bool = False
) -> LMPolicy:
    """Return a model as a policy that samples as a configuration says, to write and not to train with.

    Args:
        name: The model's name or folder.
        tokenizer: Its tokenizer.
        model: The configuration.
        trust: What it may have run.
        as_trained: With the adapters that the configuration trains, whose weights are to come.
    """
    env = TextEnv([[0]], tokenizer, reward=no_reward, max_new_tokens=1)
    left_out = {"critic"} if as_trained else {"critic", "train"}
    arguments = {key: value for key, value in policy_arguments(model).items() if key not in left_out}
    spaces = env.observation_space, env.action_space
    return LMPolicy(*spaces, lambda _: 0.0, lm=load_lm(name, trust), **arguments)  # type: ignore[arg-type]


def examine(config: TrainConfig, options: TrustOptions) -> int:
    """Print what the doctor finds; the exit code is 1 where training would be wrong."""
    report = check(Parts(config, trust_of(options)).agent)
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
    run = RunFolder.open(chosen.run)
    writer = open_writer(chosen.run, config, options)
    folder = export(writer.policy, writer.tokenizer, chosen.folder)
    _describe(folder, run, config)
    again = make_policy(str(folder), writer.tokenizer, config.model, Trust())
    texts = []
    for policy in (writer.policy, again):
        prompts = _some_prompts(len(writer.tokenizer))
        room = (n_positions(policy.backbone.model) or COMPARED_TOKENS + COMPARED_PROMPT) - COMPARED_PROMPT
        settings = {"max_new_tokens": min(COMPARED_TOKENS, room), "deterministic": True}
        texts.append([one.ids for one in generate(policy, prompts, writer.tokenizer, **settings)])  # type: ignore[arg-type]
    if texts[0] != texts[1]:
        place = next(i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1])
        raise CommandError(f"Expected {folder} to generate what the run does, got another text at prompt {place}.", 1)
    if options.sb3_zip:
        parts = Parts(config, trust_of(options))
        load_newest(chosen.run, parts)
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


def _some_prompts(n_tokens: int) -> list[PromptLike]:
    """Return prompts of any tokens: an export is compared without the run's own, which may come from anywhere."""
    return np.random.default_rng(0).integers(n_tokens, size=(N_COMPARED, COMPARED_PROMPT)).tolist()


def _describe(folder: Path, run: RunFolder, config: TrainConfig) -> None:
    """Put a run's samples and curves, as far as there are some, and the card beside its model."""
    table, results = "Not evaluated yet.", run.path / "results"
    reward = None
    if results.with_suffix(".md").is_file():
        table = results.with_suffix(".md").read_text(encoding="utf-8")
        reward = json.loads(results.with_suffix(".json").read_text(encoding="utf-8"))["after"]["figures"].get("reward")
    samples, rows = read_rows(run.samples), read_rows(run.metrics)
    if samples:
        write_text(folder / run.samples.name, "".join(map(to_line, samples)))
    curves = None
    if rows and find_spec("matplotlib") is not None:
        curves = "curves.png"
        draw_curves(folder / curves, {run.path.name: rows}, task_name(config))
    write_text(folder / "README.md", model_card(config, run.read_about(), table, samples, reward, curves))
