"""Functions that run a job in several processes which train together, as a launcher starts them."""

import contextlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import traceback
from functools import cache

from agents.distributed import world
from tests.agents.callbacks import episode_jobs
from tests.agents.cli import several
from tests.agents.distributed import device_jobs, evaluation_jobs, loading_jobs, prompt_jobs
from tests.agents.engines import engine_jobs
from tests.helpers import advantage_jobs, group_jobs, jobs, mistakes, surrogate_jobs, value_jobs
from tests.helpers.command import ROOT

# Children are forked from a server that has imported everything once and has never run a backward pass: the threads
# that a backward pass starts do not survive a fork.
CONTEXT = multiprocessing.get_context("forkserver")
MODULES = (
    *(several, mistakes, advantage_jobs, surrogate_jobs, group_jobs, value_jobs, prompt_jobs, engine_jobs, jobs),
    *(loading_jobs, device_jobs, evaluation_jobs, episode_jobs),
)
JOBS = {name: job for module in MODULES for name, job in vars(module).items()}
CONTEXT.set_forkserver_preload([module.__name__ for module in MODULES])


def free_port():
    """Return a free port that no connection gets before the job: the system gives those from 32768 on."""
    ports = random.SystemRandom()  # not `random`, which has the same seed in all processes of pytest
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", ports.randrange(20_000, 32_000)))
            return probe.getsockname()[1]


@cache
def import_once():
    """Start the process that all are forked from, which imports everything: that is no part of a launch's time."""
    process = CONTEXT.Process(target=os.getpid)
    process.start()
    process.join(300)
    assert process.exitcode == 0, "a busy machine takes more than 60 s for it"


def launch(size, job, *args, environments=None, timeout=60):
    """Run a function of the `MODULES` in each process; return results and errors by rank."""
    import_once()
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank)}
        if size == 1:
            variables = {}  # as for a script that no launcher started
        variables |= {"LOCAL_RANK": str(rank), **((environments or {}).get(rank, {}))}
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_child, args=(sender, variables, job, args), daemon=True)
        process.start()
        sender.close()  # or a killed child's pipe would never end here
        pipes.append(receiver)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        try:
            results.append(pipe.recv() if pipe.poll(timeout) else TimeoutError(f"rank {rank} hangs"))
        except EOFError:
            results.append(ChildProcessError(f"rank {rank} was killed"))
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    return results


def train(size, job, *args, **kwargs):
    """Run a job as `launch` does, and raise the first error of any process."""
    results = launch(size, job, *args, **kwargs)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def torchrun(folder, *words, options=(), script="tests/helpers/launched.py"):
    """Run two processes of `launched.py` by torchrun; return the finished launcher and the seconds it took."""
    options = ["torch.distributed.run", "--nproc_per_node=2", *options]
    return run_script(folder, *words, options=options, script=script)


def accelerate(folder, *words, options=()):
    """Run two processes of `launched.py` by `accelerate launch`; return what `torchrun` returns."""
    quiet = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return run_script(folder, *words, options=["accelerate.commands.launch", "--num_processes=2", *quiet, *options])


def run_script(folder, *words, options, script="tests/helpers/launched.py"):
    folder.mkdir(exist_ok=True)
    launcher, *options = options
    port = "--master_port" if "torch" in launcher else "--main_process_port"
    start = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", launcher, f"{port}={free_port()}", *options),
            *(script, words[0], str(folder), *words[1:]),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done, time.monotonic() - start


def _child(pipe, variables, job, args):
    os.environ.update(variables)
    try:
        result = JOBS[job](*args)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        result = error
    try:
        pipe.send(result)
    except Exception:  # the result cannot be pickled
        pipe.send(RuntimeError(f"{type(result).__name__}: {result}"))
    here = world._joined
    if here is not None:  # what atexit does at the end of a script; processes of multiprocessing skip atexit
        here.watch.stop()
        world.leave(here.store, here.rank, here.size)
