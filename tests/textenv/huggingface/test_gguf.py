"""GGUF files in the place of a model's name: loaded as transformers loads them, trained, saved, and refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from stable_baselines3 import PPO
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from agents import (
    KLPenalty,
    LoRA,
    Pretrained,
    RewardModelCritic,
    SeparateCritic,
    export,
    load_checkpoint,
    make_agent,
    save_checkpoint,
)
from agents.models.pretrained import PretrainedRewardModel, build_model
from agents.small_models.demo_model import model_folder
from tests.helpers.command import run, settings
from tests.helpers.models import few
from tests.helpers.training import same_weights, weights
from tests.helpers.weights.tiny_gguf import TOKENS, tiny_llama, write_gguf
from textenv import Preds, Prompt, TextEnv
from textenv.huggingface.weights import check_name
from textenv.rewards.likelihood import Likelihood
from textenv.text.named_tokenizer import read_tokenizer

pytest.importorskip("gguf")

ROW = torch.tensor([[3, 5, 7, 2, 28]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


def reward(prompt, preds, done):
    return preds.text.count("a") if done else 0.0


def agent(file, **kwargs):
    """Return an agent whose model and tokenizer come from the file."""
    env = TextEnv(["ab", "c d"], file, reward=reward, max_new_tokens=4)
    return make_agent(
        env, Pretrained(file), n_envs=4, seed=0, device="cpu", learning_rate=1e-2, n_epochs=2, batch_size=16, **kwargs
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=ROW).logits


def test_the_logits_are_those_of_transformers(file, tmp_path):
    folder, _, name = file.rpartition("/")
    slow = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    for lm in (file, Pretrained(file), Pretrained(folder, gguf_file=name), Pretrained(file, device_map="auto")):
        model = build_model(lm)
        assert torch.equal(logits(model), logits(slow))
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    # As the model was before 8 bits: 127 steps to the largest of 32 numbers of up to 1 leave an error of 1/254 each.
    exact = logits(tiny_llama())
    assert 0 < float((logits(slow) - exact).norm() / exact.norm()) < 0.05


def test_the_tokenizer_is_the_files_own(file, make_env):
    tokenizer = read_tokenizer(file)
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer.encode("ab c") == [TOKENS.index("ab"), TOKENS.index("Ġ"), TOKENS.index("c")]
    assert make_env(tokenizer=file).tokenizer.eos_token_id == 0


@pytest.mark.parametrize("train", few(["all", LoRA(r=2)], 1), ids=["all", "lora"])
def test_it_trains_resumes_loads_and_exports_a_plain_folder(file, tmp_path, train):
    own = shutil.copy(file, tmp_path / "own.gguf")
    model = agent(own, policy_kwargs={"train": train})
    before = weights(model)
    model.learn(32, callback=KLPenalty(0.05))
    assert not same_weights(before, weights(model))
    save_checkpoint(model, tmp_path / "saved")
    other = agent(own, policy_kwargs={"train": train})
    load_checkpoint(other, tmp_path / "saved")
    for each in (model, other):
        each.learn(16, callback=KLPenalty(0.05), reset_num_timesteps=False)
    assert same_weights(weights(model), weights(other))

    model.save(tmp_path / "agent.zip")
    Path(own).unlink()
    assert same_weights(weights(PPO.load(tmp_path / "agent.zip", device="cpu")), weights(model))

    folder = export(model, read_tokenizer(file), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in (folder / "config.json").read_text() and "gguf" not in str(plain.config)
    with torch.no_grad():
        ours = model.policy.lm.backbone.model(input_ids=ROW).logits
    torch.testing.assert_close(logits(plain), ours, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).encode("ab c") == read_tokenizer(file).encode("ab c")


def test_an_adapter_trained_on_it_reloads_on_it(file, tmp_path):
    """peft looks for a folder by the name in the adapter's files, and takes the name of the file as an argument."""
    peft = pytest.importorskip("peft")
    model = agent(file, policy_kwargs={"train": LoRA(r=2)})
    model.learn(32)
    export(model, None, tmp_path / "plain", adapter=True)
    ours = logits(model.policy.lm.backbone.model)
    assert (ours - logits(Pretrained(file).build())).abs().max() > 1e-3
    on_base = peft.PeftModel.from_pretrained(Pretrained(file).build(), tmp_path / "plain" / "adapter")
    torch.testing.assert_close(logits(on_base), ours, atol=1e-5, rtol=1e-5)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain" / "adapter", gguf_file=Path(file).name)
    torch.testing.assert_close(logits(alone), ours, atol=1e-5, rtol=1e-5)


def test_transformers_alone_would_not_save_it(file, tmp_path):
    """The reason why weights are asked for as floats; where this fails, `as_floats` may go.

    Such a model is refused as `lm`, too.
    """
    pytest.importorskip("transformers", minversion="5.23")
    folder, _, name = file.rpartition("/")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got a quantised LlamaForCausalLM.*or the path of its GGUF file"):
        build_model(model)


