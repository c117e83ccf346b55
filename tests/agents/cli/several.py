"""Jobs that run the command in one of several processes, also with one thing wrong in one of them."""

import errno
import os
import signal
import sys
import tempfile
import time
import warnings

import torch
from stable_baselines3 import PPO

import agents.checkpoints.checkpoint
import agents.cli.processes
import agents.cli.stages
import agents.cli.trained_model
import agents.report.training
import agents.runs.assemble
import agents.runs.loggers
from agents.cli import main as cli
from agents.supervised import hf_trainer, resumable
from tests.helpers.jobs import choose_by_row
from textenv.checks.extras import MissingExtraError

assert agents.cli.trained_model and agents.report.training, "imported once, in the process that all are forked from"


def run_command(words, is_scripted=False):
    """Run the command in this process; return its exit code, and what it printed.

    Args:
        words: The words after `textenv`.
        is_scripted: Whether each token depends on its row alone, so that any number of processes write the same texts.
    """
    if "WORLD_SIZE" not in os.environ:
        os.environ.pop("LOCAL_RANK", None)  # which no launcher sets for one process: accelerate would expect others
    if is_scripted:
        choose_by_row()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        for file, number in ((out, 1), (err, 2)):
            os.dup2(file.fileno(), number)
        code = cli.main([str(word) for word in words])
        sys.stdout.flush()
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


def run_shares_of_four(words):
    """Run the command as `run_command` does, with shares of four rows."""
    agents.cli.trained_model.CHUNK = agents.cli.trained_model.SHARE = 4
    return run_command(words)


def run_with_warnings(words):
    """Run the command as `run_command` does; all processes warn of their texts, and rank 1 of two things more."""
    rank = int(os.environ.get("RANK", "0"))
    mood, generate = agents.runs.assemble.mood, agents.cli.trained_model.generate

    def warn():
        warnings.warn(f"a text of {5 + rank} words", stacklevel=1)
        if rank == 1:
            warnings.warn("an odd text", stacklevel=1)

    def reward(prompt, preds, done):
        warn()
        return mood(prompt, preds, done)

    def write(*args, **kwargs):
        warn()
        return generate(*args, **kwargs)

    agents.runs.assemble.mood, agents.cli.trained_model.generate = reward, write
    agents.cli.trained_model.CHUNK = 1  # a prompt for each process
    return run_command(words)


def run_stage_until(words, n_steps=0, how="SIGINT"):
    """Run a stage as `run_command` does, with a state every second step; end its last process in a step.

    Args:
        words: The words after `textenv`.
        n_steps: The step after which the signal comes; 0 for none.
        how: The name of the signal.
    """
    resumable.SAVE_STEPS, done, first_request = 2, [0], resumable.first_request
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def request(signals):
        done[0] += 1
        if is_last and done[0] == n_steps:
            os.kill(os.getpid(), signal.Signals[how])
        return first_request(signals)

    resumable.first_request = hf_trainer.first_request = request
    return run_command(words)


def child_of_launcher(variables, words, folder, fault):
    """Be a process that the launcher has started: run the command, with a fault, and end with its exit code.

    What it prints goes into the files out and err of `folder`, as all processes share one terminal.
    """
    os.environ.update(variables)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if fault is not None:
        words = [*words, *(FAULTS[fault](int(variables.get("RANK", "0"))) or ())]
    sys.exit(cli.main(words))


# What goes wrong, by name: functions from the rank that change this process, and may return further words.


def other_version(rank):
    """Another version of textenv in rank 1."""
    agents.cli.processes.__version__ = f"0.0.{rank}"


def other_seed(rank):
    """Another configuration in rank 1."""
    return ["--seed", str(rank)]


def other_key(rank):
    """A key in rank 1 that does not exist."""
    return ["--sed", "1"] if rank == 1 else []


def other_folder(rank):
    """Rank 1 runs on a machine without the files."""
    if rank == 1:
        os.chdir(tempfile.mkdtemp())


def no_package(rank):
    """A package that rank 1 lacks."""

    def check():
        raise MissingExtraError("Expected matplotlib, which draws curves, got none.")

    if rank == 1:
        agents.runs.loggers.check_matplotlib = check


IN_A_ROLLOUT, IN_AN_EVALUATION = (
    8,
    2,
)  # rewards: rank 1 has its half of 8 evaluated texts and 4 samples before it trains


def in_a_reward(rank, act, at=IN_A_ROLLOUT):
    """Do something in rank 1 when its text number `at` gets its reward."""
    n, mood = [0], agents.runs.assemble.mood

    def reward(prompt, preds, done):
        n[0] += 1
        return act() or mood(prompt, preds, done) if n[0] == at else mood(prompt, preds, done)

    if rank == 1:
        agents.runs.assemble.mood = reward


def in_an_update(rank, act):
    """Do something in rank 1 in its second update."""
    train, n = PPO.train, [0]

    def second(self):
        n[0] += 1
        if rank == 1 and n[0] == 2:
            act()
        train(self)

    PPO.train = second


def end_at_once():
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def interrupt():
    """Send Ctrl-C to this process."""
    os.kill(os.getpid(), signal.SIGINT)


def fail(error):
    """Raise an error."""
    raise error


def full_disk(rank):
    """No checkpoint can be written, which rank 0 does."""

    def write_manifest(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint")

    agents.checkpoints.checkpoint.write_manifest = write_manifest


FAULTS = {
    "other version": other_version,
    "other seed": other_seed,
    "other key": other_key,
    "other folder": other_folder,
    "no package": no_package,
    "reward": lambda rank: in_a_reward(rank, lambda: fail(KeyError("no"))),
    "reward of an evaluation": lambda rank: in_a_reward(rank, lambda: fail(KeyError("no")), IN_AN_EVALUATION),
    "interrupt": lambda rank: in_a_reward(rank, interrupt),
    "killed in a rollout": lambda rank: in_a_reward(rank, end_at_once),
    "killed in an evaluation": lambda rank: in_a_reward(rank, end_at_once, IN_AN_EVALUATION),
    "killed in an update": lambda rank: in_an_update(rank, end_at_once),
    "killed at the start": lambda rank: end_at_once() if rank == 1 else None,
    "out of memory": lambda rank: in_an_update(rank, lambda: fail(MemoryError("1 TB"))),
    "out of device memory": lambda rank: in_an_update(rank, lambda: fail(torch.OutOfMemoryError("CUDA out of memory"))),
    "a bug": lambda rank: in_an_update(rank, lambda: fail(AttributeError("no such thing"))),
    "hang": lambda rank: in_an_update(rank, lambda: time.sleep(60)),
    "full disk": full_disk,
}
