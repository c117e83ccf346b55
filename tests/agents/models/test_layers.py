"""`keep_first_layers`: the model that remains is the lower part of the whole one, and its config builds it."""

import copy

import pytest
import torch
from transformers import AutoModel

from agents.models.layers import keep_first_layers, transformer_layers
from tests.helpers.models import tiny

FAMILIES = ["gpt2", "llama", "gpt_neox", "opt", "bloom", "gemma3", "mamba"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_remains_reads_as_the_lower_layers_of_the_whole_model(family, tmp_path):
    torch.manual_seed(0)
    whole = AutoModel.from_config(tiny(family)).eval()
    upper = transformer_layers(whole)[-1]
    lower = copy.deepcopy(whole)
    keep_first_layers(lower, 1)
    ids = torch.tensor([[1, 5, 3, 7, 2]])
    seen = []

    def hand_on(module, args, kwargs, out):  # the slow way: all layers run, and the upper one returns what it was given
        seen.append(module)
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    handle = upper.register_forward_hook(hand_on, with_kwargs=True)
    with torch.no_grad():
        expected, found = (model(ids, use_cache=False).last_hidden_state for model in (whole, lower))
    handle.remove()
    assert seen == [upper]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    lower.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and len(transformer_layers(again)) == 1
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids, use_cache=False).last_hidden_state, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [0, 3])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(n):
    with pytest.raises(ValueError, match=f"Expected first_layers from 1 to the model's 2 layers, got {n}"):
        keep_first_layers(AutoModel.from_config(tiny("llama")), n)


def test_a_model_that_its_config_does_not_build_with_fewer_layers_is_refused():
    model = AutoModel.from_config(tiny("llama"))
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Expected a model whose config builds it with 1 of its layers, too"):
        keep_first_layers(model, 1)
