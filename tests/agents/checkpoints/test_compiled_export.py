"""`export` of a model inside `torch.compile`: the names and weights of the same model without it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agents import LoRA, char_tokenizer
from agents.checkpoints.hf_export import export
from agents.engines.protocol import named_weights
from tests.helpers.training import tiny_agent, tiny_config
from textenv import TextEnv

TOKENIZER = char_tokenizer(["abcd"])
IDS = torch.tensor([[1, 2, 3]])


def compiled(module):
    return torch.compile(module, backend="eager")


def model_in_place(agent):
    agent.policy.backbone.model.compile(backend="eager")


def model(agent):
    agent.policy.backbone.model = compiled(agent.policy.backbone.model)


def base_model(agent):
    lm = agent.policy.backbone.model
    lm.transformer = compiled(lm.transformer)


def layers(agent):
    blocks = agent.policy.backbone.model.transformer.h
    for number, block in enumerate(blocks):
        blocks[number] = compiled(block)


def policy(agent):
    agent.policy = compiled(agent.policy)


def make_agent(**kwargs):
    env = TextEnv(["a", "bc"], TOKENIZER, reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
    return tiny_agent(env, lm=tiny_config(vocab_size=12, initializer_range=0.3), **kwargs)


@pytest.mark.parametrize("train", ["all", LoRA(r=2)], ids=["all", "lora"])
@pytest.mark.parametrize("compile_part", [model_in_place, model, base_model, layers, policy])
def test_the_export_is_that_of_the_model_that_was_compiled(compile_part, train, tmp_path):
    agent = make_agent(policy_kwargs={"train": train})
    for name, weight in agent.policy.backbone.model.named_parameters():
        if ".lora_B." in name:  # zero at first: an adapter that changes nothing could be lost unnoticed
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = agent.policy.backbone.model(IDS).logits
    export(agent, TOKENIZER, tmp_path / "plain")
    compile_part(agent)
    export(agent, TOKENIZER, tmp_path / "compiled")
    export(agent.policy, TOKENIZER, tmp_path / "policy")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for folder in ("compiled", "policy"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name], plain[name]) for name in plain)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, logits)


def test_an_engine_gets_the_plain_names():
    agent = make_agent()
    with named_weights(agent.policy.backbone) as weights:
        names = [name for name, _ in weights]
    model(agent)
    layers(agent)
    with named_weights(agent.policy.backbone) as weights:
        assert [name for name, _ in weights] == names
