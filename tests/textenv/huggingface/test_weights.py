"""Model folders with missing or foreign weights: refused, as transformers would draw missing weights at random."""

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from agents import Pretrained, RewardModelCritic
from agents.models.pretrained import PretrainedRewardModel, build_model
from tests.helpers.command import run, settings, small_model
from tests.helpers.models import tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import tiny_config
from textenv.rewards.preference import Preference


def folder_of(tmp_path, config=None, auto_class=AutoModelForCausalLM):
    auto_class.from_config(config or tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, change_it):
    """Change the weights in a folder with a function."""
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    change_it(weights)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def lose(weights):
    del weights["transformer.h.1.mlp.c_fc.weight"], weights["transformer.h.1.mlp.c_fc.bias"]


def add(weights):
    weights["value_head.weight"] = torch.zeros(1, 16)


@pytest.mark.parametrize(
    ("change_it", "words"),
    [
        (lose, r"all weights of GPT2LMHeadModel in .*, got none for 'transformer\.h\.1\.mlp\.c_fc\.bias' and 1 more"),
        (add, r"the weights of GPT2LMHeadModel alone in .*, got 'value_head\.weight' besides.*save_pretrained"),
    ],
)
def test_a_missing_or_foreign_tensor_is_refused(change_it, words, tmp_path):
    folder = folder_of(tmp_path)
    for lm in (str(folder), Pretrained(str(folder))):
        build_model(lm)
    change(folder, change_it)
    for lm in (str(folder), folder, Pretrained(str(folder))):
        with pytest.raises(ValueError, match=words):
            build_model(lm)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "mamba", "t5", "bart", "marian"])
def test_whole_folders_of_other_families_load(family, tmp_path):
    """Tied weights and computed buffers are in no folder, and do not count as missing."""
    is_causal = family not in ("t5", "bart", "marian")
    config = tiny(family) if is_causal else tiny_seq2seq(family)
    folder = folder_of(tmp_path, config, AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM)
    build_model(str(folder))


def test_a_head_is_fresh_only_where_it_is_declared(tmp_path):
    folder = folder_of(tmp_path)
    with pytest.raises(ValueError, match=r"all weights of GPT2ForSequenceClassification .*'score\.weight'"):
        PretrainedRewardModel(str(folder)).build()
    with pytest.raises(ValueError, match="score"):
        RewardModelCritic(str(folder)).build(16)
    assert PretrainedRewardModel(str(folder), num_labels=1, pad_token_id=0).build().score.out_features == 1
    change(folder, lose)
    with pytest.raises(ValueError, match="c_fc"):
        PretrainedRewardModel(str(folder), num_labels=1).build()


def test_a_reward_of_random_weights_is_refused(tmp_path):
    folder = small_model(tmp_path / "small")  # a language model, without a score head
    with pytest.raises(ValueError, match="which would be random"):
        Preference(str(folder))
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    scorer.save_pretrained(folder)
    Preference(str(folder))


def test_the_command_refuses_before_it_trains(tmp_path, capfd):
    folder = small_model(tmp_path / "small")
    change(folder, lambda weights: weights.pop("transformer.ln_f.weight"))
    assert run("train", *settings(folder, tmp_path / "run"), "--quiet") == 2
    assert "'transformer.ln_f.weight', which would be random" in capfd.readouterr().err
