"""What 8 and 64 GPUs would do, on paper: memory a device, traffic a step, tokens a second; nothing is run.

    python benchmarks/scale_on_paper.py

The assumptions are the constants below and in `docs/scaling.md`, which holds this table.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 80e9  # bytes of a GPU: an H100
FLOPS = 0.4 * 989e12  # bfloat16, at two fifths of the peak
BANDWIDTH = 3.35e12  # bytes a second of its memory
LINKS = {8: 300e9, 64: 50e9}  # bytes a second that an all-reduce gets: NVLink in a machine, 400 Gbit/s a GPU between
LAYER_SECONDS = 0.6e-3  # of a decode step: launching the kernels of a layer, eagerly
LAYERS = {0.5: 24, 7: 32, 70: 80}  # of a model of so many billion parameters
LANES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 512, 4, 8  # lanes a GPU
ADAPTERS = 0.005  # parameters of a LoRA, as a share of the model's


@dataclass(frozen=True)
class Plan:
    """What is trained of a model of `billions` of parameters, a copy of it on each of `n_gpus`."""

    billions: float
    n_gpus: int
    lora: bool

    @property
    def memory(self) -> float:
        """Bytes without activations, keys and values: weight, gradient, two moments, and the reference, in float32.

        With LoRA a bfloat16 base, which is the reference too, and the first four of the adapters.
        """
        n = self.billions * 1e9
        return 2 * n + 16 * ADAPTERS * n if self.lora else 20 * n

    @property
    def traffic(self) -> float:
        """Bytes that a GPU sends in an optimizer step: a ring all-reduce of float32 gradients."""
        trained = self.billions * 1e9 * (ADAPTERS if self.lora else 1)
        return 2 * (self.n_gpus - 1) / self.n_gpus * 4 * trained

    @property
    def rollout_seconds(self) -> float:
        """Decode steps, each of which reads the weights once, or waits for its launches."""
        read = self.billions * 1e9 * (2 if self.lora else 4) / BANDWIDTH
        return NEW_TOKENS * max(read, LAYERS[self.billions] * LAYER_SECONDS)

    @property
    def update_seconds(self) -> float:
        """2 operations a parameter for a forward, 4 for a backward (2 where the weights are frozen), the reference."""
        operations = EPOCHS * (4 if self.lora else 6) + 2
        return operations * self.billions * 1e9 * LANES * NEW_TOKENS / FLOPS

    @property
    def traffic_seconds(self) -> float:
        """As if nothing of it were hidden behind the backward pass."""
        return EPOCHS * MINIBATCHES * self.traffic / LINKS[self.n_gpus]

    @property
    def seconds(self) -> float:
        """An iteration."""
        return self.rollout_seconds + self.update_seconds + self.traffic_seconds

    def row(self) -> str:
        """A line of the table."""
        tokens = self.n_gpus * LANES * NEW_TOKENS / self.seconds
        efficiency = 1 - self.traffic_seconds / self.seconds
        fits = "yes" if self.memory < MEMORY else "no"
        return (
            f"| {self.billions:g} B | {'LoRA' if self.lora else 'all'} | {self.n_gpus} | {self.memory / 1e9:,.0f} GB "
            f"| {fits} | {self.traffic / 1e9:.2f} GB | {self.rollout_seconds:.0f} + {self.update_seconds:.0f} + "
            f"{self.traffic_seconds:.1f} s | {tokens:,.0f} | {efficiency:.0%} |"
        )


def table() -> str:
    """All plans as Markdown."""
    lines = [
        "| model | trained | GPUs | a device | fits 80 GB | a step sends | rollout + update + traffic | tokens/s | "
        "efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plans = [Plan(size, n, lora) for size in LAYERS for lora in (False, True) for n in LINKS]
    return "\n".join([*lines, *(plan.row() for plan in plans)])


if __name__ == "__main__":
    print(table())
