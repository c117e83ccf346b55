"""The faults of the bank, each with the cause that the diagnosis must name first, and the healthy settings."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional

from agents.steps.kl_penalty import KLPenalty

REWARDS = "tests.agents.diagnosis.bank.rewards"
MODELS = ("model", "other", "chat")  # the folders of models that a case may name with a leading "@"
FAST = {"kl.coef": 0.001, "algorithm.learning_rate": 3e-3}  # so that a reward is won in a dozen rollouts
GROUPS = {"env.args": {"samples_per_prompt": 4}, "algorithm.advantage": "grpo", "algorithm.n_envs": 32}


class Case(NamedTuple):
    """A run of the bank.

    Attributes:
        name: Its name.
        cause: The id of the cause to be named first; None for a healthy run.
        settings: Its settings, by dotted keys; "@model" stands for a model of the bank, "@rows" for its file of rows.
        inject: A context in which the run has its fault, if that is not in the settings; None for none.
        quick: Whether it is in the small budget.
    """

    name: str
    cause: str | None
    settings: dict
    inject: object = None
    quick: bool = False


def reward(name, **args):
    return {"env.reward": {"id": f"{REWARDS}:{name}", "args": args}}


@contextmanager
def below_zero():
    """Within, the divergence is a tenth of a nat below what it is."""
    honest = KLPenalty._divergence
    with mock.patch.object(KLPenalty, "_divergence", lambda *args: honest(*args) - 0.1):
        yield


@contextmanager
def changed_agent(change):
    """Within, a new agent of a run is changed before it trains."""
    import agents.runs.train as train

    build = train.assemble

    def assemble(*args, **kwargs):
        parts = build(*args, **kwargs)
        change(parts.agent)
        return parts

    with mock.patch.object(train, "assemble", assemble):
        yield


def drop_out(agent):
    """Add dropout to the update, which the probe has not seen."""

    def drop(module, inputs, output):
        return functional.dropout(output, 0.3, agent.policy.training)

    agent.policy.lm.backbone.model.transformer.ln_f.register_forward_hook(drop)


def not_a_number(agent):
    """Make every third gradient NaN."""
    agent.calls = 0
    weight = next(agent.policy.lm.backbone.model.parameters())

    def spoil(gradient):
        agent.calls += 1
        return gradient * torch.nan if agent.calls % 3 == 0 else gradient

    weight.register_hook(spoil)


def broken(agent):
    """Raise an error after a few rollouts."""
    collect = agent.collect_rollouts

    def collect_rollouts(*args, **kwargs):
        if agent.num_timesteps > 1000:
            raise RuntimeError("a callback of my own has failed")
        return collect(*args, **kwargs)

    agent.collect_rollouts = collect_rollouts


FAULTS = (
    Case("a constant reward", "constant-reward", reward("Constant", value=0.5), quick=True),
    Case(
        "a keyword that is never written",
        "constant-reward",
        {"env.reward": {"id": "keyword", "args": {"words": ["zebra"]}}},
    ),
    Case(
        "the column of numbers",
        "wrong-column",
        {"env.prompts": "@rows", **reward("Contains", column="number")},
        quick=True,
    ),
    Case("a column that is missing", "wrong-column", {"env.prompts": "@rows", **reward("Contains", column="label")}),
    Case(
        "a limit before the full stop", "all-cut", {**reward("Ends"), "env.max_new_tokens": 2, "algorithm.n_steps": 10}
    ),
    Case("groups that the prompt decides", "no-group-signal", {**GROUPS, **reward("OfPrompt")}, quick=True),
    Case("a reward that fails, at a penalty", "reward-fails", {**reward("Fails"), "env.on_failure": -1.0}),
    Case("a reward that fails", "reward-fails", reward("Fails")),
    Case("a reward that sleeps", "reward-slow", {**reward("Slow"), "env.args": {"score_at": "done"}}),
    Case("another end token", "never-stops", {"env.args": {"stop_ids": [1]}}, quick=True),
    Case("prompts that are finished texts", "empty-texts", {"env.prompts": "@finished"}, quick=True),
    Case("a reward for length", "longer-texts", {**reward("Words"), **FAST}, quick=True),
    Case(
        "a reward for each good word",
        "repetition",
        {**reward("Words", words=["good", "great"]), **FAST, "env.args": {"stop_ids": []}, "total_tokens": 7680},
    ),
    Case(
        "a reward for one sentence",
        "one-text",
        {
            **reward("Overlap", text="is very good ."),
            "kl.coef": 0.01,
            "total_tokens": 9600,
        },
    ),
    Case(
        "a reward that overrates, and a judge",
        "judge-gap",
        {**reward("Words"), **FAST, "evaluation.judge": {"id": f"{REWARDS}:Mood2", "args": {}}},
    ),
    Case("a reward for rare words", "unlike-start", {**reward("Rare"), **FAST}),
    Case(
        "an entropy bonus below zero",
        "entropy-collapse",
        {**reward("OfPrompt"), **FAST, "algorithm.args": {"ent_coef": -0.5}},
    ),
    Case(
        "an entropy bonus of two",
        "kl-runaway",
        {**reward("OfPrompt"), "kl.coef": 0.001, "algorithm.args": {"ent_coef": 2.0}},
    ),
    Case("a divergence below zero", "kl-negative", {}, below_zero, quick=True),
    Case("an older reference", "stale-reference", {"kl.reference": "@other"}, quick=True),
    Case("dropout in the update", "rollout-update-mismatch", {}, lambda: changed_agent(drop_out), quick=True),
    Case("a critic that is never trained", "critic-useless", {"algorithm.args": {"vf_coef": 0.0}}, quick=True),
    Case("rewards of hundreds", "critic-dominates", reward("Times", factor=100.0)),
    Case("thirty epochs", "many-epochs", {**FAST, "algorithm.n_epochs": 30, "algorithm.batch_size": 160}),
    Case("a rate a hundred times too high", "rate-high", {"algorithm.learning_rate": 0.2}, quick=True),
    Case("a rate of 1e-8", "rate-low", {"algorithm.learning_rate": 1e-8}),
    Case("gradients that are not finite", "not-finite", {}, lambda: changed_agent(not_a_number)),
    Case("no template", "template-missing", {"model.name": "@chat"}, quick=True),
    Case("prompts cut to one token", "prompts-cut", {"env.args": {"max_prompt_tokens": 1, "truncation_side": "right"}}),
    Case("a file with one prompt many times", "one-prompt", {"env.prompts": "@duplicates"}),
    Case("one prompt that earns ten times as much", "one-prompt", reward("Times", factor=10.0, prompt="the film")),
    Case("an error of a callback", "crashed", {}, lambda: changed_agent(broken)),
)

HELD_OUT = "held out"  # the first words of the names of healthy cases at which nobody looked before all was set
# Decided before any threshold was set.
SOUND = (
    {},
    {"kl.coef": 0.2},
    {"algorithm.learning_rate": 5e-4},
    {**GROUPS},
    {**GROUPS, "algorithm.advantage": "rloo"},
    {"env.prompts": "@rows", **reward("Contains", column="answer")},
    reward("Finished"),
    {"algorithm.name": "a2c", "algorithm.batch_size": None, "algorithm.n_epochs": None},
    {"env.reward": {"id": "keyword", "args": {"words": ["great", "superb"]}}},
    {"model.temperature": 1.2, "algorithm.n_epochs": 4},
    {"env.reward": {"id": "length", "args": {"target": 5, "unit": "words"}}},
    {"model.critic": "separate", "model.critic_model": "@model"},
    {"shaping.scale": True, "env.args": {"score_at": "done"}, **reward("Times", factor=100.0)},
    {"algorithm.schedule": "linear"},
    {"kl.estimator": "k3"},
    {"env.args": {"score_at": "rollout_end"}},
    {"model.value_norm": "norm"},
    {"algorithm.n_envs": 64, "algorithm.batch_size": 128},
    {"algorithm.advantage": "reinforce++"},
    {"kl.target": 1.0},
)


def healthy(held_out=False):
    """Return the twenty healthy cases with their seeds; those that are held out have other seeds and other sizes."""
    other = {"algorithm.n_envs": 48, "algorithm.batch_size": 96, "env.max_new_tokens": 12} if held_out else {}
    name, seed = (HELD_OUT, 1000) if held_out else ("healthy", 10)
    return [
        Case(f"{name} {number}", None, {**other, **settings, "seed": seed + number}, quick=number % 4 == 0)
        for number, settings in enumerate(SOUND)
    ]
