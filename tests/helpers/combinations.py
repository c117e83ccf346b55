"""Options that combine, as data: the axes, the pairs that are refused and why, and cells that cover all others."""

from itertools import combinations, product

AXES = {
    "algorithm": ("PPO", "A2C", "MaskablePPO", "TRPO"),
    "model": ("causal", "encoder-decoder"),
    "trained": ("all", "head", "LastLayers", "LoRA"),
    "critic": ("shared", "detached", "SeparateCritic", "RewardModelCritic"),
    "value_norm": ("none", "norm", "popart"),
    "sampling": ("plain", "temperature, top_p", "repetition_penalty", "top_p_lag (NLPO)"),
    "mask": ("none", "AllowedMask", "RegexMask", "JSONSchemaMask"),
    "KLPenalty": ("none", "k1", "k3, adaptive", "exact", "another reference", "exact in the loss"),
    "advantage": ("gae", "gae, two lambdas", "grpo", "rloo", "reinforce++"),
    "surrogate": ("none", "ClipHigher", "DualClip", "CISPO", "GSPO", "SoftGate", "a function"),
    "aggregation": ("token", "sequence", "constant"),
    "score": ("each token", "shaped", "late, shaped"),
    "memory": ("plain", "gradient_checkpointing", "micro_batch_tokens", "bfloat16"),
    "beside": ("none", "CriticWarmup", "TrainingWarnings", "doctor", "dynamic sampling"),
}

# One side, the other side, and words of the error that says why they do not combine.
REFUSED = (
    (("mask", "any"), ("algorithm", "PPO, A2C, TRPO"), "would sample what the mask forbids"),
    (("mask", "none"), ("algorithm", "MaskablePPO"), "without `mask`"),
    (("model", "encoder-decoder"), ("algorithm", "TRPO"), "second derivatives"),
    (("memory", "gradient_checkpointing"), ("algorithm", "TRPO"), "would miss the vector"),
    (("sampling", "top_p_lag (NLPO)"), ("algorithm", "TRPO"), "those of the lagged copy (NLPO) have no gradient"),
    (("KLPenalty", "exact in the loss"), ("algorithm", "TRPO"), "its line search compares the loss alone"),
    (("beside", "CriticWarmup"), ("algorithm", "TRPO"), "differentiates the policy in every update"),
    (("surrogate", "any"), ("algorithm", "A2C"), "where all ratios are 1"),
    (("surrogate", "any"), ("algorithm", "TRPO"), "compares plain ratios"),
    (("beside", "dynamic sampling"), ("algorithm", "TRPO"), "whose updates cannot wait"),
    (("beside", "dynamic sampling"), ("advantage", "gae"), "gives groups of equal scores a signal"),
    (("beside", "dynamic sampling"), ("advantage", "gae, two lambdas"), "gives groups of equal scores a signal"),
    (("beside", "dynamic sampling"), ("advantage", "reinforce++"), "gives groups of equal scores a signal"),
)


def options(side):
    """Return the options of its axis that one side of `REFUSED` names."""
    axis, named = side
    if named == "any":
        return AXES[axis][1:]
    names = named.split(", ") if axis == "algorithm" else [named]
    return tuple(option for option in AXES[axis] if option in names)


def refused_pairs():
    """Yield each pair that does not combine, as ((axis, option), (axis, option), words)."""
    for left, right, words in REFUSED:
        for first, second in product(options(left), options(right)):
            yield (left[0], first), (right[0], second), words


def walk():
    """Return cells, each a dict of one option per axis, that together hold every pair of options that combine."""
    never = {frozenset(pair[:2]) for pair in refused_pairs()}
    choices = [(axis, option) for axis, of_axis in AXES.items() for option in of_axis]
    missing = {frozenset(pair) for pair in combinations(choices, 2) if pair[0][0] != pair[1][0]} - never
    cells = []
    while missing:
        cell = dict(min(sorted(pair) for pair in missing))
        for axis, of_axis in AXES.items():
            if axis in cell:
                continue
            chosen = list(cell.items())
            fitting = [
                option for option in of_axis if not any(frozenset(((axis, option), pair)) in never for pair in chosen)
            ]
            new = [sum(frozenset(((axis, option), pair)) in missing for pair in chosen) for option in fitting]
            cell[axis] = fitting[new.index(max(new))]
        missing -= {frozenset(pair) for pair in combinations(cell.items(), 2)}
        cells.append(cell)
    return cells


def page_tables():
    """Return the tables of docs/reference/combinations.md: the axes, and the pairs that are refused."""
    cells = [f"{axis} | {'; '.join(of_axis)}" for axis, of_axis in AXES.items()]
    lines = ["| of | any of | of | any of |", "|---|---|---|---|"]
    lines += [f"| {first} | {second} |" for first, second in zip(cells[::2], cells[1::2])]
    lines += ["", "| but not | with | since (the error says more) |", "|---|---|---|"]
    for (axis, option), (other, others), words in REFUSED:
        lines.append(f"| {axis}: {option} | {other}: {others} | {words} |")
    return "\n".join(lines)
