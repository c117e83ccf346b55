"""Critics with a trunk of their own: their values, their cost in a rollout, and the weights that their loss trains."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from transformers import (
    BartConfig,
    BertConfig,
    GPT2ForSequenceClassification,
    Llama4TextConfig,
    LlamaForSequenceClassification,
)

from agents import KLPenalty, RewardModelCritic, SeparateCritic, SequenceRolloutBuffer, SharedCritic
from agents.models.critic import TrunkCritic
from agents.models.observations import has_begun
from agents.models.sequences import SequenceBatch
from agents.policies.lm_policy import LMPolicy
from tests.helpers.models import (
    COMMON,
    GATED,
    LENGTH,
    N_POSITIONS,
    N_TOKENS,
    PROMPTS,
    collect,
    count_a,
    make_policy,
    make_ppo,
    observe,
    tiny,
)
from textenv import CharTokenizer, TextEnv

SEPARATE: dict[str, Any] = {"critic": SeparateCritic(tiny("llama"))}
ROWS = [([1, 2, 3], []), ([4], [5, 6]), ([7, 8, 9, 10, 11], [12])]


def separate_ppo(**kwargs):
    """Return PPO with a separate critic, whose values differ from zero and from each other."""
    return make_ppo(**{**kwargs, "policy_kwargs": {**SEPARATE, **kwargs.get("policy_kwargs", {})}})


def count_forwards(module):
    """Return a list that grows by the number of rows of each forward of a module."""
    calls: list[int] = []
    module.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return calls


def own_value(policy, tokens):
    """Return the value of tokens from a forward of the critic's trunk on them alone."""
    critic = policy.lm.critic
    return critic(critic.trunk(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1:]).item()


def test_it_values_observations_and_sequences_by_its_own_trunk():
    policy = make_policy(**SEPARATE)
    expected = [own_value(policy, prompt + since) for prompt, since in ROWS]
    assert np.ptp(expected) > 0.1
    with torch.no_grad():
        of_rows = policy.predict_values(observe(ROWS)).flatten()
        of_forward = policy(observe(ROWS))[1].flatten()
        of_stock_samples = policy.evaluate_actions(observe(ROWS), torch.zeros(3))[0].flatten()
        batch = SequenceBatch.from_observations(observe(ROWS))
        of_sequences = policy.predict_values(batch).flatten()
    for values in (of_rows, of_forward, of_stock_samples, of_sequences):
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_e5_its_values_are_zero_at_the_start():
    torch.manual_seed(0)
    critic = SeparateCritic(tiny()).build(hidden_size=7)
    assert isinstance(critic, TrunkCritic)
    hidden = critic.read(torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([2, 1]))
    assert hidden.shape == (2, 16) and hidden.abs().min() > 0
    assert critic(hidden).tolist() == [0.0, 0.0]


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """Folders of a GPT-2 and a Llama that score a text by one number; the Llama pads with token 0."""
    folders = {}
    for name, cls in (("gpt2", GPT2ForSequenceClassification), ("llama", LlamaForSequenceClassification)):
        torch.manual_seed(1)
        config = tiny(name, num_labels=1, pad_token_id=None if name == "gpt2" else 0)
        folders[name] = str(tmp_path_factory.mktemp("rewards") / name)
        cls(config).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(
    ("name", "cls"), [("gpt2", GPT2ForSequenceClassification), ("llama", LlamaForSequenceClassification)]
)
def test_e5_a_reward_models_critic_values_a_whole_text_at_its_score(reward_models, name, cls):
    torch.manual_seed(0)
    policy = plain_policy(RewardModelCritic(reward_models[name]))
    reward_model = cls.from_pretrained(reward_models[name]).eval()
    with torch.no_grad():
        scores = [float(reward_model(input_ids=torch.tensor([prompt + since])).logits) for prompt, since in ROWS]
        values = policy.predict_values(observe(ROWS)).flatten()
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(values, scores, atol=1e-5)


def plain_policy(critic, **kwargs):
    space = spaces.Box(-2, N_TOKENS - 1, (LENGTH,), np.int64)
    return LMPolicy(space, spaces.Discrete(N_TOKENS), lambda _: 1e-3, lm=tiny(), critic=critic, **kwargs)


def test_a_reward_models_critic_pickles_as_its_config_and_loads_without_the_folder(reward_models, tmp_path):
    folder = tmp_path / "model"
    GPT2ForSequenceClassification.from_pretrained(reward_models["gpt2"]).save_pretrained(folder)
    spec = RewardModelCritic(str(folder))
    assert pickle.loads(pickle.dumps(spec)).model.name == str(folder)  # not built yet
    model = make_ppo(policy_kwargs={"critic": spec})
    model.learn(48)
    model.save(tmp_path / "model.zip")
    folder.rename(tmp_path / "elsewhere")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded.policy.predict_values(observe(ROWS)), model.policy.predict_values(observe(ROWS)))


