"""`LMPolicy` inside SB3: one distribution in rollout and update, padding, special tokens and the critic."""

import copy

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from transformers import AutoModelForCausalLM, GenerationConfig

from agents import LMPolicy, SharedCritic
from agents.models.backbone import Backbone
from agents.models.sequences import SequenceBatch
from tests.helpers.models import (
    FAMILIES,
    N_TOKENS,
    PROMPTS,
    CheckRatio,
    collect,
    count_a,
    few,
    log_ratios,
    make_policy,
    make_ppo,
    observe,
    tiny,
)
from textenv import CharTokenizer, TextEnv

TOLERANCE = 1e-5
ABSOLUTE = ["gpt2", "opt"]
EACH_KIND = ["gpt2", "llama", "opt", "bloom", "mistral", "gemma3", "gemma2"]


def trunk_gradient(policy) -> torch.Tensor:
    """Return the gradient of the language model as one vector, with zeros where there is none, and clear it."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.lm.backbone.parameters()]
    gradient = torch.cat([grad.flatten() for grad in grads]).clone()
    policy.zero_grad()
    return gradient


def rollout(model):
    """The first rollout of a model as a batch with its actions."""
    buffer = collect(model)
    view = buffer.view()
    return view.batch, view.actions


# A1: before any optimizer step the ratio is 1


@pytest.mark.parametrize("temperature", few([0.7, 1.0, 1.3], 1))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_a1_ratio_is_one(family, temperature):
    """Mixed prompt lengths, lanes that end at different steps, and rollouts that begin inside an episode."""
    model = make_ppo(
        tiny(family), n_steps=8, learning_rate=0.05, policy_kwargs={"temperature": temperature}, max_grad_norm=1.0
    )
    check = CheckRatio()
    model.learn(2 * 32, callback=check)
    assert len(check.largest) == 2 and max(check.largest) < TOLERANCE
    assert np.abs(log_ratios(model, model.rollout_buffer)).max() > 1e-3  # after the step it is not


@pytest.mark.parametrize("options", [{"cache": False}, {"temperature": 0.5}], ids=str)
def test_a1_in_ppos_own_numbers(options):
    """The KL, clip fraction and entropy that PPO logs in a first epoch are means over the policy's tokens (B6)."""
    model = make_ppo(policy_kwargs=options, n_epochs=1)
    buffer = collect(model)
    with torch.no_grad():
        expected = -model.policy.evaluate_actions(*buffer.view()[:2])[2].mean()
    model.train()
    logged = model.logger.name_to_value
    assert abs(logged["train/approx_kl"]) < 1e-7 and logged["train/clip_fraction"] == 0
    assert logged["train/entropy_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a1_with_the_stock_buffer_and_a_lone_env():
    """`PPO(LMPolicy, env)` reads one sequence per token, which is slow but right."""
    torch.manual_seed(0)
    env = TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=5)
    model = PPO(LMPolicy, env, n_steps=24, batch_size=12, policy_kwargs={"lm": tiny()}, device="cpu", seed=0)
    buffer = collect(model)
    assert type(buffer) is RolloutBuffer
    for samples in buffer.get(8):
        _, log_probs, _ = model.policy.evaluate_actions(samples.observations, samples.actions.long().flatten())
        torch.testing.assert_close(log_probs, samples.old_log_prob, atol=TOLERANCE, rtol=0)
    model.learn(48)
    assert model.num_timesteps == 48


def test_a1_with_a2c():
    model = make_ppo(algorithm=A2C, n_steps=8, use_rms_prop=False)
    check = CheckRatio()
    model.learn(64, callback=check)
    assert len(check.largest) == 2 and max(check.largest) < TOLERANCE
    assert type(model) is A2C and type(model.policy.optimizer) is torch.optim.SGD


# A4, A10, A11


