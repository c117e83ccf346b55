"""Refusals of engines: policies and envs that they cannot serve, and wrong completions."""

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents import EngineRollouts
from agents.engines.protocol import Completion, Request, check_completions
from tests.helpers.engines import LANES, STEPS, InProcess, build, often
from tests.helpers.models import make_ppo
from tests.helpers.seq2seq import tiny_seq2seq
from textenv import AllowedMask

pytestmark = pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")
REFUSED = {
    "top_k": ({}, {"policy_kwargs": {"top_k": 5}}, "Expected a temperature alone .* top_k=5"),
    "top_p": ({}, {"policy_kwargs": {"top_p": 0.9}}, "Expected a temperature alone .* top_p=0.9"),
    "min_p": ({}, {"policy_kwargs": {"min_p": 0.1}}, "Expected a temperature alone .* min_p=0.1"),
    "top_p_lag": ({}, {"policy_kwargs": {"top_p": 0.9, "top_p_lag": 2}}, "Expected a temperature alone .* top_p_lag=2"),
    "penalty": ({}, {"policy_kwargs": {"repetition_penalty": 1.2}}, "Expected a temperature alone .*penalty=1.2"),
    "mask": (
        {"mask": AllowedMask(tuple(range(1, 33)))},
        {"algorithm": MaskablePPO, "batch_size": LANES * STEPS},
        "Expected an env without `mask`",
    ),
    "encoder-decoder": ({}, {"lm": tiny_seq2seq(vocab_size=33)}, "Expected a causal language model"),
    "TRPO": ({}, {"algorithm": TRPO, "policy_kwargs": {}}, "Expected PPO or A2C .* got TRPO"),
    "normalize": ({}, {"normalize_advantage": True}, "Expected normalize_advantage=False of the algorithm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_cannot_do_is_refused(case):
    env_kwargs, agent_kwargs, message = REFUSED[case]
    engine, model = InProcess(), build(env_kwargs, agent_kwargs)
    with pytest.raises(ValueError, match=message):
        EngineRollouts(engine).attach(model)
    assert engine.n_loads == 0 and model.policy.samples_itself


def test_sharded_weights_and_the_stock_buffer_are_refused():
    with pytest.raises(TypeError, match="Expected rollout_buffer_class=SequenceRolloutBuffer"):
        EngineRollouts(InProcess()).attach(make_ppo(rollout_buffer_class=RolloutBuffer))
    model = build({}, {})
    model.policy.lm.shards = object()
    with pytest.raises(ValueError, match="Expected whole weights in each process with EngineRollouts, got sharded"):
        EngineRollouts(InProcess()).attach(model)


WRONG = {
    "one too few": (lambda good: good[:-1], "Expected 2 completions of the engine, got 1"),
    "nothing": (lambda good: [Completion(*(part[:0] for part in good[0])), good[1]], "1 to 4 tokens .* got 0 tokens"),
    "too long": (lambda good: [Completion(np.ones(5, int), -np.ones(5)), good[1]], "1 to 4 tokens .* got 5 tokens"),
    "without log-probabilities": (lambda good: [good[0]._replace(log_probs=-np.ones(1)), good[1]], "and 1 log-prob"),
    "padding of the model": (
        lambda good: [good[0]._replace(tokens=np.array([1, 33])), good[1]],
        r"in \[0, 33\), got 33",
    ),
    "stop token left out": (lambda good: [Completion(*(part[:1] for part in good[0])), good[1]], "the stop token and"),
    "goes on behind it": (lambda good: [good[0]._replace(tokens=np.array([0, 1])), good[1]], "stop ids at \\[0\\]"),
    "not a number": (lambda good: [good[0]._replace(log_probs=np.array([-1.0, np.nan])), good[1]], "finite and not"),
    "a probability": (lambda good: [good[0]._replace(log_probs=np.array([-1.0, 0.4])), good[1]], "finite and not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answers_of_an_engine_are_refused(case):
    change, message = WRONG[case]
    requests = [Request(np.array([3]), 4, (0,))] * 2
    good = [Completion(np.array([1, 0]), np.array([-1.0, -2.0])), Completion(np.array([1, 2, 3, 4]), -np.ones(4))]
    check_completions(requests, good, 33)
    with pytest.raises(ValueError, match=message):
        check_completions(requests, change(good), 33)


def test_offloaded_weights_are_refused_when_they_are_sent():
    model = build(often(6), {})
    layer = model.policy.backbone.model.transformer.h[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(torch.empty_like(layer.weight, device="meta"))
    with pytest.raises(ValueError, match=r"got 1 that are offloaded, 'transformer.h.0.mlp.c_fc.weight' first"):
        model.learn(STEPS * LANES, callback=EngineRollouts(InProcess()))


def test_rows_that_are_not_those_of_the_lanes_are_refused():
    model = build(often(6), {})
    EngineRollouts(InProcess()).attach(model)
    model._setup_learn(STEPS * LANES)
    model.rollout_buffer.reset()
    with pytest.raises(ValueError, match=r"Expected the rows of all 6 lanes .* got 2"):
        model.policy.forward(torch.as_tensor(model._last_obs[:2]))
