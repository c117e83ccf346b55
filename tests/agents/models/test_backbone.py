"""`Backbone`: the sources it is built from, refusals, dropout, autocast, and the probe at construction."""

import copy
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from stable_baselines3 import PPO
from transformers import AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from agents import LMPolicy, Pretrained
from agents.models.backbone import Backbone
from agents.models.layers import fuse_activations
from agents.models.pretrained import build_model
from tests.helpers.models import LENGTH, N_TOKENS, CheckRatio, make_policy, make_ppo, observe, tiny

ROWS = observe([([1, 2, 3], [4]), ([5], [6, 7, 8])])


def log_probabilities(policy, observations=ROWS):
    with torch.no_grad():
        return policy.get_distribution(observations).log_probabilities


def saved(folder, config=None) -> str:
    """Save a model with random weights to a folder; return its path."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config or tiny()).save_pretrained(folder)
    return str(folder)


class Frozen:
    """A user's own spec, of a language model that is not trained."""

    def __init__(self, config, dtype=torch.float32):
        self.config = config
        self.dtype = dtype

    def build(self):
        return AutoModelForCausalLM.from_config(self.config).to(self.dtype).requires_grad_(False)


# Sources: paths, configs and specs


def test_a_path_a_name_and_a_spec_give_the_same_model(tmp_path):
    path = saved(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(path)(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[0, -1]
    for lm in (path, Path(path), Pretrained(path)):
        got = log_probabilities(make_policy(lm))
        torch.testing.assert_close(got[0], expected[:N_TOKENS].log_softmax(-1).detach(), atol=1e-5, rtol=0)


def test_pretrained_loads_without_its_folder(tmp_path):
    """`PPO.load` needs neither download nor folder, since a built spec pickles as its config."""
    path = saved(tmp_path / "model")
    model = make_ppo(Pretrained(path))
    before = log_probabilities(model.policy)
    model.learn(48)
    trained = log_probabilities(model.policy)
    assert not torch.equal(before, trained)
    model.save(tmp_path / "agent.zip")
    shutil.rmtree(path)
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert torch.equal(log_probabilities(loaded.policy), trained)
    assert loaded.policy_kwargs["lm"].name is None


def test_pretrained_pickles_small(tmp_path):
    spec = Pretrained(saved(tmp_path))
    assert pickle.loads(pickle.dumps(spec)).name == spec.name  # not built yet
    spec.build()
    again = pickle.loads(pickle.dumps(spec))
    assert (again.name, again.kwargs, again.config.vocab_size) == (None, {}, 40)
    assert len(pickle.dumps(spec)) < 5_000
    assert spec.build().config.vocab_size == 40  # the spec itself still loads from the folder


def test_pretrained_of_a_16_bit_checkpoint_is_float32_before_and_after(tmp_path):
    AutoModelForCausalLM.from_config(tiny(dtype=torch.bfloat16)).save_pretrained(tmp_path)
    spec = Pretrained(str(tmp_path))
    for built in (spec, pickle.loads(pickle.dumps(spec))):
        assert build_model(built).dtype == torch.float32
    spec.build()
    assert build_model(pickle.loads(pickle.dumps(spec))).dtype == torch.float32


def test_a_bare_path_is_loaded_by_name_again(tmp_path):
    path = saved(tmp_path / "model")
    model = make_ppo(path)
    model.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert torch.equal(log_probabilities(loaded.policy), log_probabilities(model.policy))
    shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"model.*there is no such folder"):
        PPO.load(tmp_path / "agent.zip", device="cpu")


@pytest.mark.parametrize("lm", [tiny("llama"), Frozen(tiny())], ids=["config", "spec"])
def test_config_and_spec_survive_saving(tmp_path, lm):
    model = make_ppo(lm)
    model.learn(48)
    model.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert torch.equal(log_probabilities(loaded.policy), log_probabilities(model.policy))


def test_policy_save_and_load(tmp_path):
    policy = make_policy(Frozen(tiny()), temperature=0.7, cache=False)
    policy.save(tmp_path / "policy.pt")
    loaded = LMPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert torch.equal(log_probabilities(loaded), log_probabilities(policy))
    assert (loaded.lm.sampling.temperature, loaded.lm.use_cache) == (0.7, False)


def test_frozen_weights_are_not_optimised():
    model = make_ppo(Frozen(tiny()), policy_kwargs={"optimizer_class": torch.optim.AdamW})
    before = {name: weight.clone() for name, weight in model.policy.named_parameters()}
    model.learn(96)
    moved = {name for name, weight in model.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"lm.critic.linear.weight", "lm.critic.linear.bias"}
    assert len(model.policy.optimizer.param_groups[0]["params"]) == 2


# Refusals


@pytest.mark.parametrize("lm", [3, object(), b"gpt2"])
def test_something_else_is_refused(lm):
    with pytest.raises(TypeError, match="Expected `lm` to be a name, a path, a config or a spec"):
        make_policy(lm)


def test_trainable_16_bit_weights_are_refused(tmp_path):
    path = saved(tmp_path)
    for lm in (tiny(dtype=torch.bfloat16), Pretrained(path, dtype=torch.float16)):
        with pytest.raises(
            ValueError, match=r"trainable weights in float32, got torch\.\w*float16 .*autocast='bfloat16'"
        ):
            make_policy(lm)


def test_frozen_16_bit_weights_are_not():
    policy = make_policy(Frozen(tiny(), torch.bfloat16))
    assert log_probabilities(policy).dtype == torch.float32
    assert policy.predict(ROWS.numpy())[0].shape == (2,)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="at least the 33 tokens of the tokenizer, got 32 embedding rows"):
        make_policy(tiny(vocab_size=32))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_too_few_positions_are_refused(family):
    name = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    make_policy(tiny(family, **{name: LENGTH - 1}))  # one column of an observation is the separator, not a token
    with pytest.raises(ValueError, match=r"fit the model's 62 positions, got up to 63 tokens: lower max_prompt_tokens"):
        make_policy(tiny(family, **{name: LENGTH - 2}))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"Expected `temperature` above 0, got .*deterministic=True"):
        make_policy(temperature=temperature)


