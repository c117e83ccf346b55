"""What a configuration can name: tasks, rewards, metrics, masks and loggers, with a line each; without torch."""

from __future__ import annotations

from textenv import TASKS
from textenv.rewards.registry import _ENTRY_POINTS as REWARDS

from .names import LOGGERS, MASKS, METRICS, first_line
from .refusal import Exit


def list_names() -> int:
    """Print the catalogue."""
    print(catalogue())
    return Exit.DONE


def catalogue() -> str:
    """Return the names with the first line of what their classes say; those whose module is not there are left out."""
    rooms = {"tasks (env.id)": TASKS, "rewards": REWARDS, "metrics": METRICS, "masks": MASKS}
    lines = ["tasks (env.id)", "  demo                The built-in product reviews, rewarded for a good mood."]
    lines.append("  text                Prompts of a file (env.prompts) and a reward by name (env.reward).")
    for room, names in rooms.items():
        if room != "tasks (env.id)":
            lines += ["", room]
        found = {name: first_line(path) for name, path in names.items() if not path.endswith(":TextEnv")}
        lines += [f"  {name:<20}{line}" for name, line in found.items() if line is not None]
    lines += ["", "loggers", *(f"  {name:<20}{line}" for name, line in LOGGERS.items())]
    return "\n".join(lines)