def test_reference_critic_and_rewards_take_it(file):
    plain = agent(file, policy_kwargs={"critic": SeparateCritic(file)})
    plain.learn(16, callback=KLPenalty(0.05, reference=file))
    assert plain.policy.lm.critic.trunk.embed_tokens.num_embeddings == len(TOKENS)
    head = build_model(PretrainedRewardModel(file, num_labels=1), train=None)
    assert float(head(input_ids=ROW).logits.abs()) < 10  # a fresh head of one score
    with pytest.raises(ValueError, match=r"all weights of .*ForSequenceClassification in '.*tiny\.gguf', got none"):
        RewardModelCritic(file).build(32)
    tokenizer = read_tokenizer(file)
    assert Likelihood(file)(Prompt("ab"), Preds(tokenizer, tokenizer.encode("c")), True) < 0


NAMES = {  # what takes the name of a model
    "model": lambda name: build_model(name),
    "spec": lambda name: Pretrained(name).build(),
    "critic": lambda name: SeparateCritic(name).build(8),
    "reward": lambda name: Likelihood(name),
    "tokenizer": lambda name: read_tokenizer(name),
    "command": lambda name: model_folder(name),
    "check": lambda name: check_name(name),
}


@pytest.mark.parametrize("what", NAMES)
def test_what_is_none_is_refused_by_name(what, tmp_path):
    (tmp_path / "text.gguf").write_text("<html>not found</html>")
    (tmp_path / "empty.gguf").touch()
    for name, words in {
        "nowhere": r"GGUF file, got '.*nowhere\.gguf': there is no such file.*gguf_file=",
        "text": r"begins with b'GGUF', got '.*text\.gguf', which begins with b'<htm': is it a download that failed",
        "empty": r"got '.*empty\.gguf', which begins with b''",
    }.items():
        with pytest.raises(ValueError, match=words):
            NAMES[what](str(tmp_path / f"{name}.gguf"))


def test_what_transformers_does_not_read_is_refused_by_name(file, tmp_path):
    other = str(write_gguf(tmp_path / "other.gguf", architecture="clip"))
    whole = Path(file).read_bytes()
    cut = []
    for n_bytes in (5, 30, 500, len(whole) // 2, len(whole) - 100):
        cut.append(str(tmp_path / f"{n_bytes}.gguf"))
        Path(cut[-1]).write_bytes(whole[:n_bytes])
    for name in (other, *cut):
        with pytest.raises(
            ValueError, match=r"GGUF file that transformers reads, got '.*\.gguf': \w*[eE]rror: .+\. Is it"
        ):
            Pretrained(name).build()
    with pytest.raises(ValueError, match=r"architecture clip is not supported"):
        read_tokenizer(other)


def test_the_bar_of_unpacking_shows_as_transformers_other_bars_do(file, monkeypatch, capfd):
    own = modeling_gguf_pytorch_utils.tqdm
    for shows in (True, False):
        monkeypatch.setattr(transformers_logging, "_tqdm_active", shows)
        build_model(file)
        assert ("de-quantizing" in capfd.readouterr().err) == shows
    with pytest.raises(ValueError):
        build_model("no.gguf")
    assert modeling_gguf_pytorch_utils.tqdm is own


def test_an_adapter_beside_it_is_refused(file, tmp_path):
    """transformers would put it into the model (`modeling_utils.maybe_load_adapters`)."""
    shutil.copy(file, tmp_path / "tiny.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter of peft"):
        build_model(str(tmp_path / "tiny.gguf"))


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "folder.gguf")
    assert torch.equal(logits(build_model(str(tmp_path / "folder.gguf"))), logits(tiny_llama()))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("ab\nc d\n")


def test_a_command_takes_it(file, here, capfd):
    assert run("generate", file, "--prompts", "p.txt", "--max_new_tokens", "3") == 0
    out, err = capfd.readouterr()
    assert out.count('"text"') == 2 and "quantizing" not in err  # no bar that --quiet would have to silence
    assert run("generate", "no.gguf", "--prompts", "p.txt") == 2
    assert "got 'no.gguf': there is no such file" in capfd.readouterr().err
    folder = Path(file).parent
    assert run("generate", folder, "--prompts", "p.txt") == 2
    assert f"got {folder}, with neither but tiny.gguf: name the file, {file}." in capfd.readouterr().err


@pytest.mark.slow
def test_the_commands_take_it(file, here, capfd):
    assert run("doctor", "--model", file) == 0
    assert "result     exact" in capfd.readouterr().out
    task = ["--env.id=text", "--env.prompts=p.txt", "--env.reward={id: length, args: {target: 3}}"]
    assert run("train", *settings(file, "run", rollouts=1), *task, f"--kl.reference={file}") == 0
    assert run("evaluate", "run", "--n_prompts", "2") == 0
    assert run("export", "run", "plain") == 0
    assert AutoModelForCausalLM.from_pretrained("plain").config.model_type == "llama"
    assert run("sft", "--model", file, "--data", "p.txt", "--out", "tuned") == 0
    assert AutoModelForCausalLM.from_pretrained("tuned").dtype == torch.float32
    Path("labels.jsonl").write_text("".join(f'{{"text": "{text}", "label": {n}}}\n' for n, text in enumerate("abcd")))
    assert run("reward-model", "--model", file, "--data", "labels.jsonl", "--out", "judge") == 0
    assert run("classifier", "--model", file, "--data", "labels.jsonl", "--out", "classes") == 0
