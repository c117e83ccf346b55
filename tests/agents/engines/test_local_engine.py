"""The engine in a process of its own: tensors on the wire, training, errors, death, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback

from agents import EngineLost, EngineRollouts, LocalEngine
from agents.distributed.world import world
from agents.engines import wire
from agents.engines.protocol import Request, named_weights
from tests.helpers.command import ROOT
from tests.helpers.engines import Background, InProcess
from tests.helpers.training import same_weights, tiny_agent, tiny_config, weights

SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job does not inherit
if __name__ == "__main__":
    from transformers import GPT2Config
    from agents.engines.local import LocalEngine
    engine = LocalEngine(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40), vocab_size=33)
    print(engine._process.pid, flush=True)
    how = sys.argv[1]
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "raises":
        raise RuntimeError("the trainer is at its end")
    time.sleep(60)
"""

# The script of docs/engines.md, without `with` and without `close()`. The engine's process draws a progress bar, whose
# lock is a semaphore of the operating system.
DOCUMENTED = """
import sys
if __name__ == "__main__":
    import numpy as np
    import transformers
    from agents import EngineRollouts, LocalEngine, make_agent
    from agents.engines.protocol import Request
    from agents import demo_model
    from textenv.tasks.demo import Demo
    transformers.utils.logging.disable_progress_bar()  # of this process
    env, lm = Demo(max_new_tokens=4), str(demo_model())
    engine = LocalEngine(lm, vocab_size=len(env.tokenizer))
    make_agent(env, lm=lm, n_envs=8).learn(32, callback=EngineRollouts(engine))
    if sys.argv[1] == "writing":
        engine.start([Request(np.arange(3), 12, ())] * 2000, 1.0, 0)
    if sys.argv[1] == "closed":
        engine.close()
    print(engine._process.pid)
"""

