"""The option `--credit` of `textenv show`: a run's values by critic and by continuations, as a file and a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from ..configuration.config import TrainConfig, TrustOptions
from ..errors import CommandError, Exit
from ..evaluation.credit import Agreement, critic_agreement, monte_carlo_values
from ..evaluation.generation import run_episodes
from ..evaluation.tables import markdown
from ..files import write_text
from ..policies.lm_policy import LMPolicy
from ..report.run_data import CREDIT_FILE
from ..runs.assemble import Parts, training_callbacks, trust_of
from ..steps.step import RolloutStep
from .options import ShowOptions
from .trained_model import load_newest


def write_credit(config: TrainConfig, chosen: ShowOptions, options: TrustOptions) -> int:
    """Write the values of a few episodes of a run's newest policy, and print how they agree; return the exit code.

    The file is a list with one entry for each episode: "prompt" and "tokens" as texts, and for each token the critic's
    value of the text before it ("critic"), the mean return of continuations from there ("monte_carlo") and the ends of
    its 95 % interval ("low", "high"); see `monte_carlo_values`. Null stands for a number that is not known.

    Raises:
        CommandError: If a prompt is out of range, or the run has no intact checkpoint.
        ValueError: If the run has no critic, or its rewards follow from no text alone.
    """
    assert chosen.credit is not None, "the caller has checked it"
    trust = trust_of(options)
    parts = Parts(config, trust)
    last = chosen.prompt + chosen.credit - 1
    if last >= len(parts.env.prompts):
        raise CommandError(
            f"Expected --prompt and --credit of prompts up to number {len(parts.env.prompts) - 1}, got {last}."
        )
    run = load_newest(chosen.run, parts)
    for step in training_callbacks(config, trust):  # shaping and penalties, with their state of the checkpoint
        if isinstance(step, RolloutStep):
            step.attach(parts.agent)
    prompts = [parts.env.prompts[number] for number in range(chosen.prompt, last + 1)]
    policy, seed = cast("LMPolicy", parts.agent.policy), chosen.seed
    episodes = [step.generation for step in run_episodes(policy, parts.env, prompts, seed=seed)]
    credits = [monte_carlo_values(parts.agent, episode, chosen.continuations, seed=seed) for episode in episodes]
    rows = [credit.to_dict(parts.env.tokenizer) for credit in credits]
    path = run.path / CREDIT_FILE
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    print(f"{path}: {len(rows)} episodes, {chosen.continuations} continuations of each prefix\n")
    print(_table(critic_agreement(credits)))
    return Exit.DONE


def _table(rows: Sequence[Agreement]) -> str:
    """Return how critic and continuations agree as a Markdown table, a row for each part of the texts."""
    return markdown(
        ["tokens", "prefixes", "correlation", "critic minus truth"],
        [
            [row.part, str(row.n), f"{row.correlation:.2f}", f"{row.bias:+.3g} ± {1.96 * row.standard_error:.2g}"]
            for row in rows
        ],
    )