def test_bad_autocast_is_refused():
    with pytest.raises(ValueError, match=r"Expected `autocast` to be one of .*'bfloat16'.*, got 'int8'"):
        make_policy(autocast="int8")


# A6: dropout


@pytest.mark.parametrize(
    ("family", "dropouts"),
    [
        ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        ("llama", ["attention_dropout"]),
        ("opt", ["dropout", "attention_dropout", "layerdrop"]),
        ("bloom", ["hidden_dropout", "attention_dropout"]),
        ("gpt_neox", ["hidden_dropout", "attention_dropout"]),
    ],
)
def test_a6_dropout_is_off_in_training_mode(family, dropouts):
    config = tiny(family, **dict.fromkeys(dropouts, 0.5))
    policy = make_policy(config)
    expected = log_probabilities(policy)
    policy.set_training_mode(True)
    assert policy.lm.backbone.training
    for _ in range(3):
        assert torch.equal(log_probabilities(policy), expected)
        values, log_probs, _ = policy.evaluate_actions(ROWS, torch.tensor([1, 2]))
        torch.testing.assert_close(log_probs, expected[[0, 1], [1, 2]])
    dropping = AutoModelForCausalLM.from_config(config).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(
        dropping(input_ids=ids).logits, dropping(input_ids=ids).logits
    )  # the control: plain transformers do drop


