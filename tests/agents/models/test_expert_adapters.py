"""Adapters of mixtures of experts, DoRA and rsLoRA: right by hand, equal to the merged model, and they learn."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    Zamba2Config,
)

from agents import KLPenalty, LoRA, Pretrained, export, load_checkpoint, save_checkpoint
from agents.models.pretrained import build_model
from agents.models.trainable import adapted_layers, adapters_off, merged_state_dict, set_trainable
from tests.helpers.models import (
    COMMON,
    GATED,
    LAYERS,
    N_TOKENS,
    CheckRatio,
    disturb,
    few,
    make_policy,
    make_ppo,
    observe,
    tiny,
    tiny_mixture,
)
from tests.helpers.training import run_state, tiny_agent, weights

MOE = {"initializer_range": 0.3, **COMMON, **GATED, "num_experts_per_tok": 2}
HEAD = {"head_dim": 8}
SMALL = {"moe_intermediate_size": 8}  # of each expert
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

CONFIGS = {
    "mixtral": tiny_mixture(),
    "deepseek_v3": DeepseekV3Config(
        **{**MOE, **SMALL, **DEEPSEEK, "num_key_value_heads": 2},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "qwen3_moe": Qwen3MoeConfig(**MOE, **HEAD, **SMALL, num_experts=4),
    "olmoe": OlmoeConfig(**MOE, num_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**MOE, **SMALL, num_experts=4, shared_expert_intermediate_size=8),
    "gpt_oss": GptOssConfig(
        **MOE, **HEAD, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "granitemoe": GraniteMoeConfig(**MOE, num_local_experts=4),
    "phimoe": PhimoeConfig(**MOE, num_local_experts=4, router_jitter_noise=0.0),
    "llama4": Llama4TextConfig(
        **MOE, **HEAD, num_local_experts=4, intermediate_size_mlp=16, interleave_moe_layer_step=1
    ),
    "jetmoe": JetMoeConfig(
        **{k: v for k, v in MOE.items() if k not in ("num_attention_heads", "num_key_value_heads")},
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    ),
}
ADAPTED = {  # modules of the last layer with an adapter; of each expert stack, one per weight
    "mixtral": 4 + 1 + 2,  # attention, router, experts
    "deepseek_v3": 5 + 1 + 2 + 3,  # the last three are the shared expert
    "qwen3_moe": 4 + 1 + 2,
    "olmoe": 4 + 1 + 2,
    "qwen2_moe": 4 + 1 + 2 + 3 + 1,  # the last is the gate of the shared expert
    "gpt_oss": 4 + 1 + 2,
    "granitemoe": 4 + 1 + 2,
    "phimoe": 4 + 1 + 2,
    "llama4": 4 + 1 + 2 + 3,
    "jetmoe": 1 + 2 * 3,  # experts and a router in attention, too
}
IDS = torch.randint(0, N_TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def plain_and_adapted(config, train):
    """Return a model, and the same model with adapters."""
    torch.manual_seed(0)
    plain = build_model(copy.deepcopy(config))
    torch.manual_seed(0)
    return plain, build_model(copy.deepcopy(config), train)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_linear_layers_experts_and_routers_get_adapters_that_merge(family):
    """The adapters start as nothing, all get a gradient, and off they leave the model as it was."""
    plain, model = plain_and_adapted(CONFIGS[family], LoRA(r=3))
    start = logits_of(plain)
    assert torch.equal(logits_of(model), start)
    last = [name for name in adapted_layers(model) if ".1." in name]
    assert len(last) == ADAPTED[family]
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    model.eval()(IDS).logits.logsumexp(-1).sum().backward()
    # PhiMoE's router weighs an expert that is clearly ahead by 1, whatever its logit: no gradient in this sharp model.
    exempt = "mlp.router." if family == "phimoe" else "nothing"
    second = [p for name, p in model.named_parameters() if ".lora_B." in name and exempt not in name]
    assert all(weight.grad.abs().max() > 0 for weight in second)
    disturb(model, 0.1)
    ours = logits_of(model)
    assert (ours - start).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits_of(model), start)
    merged = merged_state_dict(model)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert torch.allclose(logits_of(plain), ours, atol=1e-4)


def by_hand(a, b, scale, shape):
    """Return scale B A of each expert, (E, out, in), or its transpose where the weight has that shape.

    peft keeps A as (rank * E, in), an expert's rows side by side, and B as (out, rank * E), its columns E apart.
    """
    n_experts = shape[0]
    rank = a.shape[0] // n_experts
    product = torch.stack(
        [b[:, expert::n_experts] @ a[expert * rank : (expert + 1) * rank] for expert in range(n_experts)]
    )
    return scale * (product if product.shape == shape else product.transpose(1, 2))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # the second has its weights as (E, in, out)
def test_an_expert_s_weight_is_w_plus_alpha_over_r_b_a(family):
    plain, model = plain_and_adapted(CONFIGS[family], LoRA(r=2, alpha=6))
    disturb(model, 0.1)
    base, merged = plain.state_dict(), merged_state_dict(model)
    for name, layer in adapted_layers(model).items():
        if "experts" in name:
            key = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            assert a.shape[0] == b.shape[1] == 4 * 2
            assert torch.allclose(merged[key], base[key] + by_hand(a, b, 3.0, base[key].shape), atol=1e-6)
            assert not torch.allclose(merged[key], base[key], atol=1e-2)


@pytest.mark.parametrize("family", few(["mixtral", "deepseek_v3", "qwen3_moe", "olmoe"], 2))
def test_a1_a7_rollouts_of_experts_with_adapters_have_ratio_1_from_their_cache(family):
    """Before and after updates, with a KL penalty that reads the model without adapters (A1, A7)."""
    check = CheckRatio()
    model = make_ppo(CONFIGS[family], policy_kwargs={"train": LoRA(r=4)}, learning_rate=1e-2)
    assert model.policy.lm.use_cache
    disturb(model.policy.lm.backbone, 0.05)
    model.learn(3 * 48, callback=[check, KLPenalty(0.1)])
    assert len(check.largest) == 3 and max(check.largest) < 1e-5


def test_a_cached_step_of_experts_with_adapters_reads_one_token(monkeypatch):
    """A forward replaces the experts' weights for a moment, which must not count as a change of the weights."""
    policy = make_policy(CONFIGS["mixtral"], train=LoRA())
    read = policy.lm.rollout_cache.growth
    grown = []
    monkeypatch.setattr(policy.lm.rollout_cache, "growth", lambda *args: grown.append(read(*args)) or grown[-1])
    for since in ([], [5], [5, 6], [5, 6, 7]):
        with torch.no_grad():
            policy(observe([([1, 2, 3], since), ([4], since)]))
    assert [growth.tolist() for growth in grown] == [[-1, -1], [1, 1], [1, 1], [1, 1]]