def test_a4_generation_config_has_no_effect(tmp_path):
    """Penalties and forced tokens in the checkpoint's folder do not reach the distribution."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny())
    model.save_pretrained(tmp_path / "plain")
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, min_p=0.5, do_sample=True, temperature=0.1, top_k=1, forced_eos_token_id=7
    )
    model.save_pretrained(tmp_path / "odd")
    assert "repetition_penalty" in (tmp_path / "odd" / "generation_config.json").read_text()
    observations = observe([([1, 1, 1], [2, 2, 2]), ([3], [4])])
    plain, odd = (make_policy(str(tmp_path / name)) for name in ("plain", "odd"))
    with torch.no_grad():
        for got, expected in zip(odd(observations), plain(observations)):
            assert torch.equal(got, expected)


class Merging(CharTokenizer):
    """A tokenizer with ten more tokens that decode to "a", to which no text ever encodes."""

    def __init__(self):
        super().__init__("abcdefgh")

    def __len__(self):
        return 19

    def decode(self, token_ids, *, skip_special_tokens=False):
        return super().decode([1 if i > 8 else i for i in token_ids], skip_special_tokens=skip_special_tokens)


def test_a10_trained_ids_are_the_sampled_ones():
    tokenizer = Merging()
    assert tokenizer.encode(tokenizer.decode([9, 2])) == [1, 2]
    env = TextEnv(["ab", "c"], tokenizer, reward=lambda prompt, preds, done: float(len(preds.text)), max_new_tokens=5)
    model = make_ppo(env=env, n_steps=20)
    sampled = []
    step = model.policy.forward

    def forward_and_note(obs, deterministic=False):
        actions, values, log_probs = step(obs, deterministic)
        sampled.extend((*row[row >= 0].tolist(), action) for row, action in zip(obs, actions.tolist()))
        return actions, values, log_probs

    model.policy.forward = forward_and_note
    buffer = collect(model)
    trained = []
    for samples in buffer.get(20):
        batch = samples.observations
        for row, col, action in zip(batch.rows, batch.cols, samples.actions.tolist()):
            trained.append((*batch.tokens[row, : col + 1].tolist(), action))
            if col + 1 < batch.lengths[row]:
                assert int(batch.tokens[row, col + 1]) == action
    assert sorted(trained) == sorted(sampled)
    assert sum(tokens[-1] > 8 for tokens in trained) > 10


@pytest.mark.parametrize("family", EACH_KIND)
def test_a11_nothing_depends_on_later_tokens(family):
    """Other tokens after a column change log-probabilities and values after it, and none up to it."""
    policy = make_policy(tiny(family))
    tokens = torch.randint(N_TOKENS, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = SequenceBatch(tokens, np.array([20, 20]), np.repeat([0, 1], 19), np.tile(np.arange(19), 2))
    changed = copy.copy(batch)
    changed.tokens = tokens.clone()
    changed.tokens[:, 9:] = (tokens[:, 9:] + 1) % N_TOKENS
    actions = tokens[:, 1:].flatten()
    with torch.no_grad():
        before, after = (policy.evaluate_actions(b, actions) for b in (batch, changed))
    early = torch.as_tensor(batch.cols <= 8)
    for old, new in zip(before, after):
        torch.testing.assert_close(new[early], old[early], atol=TOLERANCE, rtol=0)
        assert ((new[~early] - old[~early]).abs() > 1e-4).float().mean() > 0.9


# B: padding and special tokens


def ragged(policy) -> tuple[SequenceBatch, torch.Tensor]:
    """Return four sequences of very different lengths, with transitions in the second half of each, and actions."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 30, 1, 12])
    tokens = torch.zeros(4, 30, dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens[row, :n] = torch.as_tensor(rng.integers(N_TOKENS, size=n))
    cols = [np.arange(n // 2, n) for n in lengths]
    rows = np.repeat(np.arange(4), [len(of_row) for of_row in cols])
    actions = torch.as_tensor(rng.integers(N_TOKENS, size=len(rows)))
    return SequenceBatch(tokens, lengths, rows, np.concatenate(cols)), actions


def alone(batch: SequenceBatch, actions, row: int) -> tuple[SequenceBatch, torch.Tensor]:
    here = batch.rows == row
    n = batch.lengths[row]
    single = SequenceBatch(batch.tokens[[row], :n], np.array([n]), batch.rows[here] * 0, batch.cols[here])
    return single, actions[torch.as_tensor(here)]


def loss_of(policy, batch, actions):
    """Return a loss that weights each transition differently."""
    values, log_probs, entropy = policy.evaluate_actions(batch, actions)
    weights = torch.as_tensor(np.sin(batch.cols + 1.0), dtype=torch.float32)
    return (weights * (log_probs + values[:, 0] ** 2 + 0.1 * entropy)).sum()


@pytest.mark.parametrize("family", EACH_KIND)
def test_b1_padding_changes_nothing(family):
    """Log-probabilities, values, loss and gradient of a padded batch are those of each sequence alone."""
    policy = make_policy(tiny(family))
    batch, actions = ragged(policy)
    assert len(list(batch.chunks())) == 1  # padded together
    together = loss_of(policy, batch, actions)
    together.backward()
    gradient = trunk_gradient(policy)
    singles = [loss_of(policy, *alone(batch, actions, row)) for row in range(4)]
    sum(singles).backward()
    torch.testing.assert_close(together, sum(singles), atol=1e-4, rtol=1e-5)
    expected = trunk_gradient(policy)
    assert float((gradient - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    for row in range(4):
        here = torch.as_tensor(batch.rows == row)
        for mixed, single in zip(
            policy.evaluate_actions(batch, actions), policy.evaluate_actions(*alone(batch, actions, row))
        ):
            torch.testing.assert_close(mixed[here], single, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("poison", [5, N_TOKENS - 1, 39])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_b5_what_stands_in_padding_changes_nothing(family, poison):
    """Any id may be in the padding of token arrays, and any amount of it; other arrays have no padding."""
    policy = make_policy(tiny(family))
    batch, actions = ragged(policy)
    loss = loss_of(policy, batch, actions)
    loss.backward()
    gradient = trunk_gradient(policy)
    tokens = torch.cat([batch.tokens, torch.zeros(4, 17, dtype=torch.long)], dim=1)
    padded = torch.arange(47) >= torch.as_tensor(batch.lengths)[:, None]
    poisoned = SequenceBatch(tokens.masked_fill(padded, poison), batch.lengths, batch.rows, batch.cols)
    again = loss_of(policy, poisoned, actions)
    again.backward()
    torch.testing.assert_close(again, loss)
    assert float((trunk_gradient(policy) - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("family", ABSOLUTE)
def test_b2_positions_count_real_tokens(family, monkeypatch):
    """The masks and positions of a prefill and a decoding step, both with left padding."""
    policy = make_policy(tiny(family))
    seen = []
    forward, prefill = Backbone.forward, Backbone.prefill

    def watched_forward(self, ids, rows, cols, mask=None, positions=None, cache=None):
        seen.append((mask, positions))
        return forward(self, ids, rows, cols, mask, positions, cache)

    def watched_prefill(self, ids, mask, positions):
        seen.append((mask, positions))
        return prefill(self, ids, mask, positions)

    monkeypatch.setattr(Backbone, "forward", watched_forward)
    monkeypatch.setattr(Backbone, "prefill", watched_prefill)
    with torch.no_grad():
        policy(observe([([1, 2, 3], [4]), ([5], [6])]))
    (prompt_mask, prompt_positions), (mask, positions) = seen
    assert prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]] and prompt_positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]] and positions.tolist() == [[3], [1]]


EOS = 0  # also the pad token, in every model here


def test_b3_lengths_decide_not_the_pad_token():
    """With pad == EOS the final EOS keeps its log-probability, value and gradient."""
    policy = make_policy(tiny())
    assert policy.lm.backbone.model.config.pad_token_id == policy.lm.backbone.model.config.eos_token_id == EOS
    tokens = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    batch = SequenceBatch(tokens, np.array([3, 5]), np.array([0, 0, 1]), np.array([1, 2, 4]))
    values, log_probs, _ = policy.evaluate_actions(batch, torch.tensor([3, EOS, 9]))
    (log_probs[1] + values[1, 0]).backward()
    gradient = trunk_gradient(policy)
    output = policy.lm.backbone.model(input_ids=tokens[:1, :3], output_hidden_states=True)
    expected = output.logits[0, -1, :N_TOKENS].log_softmax(-1)[EOS]
    value = policy.lm.critic(output.hidden_states[-1][0, -1:])[0]
    (expected + value).backward()
    torch.testing.assert_close(log_probs[1], expected)
    torch.testing.assert_close(values[1, 0], value)
    torch.testing.assert_close(gradient, trunk_gradient(policy), atol=1e-5, rtol=1e-5)
    assert float(gradient.abs().max()) > 1e-2


def test_b3_special_ids_inside_a_prompt_are_ordinary_tokens():
    prompts = [[3, EOS, 5], [EOS], [EOS, EOS, 7, EOS]]
    model = make_ppo(prompts=prompts, n_steps=16, max_new_tokens=4, n_envs=6)
    buffer = collect(model)
    assert np.abs(log_ratios(model, buffer)).max() < TOLERANCE
    contexts = {tuple(segment.tokens[: buffer.cols[segment.start, segment.lane] + 1]) for segment in buffer.segments}
    assert {tuple(prompt) for prompt in prompts} <= contexts
    assert (buffer.actions == EOS).any()  # and episodes that end by it
    lm = model.policy.lm.backbone.model
    observations = observe([(prompt, []) for prompt in prompts])
    got = model.policy.get_distribution(observations).log_probabilities
    for row, prompt in zip(got, prompts):
        expected = lm(input_ids=torch.tensor([prompt])).logits[0, -1, :N_TOKENS].log_softmax(-1)
        torch.testing.assert_close(row, expected, atol=TOLERANCE, rtol=0)


# E5, E6: the critic


def test_e5_values_are_zero_at_the_start():
    torch.manual_seed(0)
    env = TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=5)
    policy = LMPolicy(env.observation_space, env.action_space, lambda _: 1e-3, lm=tiny())
    observations = torch.as_tensor(env.reset(seed=0)[0])[None]
    assert policy(observations)[1].tolist() == [[0.0]]
    assert policy.predict_values(observations).tolist() == [[0.0]]
    assert policy.evaluate_actions(observations, torch.tensor([1]))[0].tolist() == [[0.0]]


def test_e6_without_vf_coef_the_gradient_is_the_policys():
    """`train()` with vf_coef=0 moves the trunk by the policy gradient alone, and the value head not at all."""
    model = make_ppo(vf_coef=0.0, learning_rate=0.1, max_grad_norm=1e9)
    buffer = collect(model)
    view = buffer.view()
    twin = copy.deepcopy(model.policy)
    advantages = torch.as_tensor(buffer.advantages[view.steps, view.lanes])
    logits = twin.lm.backbone.model(input_ids=view.batch.tokens).logits[view.batch.rows, view.batch.cols, :N_TOKENS]
    log_probs = logits.log_softmax(-1).gather(1, view.actions[:, None])[:, 0]
    (-advantages * (log_probs - log_probs.detach()).exp()).mean().backward()
    model.train()
    for new, old in zip(model.policy.lm.backbone.parameters(), twin.lm.backbone.parameters()):
        torch.testing.assert_close(new, old - 0.1 * old.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.policy.lm.critic.linear.weight, twin.lm.critic.linear.weight)


@pytest.mark.parametrize("detach", [True, False])
def test_e6_a_detached_critic_gives_the_trunk_none(detach):
    policy = make_policy(critic=SharedCritic(detach=detach))
    batch, actions = ragged(policy)
    (policy.evaluate_actions(batch, actions)[0] ** 2).sum().backward()
    assert float(policy.lm.critic.linear.weight.grad.abs().max()) > 1e-3
    assert (float(trunk_gradient(policy).abs().max()) == 0) is detach


# Methods that SB3 calls


def test_predict_takes_one_observation_or_many():
    policy = make_policy()
    rows = observe([([1, 2], [3]), ([4], [])]).numpy()
    actions, state = policy.predict(rows, deterministic=True)
    assert actions.shape == (2,) and state is None
    for row, action in zip(rows, actions):
        single = policy.predict(row, deterministic=True)[0]
        assert single.shape == () and int(single) == action
    assert policy.predict(rows.astype(np.int32), deterministic=True)[0].tolist() == actions.tolist()


def test_get_distribution_agrees_with_forward():
    policy = make_policy(temperature=0.7)
    observations = observe([([1, 2], [3]), ([4], [])])
    distribution = policy.get_distribution(observations)
    with torch.no_grad():
        actions, _, log_probs = policy(observations)
        best = policy(observations, deterministic=True)[0]
    torch.testing.assert_close(distribution.log_prob(actions), log_probs, atol=TOLERANCE, rtol=0)
    assert torch.equal(distribution.mode(), best)
    assert distribution.log_probabilities.shape == (2, N_TOKENS)


@pytest.mark.parametrize(
    "observation",
    [np.zeros((2, 64), np.float32), np.zeros((2, 3, 64), np.int64), np.zeros((64,), bool), np.int64(3)],
    ids=["floats", "three dimensions", "booleans", "a number"],
)
def test_an_observation_that_is_no_tokens_is_refused(observation):
    with pytest.raises(ValueError, match=r"Expected an observation of token ids, \(L,\) or \(B, L\), got"):
        make_policy().obs_to_tensor(observation)


def test_shapes_that_sb3_relies_on():
    policy = make_policy()
    observations = observe([([1, 2], [3]), ([4], [])])
    actions, values, log_probs = policy(observations)
    assert (actions.shape, values.shape, log_probs.shape) == ((2,), (2, 1), (2,))
    assert actions.dtype == torch.int64 and values.dtype == log_probs.dtype == torch.float32
    assert policy.predict_values(observations).shape == (2, 1)
    evaluated = policy.evaluate_actions(observations, actions.float())
    assert [tuple(output.shape) for output in evaluated] == [(2, 1), (2,), (2,)]
