"""`export`: the folder loads with transformers alone and generates the same texts (E9); tied weights stay tied (E7)."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from stable_baselines3 import PPO
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from agents import KLPenalty, Pretrained, word_tokenizer
from agents.checkpoints.hf_export import export
from agents.evaluation.generation import generate
from tests.helpers.training import tiny_agent, tiny_config
from textenv import TextEnv

WORDS = ("good", "bad", "film", "phone", "the", "a", "was", "is", "very", ".")
TEXTS = ("the film was", "a phone is", "good", "the bad phone is very")
LONGEST = 8


def words_agent(lm=None, **kwargs):
    tokenizer = word_tokenizer(WORDS)
    reward = lambda prompt, preds, done: float(sum(preds.ids)) if done else 0.0  # noqa: E731
    env = TextEnv(TEXTS, tokenizer, reward=reward, max_new_tokens=LONGEST)
    lm = lm or tiny_config(vocab_size=len(tokenizer), initializer_range=0.3)
    return tiny_agent(env, n_envs=8, lm=lm, **kwargs), tokenizer


@pytest.fixture(scope="module")
def trained():
    model, tokenizer = words_agent()
    return model.learn(128, callback=KLPenalty(0.05)), tokenizer


def greedy_by_transformers(lm, tokenizer):
    texts = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")
        out = lm.generate(**ids, max_new_tokens=LONGEST, do_sample=False, pad_token_id=0)
        texts.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return texts


def test_e9_the_folder_loads_alone_with_the_same_greedy_output(trained, tmp_path):
    model, tokenizer = trained
    assert export(model, tokenizer, tmp_path / "model") == tmp_path / "model"
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = [text.ids for text in generate(model, TEXTS, tokenizer, max_new_tokens=LONGEST, deterministic=True)]
    assert greedy_by_transformers(lm, loaded_tokenizer) == ours
    assert len({tuple(ids) for ids in ours}) > 1
    start = greedy_by_transformers(words_agent()[0].policy.lm.backbone.model, tokenizer)
    assert start != ours, "training has changed what it writes"


def test_e9_weights_are_those_of_the_policy_and_no_others(trained, tmp_path):
    model, tokenizer = trained
    export(model.policy, tokenizer, tmp_path / "model")
    lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = model.policy.lm.backbone.model.state_dict()
    assert ours.keys() == lm.state_dict().keys()
    assert all(torch.equal(ours[name], weight) for name, weight in lm.state_dict().items())
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".zip"))]


@pytest.mark.slow
def test_e9_in_a_process_that_knows_transformers_only(trained, tmp_path):
    model, tokenizer = trained
    export(model, tokenizer, tmp_path / "model")
    script = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
lm, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
out = lm.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
assert not {"agents", "textenv", "stable_baselines3"} & set(sys.modules)
print(json.dumps(out[0, ids["input_ids"].shape[1]:].tolist()))
"""
    command = [sys.executable, "-c", script, tmp_path / "model", TEXTS[0]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    [ours] = generate(model, TEXTS[:1], tokenizer, max_new_tokens=LONGEST, deterministic=True)
    assert json.loads(done.stdout) == ours.ids


@pytest.mark.parametrize("tied", [True, False])
def test_e7_tied_embeddings_stay_tied(tied, tmp_path):
    """Through training, saving by SB3, and export; untied ones become different."""
    model, tokenizer = words_agent(tiny_config(vocab_size=12, tie_word_embeddings=tied))
    model.learn(64)
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    loaded = PPO.load(stream, device="cpu")
    export(loaded, tokenizer, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for lm in (model.policy.lm.backbone.model, loaded.policy.lm.backbone.model, exported):
        embeddings, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        assert (embeddings is head) == tied
        assert torch.equal(embeddings, head) == tied
        assert torch.equal(embeddings, model.policy.lm.backbone.model.get_input_embeddings().weight)
    assert exported.config.tie_word_embeddings == tied


def test_e9_an_exported_model_trains_on(trained, tmp_path):
    """Loaded by `Pretrained(folder)`, it is the policy that was exported."""
    model, tokenizer = trained
    export(model, tokenizer, tmp_path / "model")
    again, _ = words_agent(Pretrained(str(tmp_path / "model")))
    for one, other in zip(model.policy.lm.backbone.parameters(), again.policy.lm.backbone.parameters()):
        assert torch.equal(one, other)
    again.learn(64)


def test_e9_embedding_rows_beyond_the_vocabulary_and_another_family(tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model, tokenizer = words_agent(config)
    model.learn(64)
    export(model, tokenizer, tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert lm.config.vocab_size == 16 and lm.lm_head.weight.shape[0] == 16
    ours = [text.ids for text in generate(model, TEXTS, tokenizer, max_new_tokens=LONGEST, deterministic=True)]
    theirs = greedy_by_transformers(lm, tokenizer)
    for text, one, other in zip(TEXTS, ours, theirs):
        assert one == other or max(other) >= len(tokenizer), text  # ours never samples embedding rows without a token


def test_e9_what_the_checkpoint_said_about_sampling_is_not_exported(tmp_path):
    """With a repetition penalty in its generation_config, the exported model would write other texts (E9, A4)."""
    start, tokenizer = words_agent()
    start.policy.lm.backbone.model.generation_config.repetition_penalty = 9.0
    start.policy.lm.backbone.model.save_pretrained(tmp_path / "start")
    model, _ = words_agent(Pretrained(str(tmp_path / "start")))
    export(model, tokenizer, tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = [text.ids for text in generate(model, TEXTS, tokenizer, max_new_tokens=LONGEST, deterministic=True)]
    assert greedy_by_transformers(lm, tokenizer) == ours
    assert greedy_by_transformers(model.policy.lm.backbone.model, tokenizer) != ours


def test_a_folder_is_replaced_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    folder = tmp_path / "model"
    export(model, None, folder)
    without = sorted(path.name for path in folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", fail)  # called after the model is written
        with pytest.raises(OSError, match="disk full"):
            export(model, tokenizer, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == without
    export(model, tokenizer, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "tokenizer.json").exists() and "tokenizer.json" not in without


def fail(*args, **kwargs):
    raise OSError("disk full")


def test_a_new_folder_appears_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export(model, tokenizer, tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []
    export(model, None, tmp_path / "deep" / "model")  # the model alone
    AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model")


def test_what_is_refused(trained, tmp_path):
    model, tokenizer = trained
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Expected a folder to write to, got the file"):
        export(model, tokenizer, tmp_path / "file")
    with pytest.raises(TypeError, match="Expected a Hugging Face tokenizer or None, got str"):
        export(model, "gpt2", tmp_path / "model")
    with pytest.raises(TypeError, match="Expected a model with an LMPolicy, got ActorCriticPolicy"):
        export(PPO("MlpPolicy", "CartPole-v1", device="cpu"), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()
