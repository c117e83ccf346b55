"""The policy's arguments of a configuration: the critic that it names."""

import pytest

from agents.configuration.config import ModelConfig
from agents.runs.policy_arguments import policy_arguments


@pytest.mark.parametrize("normalise", [False, True])
def test_a_reward_models_critic_is_in_the_units_of_its_reward(normalise):
    config = ModelConfig(critic="reward_model", critic_model="folder", critic_normalise=normalise)
    critic = policy_arguments(config)["critic"]
    assert (critic.model.name, critic.normalise) == ("folder", normalise)
