"""The values of a rollout's last observations: what Stable-Baselines3 multiplies by 0 is not read."""

import hashlib

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents import LoRA, SeparateCritic, make_agent
from agents.models.backbone import Backbone
from agents.models.observations import has_begun
from agents.models.seq2seq import Seq2SeqBackbone
from tests.helpers.models import collect, count_a, make_policy, make_ppo, observe, randomise_critic, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from textenv import CharTokenizer, TextEnv

PROMPTS = ["abcd", "efghijklm", "nopqr", "stuvwxyzab"]


class Talks(TextEnv):
    """An env that answers after a turn: two tokens, two of the answer, and two more."""

    def get_reward(self, prompt, preds, done):
        return 0.1 * len(preds) if done else 0.0

    def respond(self, prompt, preds):
        return "so"


def even_tokens(prompt, preds):
    return range(0, 30, 2)


def env_of(kind, stop_ids):
    """Return an env whose episodes have 6 tokens (4 with turns), or fewer with stop ids."""
    tokenizer = CharTokenizer()
    if kind == "turns":
        return Talks(PROMPTS, tokenizer, max_new_tokens=6, turn_tokens=2, stop_ids=stop_ids)
    limit = {"length_limit": "truncate"} if kind == "truncated" else {}
    mask = even_tokens if kind == "masked" else None
    return TextEnv(PROMPTS, tokenizer, reward=count_a, max_new_tokens=6, stop_ids=stop_ids, mask=mask, **limit)


def build(kind="plain", stop_ids=(), config=None, algorithm=PPO, policy_kwargs=None, buffer=None):
    """Return an agent whose rollouts have 12 steps of 6 lanes."""
    kwargs = {} if algorithm in (A2C, TRPO) else {"n_epochs": 2, "batch_size": 72}
    model = make_agent(
        env_of(kind, stop_ids), config or tiny(), n_envs=6, algorithm=algorithm, n_steps=12, seed=0, device="cpu",
        policy_kwargs=policy_kwargs, learning_rate=0.02, **kwargs,
    )  # fmt: skip
    if buffer is not None:
        model.rollout_buffer = buffer(12, model.observation_space, model.action_space, "cpu", n_envs=6)
    randomise_critic(model.policy)
    return model


def learn(case):
    """Train for three rollouts; return a digest of every number of the updates, and of the weights."""
    model, digest = build(**case), hashlib.sha256()
    train = model.train

    def recorded():
        for name in (*SAMPLED, *COMPUTED):
            digest.update(getattr(model.rollout_buffer, name).tobytes())
        train()

    model.train = recorded
    model.learn(3 * 72)
    for weight in model.policy.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


SAMPLED, COMPUTED = ("actions", "rewards", "values", "log_probs"), ("advantages", "returns")
CASES = {
    "plain": {},
    "truncated": {"kind": "truncated"},
    "turns": {"kind": "turns"},
    "a critic of its own": {"policy_kwargs": {"critic": SeparateCritic(tiny(n_layer=1))}},
    "no cache": {"policy_kwargs": {"cache": False}},
    "value norm": {"policy_kwargs": {"value_norm": "norm"}},
    "LoRA": {"policy_kwargs": {"train": LoRA(r=2)}},
    "llama": {"config": tiny("llama")},
    "a recurrent model": {"config": tiny("mamba")},
    "an encoder-decoder": {"config": tiny_seq2seq("bart")},
    "masked": {"kind": "masked", "algorithm": MaskablePPO},
    "A2C": {"algorithm": A2C},
    "TRPO": {"algorithm": TRPO},
    "SB3's buffer": {"buffer": RolloutBuffer},
}


