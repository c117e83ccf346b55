"""The command `textenv tasks`: the names that a configuration can use. Importing this does not load torch."""

from __future__ import annotations

from textenv import TASKS
from textenv.rewards.registry import REWARDS

from ..configuration.names import LOGGERS, MASKS, METRICS, first_line
from ..errors import Exit


def list_names() -> int:
    """Print the names; return the exit code."""
    print(catalogue())
    return Exit.DONE


def catalogue() -> str:
    """Return the names by kind, each with the first docstring line of its class; missing modules are left out."""
    kinds = {"tasks (env.id)": TASKS, "rewards": REWARDS, "metrics": METRICS, "masks": MASKS}
    lines = ["tasks (env.id)", "  demo                The built-in product reviews, rewarded for a good mood."]
    lines.append("  text                Prompts of a file (env.prompts) and a reward by name (env.reward).")
    for kind, paths in kinds.items():
        if kind != "tasks (env.id)":
            lines += ["", kind]
        # The task "Text" is `TextEnv` itself, which the line "text" above describes.
        described = {name: first_line(path) for name, path in paths.items() if not path.endswith(":TextEnv")}
        lines += [f"  {name:<20}{line}" for name, line in described.items() if line is not None]
    lines += ["", "loggers", *(f"  {name:<20}{line}" for name, line in LOGGERS.items())]
    return "\n".join(lines)
