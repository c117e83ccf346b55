"""Estimates for 8 and 64 GPUs: memory per device, traffic per step, tokens per second; nothing is run on a GPU.

    python benchmarks/scale_on_paper.py

The assumptions are the constants below and in `docs/scaling.md`, which holds this table. The seconds of an iteration
are those of the simulated schedule (`schedule.py`), with the costs of each GPU computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedule import Costs, simulate

MEMORY = 80e9  # bytes of a GPU: an H100
FLOPS = 0.4 * 989e12  # bfloat16, at two fifths of the peak
BANDWIDTH = 3.35e12  # bytes a second of its memory
LINKS = {8: 300e9, 64: 50e9}  # bytes a second that an all-reduce gets: NVLink in a machine, 400 Gbit/s a GPU between
LAYER_SECONDS = 0.6e-3  # of a decode step per layer: launching its kernels, without CUDA graphs
LAYERS = {0.5: 24, 7: 32, 70: 80}  # the layers of a model, by billions of parameters
LANES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 512, 4, 8  # lanes per GPU
PROMPT_TOKENS, SAMPLES = 512, 8  # tokens of a prompt; texts of each, on one GPU
ADAPTERS = 0.005  # parameters of a LoRA, as a share of the model's


WAYS = ("copies", "sharded", "lock-step")  # how processes hold the weights: see `agents.Sharded`


@dataclass(frozen=True)
class Plan:
    """A model of `billions` of parameters on `n_gpus`: which weights are trained, and how they are held on each GPU.

    `shares_prompts` is whether the samples of a prompt share its reading: in the rollout with every way, in reference
    and update with copies alone.
    """

    billions: float
    n_gpus: int
    lora: bool
    way: str = "copies"
    shares_prompts: bool = True

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

    def read_tokens(self, in_rollout: bool) -> float:
        """Return the tokens of prompts that a GPU reads in a rollout, or in a pass over all of its texts."""
        is_shared = self.shares_prompts and (in_rollout or self.way == "copies")
        return PROMPT_TOKENS * LANES / (SAMPLES if is_shared else 1)

    @property
    def rollout_seconds(self) -> float:
        """Return the seconds of prefill and of decode steps, each limited by reading the weights or by launches.

        A token of a prompt takes 2 operations per parameter.
        """
        in_16_bits = self.lora or self.way != "copies"
        read = self.n * (2 if in_16_bits else 4) / BANDWIDTH
        prefill = 2 * self.n * self.read_tokens(True) / FLOPS
        return prefill + NEW_TOKENS * max(read, LAYERS[self.billions] * LAYER_SECONDS)

    @property
    def pass_tokens(self) -> float:
        """The tokens that a forward over all texts of a GPU reads: completions, and prompts."""
        return LANES * NEW_TOKENS + self.read_tokens(False)

    @property
    def reference_seconds(self) -> float:
        """Return the seconds of the reference: a forward."""
        return 2 * self.n * self.pass_tokens / FLOPS

    @property
    def update_seconds(self) -> float:
        """Return the seconds of the update: operations per parameter and token are 2 forward, 4 (frozen: 2) backward.

        Minibatches keep the texts of a prompt together.
        """
        return EPOCHS * (4 if self.lora else 6) * self.n * self.pass_tokens / FLOPS

    @property
    def costs(self) -> Costs:
        """What each GPU does in an iteration; none of the traffic overlaps with forward or backward."""
        n_steps, link = EPOCHS * MINIBATCHES, LINKS[self.n_gpus]
        return Costs(
            rollout=self.rollout_seconds,
            reference=self.reference_seconds,
            step=self.update_seconds / n_steps,
            n_steps=n_steps,
            traffic=self.traffic / link,
            gathering=self.rollout_traffic / link,
        )

    @property
    def tokens_per_second(self) -> float:
        """The sampled tokens of all GPUs per second."""
        return self.n_gpus * LANES * NEW_TOKENS / simulate(self.costs, self.n_gpus, self.n_gpus)["seconds"]

    def row(self) -> str:
        """Return a line of the table."""
        spent = simulate(self.costs, self.n_gpus, self.n_gpus)
        alone = Plan(self.billions, self.n_gpus, self.lora, self.way, shares_prompts=False)
        return (
            f"| {self.billions:g} B | {'LoRA' if self.lora else 'all'} | {self.n_gpus} | {self.way} "
            f"| {self.memory / 1e9:,.0f} GB{'' if self.memory < MEMORY else ': too much'} "
            f"| {self.traffic / 1e9:.2f} GB | {self.rollout_traffic / 1e9:,.0f} GB "
            f"| {spent['rollout']:.0f} + {spent['reference']:.1f} + {spent['update']:.0f} + {spent['traffic']:.1f} s "
            f"| {self.tokens_per_second:,.0f} | {alone.tokens_per_second:,.0f} "
            f"| {1 - spent['traffic'] / spent['seconds']:.0%} |"
        )


def choose(billions: float, n_gpus: int, lora: bool) -> Plan:
    """Return the first way of holding the weights that leaves a tenth of the memory for all else; else the last."""
    plans = [Plan(billions, n_gpus, lora, way) for way in WAYS]
    return next((plan for plan in plans if plan.memory < 0.9 * MEMORY), plans[-1])


def table() -> str:
    """Return the table of all models as Markdown."""
    lines = [
        "| model | trained | GPUs | weights | a device | a step sends | a rollout sends "
        "| rollout + reference + update + traffic | tokens/s | each prompt read 8 times | efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plans = [choose(size, n, lora) for size in LAYERS for lora in (False, True) for n in LINKS]
    return "\n".join([*lines, *(plan.row() for plan in plans)])


if __name__ == "__main__":
    print(table())
