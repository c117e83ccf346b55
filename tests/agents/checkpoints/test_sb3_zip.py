"""Zip files of SB3: weights are read without unpickling, everything else only with `trust=True`."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from stable_baselines3 import PPO

from agents import export, load_sb3_zip
from tests.helpers.command import run, settings, small_model
from tests.helpers.training import same_weights, tiny_agent, tiny_config, weights


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def saved(tmp_path):
    model = tiny_agent()
    model.learn(32)
    model.save(tmp_path / "model.zip")
    return model


def replaced(source, target, name, content):
    """Copy a zip with one member's content replaced; return the copy."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return target


def with_pickle(tmp_path, bomb):
    """Copy the saved zip with a field of `data` that runs code when unpickled; return the copy."""
    import base64

    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    data["policy_kwargs"][":serialized:"] = base64.b64encode(pickle.dumps(Evil(bomb))).decode()
    return replaced(tmp_path / "model.zip", tmp_path / "evil.zip", "data", json.dumps(data))


def test_weights_and_optimizer_are_read_and_nothing_is_unpickled(saved, tmp_path):
    bomb = tmp_path / "bomb"
    evil = with_pickle(tmp_path, bomb)
    model = tiny_agent(seed=5)
    assert load_sb3_zip(evil, model) is model
    assert same_weights(weights(model), weights(saved)) and not bomb.exists()
    ours, theirs = (agent.policy.optimizer.state_dict()["state"][0]["exp_avg"] for agent in (model, saved))
    assert torch.equal(ours, theirs)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        PPO.load(evil)
    assert bomb.exists()  # the control: the file does run code when unpickled


def test_weights_that_are_a_pickle_of_something_else_are_refused(saved, tmp_path):
    bomb = tmp_path / "bomb"
    torch.save({"weight": Evil(bomb)}, tmp_path / "evil.pth")
    evil = replaced(tmp_path / "model.zip", tmp_path / "evil.zip", "policy.pth", (tmp_path / "evil.pth").read_bytes())
    model = tiny_agent()
    before = weights(model)
    with pytest.raises(ValueError, match="Expected tensors alone among the weights"):
        load_sb3_zip(evil, model)
    assert not bomb.exists() and same_weights(before, weights(model))


def test_with_trust_all_is_loaded_and_the_danger_named(saved, tmp_path):
    model = tiny_agent(seed=5, learning_rate=0.5)
    with pytest.warns(UserWarning, match="run whatever code its author put there"):
        loaded = load_sb3_zip(tmp_path / "model.zip", model, trust=True)
    assert same_weights(weights(loaded), weights(saved)) and loaded is not model
    assert (loaded.num_timesteps, loaded.learning_rate) == (32, saved.learning_rate)
    loaded.learn(16, reset_num_timesteps=False)


def test_other_files_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="of a model built as this one"):
        load_sb3_zip(tmp_path / "model.zip", tiny_agent(lm=tiny_config(n_embd=32)))
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match=r"of a model built as this one, got .*text\.zip"):
        load_sb3_zip(tmp_path / "text.zip", saved)
    with pytest.raises(ValueError, match=r"nowhere\.zip, which is none"):
        load_sb3_zip(tmp_path / "nowhere.zip", saved)


@pytest.mark.slow
def test_the_command_writes_one_only_when_asked_and_reads_none(tmp_path, capfd):
    model = small_model(tmp_path / "small")
    assert run("train", *settings(model, tmp_path / "run", rollouts=1), "--quiet") == 0
    assert run("export", tmp_path / "run", tmp_path / "plain") == 0
    assert run("export", tmp_path / "run", tmp_path / "both", "--sb3-zip") == 0
    assert "holds pickles" in capfd.readouterr().out
    assert not list((tmp_path / "run").rglob("*.zip")) and not (tmp_path / "plain" / "sb3.zip").exists()
    file = tmp_path / "both" / "sb3.zip"
    from agents.cli.main import read_config
    from agents.runs.assemble import assemble

    agent = assemble(read_config(tmp_path / "run" / "config.yml")).agent
    load_sb3_zip(file, agent)
    export(agent, None, tmp_path / "again")
    pair = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "plain")]
    assert pair[0] == pair[1]
    for words in (["generate", file, "--prompts", "p.txt"], ["chat", file], ["evaluate", file], ["export", file, "x"]):
        assert run(*words) == 2
        assert "agents.load_sb3_zip" in capfd.readouterr().err