def test_e3_gradient_checkpointing_of_experts_with_adapters_changes_nothing():
    gradients = []
    for on in (False, True):
        policy = make_policy(CONFIGS["mixtral"], train=LoRA(r=2), gradient_checkpointing=on)
        disturb(policy.lm.backbone, 0.1)
        policy.set_training_mode(True)
        _, log_probs, _ = policy.evaluate_actions(observe([([3, 1], [2, 5]), ([4], [])]), torch.tensor([1, 2]))
        log_probs.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("experts" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


TRAINED = {
    "mixtral": (CONFIGS["mixtral"], LoRA(r=2)),
    "dora": (tiny("llama", vocab_size=N_TOKENS), LoRA(r=2, use_dora=True)),
    "rslora": (tiny("gpt2", vocab_size=N_TOKENS), LoRA(r=4, use_rslora=True)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_e8_e9_checkpoints_hold_the_adapters_and_exports_merge_them(name, tmp_path):
    config, train = TRAINED[name]

    def build(seed=0):
        return tiny_agent(lm=copy.deepcopy(config), seed=seed, policy_kwargs={"train": train})

    model = build()
    start = weights(model)
    model.learn(32)
    moved = {key for key, weight in weights(model).items() if not torch.equal(weight, start[key])}
    assert all(any(part in key for key in moved) for part in (["experts"] if name == "mixtral" else ["lora_B"]))
    save_checkpoint(model, tmp_path / "saved")
    resumed = build(seed=7)
    load_checkpoint(resumed, tmp_path / "saved")
    disturb(model.policy.lm.backbone, 0.1)
    export(model, None, tmp_path / "model")
    lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits_of(lm), logits_of(model.policy.lm.backbone.model), atol=1e-4)
    load_checkpoint(model, tmp_path / "saved")
    for run in (model, resumed):
        run.learn(32, reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # GPT-2's weights are transposed, and have biases
@pytest.mark.parametrize("rank_stable", [False, True])
def test_dora_scales_each_row_to_its_magnitude(family, rank_stable):
    """By hand: V = W + s B A, and the merged row of each output is m V / |V|; at the start m = |W|."""
    plain, model = plain_and_adapted(tiny(family), LoRA(r=4, alpha=6, use_dora=True, use_rslora=rank_stable))
    assert torch.allclose(logits_of(model), logits_of(plain), atol=1e-5)
    disturb(model, 0.1)
    ours, merged, base = logits_of(model), merged_state_dict(model), plain.state_dict()
    scale = 6 / 2 if rank_stable else 6 / 4  # the root of 4
    for name, layer in adapted_layers(model).items():
        w = base[f"{name}.weight"].T if family == "gpt2" else base[f"{name}.weight"]  # (out, in)
        v = w + scale * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        assert not torch.allclose(magnitude, w.norm(dim=1), atol=1e-2)
        rows = torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(magnitude, v, strict=True)])
        assert torch.allclose(merged[f"{name}.weight"], rows.T if family == "gpt2" else rows, atol=1e-5)
    assert merged.keys() == base.keys()
    with adapters_off(model):
        assert torch.equal(logits_of(model), logits_of(plain))
    plain.load_state_dict(merged)
    assert torch.allclose(logits_of(plain), ours, atol=1e-4)


def test_a1_dora_has_ratio_1_and_trains_its_magnitudes():
    check = CheckRatio()
    model = make_ppo(tiny("llama"), policy_kwargs={"train": LoRA(r=4, use_dora=True)}, learning_rate=1e-2)
    before = weights(model)
    model.learn(3 * 48, callback=[check, KLPenalty(0.1)])
    assert max(check.largest) < 1e-5
    magnitudes = [name for name in before if "lora_magnitude_vector" in name]
    assert magnitudes and all(not torch.equal(weights(model)[name], before[name]) for name in magnitudes)


def test_falcon_s_own_linear_layers_get_low_rank_adapters():
    """They derive from torch's and compute the same; a router that derives from it does not."""
    config = FalconConfig(**COMMON, **LAYERS, attn_implementation="eager")
    model = build_model(config, LoRA())
    kinds = {type(layer).__name__ for layer in adapted_layers(model).values()}
    assert kinds == {"Linear"} and len(adapted_layers(model)) == 2 * 4
    kinds = {
        name: type(layer).__name__ for name, layer in adapted_layers(build_model(CONFIGS["phimoe"], LoRA())).items()
    }
    assert kinds["model.layers.0.mlp.router"] == "ParamWrapper"


class Grouped(torch.nn.Linear):
    """Multiplies each half of a state by its own half of the weight, as DeepSeek-V4's grouped projection does."""

    def forward(self, x):
        x = x.reshape(*x.shape[:-1], 2, self.in_features)
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features)).flatten(-2)


