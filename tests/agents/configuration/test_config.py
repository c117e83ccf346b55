"""The configuration of a run: the defaults of the demo's model and of others, and help that agrees with them."""

import pytest
import yaml

from agents.build import settings_for, usual_learning_rate
from agents.cli import main as cli
from agents.cli.arguments import make_parser
from agents.cli.options import SFTConfig
from agents.configuration.config import TrainConfig, argument_help
from agents.configuration.defaults import DEMO_PPO_SETTINGS, DEMO_SETTINGS
from agents.runs.assemble import ALGORITHMS
from agents.supervised.learned_reward import LearnedReward
from tests.helpers.command import run
from tests.helpers.training import tiny_agent
from textenv.text.named_tokenizer import DEMO


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], DEMO_SETTINGS | DEMO_PPO_SETTINGS),
        (["--env.id", "text"], DEMO_SETTINGS | DEMO_PPO_SETTINGS),
        (["--model.name", "demo", "--algorithm.name", "a2c"], DEMO_SETTINGS),
        (["--algorithm.n_envs", "8"], DEMO_SETTINGS | {"algorithm.args": {"target_kl": 0.05}}),
        (["--model.name", "gpt2"], {}),
        (["--env.id", "text", "--model", "{name: gpt2}"], {}),
    ],
)
def test_what_is_printed_is_what_runs(words, changed, capsys):
    plain = TrainConfig()
    config, _, dumped = cli.train_config(words)
    for key in DEMO_SETTINGS | DEMO_PPO_SETTINGS:
        *above, last = key.split(".")
        values = [vars(vars(top)[above[0]] if above else top)[last] for top in (config, plain)]
        assert values == [changed.get(key, values[1]), values[1]], key
    for verb in ("train", "doctor"):
        with pytest.raises(SystemExit):
            run(verb, *words, "--print_config")
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed.items() >= yaml.safe_load(dumped).items() and printed["env"]["reward"] is None


def test_a_configuration_gets_the_defaults_of_its_model(tmp_path):
    (tmp_path / "own.yml").write_text("model: {name: gpt2}\n")
    (tmp_path / "demo.yml").write_text("seed: 3\nenv: {max_new_tokens: null}\n")
    assert cli.train_config([str(tmp_path / "own.yml")])[0].total_tokens == 100_000
    demo = cli.train_config([str(tmp_path / "demo.yml")])[0]
    assert (demo.total_tokens, demo.env.max_new_tokens) == (56_000, None), "what is given stays, null too"
    (tmp_path / "kept.yml").write_text(cli.train_config([str(tmp_path / "demo.yml")])[2])
    assert cli.train_config([str(tmp_path / "kept.yml")])[0] == demo, "and so it does in what a run keeps"


def test_the_default_model_and_task_are_the_demo():
    config = TrainConfig()
    assert {config.model.name, config.env.id, SFTConfig().model, LearnedReward().model} == {DEMO}


def test_every_argument_has_help():
    parser = make_parser("train", "[CONFIG]", TrainConfig)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert argument_help(TrainConfig)["seed"] == "The seed of everything random."


def test_what_null_means_is_what_make_agent_has():
    texts = argument_help(type(TrainConfig().algorithm))
    for name, algorithm in ALGORITHMS.items():
        rate = f"{usual_learning_rate(algorithm):.0e}".replace("e-0", "e-")
        assert rate in texts["learning_rate"], name
    envs = tiny_agent(n_envs=64).get_env()
    usual = settings_for(ALGORITHMS["ppo"], envs, {})
    assert f"null is {usual['n_epochs']}." in texts["n_epochs"] and usual["n_steps"] == 4
    assert usual["batch_size"] * 8 == usual["n_steps"] * 64 and "an eighth of a rollout" in texts["batch_size"]