# Autocast


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2"])
def test_a12_autocast_runs_in_16_bits_with_float32_weights(family):
    """OPT is built with a last projection, which leaves its hidden states in 16 bits."""
    narrow = {"word_embed_proj_dim": 8} if family == "opt" else {}
    model = make_ppo(tiny(family, **narrow), policy_kwargs={"autocast": "bfloat16"}, learning_rate=0.01)
    exact = make_policy(tiny(family, **narrow))
    exact.load_state_dict({k: v for k, v in model.policy.state_dict().items()})
    difference = float((log_probabilities(model.policy) - log_probabilities(exact)).abs().max())
    assert 1e-5 < difference < 0.5
    check = CheckRatio()
    model.learn(96, callback=check)
    assert len(check.largest) == 2 and max(check.largest) < 0.2  # cached and full forwards round differently
    buffer = model.rollout_buffer
    assert torch.as_tensor(buffer.log_probs).isfinite().all() and buffer.log_probs.dtype == "float32"
    assert {weight.dtype for weight in model.policy.parameters()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in model.policy.parameters())


# The probe at construction


def test_a_recurrent_model_runs_uncached_with_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_ppo(tiny("mamba"))
        check = CheckRatio()
        model.learn(3 * 48, callback=check)
    assert not model.policy.lm.use_cache
    assert len(check.largest) == 3 and max(check.largest) < 1e-5
    for row, n in zip(ROWS, (4, 4)):
        expected = model.policy.lm.backbone.model(input_ids=row[row >= 0][None, :n]).logits[0, -1, :N_TOKENS]
        got = log_probabilities(model.policy, row[None])[0]
        torch.testing.assert_close(got, expected.log_softmax(-1).detach(), atol=1e-5, rtol=0)
    ours = [warning for warning in caught if "does not decode exactly" in str(warning.message)]
    assert len(ours) == 1 and "MambaForCausalLM" in str(ours[0].message)


@pytest.mark.parametrize("initializer_range", [0.02, 0.3])
def test_the_probe_finds_a_cache_that_does_not_decode(monkeypatch, initializer_range):
    """The probe needs no flag of recurrent models, and works on fresh weights, whose logits hardly differ."""
    prefill = Backbone.prefill
    monkeypatch.setattr(Backbone, "prefill", lambda self, ids, mask, positions: prefill(self, ids * 0, mask, positions))
    with pytest.warns(UserWarning, match="GPT2LMHeadModel does not decode exactly from cached keys and values"):
        assert not make_policy(tiny(initializer_range=initializer_range)).lm.use_cache


def test_soft_cap_is_found_on_fresh_weights(tmp_path):
    """A cap hardly changes small logits, and `PPO.load` probes fresh weights before it loads the trained ones."""
    large = make_policy(tiny("gemma2", initializer_range=0.02, final_logit_softcapping=30.0))
    assert not large.lm.backbone.head_is_linear
    with torch.no_grad():
        for weight in large.lm.backbone.parameters():
            weight.mul_(20)
    large.lm.backbone.model.save_pretrained(tmp_path)
    spec = Pretrained(str(tmp_path))
    spec.build()
    loaded = make_policy(pickle.loads(pickle.dumps(spec)))
    loaded.load_state_dict(large.state_dict())
    assert torch.equal(log_probabilities(loaded), log_probabilities(large))


def test_the_probe_leaves_no_hook_and_the_mode_as_it_was():
    model = make_policy().lm.backbone.model
    assert not model.get_output_embeddings()._forward_hooks
    assert Backbone(model, N_TOKENS, LENGTH - 1).training  # as every new module of PyTorch


def test_the_fused_activation_is_the_models_own():
    """The fused activation gives the logits and gradients of transformers' own GPT-2."""
    model = build_model(tiny("gpt2")).eval()
    twin = copy.deepcopy(model)
    fuse_activations(model)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model.state_dict().keys() == twin.state_dict().keys()
    ids, results = torch.tensor([[1, 2, 3, 4]]), []
    for lm in (model, twin):
        logits = lm(input_ids=ids).logits
        logits.square().sum().backward()
        results.append((logits.detach(), next(lm.parameters()).grad))
    for fused, written_out in zip(*results):
        torch.testing.assert_close(fused, written_out, atol=1e-5 * float(written_out.abs().max()), rtol=1e-5)