def test_values_stand_still_when_later_tokens_change():
    """Invariant A11 for a separate critic."""
    policy = make_policy(**SEPARATE)
    tokens = torch.randint(N_TOKENS, (1, 12), generator=torch.Generator().manual_seed(0))
    batch = SequenceBatch(tokens, np.array([12]), np.zeros(11, dtype=int), np.arange(11))
    changed = copy.copy(batch)
    changed.tokens = torch.cat([tokens[:, :6], (tokens[:, 6:] + 1) % N_TOKENS], dim=1)
    with torch.no_grad():
        before, after = policy.predict_values(batch), policy.predict_values(changed)
    torch.testing.assert_close(after[:6], before[:6], atol=1e-5, rtol=0)
    assert (after[6:] - before[6:]).abs().min() > 1e-4


def values_step_by_step(buffer_class, **kwargs):
    """Collect the same rollout into a buffer of some class; return its values, returns and advantages."""
    model = separate_ppo(rollout_buffer_class=buffer_class, **kwargs)
    buffer = collect(model)
    assert np.ptp(buffer.values) > 0.1
    return buffer.values, buffer.returns, buffer.advantages


@pytest.mark.parametrize("limit", ["terminate", "truncate"])
def test_values_at_the_end_equal_those_step_by_step(limit):
    """The sequence buffer values a rollout at its end; stock SB3 values it step by step, to the same numbers."""

    def env():
        return TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=5, length_limit=limit)

    late = values_step_by_step(SequenceRolloutBuffer, env=env())
    stock = values_step_by_step(RolloutBuffer, env=env())
    for ours, theirs in zip(late, stock):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_rollout_costs_one_forward_a_sequence():
    """Rows that the critic's trunk reads: the first step's, each sequence once, and last observations with a token."""
    model = separate_ppo()
    calls = count_forwards(model.policy.lm.critic.trunk)
    model.policy.set_training_mode(False)
    for _ in range(2):
        calls.clear()
        buffer = collect(model)
        n_sequences = len(buffer.segments)
        n_begun = int(has_begun(torch.as_tensor(model._last_obs)).sum())
        assert calls[0] == model.n_envs and sum(calls[1:]) == n_begun + n_sequences
    calls.clear()
    next(iter(buffer.get(48)))  # minibatches and `predict` cost no forward of the critic
    model.predict(model._last_obs)
    assert calls == []


def test_values_are_there_again_outside_a_rollout():
    """Also after a rollout that was broken off, once `set_training_mode` is called."""
    model = separate_ppo()
    collect(model)
    observation = torch.as_tensor(model._last_obs)
    assert model.policy(observation)[1].abs().min() > 0
    model.policy.lm.defer_values()
    assert model.policy(observation)[1].abs().max() == 0
    model.policy.set_training_mode(False)
    assert model.policy(observation)[1].abs().min() > 0


def update_batch(model):
    samples = next(iter(collect(model).get()))
    return samples.observations, samples.actions, samples.returns


def gradients(model, vf_coef, policy_coef=1.0, seed=0):
    """Return gradients by name of a policy loss plus a value loss on one rollout."""
    batch, actions, returns = update_batch(model)
    values, log_prob, _ = model.policy.evaluate_actions(batch, actions)
    loss = -policy_coef * (returns * log_prob).mean() + vf_coef * (returns - values.flatten()).square().mean()
    model.policy.optimizer.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.policy.named_parameters() if weight.grad is not None}


def largest(grads, part):
    return max((float(grad.abs().max()) for name, grad in grads.items() if part in name), default=0.0)


@pytest.mark.parametrize(
    ("critic", "reaches_trunk"),
    [(SharedCritic(), True), (SharedCritic(detach=True), False), (SeparateCritic(tiny()), False)],
    ids=["shared", "detached", "separate"],
)
def test_e6_what_the_value_loss_trains(critic, reaches_trunk):
    """With vf_coef=0 the trunk's gradient is the policy's; only the loss of a shared critic changes it (E6)."""
    pure, both, value = (
        gradients(make_ppo(policy_kwargs={"critic": critic}), vf_coef, policy_coef)
        for vf_coef, policy_coef in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
    )
    trunk = [name for name in pure if "backbone" in name]
    assert trunk and largest(pure, "backbone") > 1e-3 and largest(pure, "lm.critic") == 0.0
    assert all(torch.equal(pure[name], both[name]) for name in trunk) is not reaches_trunk
    assert (largest(value, "backbone") > 1e-3) is reaches_trunk
    assert largest(value, "critic.linear") > 1e-3
    assert (largest(value, "critic.trunk") > 1e-3) is isinstance(critic, SeparateCritic)


