"""Trained and frozen weights: LoRA, last layers, head; export, quantised bases, gradient checkpointing (E3, E7)."""

import io
import pickle

import pytest
import torch
from stable_baselines3 import PPO
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from agents import KLPenalty, LastLayers, LoRA, Pretrained, TextVecEnv, export, load_checkpoint, save_checkpoint
from agents.models.layers import transformer_layers
from agents.models.pretrained import build_model
from agents.models.trainable import adapted_layers, is_checkpointing, merged_state_dict
from tests.helpers.models import FAMILIES, N_TOKENS, CheckRatio, disturb, few, make_policy, make_ppo, observe, tiny
from tests.helpers.training import run_state, same_weights, tiny_agent, tiny_config, tiny_env, weights

TRAINED = {"head": "head", "last": LastLayers(1), "lora": LoRA()}
ROWS = [([3, 1], [2, 5]), ([4], []), ([7, 8, 9, 1, 2], [3])]


def names_of_trained(model):
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layers_are_those_before_the_head_in_every_family(family):
    """The trained layer is the second of two, and it runs last."""
    model = build_model(tiny(family), LastLayers(1))
    layers = transformer_layers(model)
    assert len(layers) == 2
    assert {id(weight) for weight in model.parameters() if weight.requires_grad} == {
        id(weight) for weight in layers[1].parameters()
    }
    order = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *args, number=number: order.append(number))
    model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
    assert order == [0, 1]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])  # peft refuses some of its layers
