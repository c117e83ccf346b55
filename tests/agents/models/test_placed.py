"""Models with a device map, some of whose layers are offloaded to the disk, and quantised models."""

import pytest
import torch
from transformers import BitsAndBytesConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from agents import KLPenalty, LastLayers, LoRA, Pretrained, load_checkpoint, save_checkpoint
from tests.helpers.training import same_weights, tiny_agent, tiny_config, weights

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("placed")
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_config(tie_word_embeddings=False)).save_pretrained(path / "model")
    return path


def placed(folder, *on_disk):
    """Return a spec of the model with some of its parts offloaded to the disk."""
    parts = ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head"]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
    return Pretrained(folder / "model", device_map=device_map, offload_folder=str(folder / "offload"))


def trained(lm, reference=None, **kwargs):
    model = tiny_agent(lm=lm, policy_kwargs=kwargs)
    model.learn(48, callback=[] if reference is None else KLPenalty(0.1, reference=reference))
    return model


def in_memory(model):
    return {name: weight.detach().clone() for name, weight in model.policy.named_parameters() if not weight.is_meta}


def test_a_reference_on_the_disk_gives_the_same_penalty(folder):
    plain = trained(Pretrained(folder / "model"), Pretrained(folder / "model"))
    model = trained(Pretrained(folder / "model"), placed(folder, "transformer.h.0", "transformer.h.1"))
    assert same_weights(in_memory(plain), in_memory(model))


@pytest.mark.parametrize(
    ("train", "part"), [(LastLayers(1), "transformer.h.0"), (LastLayers(1), "lm_head"), (LoRA(r=2), "lm_head")]
)
def test_frozen_layers_may_lie_on_the_disk(folder, train, part):
    """The update is the same with a part on the disk below the trained layers, or above them."""
    plain, model = (trained(lm, train=train) for lm in (Pretrained(folder / "model"), placed(folder, part)))
    ours, theirs = in_memory(model), in_memory(plain)
    assert 0 < len(ours) < len(theirs)
    assert same_weights(ours, {name: theirs[name] for name in ours})
    fresh = in_memory(tiny_agent(lm=Pretrained(folder / "model"), policy_kwargs={"train": train}))
    assert not same_weights(ours, {name: fresh[name] for name in ours})


def test_what_lies_on_the_disk_stays_there(folder):
    """SB3 moves the policy in `_setup_model`: a plain model follows `to`, a model with a device map does not."""
    plain = tiny_agent(lm=Pretrained(folder / "model")).policy
    policy = tiny_agent(lm=placed(folder, "transformer.h.0"), policy_kwargs={"train": LastLayers(1)}).policy
    before = {name: weight.device.type for name, weight in policy.lm.backbone.named_parameters()}
    assert set(before.values()) == {"cpu", "meta"}
    for each in (plain, policy):
        each.to("meta")
    assert {weight.device.type for weight in plain.parameters()} == {"meta"}
    assert {name: weight.device.type for name, weight in policy.lm.backbone.named_parameters()} == before


@pytest.mark.parametrize("train", ["all", LoRA(r=2)])
def test_what_is_trained_must_be_in_memory(folder, train):
    with pytest.raises(ValueError, match=r"Expected trainable weights in memory, got \d+ .*'transformer.h.0"):
        tiny_agent(lm=placed(folder, "transformer.h.0"), policy_kwargs={"train": train})


def test_a_checkpoint_leaves_out_what_the_disk_has(folder, tmp_path):
    reference = placed(folder, "transformer.h.1")

    def agent():
        return tiny_agent(lm=placed(folder, "transformer.h.0"), policy_kwargs={"train": LastLayers(1)})

    whole = agent()
    whole.learn(48, callback=KLPenalty(0.1, reference=reference))
    half = agent()
    half.learn(32, callback=KLPenalty(0.1, reference=reference))
    save_checkpoint(half, tmp_path / "half")
    resumed = agent()
    load_checkpoint(resumed, tmp_path / "half")
    resumed.learn(16, callback=KLPenalty(0.1, reference=reference), reset_num_timesteps=False)
    assert same_weights(in_memory(whole), in_memory(resumed)) and resumed.num_timesteps == 48


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_base_stays_as_it_is_while_its_adapters_train(bits, tmp_path):
    """The policy's `to` does not move a quantised model, and a checkpoint resumes it; needs bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=33, max_position_embeddings=64, eos_token_id=0, **shape)).save_pretrained(
        tmp_path / "model"
    )
    spec = Pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**{bits: True}), device_map={"": "cpu"}
    )
    model, other, moved_away = (tiny_agent(lm=spec, policy_kwargs={"train": LoRA(r=2)}) for _ in range(3))
    moved_away.policy.to("meta")
    assert not any(weight.is_meta for weight in moved_away.policy.backbone.parameters())
    before = weights(model)
    model.learn(32, callback=KLPenalty(0.05))
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all("lora" in name or "critic" in name for name in moved)
    assert any(not after[name].is_floating_point() for name in after.keys() - moved)
    save_checkpoint(model, tmp_path / "saved")
    load_checkpoint(other, tmp_path / "saved")
    for agent in (model, other):
        agent.learn(16, callback=KLPenalty(0.05), reset_num_timesteps=False)
    assert same_weights(in_memory(model), in_memory(other))