@pytest.mark.parametrize("micro_batch_tokens", [8, 40])
def test_e1_micro_batches_change_no_gradient_of_it(micro_batch_tokens):
    whole = gradients(separate_ppo(), 1.0)
    parts = gradients(separate_ppo(rollout_buffer_kwargs={"micro_batch_tokens": micro_batch_tokens}), 1.0)
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, atol=1e-5 + 1e-4 * float(grad.abs().max()), rtol=0)


def test_a_micro_batch_bounds_the_critics_forwards():
    model = separate_ppo(rollout_buffer_kwargs={"micro_batch_tokens": 40})
    shapes: list[int] = []
    buffer = collect(model)
    model.policy.lm.critic.trunk.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    samples = next(iter(buffer.get()))
    model.policy.evaluate_actions(samples.observations, samples.actions)
    assert len(shapes) > 2 and max(shapes) <= 40


def test_it_runs_in_16_bits_where_the_policy_does_and_values_stay_float32():
    policy, exact = (make_policy(**SEPARATE, autocast=autocast) for autocast in ("bfloat16", None))
    dtypes = []
    policy.lm.critic.trunk.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.no_grad():
        values, expected = (each.predict_values(observe(ROWS)) for each in (policy, exact))
    assert dtypes == [torch.bfloat16] and values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=0.1, rtol=0.1)
    assert not torch.equal(values, expected)


def test_a6_its_dropout_is_off():
    policy = make_policy(critic=SeparateCritic(tiny(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)))
    policy.train()
    batch, actions = SequenceBatch.from_observations(observe(ROWS)), torch.zeros(3, dtype=torch.long)
    assert torch.equal(policy.evaluate_actions(batch, actions)[0], policy.evaluate_actions(batch, actions)[0])


def test_the_kl_reference_has_no_copy_of_it():
    model, penalty = separate_ppo(), KLPenalty(0.1)
    calls = count_forwards(model.policy.lm.critic.trunk)
    penalty.attach(model)
    assert not any("critic" in name for name in penalty.reference.state_dict())
    batch, actions, _ = update_batch(model)
    calls.clear()
    penalty.reference.log_probs(batch, actions)
    model.policy.lm.log_probs(batch, actions)
    assert calls == []


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_it_trains_under_unmodified_algorithms(algorithm):
    model = separate_ppo(algorithm=algorithm, learning_rate=1e-2)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(96)
    changed = {name for name, tensor in model.policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("critic.trunk" in name for name in changed) and any("backbone" in name for name in changed)


def test_a_critic_that_cannot_read_the_sequences_is_refused():
    with pytest.raises(ValueError, match="at least the 33 tokens of the tokenizer, got 20"):
        plain_policy(SeparateCritic(tiny(vocab_size=20)))
    with pytest.raises(ValueError, match="model's 32 positions, got up to 63"):
        plain_policy(SeparateCritic(tiny(n_positions=32)))


def test_a_critic_that_sees_the_future_is_refused():
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match=r"a causal model as critic, got BertModel, .* set is_decoder=True in"):
        plain_policy(SeparateCritic(config))


@pytest.mark.parametrize("config", [
    Llama4TextConfig(**GATED, **COMMON, head_dim=8, intermediate_size_mlp=32, num_local_experts=2),
    BartConfig(**COMMON, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
               max_position_embeddings=N_POSITIONS, is_encoder_decoder=False, is_decoder=True),
], ids=["llama4", "bart's decoder"])  # fmt: skip
def test_the_trunk_of_a_model_with_another_name_for_it_is_a_critic(config):
    policy = plain_policy(SeparateCritic(config))
    assert policy.lm.critic.trunk.get_input_embeddings() is not None


def test_a_reward_model_of_two_scores_is_refused(tmp_path):
    GPT2ForSequenceClassification(tiny(num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"one score \(num_labels=1\), got 2 labels in GPT2ForSequenceClassification"):
        plain_policy(RewardModelCritic(str(tmp_path)))


def test_16_bit_reward_models_are_refused(reward_models):
    with pytest.raises(ValueError, match="Expected trainable weights in float32"):
        plain_policy(RewardModelCritic(reward_models["gpt2"], dtype=torch.bfloat16))