def reading_all(monkeypatch):
    monkeypatch.setattr("agents.policies.lm_policy.is_rollouts_end", lambda: False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_f2_no_number_of_the_update_changes(case, monkeypatch):
    """Every lane's last step ends its episode: bit for bit."""
    digest = learn(CASES[case])
    reading_all(monkeypatch)
    assert learn(CASES[case]) == digest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_f2_beside_episodes_that_go_on(case, monkeypatch):
    """Values of those that go on are read in a smaller batch: they round otherwise, and no other number changes."""
    case = {**CASES[case], "stop_ids": range(16)}
    buffer = collect(build(**case))
    reading_all(monkeypatch)
    expected = collect(build(**case))
    for name in SAMPLED:
        np.testing.assert_array_equal(getattr(buffer, name), getattr(expected, name))
    for name in COMPUTED:
        np.testing.assert_allclose(getattr(buffer, name), getattr(expected, name), atol=1e-5, rtol=0)
    ended = [s for s in getattr(buffer, "segments", ()) if s.is_finished]
    for s in ended:
        here = slice(s.start, s.end), s.lane
        np.testing.assert_array_equal(buffer.advantages[here], expected.advantages[here])
    assert case.get("buffer") or {s.is_finished for s in buffer.segments if s.end == 12} == {True, False}


def reads_at_the_end(model, monkeypatch, kind=Backbone):
    """Collect a rollout; return the number of tokens that the model's forwards read after its last step."""
    sizes = []
    for name in ("prefill", "read") if kind is Backbone else ("prefill_rows", "read", "decode"):
        original = getattr(kind, name)

        def counted(self, ids, *args, original=original, **kwargs):
            sizes.append(ids.numel())
            return original(self, ids, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)
    add = model.rollout_buffer.add

    def recorded(*args, **kwargs):
        add(*args, **kwargs)
        sizes.clear()

    model.rollout_buffer.add = recorded
    collect(model)
    return sum(sizes)


@pytest.mark.parametrize("config", [tiny(), tiny("mamba"), tiny_seq2seq()], ids=["cached", "recurrent", "seq2seq"])
@pytest.mark.filterwarnings("ignore")
def test_f2_it_costs_no_forward(config, monkeypatch):
    kind = Seq2SeqBackbone if config.is_encoder_decoder else Backbone
    assert reads_at_the_end(build(config=config), monkeypatch, kind) == 0
    reading_all(monkeypatch)
    assert reads_at_the_end(build(config=config), monkeypatch, kind) >= sum(map(len, PROMPTS))


def test_f2_beside_others_it_costs_a_token(monkeypatch):
    assert reads_at_the_end(build(stop_ids=range(16)), monkeypatch) == 6


def test_f2_a_value_that_somebody_asks_for_is_read():
    """Only the end of a rollout knows that it is multiplied by 0."""
    policy = make_policy()
    observations = observe([([1, 2], []), ([3], [4])])
    with torch.no_grad():
        values = policy.predict_values(observations)
        assert values.abs().min() > 1e-3
        assert policy.lm.values(observations, only_begun=True).tolist() == pytest.approx([0.0, float(values[1])])


def test_has_begun():
    rows = observe([([1, 2], []), ([3], [4]), ([], []), ([], [5])])
    assert has_begun(rows).tolist() == [False, True, False, True]


def test_a_rollout_without_an_update_goes_on_from_the_cache(monkeypatch):
    """Rows that go on are read once more; those that begin are read for the first time."""
    model = make_ppo(prompts=PROMPTS, max_new_tokens=9, n_steps=12)
    collect(model)
    n_rows = []
    prefill = Backbone.prefill
    monkeypatch.setattr(
        Backbone, "prefill", lambda self, ids, *args: n_rows.append(len(ids)) or prefill(self, ids, *args)
    )
    model.policy.forward(torch.as_tensor(model._last_obs))
    begun = has_begun(torch.as_tensor(model._last_obs))
    assert begun.sum() > 0 and sum(n_rows) <= len(begun) - int(begun.sum())


def test_idle_lanes_are_no_rows_that_stay(monkeypatch):
    """Most lanes are idle, as at the end of an evaluation: the others still decode from the cache."""
    policy = make_policy()
    n_rows = []
    prefill = Backbone.prefill
    monkeypatch.setattr(
        Backbone, "prefill", lambda self, ids, *args: n_rows.append(len(ids)) or prefill(self, ids, *args)
    )
    for n in range(4):
        with torch.no_grad():
            policy(observe([([1, 2, 3], list(range(n))), ([], []), ([], []), ([], [])]))
    assert n_rows == [1]
