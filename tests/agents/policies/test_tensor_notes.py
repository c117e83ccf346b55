"""Notes on tensors: they pass through the rollout loop of each SB3 algorithm, and a loop that copies is noticed."""

import copy

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecNormalize

from agents.policies.tensor_notes import ALLOWED, READ_BY, TERMINAL, Note, TerminalObservation
from tests.helpers.models import collect
from tests.helpers.training import tiny_agent, tiny_env

N_ENVS, N_STEPS = 4, 6


def build(algorithm):
    """Return an agent whose rollouts write all notes: allowed tokens, the values' model, and truncated lanes."""
    env = tiny_env(max_new_tokens=3, length_limit="truncate", mask=even_tokens if algorithm is MaskablePPO else None)
    policy_kwargs = {} if algorithm is MaskablePPO else {"top_k": 5}
    return tiny_agent(env, n_envs=N_ENVS, algorithm=algorithm, n_steps=N_STEPS, policy_kwargs=policy_kwargs)


def even_tokens(prompt, preds):
    return range(0, 30, 2)


def notes_that_arrive(model, monkeypatch):
    """Collect one rollout; return the number of `add` calls and how often each note was there to be read."""
    counts = {"add": 0, "allowed": 0, "read_by": 0, "terminal_observation": 0, "terminal": 0}
    buffer, policy = model.rollout_buffer, model.policy
    add, obs_to_tensor, predict_values = buffer.add, policy.obs_to_tensor, policy.predict_values

    def counted_add(obs, action, reward, start, value, log_prob, **masks):
        counts["add"] += 1
        counts["allowed"] += ALLOWED.read(log_prob) is not None
        counts["read_by"] += READ_BY.read(value) is policy.lm
        add(obs, action, reward, start, value, log_prob, **masks)

    def counted_obs_to_tensor(observation):
        counts["terminal_observation"] += isinstance(observation, TerminalObservation)
        return obs_to_tensor(observation)

    def counted_predict_values(obs):
        counts["terminal"] += isinstance(obs, torch.Tensor) and TERMINAL.read(obs) is not None
        return predict_values(obs)

    for owner, function in ((buffer, counted_add), (policy, counted_obs_to_tensor), (policy, counted_predict_values)):
        monkeypatch.setattr(owner, function.__name__.removeprefix("counted_"), function)
    collect(model)
    return counts


def check_all_arrive(counts):
    assert counts["add"] == counts["allowed"] == counts["read_by"] == N_STEPS, counts
    assert counts["terminal"] == counts["terminal_observation"] > 0, counts


ALGORITHMS = pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, MaskablePPO])


@ALGORITHMS
def test_all_notes_arrive_where_they_are_read(algorithm, monkeypatch):
    model = build(algorithm)
    check_all_arrive(notes_that_arrive(model, monkeypatch))
    model.train()  # raises if the tokens that were sampled from are unknown


@pytest.mark.parametrize("copied", ["forward", "obs_to_tensor"])
@ALGORITHMS
def test_a_loop_that_copied_tensors_would_be_seen(algorithm, copied, monkeypatch):
    """The control: the same run with copies of the policy's results, as if SB3 had made them."""
    model = build(algorithm)
    original = getattr(model.policy, copied)

    def with_copies(*args, **kwargs):
        results = original(*args, **kwargs)
        return tuple(result.clone() if isinstance(result, torch.Tensor) else result for result in results)

    monkeypatch.setattr(model.policy, copied, with_copies)
    with pytest.raises(AssertionError, match="add"):
        check_all_arrive(notes_that_arrive(model, monkeypatch))


def test_operations_of_torch_drop_notes():
    note, tensor = Note("origin"), torch.zeros(3)
    note.write(tensor, "here")
    assert note.read(tensor) == "here"
    for other in (tensor.clone(), tensor[:], tensor + 0, tensor.detach(), torch.zeros(3)):
        assert note.read(other) is None


def test_a_copied_terminal_observation_has_no_siblings():
    first, second = TerminalObservation.of_step([np.array([1, 2]), np.array([3, 4])])
    assert second.siblings.tolist() == [[1, 2], [3, 4]] and (first.index, second.index) == (0, 1)
    assert copy.deepcopy(second).siblings is None and (second + 1).siblings is None


def test_a_wrapper_that_copies_observations_costs_a_forward_and_nothing_else():
    """VecNormalize copies terminal observations: each is then valued in a forward of its own, to the same value."""
    values = []
    for wrapped in (False, True):
        model = build(PPO)
        with torch.no_grad():  # a fresh value head is zero
            model.policy.lm.critic.linear.weight.copy_(torch.linspace(-1, 1, 16))
        if wrapped:
            model.set_env(VecNormalize(model.get_env(), norm_obs=False, norm_reward=False))
        values.append(collect(model).rewards)
    np.testing.assert_allclose(values[0], values[1], atol=1e-6)
    assert np.abs(values[0]).max() > 0