def test_a_layer_that_only_derives_from_a_linear_one_is_adapted_by_its_weight():
    torch.manual_seed(0)
    plain = build_model(tiny("llama"))
    plain.model.layers[1].mlp.gate_proj = Grouped(8, 32, bias=False)
    model = copy.deepcopy(plain)
    set_trainable(model, LoRA(r=2))
    assert type(model.model.layers[1].mlp.gate_proj).__name__ == "ParamWrapper"
    disturb(model, 0.1)
    plain.load_state_dict(merged_state_dict(model))
    assert torch.allclose(logits_of(plain), logits_of(model), atol=1e-4)


def test_chosen_targets():
    mixtral = CONFIGS["mixtral"]
    model = build_model(mixtral, LoRA(target_modules=["q_proj", "experts.down_proj"]))
    assert [name.split(".", 3)[3] for name in adapted_layers(model)] == 2 * ["self_attn.q_proj", "mlp.experts"]
    model = build_model(mixtral, LoRA(use_dora=True, target_modules=["q_proj", "v_proj"]))
    assert len(adapted_layers(model)) == 4
    for train, message in (
        (LoRA(target_modules=["q_proj", "w1"]), r"MixtralForCausalLM's layers, down_proj, .*, got 'w1'"),
        (LoRA(use_dora=True), r"Expected linear layers for LoRA\(use_dora=True\), got 'model\.layers\.0\.mlp\."),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(mixtral, train)


def test_options_of_peft_that_are_refused():
    with pytest.raises(ValueError, match=r"LoRA without modules_to_save, got \['lm_head'\]: train='head'"):
        LoRA(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"a list of endings of names, got 'all-linear': .* leave it out"):
        LoRA(target_modules="all-linear")


class Wrapped:
    """A spec whose model has adapters of peft already."""

    def __init__(self, how):
        self.how = how

    def build(self):
        config = peft.LoraConfig(r=2, target_modules=["c_attn"])
        model = AutoModelForCausalLM.from_config(tiny())
        if self.how == "wrapped":
            return peft.get_peft_model(model, config)
        peft.inject_adapter_in_model(config, model, "mine")
        return model


@pytest.mark.parametrize("how", ["wrapped", "injected"])
@pytest.mark.parametrize("train", ["all", "head", LoRA(), None], ids=str)
def test_a_model_that_peft_has_changed_is_refused(how, train):
    """A wrapped one failed with an AttributeError; an injected one had no reference, and under its name no export."""
    found = {"wrapped": "PeftModel: merge", "injected": r"Linear at 'transformer\.h\.0\.attn\.c_attn': merge"}[how]
    with pytest.raises(ValueError, match=rf"Expected a model without adapters of peft, got {found}.*train=LoRA"):
        build_model(Wrapped(how), train)


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    Wrapped("wrapped").build().save_pretrained(tmp_path / "adapter")
    for lm in (str(tmp_path / "adapter"), Pretrained(str(tmp_path / "adapter"))):
        with pytest.raises(
            ValueError, match=r"Expected the folder of a whole model, got '.*adapter', .*merge_and_unload"
        ):
            build_model(lm)


# Weights that get no adapter by default


def adapted_names(config):
    return {name.rpartition(".")[2] for name in adapted_layers(build_model(config, LoRA()))}


def test_mamba_s_output_layers_get_none_since_its_kernels_read_their_weights():
    assert adapted_names(tiny("mamba")) == {"in_proj", "x_proj", "dt_proj"}


def test_weights_that_several_layers_share_get_none_and_are_refused_if_named():
    """Zamba-2 repeats attention blocks: merging an adapter of one into the shared weight would change the others."""
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    mamba = {"mamba_d_state": 4, "n_mamba_heads": 2, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 4}
    blocks = {"layers_block_type": ["mamba", "hybrid", "hybrid", "mamba"], "num_mem_blocks": 1}
    config = Zamba2Config(**shape, **mamba, **blocks, intermediate_size=32, vocab_size=40, pad_token_id=0)
    names = adapted_names(config)
    assert "in_proj" in names and "q_proj" not in names
    with pytest.raises(ValueError, match=r"weights of their own, got '.*q_proj', whose weight another layer has, too"):
        build_model(config, LoRA(target_modules=["q_proj"]))


def test_recurrent_gemma_s_gates_get_none_since_their_module_keeps_a_state():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "lru_width": 16}
    config = RecurrentGemmaConfig(**shape, intermediate_size=32, vocab_size=40, block_types=["recurrent", "recurrent"])
    names = adapted_names(config)
    assert "linear_x" in names and "rg_lru" not in names
