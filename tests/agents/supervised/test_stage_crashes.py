"""The stages before PPO, stopped, killed and damaged: they resume from the newest intact state to the same weights."""

import errno
import hashlib
import os
import random
import shutil
import signal
import threading
import time

import pytest
from tqdm.auto import tqdm

from agents import Ranking, train_classifier, train_reward_model, word_tokenizer
from agents.errors import StageStopped, StorageError
from agents.supervised import resumable as interrupted
from agents.supervised.sft import tune
from tests.helpers.command import run, small_model
from tests.helpers.models import tiny
from textenv import demo

TOKENIZER = word_tokenizer(demo.vocabulary())
TEXTS = demo.reviews(48, seed=1)
LABELS = [int("good" in text) for text in TEXTS]
CONFIG = tiny(vocab_size=len(TOKENIZER), resid_pdrop=0.1, pad_token_id=0)
WORDS = {"n_epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "progress_bar": False}
PAIRS = [Ranking(pair) for pair in zip(TEXTS, reversed(TEXTS), strict=True)]
STAGES = {
    "sft": lambda folder, **more: tune(CONFIG, TEXTS, folder, tokenizer=TOKENIZER, **WORDS, **more),
    "classifier": lambda folder, **more: train_classifier(CONFIG, TOKENIZER, TEXTS, LABELS, folder, **WORDS, **more),
    "reward-model": lambda folder, **more: train_reward_model(CONFIG, TOKENIZER, PAIRS, folder, **WORDS, **more),
}
FILES = {"sft": "optimizer.pt", "classifier": "optimizer.pt", "reward-model": "optimizer.safetensors"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that returns the bytes of the weights of a stage that was never stopped."""
    weights = {}

    def train(stage):
        if stage not in weights:
            folder = tmp_path_factory.mktemp("whole") / "model"
            STAGES[stage](folder)
            weights[stage] = (folder / "model.safetensors").read_bytes()
        return weights[stage]

    return train


def stop_at(monkeypatch, step, action):
    """Call `action` after a step, before its state is written."""
    original = interrupted.States.is_due

    def is_due(self, now):
        if now == step:
            action()
        return original(self, now)

    monkeypatch.setattr(interrupted.States, "is_due", is_due)


def stopped_with_two_states(stage, folder, monkeypatch, step=12):
    """Train a stage with a state every five steps, and stop it; return the states of steps 5 and 10."""
    monkeypatch.setattr(interrupted, "SAVE_STEPS", 5)

    def stop():
        raise RuntimeError("as if killed")

    with monkeypatch.context() as patch:
        stop_at(patch, step, stop)
        with pytest.raises(RuntimeError, match="as if killed"):
            STAGES[stage](folder)
    work = interrupted.work_folder(folder)
    states = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert [path.name for path in states] == ["checkpoint-5", "checkpoint-10"]
    return states


@pytest.mark.parametrize("stage", ["sft", pytest.param("classifier", marks=pytest.mark.slow), "reward-model"])
def test_a_state_without_its_optimizer_is_passed_over(stage, whole, tmp_path, monkeypatch):
    """A state is resumed only with all of its files: without its optimizer, training leads to other weights."""
    before, newest = stopped_with_two_states(stage, tmp_path / "m", monkeypatch)
    (newest / FILES[stage]).unlink()
    with pytest.warns(UserWarning, match=rf"{FILES[stage]}: missing.*; continuing from {before}"):
        STAGES[stage](tmp_path / "m", resume=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == whole(stage)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", ["half-made", "cut", "flipped", "all"])
def test_the_newest_whole_state_is_taken(stage, damage, whole, tmp_path, monkeypatch):
    before, newest = stopped_with_two_states(stage, tmp_path / "m", monkeypatch)
    file, goes_on = newest / FILES[stage], f"continuing from {before}"
    if damage in ("half-made", "all"):
        (newest / "manifest.json").unlink()
    if damage == "all":
        (before / "manifest.json").write_text("{}")
        goes_on = "training begins anew"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("cut", "flipped"):
        file.write_bytes(content[: 1000 if damage == "cut" else None])
    with pytest.warns(UserWarning, match=goes_on):
        STAGES[stage](tmp_path / "m", resume=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == whole(stage)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_has_its_code(number, whole, tmp_path, monkeypatch):
    stage = {signal.SIGTERM: "sft", signal.SIGHUP: "classifier", signal.SIGINT: "reward-model"}[number]
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda: os.kill(os.getpid(), number))
        with pytest.raises(StageStopped, match="stopped after step 7; `resume=True` continues") as stopped:
            STAGES[stage](tmp_path / "m")
    assert stopped.value.code == 128 + number
    STAGES[stage](tmp_path / "m", resume=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == whole(stage)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "classifier", "reward-model"])
def test_the_command_has_the_code_of_the_signal_and_goes_on(verb, tmp_path, monkeypatch, capfd):
    model = small_model(tmp_path / "small")
    lines = {"sft": "text\n" + "a phone .\n" * 40, "classifier": "text,label\n" + "good .,a\nbad .,b\n" * 20}
    lines["reward-model"] = "chosen,rejected\n" + "good .,bad .\n" * 40
    (tmp_path / "data.csv").write_text(lines[verb])
    words = [verb, f"--model={model}", f"--data={tmp_path / 'data.csv'}", f"--out={tmp_path / 'out'}", "--n_epochs=9"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*words) == 143
    assert "textenv: interrupted: the same command with --resume continues" in capfd.readouterr().err
    assert run(*words, "--resume") == 0 and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["sft", "reward-model"])
def test_a_state_that_finds_no_room_is_tried_again(stage, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupted, "SAVE_STEPS", 10)
    monkeypatch.setattr(interrupted, "RETRY_STEPS", 2)
    original, tried = interrupted.seal, []

    def full(folder, step):
        tried.append(step)
        if len(tried) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, step)

    monkeypatch.setattr(interrupted, "seal", full)
    with pytest.warns(
        UserWarning, match=r"state after step 1\d could not be written: .* free at .*checkpoint-1\d \(No s"
    ):
        STAGES[stage](tmp_path / "m")
    assert tried == [10, 12, 14, 20]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == whole(stage)


def test_a_signal_while_there_is_no_room_says_that_nothing_is_saved(tmp_path, monkeypatch):
    def full(folder, step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(interrupted, "seal", full)
    stop_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.warns(UserWarning), pytest.raises(StorageError, match="The state after step 6 could not be written"):
        STAGES["reward-model"](tmp_path / "m")


def test_states_of_unknown_arguments_are_not_thrown_away(tmp_path, monkeypatch):
    stopped_with_two_states("reward-model", tmp_path / "m", monkeypatch)
    (interrupted.work_folder(tmp_path / "m") / "fingerprint").unlink()
    with pytest.raises(ValueError, match="Expected the arguments and data of the interrupted run"):
        STAGES["reward-model"](tmp_path / "m", resume=True)


@pytest.mark.filterwarnings("ignore:.*(training begins anew|continuing from)")
@pytest.mark.parametrize("resume", [False, True])
def test_a_stage_killed_while_it_removes_states_starts_again(resume, tmp_path, monkeypatch):
    """The fingerprint goes last: without it, the states that are left would be taken for somebody else's folder."""
    monkeypatch.setattr(interrupted, "KEPT", 8)
    remove, rmdir = os.unlink, os.rmdir

    def killed_after(n_removals):
        left = iter(range(n_removals))

        def dying(original):
            def action(*path, **options):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                original(*path, **options)

            return action

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", dying(remove))
            patch.setattr(os, "rmdir", dying(rmdir))
            interrupted.remove_states(work)

    for n_removals in range(100):
        work = tmp_path / f"killed after {n_removals}"
        states = interrupted.States(work)
        for step in (1, 2, 3):
            states.save(step, lambda folder: (folder / "weights").write_text("0"))
        (work / "fingerprint").write_text(hashlib.sha256(repr("data").encode()).hexdigest())
        for step in (4, 5, 6):  # so that the fingerprint is first and last in no order of the files' making
            states.save(step, lambda folder: (folder / "weights").write_text("0"))
        try:
            killed_after(n_removals)
        except KeyboardInterrupt:
            interrupted.prepare(work, "data", resume)
        else:
            break
    assert n_removals == 6 * 3 + 2 and not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_random_moments_leaves_a_stage_that_goes_on(stage, whole, tmp_path, monkeypatch):
    expected = whole(stage)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with forks, and a killed fork would never release it
    monkeypatch.setattr(interrupted, "SAVE_STEPS", 3)
    begun = time.monotonic()
    STAGES[stage](tmp_path / "timed")
    seconds = time.monotonic() - begun
    shutil.rmtree(tmp_path / "timed")
    rng, killed = random.Random(0), 0
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                STAGES[stage](tmp_path / "m", resume=True, overwrite=True)
            finally:
                os._exit(0)  # whatever happened, the fork does not return into pytest
        time.sleep(rng.uniform(0.0, 0.4 * seconds))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert killed >= 6
    STAGES[stage](tmp_path / "m", resume=True, overwrite=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
