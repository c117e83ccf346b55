"""The loop of docs/guides/own_loop.md against `learn`: the same weights, until it stops by its own rule."""

import pytest
import torch

from agents import EpisodeMetrics, KLPenalty, make_agent
from tests.docs.snippets import snippets
from tests.helpers.command import ROOT
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.rewards import Length


@pytest.fixture
def train():
    """Return the function of the page."""
    block = snippets((ROOT / "docs/guides/own_loop.md").read_text(encoding="utf-8"))[0]
    start, end = block.index("class Finished"), block.index("model = train(")
    names = {"EpisodeMetrics": EpisodeMetrics, "KLPenalty": KLPenalty}
    exec("from stable_baselines3.common.callbacks import BaseCallback\n" + block[start:end], names)
    return names["train"]


def agent():
    torch.manual_seed(0)
    env = TextEnv(["ab"], CharTokenizer("abcd"), reward=Length(4), max_new_tokens=4, seed=0)
    return make_agent(env, tiny_config(vocab_size=5), n_envs=8, learning_rate=1e-2, seed=0, device="cpu")


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.policy.parameters()])


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
def test_the_loop_is_learn_until_it_stops(train, capsys):
    learnt, own, stopped = agent(), train(agent(), total=96, enough=9.0), train(agent(), total=96, enough=-9.0)
    start = weights(learnt)
    learnt.learn(96, callback=[KLPenalty(0.05), EpisodeMetrics()])
    assert torch.equal(weights(learnt), weights(own)) and own.num_timesteps == 96
    assert torch.equal(weights(stopped), start) and stopped.num_timesteps == 32  # it stopped before the first update
    assert not torch.equal(weights(own), start)
    assert "mean reward" in capsys.readouterr().out
