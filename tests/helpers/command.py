"""The command `textenv` for tests: run in this process, in a fork or in a new process, on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from agents import word_tokenizer
from agents.cli import main as cli
from agents.runs.recording import Recorder
from agents.small_models.tokenizers import EOS_TOKEN
from textenv import demo

ROOT = Path(__file__).resolve().parents[2]
N_ENVS, N_STEPS = 8, 8
ROLLOUT = N_ENVS * N_STEPS


def small_model(folder, tokenizer=None, n_positions=32):
    """Write an untrained one-layer GPT-2, by default with the demo's words as its vocabulary; return its folder."""
    tokenizer = tokenizer or word_tokenizer(demo.vocabulary())
    eos = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": n_positions, "resid_pdrop": 0, "embd_pdrop": 0}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, attn_pdrop=0, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model, out=None, rollouts=4, **more):
    """Return the options of `textenv train` for a run of a few small rollouts."""
    values = {
        "model.name": model,
        "env.max_new_tokens": N_STEPS,
        "algorithm.n_envs": N_ENVS,
        "algorithm.n_steps": N_STEPS,
        "algorithm.batch_size": ROLLOUT,
        "algorithm.learning_rate": 1e-2,
        "algorithm.schedule": "linear",
        "evaluation.every": 2 * ROLLOUT,
        "evaluation.n_prompts": 8,
        "total_tokens": rollouts * ROLLOUT,
        "checkpoint_every": 1,
        "samples_every": 2,
        "device": "cpu",
        "loggers": "[]",
        **({} if out is None else {"out": out}),
        **more,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def run(*words):
    """Run the command in this process; return its exit code."""
    return cli.main([str(word) for word in words])


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*words, cwd=ROOT, **kwargs):
    """Start the command in a new process; return it."""
    command = [sys.executable, "-m", "agents.cli", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(), **{**pipes, **kwargs})


def in_a_fork(*words):
    """Run the command in a fork, which need not import anything again; return the fork's process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = run(*words)
        finally:
            os._exit(code)  # whatever happened, the fork does not return into pytest
    return pid


def interrupt_after(monkeypatch, n_rows, folder=""):
    """Send SIGINT once, in the middle of the rollout after `n_rows` rollouts of a run, by the name of its folder."""
    original = Recorder._on_step

    def step(self):
        is_due = self.model.num_timesteps > n_rows * ROLLOUT and self.run.path.name.endswith(folder)
        if is_due and not getattr(self, "sent", False):
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Recorder, "_on_step", step)


def rows(folder, name="metrics.jsonl"):
    """Return the rows of a run's file, without the figures that depend on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not re.match("time/", key)} for line in lines]


def same_runs(first, second):
    """Assert that two run folders have equal rows, samples, tokens, scores, final tables and final weights."""
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        assert rows(first, name) == rows(second, name)
    for name in ("results.md", "results.json", "history.json", "scores.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def wait_for_rows(process, folder, n):
    """Wait until the run of a process has written `n` rows."""
    limit = time.monotonic() + 100
    while not (folder / "metrics.jsonl").is_file() or len((folder / "metrics.jsonl").read_text().splitlines()) < n:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)


def refused(capfd, *words):
    """Run a command that is refused and leaves no file; return the one line that it prints."""
    before = files_here()
    code = run(*words)
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert files_here() == before
    return error


def files_here():
    return {path for path in Path.cwd().rglob("*") if path.is_file()}