# A script that ends while its engine writes. In both processes a thread comes back from C++ within the second that the
# interpreter takes to end: the trainer's when the connection is closed, the engine's in any case.
LATE = """
import contextlib, datetime, time
import numpy as np
import torch.distributed as dist
from agents import LocalEngine
from agents.engines.protocol import Request
from agents.engines.wire import Wire
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1.0)
slow = Slow()  # it is deleted when the interpreter ends
store, receive, calls = dist.HashStore(), Wire.receive, []
def wait_in_cpp(suppress=contextlib.suppress):
    with suppress(RuntimeError):
        store.wait(["never"], datetime.timedelta(seconds=0.3))
def late(self):
    calls.append(self)
    while self.other == 0 and len(calls) > 1:  # the engine, which has its question
        wait_in_cpp()
    try:
        return receive(self)
    except RuntimeError:
        wait_in_cpp()
        raise
Wire.receive = late
if __name__ == "__main__":
    from transformers import GPT2Config
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 40}
    engine = LocalEngine(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None), vocab_size=33)
    engine.start([Request(np.arange(3), 900, ())] * 200, 1.0, 0)
    time.sleep(1.0)  # until the engine has its question
    del engine  # nobody waits for the texts any more, but a thread
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_end(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def requests(most_new=4, n=5):
    return [Request(np.arange(1, 3 + i % 5), most_new, (0, 5) if i % 2 else ()) for i in range(n)]


def weights_to_send():
    with named_weights(tiny_agent().policy.backbone) as named:
        return [(name, weight.detach() + 0.01) for name, weight in named]


def test_tensors_of_all_kinds_cross_the_wire_unchanged(monkeypatch):
    monkeypatch.setattr(wire, "MOST_BYTES", 20)  # small, so that some tensors share a message and some do not
    store, ends = dist.HashStore(), {}

    def meet(rank):
        ends[rank] = wire.Wire(store, rank, timedelta(seconds=20))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    sent = [torch.tensor(3.5), torch.zeros(0, 3), torch.tensor([True, False, True]), torch.randn(7, 9).T]
    sent += [
        torch.randn(3).bfloat16(),
        torch.arange(5),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([1, 2]).int(),
    ]
    receiving = threading.Thread(target=lambda: ends.update(received=ends[1].receive()))
    receiving.start()
    ends[0].send({"do": "écrire", "names": ["a"]}, sent)
    receiving.join()
    header, received = ends["received"]
    assert header == {"do": "écrire", "names": ["a"]} and len(received) == len(sent)
    assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in zip(received, sent))


@pytest.mark.slow
def test_it_trains_answers_errors_and_is_noticed_when_it_is_killed():
    """One engine serves three checks, since starting one takes seconds."""
    with LocalEngine(tiny_config(), vocab_size=33) as engine:
        trains_as_in_one_process(engine)
        says_what_it_cannot_do(engine)
        is_noticed_when_killed(engine)
    engine.close()  # once more does no harm


def trains_as_in_one_process(engine):
    """Bit for bit, since tokens, log-probabilities and weights cross unchanged; no torch process group is made."""
    trained = []
    for writer in (engine, InProcess()):
        model = tiny_agent(n_envs=6, n_steps=6)
        model.learn(4 * 36, callback=EngineRollouts(writer))
        buffer = model.rollout_buffer
        assert np.abs(buffer.log_probs - buffer.behaviour_log_probs).max() < 1e-5
        trained.append(weights(model))
    assert same_weights(*trained) and not same_weights(trained[0], weights(tiny_agent(n_envs=6, n_steps=6)))
    assert world() is None and not torch.distributed.is_initialized()


def says_what_it_cannot_do(engine):
    sent = weights_to_send()
    engine.load_weights(sent)
    with pytest.raises(ValueError, match=r"those of another: \['lm_head.bias'"):
        engine.load_weights([*sent, ("lm_head.bias", torch.zeros(33))])
    with pytest.raises(ValueError, match=r"wpe.weight'\] differ"):
        engine.load_weights([(name, w[:5] if name.endswith("wpe.weight") else w) for name, w in sent])
    with pytest.raises(ValueError, match="32 positions, got up to 42"):
        engine.generate([Request(np.ones(2, dtype=int), 40, ())], 1.0, 0)
    same = InProcess()
    same.load_weights(sent)
    for one, other in zip(engine.generate(requests(), 0.7, 3), same.generate(requests(), 0.7, 3)):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.log_probs, other.log_probs)


def is_noticed_when_killed(engine):
    """The engine raises if its process is killed in the middle of an answer, and again at the next question."""
    threading.Timer(0.2, os.kill, (engine._process.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineLost, match="got its end, by signal 9"):
        engine.generate(requests(most_new=20, n=20_000), 1.0, 0)
    with pytest.raises(EngineLost, match="got one that was closed"):
        engine.generate(requests(), 1.0, 0)
    with pytest.raises(EngineLost, match="got one that was closed"):
        tiny_agent().learn(16, callback=EngineRollouts(engine))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"autocast": "int8"}, "`autocast` to be one of"),
        ({"vocab_size": 0}, "`vocab_size` to be positive, got 0"),
        ({"n_rows": 0}, "`n_rows` to be positive, got 0"),
        ({"patience": -1}, "`patience` to be positive, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LocalEngine(tiny_config(), **{"vocab_size": 33, **kwargs})


@pytest.mark.slow
def test_a_model_that_cannot_be_built_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a model that the engine can build, got ValueError: .*33.* got 20"):
        LocalEngine(tiny_config(vocab_size=20), vocab_size=33)


@pytest.mark.slow
def test_16_bits_in_the_engine_alone_and_no_answer_in_time():
    """The engine's log-probabilities are computed in 16 bits, the policy's are not."""
    lm = tiny_config(initializer_range=0.3, n_positions=4096)
    with LocalEngine(lm, vocab_size=33, autocast="bfloat16") as made:
        model = tiny_agent(lm=lm, n_envs=16, n_steps=8)
        model.learn(128, callback=EngineRollouts(made), log_interval=None)
        figures = model.logger.name_to_value
        assert 1e-6 < figures["engine/kl_k3"] < 1e-2 and figures["engine/weight"] == pytest.approx(1, abs=0.02)
        assert figures["engine/truncated"] == 0
        made._wire.patience = timedelta(seconds=0.5)
        with pytest.raises(EngineLost, match="got none in time, though it runs"):
            made.generate(requests(most_new=4000), 1.0, 0)
        assert not is_running(made._process.pid)


class During(BaseCallback):
    """Calls a function when a rollout has ended, from which on the engine writes the texts of the next one."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.call()


