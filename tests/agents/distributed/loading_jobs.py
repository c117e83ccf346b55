"""The job of the tests of loading: what a process needs for itself while it builds a sharded policy from a folder."""

import ctypes
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from agents.distributed.sharding import released
from tests.helpers.jobs import gathered
from tests.helpers.training import tiny_agent

M_MMAP_THRESHOLD = -3  # of malloc.h


class PeakMemory:
    """The most memory that this process has had for itself since the start, beside pages of files, in bytes."""

    def __init__(self):
        self.start = self.peak = self.now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @staticmethod
    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch(self):
        while not self.ended.wait(0.002):
            self.peak = max(self.peak, self.now())

    def end(self):
        self.ended.set()
        self.thread.join()
        return self.peak - self.start


def loaded(folder, shard):
    """Build a policy from a folder.

    Returns:
        Its peak memory and its weights as float32 in bytes; whether they are those of the folder, and their types.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed tensors go back at once, as larger ones do
    warm = tiny_agent(policy_kwargs={"shard": shard})  # allocates what any policy needs
    del warm
    memory = PeakMemory()
    model = tiny_agent(n_envs=4, lm=str(folder), policy_kwargs={"shard": shard})
    peak = memory.end()
    lm = model.policy.lm
    n_bytes = sum(4 * weight.numel() for weight in lm.backbone.parameters())
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with released(lm):
        weights = {name: gathered(weight) for name, weight in lm.backbone.model.named_parameters()}
    same = all(torch.equal(weights[name], weight) for name, weight in expected.named_parameters())
    kinds = {str(weight.dtype) for weight in weights.values()}
    return peak, n_bytes, same and len(weights) > 9, kinds, lm.backbone.model.config.dtype
