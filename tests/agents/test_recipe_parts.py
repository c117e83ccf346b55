"""The recipes: one table for `make_agent` and for configurations, of settings that can be read and overridden."""

from typing import get_args

import pytest
import yaml

from agents import RECIPES, ClipHigher, CriticWarmup, KLPenalty, make_agent
from agents.cli.main import train_config
from agents.configuration.config import Recipe
from agents.recipe_parts import recipe_parts
from agents.runs.assemble import Parts, training_callbacks
from agents.steps.sample_groups import SampleGroups
from tests.helpers.command import small_model
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.checks.trust import Trust

TOKENIZER = CharTokenizer("ab")


def agent(recipe, n_samples=8, **arguments):
    env = TextEnv(["a", "b"], TOKENIZER, reward=lambda *_: 0.0, max_new_tokens=4, samples_per_prompt=n_samples)
    return make_agent(env, tiny_config(len(TOKENIZER)), device="cpu", recipe=recipe, **arguments)


def what_counts(model, steps):
    """Return what a recipe decides of an agent, its KL penalty and its dynamic sampling."""
    buffer = model.rollout_buffer
    penalty = next((step for step in steps if isinstance(step, KLPenalty)), None)
    groups = [step for step in steps if isinstance(step, SampleGroups)]
    return {
        "advantage": buffer.advantage,
        "aggregation": buffer.aggregation,
        "surrogate": model.policy.surrogate.function,
        "clip_range": model.clip_range(1.0),
        "vf_coef": model.vf_coef,
        "kl": None if penalty is None else (penalty.coef, penalty.estimator, penalty.where),
        "min_groups": groups[-1].dynamic.min_groups if groups else None,
        "critic_warmup": [step.n_rollouts for step in steps if isinstance(step, CriticWarmup)],
        "lambdas": (buffer.critic_lambda, buffer.lambda_alpha),
        "complete_episodes": buffer.complete_episodes,
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("recipes") / "small")


@pytest.mark.parametrize("recipe", RECIPES)
def test_make_agent_and_the_command_read_the_same_table(recipe, model_folder):
    words = ["--algorithm.recipe", recipe, "--model.name", str(model_folder), "--device", "cpu"]
    config = train_config([*words, "--env.max_new_tokens", "4"])[0]
    attached = Parts(config, Trust()).agent
    steps = [*attached.rollout_buffer.before_returns, *training_callbacks(config, Trust())]
    model = agent(recipe, config.env.args.get("samples_per_prompt", 1))
    assert what_counts(model, model.rollout_buffer.before_returns) == what_counts(attached, steps)


def test_the_names_are_those_of_the_option():
    assert list(RECIPES) == list(get_args(Recipe))


def test_a_configuration_shows_the_settings_and_overrides_them(tmp_path):
    (tmp_path / "c.yml").write_text("algorithm: {recipe: dapo, min_groups: 3}\nenv: {args: {score_at: done}}\n")
    config, _, dumped = train_config([str(tmp_path / "c.yml"), "--kl.coef", "0.2"])
    shown = yaml.safe_load(dumped)
    assert shown["algorithm"]["surrogate"] == {"id": "clip_higher", "args": {"low": 0.2, "high": 0.28}}
    assert (config.algorithm.min_groups, config.kl.coef) == (3, 0.2)
    assert config.env.args == {"score_at": "done", "samples_per_prompt": 8}, "arguments of the environment are joined"
    (tmp_path / "kept.yml").write_text(dumped)
    assert train_config([str(tmp_path / "kept.yml")])[0] == config, "what a run keeps is the same configuration"
    (tmp_path / "c.yml").write_text("algorithm: {recipe: grpo}\nenv: {args: {samples_per_prompt: 2}}\n")
    assert train_config([str(tmp_path / "c.yml")])[0].env.args == {"samples_per_prompt": 2}


def test_arguments_override_a_recipe():
    mine = {"aggregation": "sequence"}
    model = agent("dapo", policy_kwargs={"surrogate": None}, rollout_buffer_kwargs=mine, vf_coef=0.3)
    assert model.policy.surrogate.function is None and model.clip_range(1.0) == 0.2 and model.vf_coef == 0.3
    assert model.rollout_buffer.aggregation == "sequence" and model.rollout_buffer.advantage == "grpo"
    model = agent("grpo")
    model.learn(1, callback=KLPenalty(0.5))
    assert [step.coef for step in model.rollout_buffer.before_returns if isinstance(step, KLPenalty)] == [0.5]
    assert agent("dapo").policy.surrogate.function == ClipHigher(0.2, 0.28)


def test_a_recipe_of_samples_needs_an_env_with_samples():
    with pytest.raises(ValueError, match="recipe 'grpo', got one of 1: give the env samples_per_prompt=8"):
        agent("grpo", n_samples=1)
    with pytest.raises(ValueError, match=r"Expected `recipe` to be one of ppo, grpo, .*, got 'gropo'"):
        agent("gropo")


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_setting_of_a_recipe_is_lost(recipe):
    """Each key becomes an argument or a step: an unknown one would reach the buffer, which refuses it."""
    parts, settings = recipe_parts(recipe), RECIPES[recipe]
    made = {f"algorithm.{name}": value for name, value in parts.buffer.items()}
    assert made.items() <= settings.items()
    others = {"algorithm.surrogate", "algorithm.min_groups", "algorithm.critic_warmup"}
    others |= {"kl.coef", "kl.estimator", "kl.where", "env.args.samples_per_prompt"}
    assert settings.keys() - made.keys() <= others
