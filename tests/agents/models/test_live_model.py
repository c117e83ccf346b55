"""Live models of transformers as `lm`: trained themselves, pickled as their config, or refused where that cannot be."""

import os
import pickle
import shutil

import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from agents import (
    EngineRollouts,
    KLPenalty,
    LastLayers,
    LMPolicy,
    LocalEngine,
    LoRA,
    Pretrained,
    Ranking,
    SeparateCritic,
    SequenceRolloutBuffer,
    TextVecEnv,
    load_checkpoint,
    save_checkpoint,
    train_reward_model,
    word_tokenizer,
)
from agents.models.pretrained import LiveModel, build_model
from agents.supervised.sft import tune
from tests.helpers.models import few, make_policy, tiny
from tests.helpers.training import same_weights, tiny_agent, tiny_config, tiny_env, weights


def live(config=None, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config or tiny_config())


def n_bytes(model, path):
    model.save(path)
    return os.path.getsize(path)


# Taken as it is


@pytest.mark.parametrize("train", few(["all", LoRA(r=2), "head", LastLayers(1)], 2), ids=str)
def test_it_trains_as_the_same_model_from_a_folder(tmp_path, train):
    """In training mode and with dropout, which transformers' own training would draw from."""
    noisy = tiny_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = live(noisy)
    model.save_pretrained(tmp_path / "model")
    model.train()
    slow = tiny_agent(lm=Pretrained(str(tmp_path / "model")), policy_kwargs={"train": train})
    agent = tiny_agent(lm=model, policy_kwargs={"train": train})
    assert agent.policy.lm.backbone.model is model
    before = weights(agent)
    for each in (slow, agent):
        each.learn(32, callback=KLPenalty(0.05))
    assert same_weights(weights(agent), weights(slow)) and not same_weights(before, weights(agent))
    assert (
        model.get_output_embeddings().weight.data_ptr()
        == dict(agent.policy.named_parameters())["lm.backbone.model.transformer.wte.weight"].data_ptr()
    )


@pytest.mark.parametrize("algorithm", few([PPO, A2C, TRPO], 1))
def test_saved_files_hold_its_weights_once_and_load(tmp_path, algorithm):
    config = tiny_config(n_embd=64)
    live(config).save_pretrained(tmp_path / "model")
    agent = tiny_agent(lm=live(config), algorithm=algorithm)
    spec = tiny_agent(lm=Pretrained(str(tmp_path / "model")), algorithm=algorithm)
    assert abs(n_bytes(agent, tmp_path / "live.zip") - n_bytes(spec, tmp_path / "spec.zip")) < 2000
    agent.learn(16)
    agent.save(tmp_path / "live.zip")
    shutil.rmtree(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "live.zip", env=agent.env, device="cpu")
    assert same_weights(weights(loaded), weights(agent))
    assert loaded.policy_kwargs["lm"].name is None  # a built `Pretrained`
    for each in (agent, loaded):
        each.learn(16)
    agent.policy.save(tmp_path / "policy.pt")
    again = type(agent.policy).load(tmp_path / "policy.pt", device="cpu")
    assert same_weights(again.state_dict(), agent.policy.state_dict())


def test_sb3s_own_constructor_takes_it_and_leaves_the_arguments_alone(tmp_path):
    arguments = {"lm": (model := live())}
    agent = PPO(
        LMPolicy,
        TextVecEnv(tiny_env(), 4),
        n_steps=4,
        batch_size=16,
        policy_kwargs=arguments,
        rollout_buffer_class=SequenceRolloutBuffer,
        device="cpu",
    )
    assert arguments == {"lm": model} and agent.policy.lm.backbone.model is model
    assert len(pickle.dumps(agent.policy_kwargs)) < 5000
    agent.save(tmp_path / "agent.zip")
    assert same_weights(weights(PPO.load(tmp_path / "agent.zip", device="cpu")), weights(agent))


