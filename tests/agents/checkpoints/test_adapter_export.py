"""The exported adapter: peft puts it on the model that the training began with, for the logits of the policy."""

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from agents import LoRA, Pretrained, export
from agents.models.pretrained import build_model
from tests.agents.models.test_expert_adapters import CONFIGS, IDS, N_TOKENS, disturb, logits_of
from tests.helpers.models import tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import tiny_agent

FILES = {"adapter_model.safetensors", "adapter_config.json"}
TRAINED = {
    "gpt2": (tiny("gpt2", vocab_size=N_TOKENS), LoRA(r=2)),  # whose weights are transposed
    "llama": (tiny("llama", vocab_size=N_TOKENS), LoRA(r=2, target_modules=["q_proj", "down_proj"])),
    "dora": (tiny("llama", vocab_size=N_TOKENS), LoRA(r=2, use_dora=True)),
    "rslora": (tiny("gpt2", vocab_size=N_TOKENS), LoRA(r=4, use_rslora=True)),
    **{family: (CONFIGS[family], LoRA(r=3)) for family in ("mixtral", "gpt_oss", "jetmoe")},
}


@pytest.mark.parametrize("name", TRAINED)
def test_it_reloads_on_its_base_and_the_merged_model_beside_it_too(name, tmp_path):
    config, train = TRAINED[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path / "base")
    model = tiny_agent(lm=Pretrained(str(tmp_path / "base")), policy_kwargs={"train": train})
    ours = model.policy.lm.backbone.model
    start = logits_of(ours)
    disturb(model.policy.lm.backbone, 0.1)
    moved = logits_of(ours)
    assert (moved - start).abs().max() > 0.1
    export(model, None, tmp_path / "model", adapter=True)
    folder = tmp_path / "model" / "adapter"
    assert {path.name for path in folder.iterdir()} == FILES
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(logits_of(base), start, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    assert torch.allclose(logits_of(loaded), moved, atol=1e-4)
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), moved, atol=1e-4)
    # What the error of `lm="adapter folder"` says to do.
    with pytest.raises(ValueError, match="merge_and_unload"):
        build_model(str(folder))
    peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(tmp_path / "other")
    assert torch.allclose(logits_of(build_model(str(tmp_path / "other"))), moved, atol=1e-4)


def test_an_encoder_decoder_and_a_compiled_model(tmp_path):
    """Inside `torch.compile` names have a part of their own, which must not be in the file."""
    model = tiny_agent(lm=tiny_seq2seq(), policy_kwargs={"train": LoRA(r=2)})
    lm = model.policy.lm.backbone.model
    lm.encoder.block[0] = torch.compile(lm.encoder.block[0])
    disturb(model.policy.lm.backbone, 0.1)
    export(model, None, tmp_path / "model", adapter=True)
    loaded, merged = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model") for _ in range(2))
    start = {name: weight for name, weight in lm.state_dict().items() if ".lora_" not in name}
    plain = {name.replace("_orig_mod.", "").replace(".base_layer", ""): weight for name, weight in start.items()}
    loaded.load_state_dict(plain)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "model" / "adapter")
    ours, theirs = (net.eval()(IDS, decoder_input_ids=IDS).logits for net in (loaded, merged))
    assert torch.allclose(ours, theirs, atol=1e-4)
    saved = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_2_SEQ_LM" and saved["base_model_name_or_path"] is None


@pytest.mark.parametrize("train", ["all", "head"])
def test_a_model_without_lora_says_so_and_writes_nothing(train, tmp_path):
    model = tiny_agent(policy_kwargs={"train": train})
    with pytest.raises(ValueError, match=r"Expected a model with LoRA to write its adapter, .* leave out `adapter`"):
        export(model, None, tmp_path / "model", adapter=True)
    assert not (tmp_path / "model").exists()
