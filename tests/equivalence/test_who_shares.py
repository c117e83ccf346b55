"""Evaluations, sample tables, the doctor and engines read a prompt that several texts have once: tokens are counted."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3.common.logger import Logger

from agents import EngineRollouts, SampleTable, SeparateCritic, evaluate
from agents.doctor import examine as doctor
from agents.doctor.sample import Subject, take_sample
from agents.engines.process import write
from agents.engines.protocol import Request
from agents.evaluation.evaluation import sequence_of
from agents.models import prefix_cache
from agents.models.backbone import Backbone
from agents.models.prefix_cache import PrefixCache
from tests.helpers.engines import InProcess
from tests.helpers.models import collect, make_policy, observe
from tests.helpers.training import TOKENIZER, tiny_agent, tiny_config, tiny_env

LONG = ("abcdefghijklmnopqrstuvwxyz" * 3)[:70]
OTHER = LONG[::-1][:60]


@contextmanager
def counted(*trunks):
    """Yield a list to which each forward of GPT-2 trunks adds the tokens that it reads, padding included."""
    read = []
    hooks = [
        trunk.register_forward_pre_hook(
            lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        for trunk in trunks
    ]
    yield read
    for hook in hooks:
        hook.remove()


def trunk_of(policy):
    return policy.lm.backbone.model.transformer


@pytest.fixture
def prefilled(monkeypatch):
    """Return a list to which each prefill adds the rows and tokens that it reads, padding included."""
    read, prefill = [], Backbone.prefill
    monkeypatch.setattr(prefix_cache, "NEW_TOKENS", 0)
    monkeypatch.setattr(Backbone, "prefill", lambda self, ids, *a: read.append(ids.shape) or prefill(self, ids, *a))
    return read


def agent(samples_per_prompt=1, n_envs=8, prompts=(LONG,), **kwargs):
    env = tiny_env(prompts=prompts, samples_per_prompt=samples_per_prompt, stop_ids=())
    return tiny_agent(env, n_envs=n_envs, lm=tiny_config(n_positions=128, initializer_range=0.3), **kwargs)


# Evaluations and sample tables


def texts_of(prompts, n, n_new):
    """Return final observations of n texts for each prompt."""
    rng = np.random.default_rng(0)
    return observe([(prompt, rng.integers(1, 33, n_new).tolist()) for prompt in prompts for _ in range(n)], 128)


def test_an_evaluations_divergence_reads_each_prompt_once():
    policy, other = make_policy(tiny_config(n_positions=128), 128), make_policy(tiny_config(n_positions=128), 128, 3)
    prompts = [TOKENIZER.encode(text) for text in (LONG, OTHER)]
    batch = sequence_of(texts_of(prompts, 4, 6))
    assert batch.prompts.tolist() == [0] * 4 + [1] * 4
    read = sum(chunk.n_read for chunk in policy.lm.chunks(batch))
    assert read == 2 * 70 + 8 * 6  # two prompts side by side, the shorter one padded, and eight texts
    with counted(*map(trunk_of, (policy, other))) as tokens:
        result = evaluate(policy, [LONG, OTHER], TOKENIZER, n=4, reference=other.lm, max_new_tokens=6, stop_ids=())
    assert tokens[-4:] == [2 * 70, 8 * 6] * 2  # of the policy and of the reference
    policy.lm.may_share_prompts = False
    with counted(*map(trunk_of, (policy, other))) as tokens:
        whole = evaluate(policy, [LONG, OTHER], TOKENIZER, n=4, reference=other.lm, max_new_tokens=6, stop_ids=())
    assert sum(tokens[-2:]) == 2 * 8 * 76 and whole.generations == result.generations
    assert result.scores["kl"].per_row == pytest.approx(whole.scores["kl"].per_row, rel=1e-5)


def test_an_evaluation_reads_the_prompt_of_several_texts_once(prefilled):
    model = agent()
    prefilled.clear()  # of the probe
    evaluate(model, [LONG, OTHER], TOKENIZER, n=4, max_new_tokens=3, stop_ids=())
    assert prefilled == [(2, 69)]  # the last token of a prompt is read with the first step
    prefilled.clear()
    evaluate(model, [LONG], TOKENIZER, n=8, n_envs=2, max_new_tokens=3, stop_ids=())
    assert prefilled == [(1, 69)]  # lanes begin it again and again


def test_a_sample_table_reads_equal_prompts_once(prefilled):
    model, console = agent(), Console(file=io.StringIO())
    table = SampleTable([LONG, LONG, OTHER], TOKENIZER, max_new_tokens=3, console=console)
    model.set_logger(Logger(None, []))
    table.init_callback(model)
    prefilled.clear()
    table._show()
    assert prefilled == [(2, 69)]


# The doctor


def test_the_doctor_examines_shared_prompts(prefilled, monkeypatch):
    """Two rows of its sample have the longest prompt, and one begins with half of it while others go on."""
    model = agent()
    shared, read_shared = [], Backbone.read_shared
    monkeypatch.setattr(Backbone, "read_shared", lambda self, part: shared.append(part) or read_shared(self, part))
    policy, env = model.policy, model.get_env().env
    prefilled.clear()
    sample = take_sample(policy, env)
    assert prefilled[0] == (2, 69)  # three rows begin with the longest, which is the shortest, too, and one with half
    assert policy.lm.rollout_cache.shared_tokens >= 2 * 69 + 34
    assert any(chunk.shared is not None for chunk in policy.lm.chunks(sample.view.batch))
    assert doctor.check(model).ok and len(shared) > 2
    monkeypatch.setattr(prefix_cache.KeptStates, "take", lambda self, key: [(2 * k, v) for k, v in self._kept[key][1]])
    assert {finding.name for finding in doctor.check(model).failed} >= {"ratio", "cache"}


def test_the_doctor_sees_an_update_that_shares_wrongly(monkeypatch):
    model = agent()
    read_shared = Backbone.read_shared

    def wrong(self, part):
        hidden, logits = read_shared(self, part)
        return 1.1 * hidden, logits

    monkeypatch.setattr(Backbone, "read_shared", wrong)
    assert "ratio" in {finding.name for finding in doctor.check(model).failed}


def test_the_trial_of_the_reward_reads_a_prompt_once(prefilled):
    model = agent()
    prefilled.clear()
    doctor.check_reward(Subject(model.policy, model.get_env().env, model))
    assert prefilled == [(1, 69)]


# Engines


def test_an_engine_reads_the_prompt_of_a_group_once(prefilled, monkeypatch):
    """Groups of 4 by 3 rows: the last ones begin when a row is free."""
    engine = InProcess(tiny_config(n_positions=128), n_rows=3)
    cache = engine.writer.lm.rollout_cache
    prefilled.clear()
    requests = [Request(np.array(TOKENIZER.encode(text)), 4, ()) for text in (LONG, OTHER) for _ in range(4)]
    written = write(engine.writer.lm, requests, 1.0, 0, 3)
    assert (cache.prefill_tokens, cache.shared_tokens) == (69 + 59, 3 * (69 + 59))
    assert sum(rows * width for rows, width in prefilled) == 69 + 59
    monkeypatch.setattr(PrefixCache, "is_sharing", False)
    alone = write(engine.writer.lm, requests, 1.0, 0, 3)
    for one, other in zip(written, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_policy_scores_an_engines_rollout_with_each_prompt_once(critic):
    """8 lanes have 2 groups of 4 with one prompt: the policy reads it once, and so does a critic with its own trunk."""
    config = tiny_config(n_positions=128, initializer_range=0.3)
    kwargs = {"policy_kwargs": {"critic": SeparateCritic(config)}} if critic == "separate" else {}
    model = agent(4, **kwargs, rollout_buffer_kwargs={"advantage": "rloo"})
    engine = InProcess(config)
    trunks = [trunk_of(model.policy), *([] if critic == "shared" else [model.policy.lm.critic.trunk])]
    with counted(*trunks) as tokens:
        buffer = collect(model, EngineRollouts(engine))
    assert sum(tokens) == len(trunks) * (70 + 8 * 3)  # where 8 whole texts have 8 * 73
    cache = engine.writer.lm.rollout_cache
    assert (cache.prefill_tokens, cache.shared_tokens) == (69, 7 * 69)
    shared = buffer.log_probs.copy(), buffer.values.copy()
    view = buffer.view()
    model.policy.lm.may_share_prompts = False
    with torch.no_grad():
        values, log_probs, _ = model.policy.lm.evaluate(view.batch, view.actions)
    np.testing.assert_allclose(shared[0][view.steps, view.lanes], log_probs, atol=1e-5)
    np.testing.assert_allclose(shared[1][view.steps, view.lanes], values, atol=1e-5)