def test_what_it_freezes_stays_frozen():
    model = live()
    model.transformer.wpe.requires_grad_(False)
    agent = tiny_agent(lm=model)
    before = model.transformer.wpe.weight.clone(), model.transformer.wte.weight.clone()
    agent.learn(16)
    assert torch.equal(model.transformer.wpe.weight, before[0])
    assert not torch.equal(model.transformer.wte.weight, before[1])


def test_a_checkpoint_resumes_it(tmp_path):
    whole, half, other = (tiny_agent(lm=live()) for _ in range(3))
    whole.learn(48, callback=KLPenalty(0.05))
    half.learn(32, callback=KLPenalty(0.05))
    save_checkpoint(half, tmp_path / "half")
    load_checkpoint(other, tmp_path / "half")
    other.learn(16, callback=KLPenalty(0.05), reset_num_timesteps=False)
    assert same_weights(weights(other), weights(whole))


@pytest.mark.parametrize("device_map", few(["auto", {"": "cpu"}], 1), ids=["auto", "cpu"])
def test_a_device_map_is_taken_too(tmp_path, device_map):
    pytest.importorskip("accelerate")
    live().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, dtype=torch.float32)
    agent, slow = (tiny_agent(lm=lm) for lm in (model, Pretrained(str(tmp_path / "model"))))
    for each in (agent, slow):
        each.learn(32, callback=KLPenalty(0.05))
    assert same_weights(weights(agent), weights(slow))
    agent.save(tmp_path / "agent.zip")
    assert same_weights(weights(PPO.load(tmp_path / "agent.zip", device="cpu")), weights(agent))


def test_an_encoder_decoder_is_taken_too(tmp_path):
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    agent = tiny_agent(lm=T5ForConditionalGeneration(T5Config(vocab_size=33, **shape, **ends)))
    agent.learn(16)
    agent.save(tmp_path / "agent.zip")
    assert same_weights(weights(PPO.load(tmp_path / "agent.zip", device="cpu")), weights(agent))


def test_frozen_16_bits_beside_adapters_stay_16_bits(tmp_path):
    """torch's `bfloat16()` leaves the config at float32, from which the loaded file would build its model."""
    model = live().bfloat16()
    assert model.config.dtype != torch.bfloat16
    agent = tiny_agent(lm=model, policy_kwargs={"train": LoRA(r=2)})
    agent.learn(16)
    agent.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert loaded.policy.lm.backbone.model.dtype == torch.bfloat16
    assert same_weights(weights(loaded), weights(agent))


# In other places


def test_reference_and_critic_of_their_own(tmp_path):
    config = tiny_config()
    live(config, 1).save_pretrained(tmp_path / "other")
    agents = []
    for other in (lambda: live(config, 1), lambda: Pretrained(str(tmp_path / "other"))):
        agents.append(tiny_agent(lm=live(config), policy_kwargs={"critic": SeparateCritic(other())}))
        agents[-1].learn(32, callback=KLPenalty(0.05, reference=other()))
    assert same_weights(*map(weights, agents))
    size = n_bytes(agents[0], tmp_path / "live.zip") - n_bytes(agents[1], tmp_path / "spec.zip")
    assert abs(size) < 2000
    assert same_weights(weights(PPO.load(tmp_path / "live.zip", device="cpu")), weights(agents[0]))


def test_a_model_in_two_roles_is_refused():
    model = live()
    agent = tiny_agent(lm=model)
    with pytest.raises(ValueError, match="of its own as reference, got a live GPT2LMHeadModel with weights of the pol"):
        agent.learn(16, callback=KLPenalty(0.05, reference=model))
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match="of its own as critic, got a live GPT2Model with weights of the policy"):
        tiny_agent(lm=model, policy_kwargs={"critic": SeparateCritic(model)})


def test_a_frozen_model_is_not_trained_without_a_word():
    reference = live()
    tiny_agent(lm=live()).learn(16, callback=KLPenalty(0.05, reference=reference))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel with a weight to train, got one whose weights are all froz"):
        tiny_agent(lm=reference)
    tiny_agent(lm=reference.requires_grad_(True))


