"""`textenv train --resume`: stopped, killed, damaged and changed runs resume bit for bit or are refused."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import time

import pytest
import torch

from agents.checkpoints.checkpoint import latest_checkpoint
from agents.checkpoints.manifest import verify_checkpoint
from agents.runs import train as training_run
from agents.signals import Interrupts
from tests.helpers.command import (
    ROLLOUT,
    in_a_fork,
    interrupt_after,
    rows,
    run,
    same_runs,
    settings,
    start,
    wait_for_rows,
)

ROLLOUTS = 5


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("train", *settings(model, out, ROLLOUTS), "--quiet") == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of `whole` that a test may damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_stop_and_resume_is_the_same_run(whole, model, tmp_path, monkeypatch, capfd):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run("train", *settings(model, out, ROLLOUTS)) == 130
    said = capfd.readouterr()
    assert f"stopped after {3 * ROLLOUT} tokens, saved; continue with: textenv train --resume {out}" in said.err
    assert [row["tokens"] for row in rows(out)] == [0, ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT]
    assert not (out / "model").exists()
    assert run("train", f"--resume={out}", "--quiet") == 0
    same_runs(whole, out)


@pytest.mark.slow
def test_groups_of_samples_resume_as_well(model, tmp_path, monkeypatch):
    words = {
        "algorithm.advantage": "grpo",
        "env.args": "{samples_per_prompt: 3, score_at: rollout_end}",
        "algorithm.batch_size": ROLLOUT,
        "shaping.scale": "true",
    }
    assert run("train", *settings(model, tmp_path / "whole", **words), "--quiet") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run("train", *settings(model, tmp_path / "cut", **words), "--quiet") == 130
    assert run("train", "--resume", tmp_path / "cut", "--quiet") == 0
    same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_checkpoint_is_passed_over_and_said(whole, copy, capfd):
    newest, before = sorted((copy / "checkpoints").iterdir(), reverse=True)[:2]
    file = newest / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    assert run("train", "--resume", copy) == 0
    said = capfd.readouterr().out
    assert f"policy.safetensors: {file.stat().st_size} bytes, manifest says" in said or "newest intact" in said
    assert f"newest intact: step {int(before.name[5:])}, continuing from there" in said
    same_runs(whole, copy)
    for folder in (copy / "checkpoints").iterdir():
        verify_checkpoint(folder)


def test_damage_everywhere_is_refused_and_nothing_is_lost(copy, capfd):
    for folder in (copy / "checkpoints").iterdir():
        file = folder / "policy.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    before = (copy / "metrics.jsonl").read_text()
    assert run("train", "--resume", copy) == 2
    assert "no checkpoint is intact" in capfd.readouterr().err
    assert (copy / "metrics.jsonl").read_text() == before


def test_leftovers_of_a_killed_process_are_removed(copy):
    left = copy / "checkpoints" / ".step_000000000999.partial-99999999"
    left.mkdir()
    (left / "policy.safetensors").write_bytes(b"half")
    (copy / ".results.md.partial-99999999").write_text("half")
    assert run("train", "--resume", copy, "--quiet") == 0
    assert not list(copy.rglob(".*.partial-*"))


def test_a_changed_config_needs_its_name(copy, capfd):
    assert run("train", "--resume", copy, "--kl.coef", "0.2") == 2
    said = capfd.readouterr()
    assert "changed: kl.coef: 0.05 -> 0.2" in said.out and "add --change kl.coef" in said.err
    more = ["--total_tokens", (ROLLOUTS + 1) * ROLLOUT, "--change", "kl.coef", "--change", "total_tokens"]
    assert run("train", "--resume", copy, "--kl.coef", "0.2", *more, "--quiet") == 0
    assert rows(copy)[-1]["tokens"] == (ROLLOUTS + 1) * ROLLOUT and rows(copy)[-1]["kl/coef"] == 0.05


def test_configs_and_folders_of_other_versions(copy, capfd):
    config = (copy / "config.yml").read_text()
    (copy / "config.yml").write_text(config + "gone: 1\n")
    assert run("train", "--resume", copy) == 2
    assert "'gone'" in (error := capfd.readouterr().err) and "If an older textenv wrote it" in error
    (copy / "run.json").write_text('{"format": 9, "versions": {"textenv": "7.0"}}')
    assert run("train", "--resume", copy) == 2
    assert "install textenv 7.0 or newer" in capfd.readouterr().err


def test_another_tokenizer_or_version_is_noticed(copy, capfd):
    about = json.loads((copy / "run.json").read_text())
    about["versions"]["torch"] = "2.10.0"
    (copy / "run.json").write_text(json.dumps(about))
    assert run("train", "--resume", copy) == 0
    assert f"torch 2.10.0 -> {torch.__version__}" in capfd.readouterr().out
    kept = json.loads((copy / "vocabulary.json").read_text())
    (copy / "vocabulary.json").write_text(json.dumps({**kept, "sha256": "0"}))
    for words in (["train", "--resume", copy], ["evaluate", copy]):
        assert run(*words) == 2
        assert "Expected the tokenizer that" in capfd.readouterr().err


def test_a_run_needs_no_network_and_writes_into_its_folder_alone(model, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a look-up")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert run("train", *settings(model, rollouts=1), "--quiet") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "runs"]
    assert list(home.iterdir()) == []
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"demo-small-\d{8}-\d{6}-[0-9a-f]{4}", folder.name)


def test_too_little_space_is_refused_before_training(model, tmp_path, monkeypatch, capfd):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert run("train", *settings(model, tmp_path / "run"), "--quiet") == 2
    assert re.search(r"The run needs .* MB, 0.0 MB free at ", capfd.readouterr().err)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_is_used_by_one_process_and_for_one_run(copy, model, capfd):
    with training_run.RunFolder(copy).locked():
        assert run("train", "--resume", copy) == 2
    assert f"is in use by pid {os.getpid()} since 2" in capfd.readouterr().err
    assert run("train", *settings(model, copy)) == 2
    assert f"continue with --resume {copy}" in capfd.readouterr().err


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_last_checkpoint(model, tmp_path, monkeypatch, capfd):
    from agents.runs import checkpoints as run_checkpoints

    original, calls = run_checkpoints.save_step, []

    def full(agent, folder, keep):
        calls.append(agent.num_timesteps)
        if len(calls) in (1, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(agent, folder, keep)

    monkeypatch.setattr(run_checkpoints, "save_step", full)
    words = settings(model, tmp_path / "run", rollouts=5, checkpoint_every=2)
    assert run("train", *words) == 5  # the last one failed
    said = capfd.readouterr()
    assert re.search(r"needs .* MB, .* GB free at .*No space left", said.out) and "No space left" in said.err
    assert calls == [ROLLOUT * i for i in (2, 3, 4, 5)]  # the first is tried again an iteration later
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name.endswith(f"{4 * ROLLOUT}")
    assert run("train", "--resume", tmp_path / "run", "--quiet") == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("return float('nan')", "Expected a reward to be a finite number, got nan"),
        ("raise KeyError('no')", "raised KeyError: 'no'"),
        ("return 'good'", "Expected a reward to be a finite number, got 'good'"),
    ],
)
def test_a_bad_reward_ends_with_4(reward, message, model, tmp_path, monkeypatch, capfd):
    name = f"bad_{abs(hash(reward))}"
    (tmp_path / f"{name}.py").write_text(
        f"class Reward:\n    def __call__(self, prompt, preds, done):\n        {reward}\n"
    )
    monkeypatch.chdir(tmp_path)
    words = settings(model, tmp_path / "run", **{"env.reward": f"{name}:Reward"})
    assert run("train", *words, "--allow", name, "--quiet") == 4
    error = capfd.readouterr().err
    assert message in error and "lane" in error and "prompt" in error and error.count("\n") == 1
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_gradients_that_are_not_finite_end_with_3_and_finite_weights(model, tmp_path, monkeypatch, capfd):
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(weights, norm):
        calls.append(1)
        weights = list(weights)
        if len(calls) == 2 or len(calls) > 6:
            for weight in weights:
                weight.grad[...] = torch.nan
        return original(weights, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    assert run("train", *settings(model, tmp_path / "run"), "--quiet") == 3
    assert "3 updates in a row" in capfd.readouterr().err
    assert [row["train/skipped_updates"] for row in rows(tmp_path / "run")[1:]] == [1, 2]
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and int(saved.name[5:]) == 2 * ROLLOUT
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", original)
    assert run("train", "--resume", tmp_path / "run", "--quiet") == 0


def test_the_first_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_once_and_twice_in_a_real_process(model, tmp_path):
    words = settings(model, tmp_path / "run", rollouts=100_000, checkpoint_every=2)
    with start("train", *words) as process:
        wait_for_rows(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "textenv train --resume" in error and "Traceback" not in error
    with start("train", "--resume", tmp_path / "run") as process:
        wait_for_rows(process, tmp_path / "run", len(rows(tmp_path / "run")) + 3)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.slow
def test_a_file_size_limit_ends_with_5_and_leaves_what_was(model, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    with start("train", *settings(model, tmp_path / "run", **{"evaluation.every": 10**6}), preexec_fn=limit) as process:
        _, error = process.communicate(timeout=100)
    assert process.returncode == 5, error
    assert error.strip().splitlines()[-1].startswith("textenv: ")
    assert not list((tmp_path / "run").rglob("step_*"))
    assert run("train", "--resume", tmp_path / "run", "--quiet") == 0


@pytest.mark.slow
def test_kill_9_at_twenty_moments_leaves_a_run_that_resumes(model, tmp_path):
    words = settings(model, tmp_path / "whole", rollouts=30)
    begun = time.monotonic()
    assert run("train", *words, "--quiet") == 0
    seconds = time.monotonic() - begun
    rng, killed = random.Random(0), 0
    out = tmp_path / "killed"
    for _ in range(20):
        again = ["train", "--resume", out] if (out / "run.json").is_file() else ["train", *words[:-1]]
        again = again if "--resume" in again else ["train", *settings(model, out, rollouts=30)]
        pid = in_a_fork(*again, "--quiet")
        time.sleep(rng.uniform(0.0, 0.08 * seconds))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert killed >= 15
    if (out / "run.json").is_file():
        assert run("train", "--resume", out, "--quiet") == 0
    else:
        assert run("train", *settings(model, out, rollouts=30), "--quiet") == 0
    same_runs(tmp_path / "whole", out)
    assert not list(out.rglob(".*.partial-*"))