def test_lora_trains_its_adapters_alone_beside_every_linear_layer(family):
    model = build_model(tiny(family), LoRA(r=2))
    adapted = adapted_layers(model)
    assert adapted and names_of_trained(model) == [name for name, _ in model.named_parameters() if ".lora_" in name]
    head = model.get_output_embeddings()
    linear = [module for module in build_model(tiny(family)).modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert len(adapted) == len(linear) - 1 and head not in adapted.values()


def test_the_head_alone():
    tied, untied = build_model(tiny(), "head"), build_model(tiny(tie_word_embeddings=False), "head")
    assert names_of_trained(tied) == ["transformer.wte.weight"] and names_of_trained(untied) == ["lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_e7_frozen_weights_are_the_same_bits_after_training(name, tied):
    """Trained weights do change, tied embeddings stay tied, and the optimizer holds only trained weights (E7)."""
    lm = tiny_config(tie_word_embeddings=tied)
    model = tiny_agent(lm=lm, policy_kwargs={"train": TRAINED[name]})
    before = {name: weight.clone() for name, weight in model.policy.named_parameters()}
    model.learn(64, callback=KLPenalty(0.1))
    for key, weight in model.policy.named_parameters():
        assert torch.equal(weight, before[key]) != weight.requires_grad, key
    optimized = {id(weight) for group in model.policy.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in model.policy.parameters() if weight.requires_grad}
    inner = model.policy.lm.backbone.model
    assert (inner.get_input_embeddings().weight is inner.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", few(["gpt2", "llama", "gpt_neox", "opt", "bloom", "mistral", "gemma2"], 3))
def test_a1_a7_with_lora_decoding_equals_the_whole_sequence(family):
    """Before and after updates, over mixed lengths and episodes that straddle rollouts (A1, A7)."""
    check = CheckRatio()
    model = make_ppo(tiny(family), policy_kwargs={"train": LoRA(r=4)}, learning_rate=1e-2)
    disturb(model.policy.lm.backbone)
    model.learn(3 * 48, callback=check)
    assert model.policy.lm.use_cache and max(check.largest) < 1e-5


def test_a6_lora_has_no_dropout():
    policy = make_policy(train=LoRA())
    observations = observe(ROWS)
    policy.set_training_mode(True)
    disturb(policy.lm.backbone)
    first, second = (policy.evaluate_actions(observations, torch.tensor([1, 2, 3]))[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", TRAINED)
def test_e8_checkpoint_and_sb3_file(name, tmp_path):
    def build(seed=0):
        return tiny_agent(seed=seed, policy_kwargs={"train": TRAINED[name]})

    model = build()
    model.learn(32)
    save_checkpoint(model, tmp_path / "saved")
    stream = io.BytesIO()
    model.save(stream)
    resumed = build(seed=7)
    load_checkpoint(resumed, tmp_path / "saved")
    stream.seek(0)
    loaded = PPO.load(stream, env=TextVecEnv(tiny_env(), 4), device="cpu")
    assert same_weights(weights(loaded), weights(model))
    trained = names_of_trained(model.policy)
    assert names_of_trained(loaded.policy) == trained
    model.learn(32, reset_num_timesteps=False)
    resumed.learn(32, reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)
    loaded.learn(16)


@pytest.mark.parametrize("family", few(["gpt2", "llama", "gemma2"], 1))
def test_e9_export_merges_and_training_goes_on_unharmed(family, tmp_path):
    """Merged logits are within 1e-4 of unmerged ones, and the run continues bit for bit as without an export (E9)."""
    runs = []
    for exports in (True, False):
        model = tiny_agent(lm=tiny(family, vocab_size=N_TOKENS), policy_kwargs={"train": LoRA(r=4)})
        model.learn(48)
        if exports:
            export(model, None, tmp_path / "model")
            lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert not [name for name in lm.state_dict() if "lora" in name or "base_layer" in name]
            ids = torch.tensor([[1, 2, 3, 4, 5]])
            with torch.no_grad():
                ours, theirs = model.policy.lm.backbone.model(ids).logits, lm(ids).logits
                start = tiny_agent(lm=tiny(family, vocab_size=N_TOKENS), policy_kwargs={"train": LoRA(r=4)})
                assert not torch.allclose(start.policy.lm.backbone.model(ids).logits, ours, atol=1e-2)
            assert torch.allclose(ours, theirs, atol=1e-4)
        model.learn(32, reset_num_timesteps=False)
        runs.append(run_state(model))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_merging_into_quantised_weights_is_refused(kind):
    model = build_model(tiny(), LoRA())
    layer = next(iter(adapted_layers(model).values())).get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.data.to(kind), requires_grad=False)
    with pytest.raises(ValueError, match=rf"Expected a weight of 16 bits or more to merge .* into, got {kind}"):
        merged_state_dict(model)


def test_adapters_are_float32_beside_frozen_weights_of_16_bits(tmp_path):
    make_policy().lm.backbone.model.save_pretrained(tmp_path / "model")
    spec = Pretrained(str(tmp_path / "model"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Expected trainable weights in float32, got torch\.bfloat16"):
        build_model(spec)
    model = build_model(spec, LoRA())
    kinds = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert kinds == {torch.float32} and model.get_input_embeddings().weight.dtype == torch.bfloat16
    agent = tiny_agent(lm=spec, policy_kwargs={"train": LoRA()})
    agent.learn(32)


def grads_of(policy, observations, actions):
    values, log_probs, entropy = policy.evaluate_actions(observations, actions)
    loss = (log_probs * torch.arange(1.0, 4.0)).sum() + values.square().sum() + entropy.sum()
    policy.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", ["all", LastLayers(1), LoRA()], ids=["all", "last", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_e3_gradient_checkpointing_is_on_and_changes_nothing(family, train):
    """Layers run again in the backward; loss and gradients are the same (E3)."""
    results, runs = [], []
    for on in (False, True):
        policy = make_policy(tiny(family), train=train, gradient_checkpointing=on)
        disturb(policy.lm.backbone)
        policy.set_training_mode(True)
        count = []
        _, inside, *_ = transformer_layers(policy.lm.backbone.model)[-1].modules()
        inside.register_forward_hook(lambda *args, count=count: count.append(1))
        results.append(grads_of(policy, observe(ROWS), torch.tensor([1, 2, 3])))
        runs.append(len(count))
        assert is_checkpointing(policy.lm.backbone.model) == on
    assert runs == [1, 2]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-6), name


def test_e3_gradient_checkpointing_trains_the_same_and_decodes_with_its_cache():
    trained = []
    for on in (False, True):
        check = CheckRatio()
        kwargs = {"policy_kwargs": {"gradient_checkpointing": on}}
        model = tiny_agent(rollout_buffer_kwargs={"micro_batch_tokens": 16}, **kwargs)
        model.learn(64, callback=check)
        assert max(check.largest) < 1e-5
        trained.append(weights(model))
    for name, weight in trained[0].items():
        assert torch.allclose(weight, trained[1][name], atol=1e-6), name
    model.policy.set_training_mode(True)  # in training mode, layers would drop the cache
    observations = observe(ROWS, 32)
    with torch.no_grad():
        for _ in range(2):
            actions, values, log_probs = model.policy(observations)
            expected = model.policy.evaluate_actions(observations, actions)
            assert torch.allclose(log_probs, expected[1], atol=1e-5) and torch.allclose(values, expected[0], atol=1e-5)


def test_quantisation_without_its_package_is_named(tmp_path):
    make_policy().lm.backbone.model.save_pretrained(tmp_path / "model")
    pytest.importorskip("accelerate")
    spec = Pretrained(str(tmp_path / "model"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"quantization requires bitsandbytes: `pip install"):
            build_model(spec, LoRA())
    spec.config = tiny()  # as after `build`; pickling only the config would lose the quantisation
    assert pickle.loads(pickle.dumps(spec)).name == str(tmp_path / "model")


def test_dispatched_weights_stay_where_they_are():
    """SB3 calls `policy.to(device)` in `_setup_model`; here the device "meta", which holds no values."""
    accelerate = pytest.importorskip("accelerate")
    policy = make_policy()
    accelerate.dispatch_model(policy.lm.backbone.model, {"": "cpu"}, force_hooks=True)
    assert {weight.device.type for weight in policy.to("meta").lm.backbone.parameters()} == {"cpu"}
    assert {weight.device.type for weight in make_policy().to("meta").lm.backbone.parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_is_refused():
    for train, message in (
        (LastLayers(3), "at most the model's 2 layers, got 3"),
        ("tail", "Expected `train` to be 'all', 'head', LastLayers"),
        (LoRA(target_modules=["wte"]), "weights of their own, got 'transformer.wte'"),
        (LoRA(target_modules=["lm_head"]), "weights of their own, got 'lm_head'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(tiny(), train)
    with pytest.raises(ValueError, match="Expected `n` to be positive, got 0"):
        LastLayers(0)