@pytest.mark.slow
def test_an_engine_in_another_process_gets_its_config_alone(monkeypatch):
    def refuse(self, protocol):
        raise TypeError("Expected a config to travel, got a model.")

    monkeypatch.setattr(GPT2LMHeadModel, "__reduce_ex__", refuse)
    agent = tiny_agent(lm=live())
    before = weights(agent)
    with LocalEngine(live(seed=1), vocab_size=33) as engine:
        agent.learn(16, callback=EngineRollouts(engine))
    assert not same_weights(before, weights(agent))


@pytest.mark.slow
def test_stages_train_it(tmp_path):
    tokenizer = word_tokenizer(["good", "bad"])
    model = live(tiny_config(vocab_size=len(tokenizer)))
    before = model.transformer.wte.weight.clone()
    texts = ["good bad", "bad good"] * 64
    tune(model, texts, tmp_path / "tuned", tokenizer=tokenizer, learning_rate=1e-2, progress_bar=False)
    assert not torch.equal(model.transformer.wte.weight, before)
    config = tiny_config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0)
    judge = AutoModelForSequenceClassification.from_config(config)
    before = judge.score.weight.clone()
    train_reward_model(judge, tokenizer, [Ranking(("good", "bad"))] * 16, tmp_path / "judge", progress_bar=False)
    assert not torch.equal(judge.score.weight, before)


# Refused


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(live(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


def injected():
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = live()
    model.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    return model


def quantised():
    model = live()
    model.hf_quantizer = object()  # as transformers' `from_pretrained` leaves it with a `quantization_config`
    return model


def widened():
    model = live()
    model.lm_head = nn.Linear(16, 50, bias=False)  # without `resize_token_embeddings`, which changes the config
    return model


def mixed():
    model = live().bfloat16().requires_grad_(False)
    model.transformer.ln_f.float()
    return model


class Changed(GPT2LMHeadModel):
    """A user's own class, whose forward a file would not know."""


REFUSED = {
    "peft": (adapted, r"without adapters of peft, got PeftModel: merge them"),
    "injected": (injected, r"without adapters of peft, got Linear at 'transformer.h.0.attn.c_attn': merge them"),
    "quantised": (quantised, r"weights in floats, got a quantised GPT2LMHeadModel.*quantization_config=.*GGUF"),
    "half": (lambda: live().half(), r"trainable weights in float32, got torch.float16 .*call model.float\(\)"),
    "mixed": (mixed, r"of one type of float, .*'transformer.ln_f.bias' and 1 more weights differ"),
    "widened": (widened, r"as its config builds it, .*'lm_head.weight' and 0 more weights differ"),
    "class": (lambda: Changed(tiny_config()), r"got Changed in the place of GPT2LMHeadModel\. A file that `save`"),
    "trunk": (lambda: GPT2Model(tiny_config()), r"got GPT2Model in the place of GPT2LMHeadModel"),
    "wrapper": (lambda: nn.Sequential(live()), r"got another module, Sequential: pass the model of transformers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_file_could_not_build_again_is_refused(what):
    make, words = REFUSED[what]
    train = LoRA(r=2) if what == "mixed" else "all"
    with pytest.raises((TypeError, ValueError), match=words):
        tiny_agent(lm=make(), policy_kwargs={"train": train})


def test_a_resized_model_is_taken(tmp_path):
    model = live(tiny_config(vocab_size=20))
    model.resize_token_embeddings(33)
    agent = tiny_agent(lm=model)
    agent.save(tmp_path / "agent.zip")
    assert same_weights(weights(PPO.load(tmp_path / "agent.zip", device="cpu")), weights(agent))


def test_the_check_draws_no_random_number_and_keeps_the_config():
    model = LlamaForCausalLM(tiny("llama"))
    config = model.config.to_dict()
    torch.manual_seed(0)
    spec = LiveModel(model)
    assert spec.build() is model is build_model(model)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert model.config.to_dict() == config and repr(spec) == "LiveModel(LlamaForCausalLM)"
    assert len(pickle.dumps(spec)) < 5000
    assert make_policy(pickle.loads(pickle.dumps(spec))).lm.backbone.model.dtype == torch.float32