@pytest.mark.slow
def test_it_writes_ahead_as_in_one_process_and_a_kill_in_between_is_noticed():
    trained = []
    with LocalEngine(tiny_config(), vocab_size=33) as engine:
        for writer in (engine, Background()):
            model = tiny_agent(n_envs=6, n_steps=6)
            model.learn(4 * 36, callback=EngineRollouts(writer, ahead=True))
            trained.append(weights(model))
        assert same_weights(*trained)

        # Two questions at a time: the second waits for the first, whose answer nobody has asked for yet.
        engine.load_weights(sent := weights_to_send())
        first = engine.start(requests(most_new=20), 1.0, 3)
        engine.load_weights([(name, weight + 0.1) for name, weight in sent])
        same = InProcess()
        same.load_weights(sent)
        for one, other in zip(first(), same.generate(requests(most_new=20), 1.0, 3), strict=True):
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.log_probs, other.log_probs)

        kill = During(lambda: os.kill(engine._process.pid, signal.SIGKILL))
        start = time.monotonic()
        with pytest.raises(EngineLost, match="got its end, by signal 9"):
            tiny_agent(n_envs=6, n_steps=6).learn(4 * 36, callback=[EngineRollouts(engine, ahead=True), kill])
        assert time.monotonic() - start < 20


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "closed"])
def test_what_interrupts_texts_that_are_written_ahead_ends_the_engine(how):
    engine = LocalEngine(tiny_config(n_positions=4096, n_embd=32), vocab_size=33)
    answer = engine.start(requests(most_new=4000), 1.0, 0)
    pid, start = engine._process.pid, time.monotonic()
    if how == "interrupted":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        engine.close()
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else EngineLost):
        answer()
    assert time.monotonic() - start < 15 and not is_running(pid) and not engine._talk.thread.is_alive()


@pytest.mark.slow
def test_ctrl_c_in_a_long_answer_is_noticed_and_ends_the_engine():
    made = LocalEngine(tiny_config(n_positions=4096, n_embd=32), vocab_size=33)
    pid = made._process.pid
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made.generate(requests(most_new=4000), 1.0, 0)
    assert time.monotonic() - start < 5 and not is_running(pid)


@pytest.mark.slow
def test_the_engine_ends_with_the_trainer(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    runs = {how: start_script(tmp_path / "train.py", how) for how in ("killed", "interrupted")}
    for how, trainer in runs.items():
        with trainer:
            pid = int(trainer.stdout.readline())
            if how == "interrupted":
                os.killpg(trainer.pid, signal.SIGINT)
            trainer.wait(60)
            said = trainer.stderr.read()
        assert trainer.returncode != 0 and wait_for_end(pid)
        assert "SpawnProcess" not in said and "gloo" not in said


@pytest.mark.long
def test_a_script_without_its_guard_is_told(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    with start_script(tmp_path / "train.py", "raises") as trainer:
        trainer.wait(60)
        said = trainer.stderr.read()
    assert "EngineLost: Expected the engine's process to be ready" in said
    assert 'put what the script runs under `if __name__ == "__main__":`' in said


def start_script(path, *words):
    """Start a script in a new session, so that a signal to its process group is like Ctrl-C in a terminal."""
    return subprocess.Popen(
        [sys.executable, str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["left", "closed", "writing"])
def test_a_script_ends_without_a_word(how, tmp_path):
    """Nothing is written to stderr, not even multiprocessing's warning of a leaked semaphore."""
    (tmp_path / "script.py").write_text(DOCUMENTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py", how], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    said = [line for line in re.split("[\r\n]+", done.stderr) if line and not line.startswith("Loading weights")]
    assert (done.returncode, said) == (0, []) and not is_running(int(done.stdout))
    assert "Loading weights" in done.stderr  # the control: the bar, and so its semaphore, was there


@pytest.mark.slow
def test_threads_that_wait_for_texts_do_not_abort_a_script_at_its_end(tmp_path):
    (tmp_path / "script.py").write_text(LATE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
