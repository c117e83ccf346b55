"""Estimates for 8 and 64 GPUs: memory per device, traffic per step, tokens per second; nothing is run.

    python benchmarks/scale_on_paper.py

The assumptions are the constants below and in `docs/scaling.md`, which holds this table.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 80e9  # bytes of a GPU: an H100
FLOPS = 0.4 * 989e12  # bfloat16, at two fifths of the peak
BANDWIDTH = 3.35e12  # bytes a second of its memory
LINKS = {8: 300e9, 64: 50e9}  # bytes a second that an all-reduce gets: NVLink in a machine, 400 Gbit/s a GPU between
LAYER_SECONDS = 0.6e-3  # of a decode step per layer: launching its kernels, without CUDA graphs
LAYERS = {0.5: 24, 7: 32, 70: 80}  # the layers of a model, by billions of parameters
LANES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 512, 4, 8  # lanes per GPU
ADAPTERS = 0.005  # parameters of a LoRA, as a share of the model's


WAYS = ("copies", "sharded", "lock-step")  # how processes hold the weights: see `agents.Sharded`


@dataclass(frozen=True)
class Plan:
    """A model of `billions` of parameters on `n_gpus`: which weights are trained, and how they are held on each GPU."""

    billions: float
    n_gpus: int
    lora: bool
    way: str = "copies"

    @property
    def n(self) -> float:
        """The number of parameters."""
        return self.billions * 1e9

    @property
    def memory(self) -> float:
        """Bytes without activations, keys and values: weight, gradient, two moments, and the reference, in float32.

        With LoRA, the base is in bfloat16 and also serves as reference, and the adapters have the first four. With
        shards, a GPU holds its part of that, and gathers in bfloat16: policy and reference, or two layers of each in
        lock-step.
        """
        kept = 2 * self.n + 16 * ADAPTERS * self.n if self.lora else 20 * self.n
        if self.way == "copies":
            return kept
        gathered = 2 * self.n * (1 if self.lora else 2)
        return kept / self.n_gpus + gathered * (1 if self.way == "sharded" else 2 / LAYERS[self.billions])

    @property
    def traffic(self) -> float:
        """Bytes that a GPU sends in an optimizer step, by rings.

        Copies all-reduce float32 gradients. Shards gather bfloat16 weights forward and backward, and reduce-scatter.
        """
        share, trained = (self.n_gpus - 1) / self.n_gpus, self.n * (ADAPTERS if self.lora else 1)
        return share * (2 * 4 * trained if self.way == "copies" else 2 * 2 * self.n + 4 * trained)

    @property
    def rollout_traffic(self) -> float:
        """Bytes that a GPU sends in a rollout and where the reference reads it, once or for each token in lock-step."""
        gathered = (self.n_gpus - 1) / self.n_gpus * 2 * self.n
        once = 0 if self.lora else gathered  # the reference
        return {"copies": 0, "sharded": gathered + once, "lock-step": NEW_TOKENS * gathered + once}[self.way]

    @property
    def rollout_seconds(self) -> float:
        """Return the seconds of decode steps, each limited by reading the weights once or by kernel launches."""
        in_16_bits = self.lora or self.way != "copies"
        read = self.n * (2 if in_16_bits else 4) / BANDWIDTH
        return NEW_TOKENS * max(read, LAYERS[self.billions] * LAYER_SECONDS)

    @property
    def update_seconds(self) -> float:
        """Return the seconds of the update: operations per parameter are 2 forward, 4 (frozen: 2) backward.

        The reference adds one forward.
        """
        operations = EPOCHS * (4 if self.lora else 6) + 2
        return operations * self.n * LANES * NEW_TOKENS / FLOPS

    @property
    def traffic_seconds(self) -> float:
        """Return the seconds of the traffic, none of it overlapped with forward or backward."""
        return (EPOCHS * MINIBATCHES * self.traffic + self.rollout_traffic) / LINKS[self.n_gpus]

    @property
    def seconds(self) -> float:
        """The seconds of an iteration."""
        return self.rollout_seconds + self.update_seconds + self.traffic_seconds

    def row(self) -> str:
        """Return a line of the table."""
        tokens = self.n_gpus * LANES * NEW_TOKENS / self.seconds
        efficiency = 1 - self.traffic_seconds / self.seconds
        return (
            f"| {self.billions:g} B | {'LoRA' if self.lora else 'all'} | {self.n_gpus} | {self.way} "
            f"| {self.memory / 1e9:,.0f} GB{'' if self.memory < MEMORY else ': too much'} "
            f"| {self.traffic / 1e9:.2f} GB | {self.rollout_traffic / 1e9:,.0f} GB "
            f"| {self.rollout_seconds:.0f} + {self.update_seconds:.0f} + {self.traffic_seconds:.1f} s | {tokens:,.0f} "
            f"| {efficiency:.0%} |"
        )


def choose(billions: float, n_gpus: int, lora: bool) -> Plan:
    """Return the first way of holding the weights that leaves a tenth of the memory for all else; else the last."""
    plans = [Plan(billions, n_gpus, lora, way) for way in WAYS]
    return next((plan for plan in plans if plan.memory < 0.9 * MEMORY), plans[-1])


def table() -> str:
    """Return the table of all models as Markdown."""
    lines = [
        "| model | trained | GPUs | weights | a device | a step sends | a rollout sends | rollout + update + traffic "
        "| tokens/s | efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plans = [choose(size, n, lora) for size in LAYERS for lora in (False, True) for n in LINKS]
    return "\n".join([*lines, *(plan.row() for plan in plans)])


if __name__ == "__main__":
    print(table())
