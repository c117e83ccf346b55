"""The diagnosis of a run: all rules of the room, and their findings in the order of likelihood."""

from __future__ import annotations

import os

from .findings import Diagnosis
from .prompt_rules import prompt_findings
from .reward_rules import reward_findings
from .run_files import RunRecord, read_run
from .text_rules import text_findings
from .update_rules import update_findings


def diagnose(run: str | os.PathLike[str]) -> list[Diagnosis]:
    """Return the likely causes of what went wrong in a run, most likely first; none for a healthy one.

    It reads the run's files (config.yml, metrics.jsonl, history.json, samples.jsonl, log.txt), of a finished run, a
    broken one, or one that is going on, and loads no model.

    Args:
        run: The run's folder.

    Raises:
        CommandError: If it is not the folder of a run.

    Example:
        >>> from agents import diagnose
        >>> # for finding in diagnose("runs/mine"): print(finding.id, finding.evidence, finding.cure)
    """
    return findings_of(read_run(run))


def findings_of(record: RunRecord) -> list[Diagnosis]:
    """Return what `diagnose` does, of a run whose files were read."""
    found = [
        *files(record),
        *prompt_findings(record),
        *reward_findings(record),
        *text_findings(record),
        *update_findings(record),
    ]
    return sorted(found, key=lambda finding: -finding.weight)


def files(record: RunRecord) -> list[Diagnosis]:
    """Name a damaged file, and an error that ended the run."""
    found = []
    if record.damage:
        more = f" and {len(record.damage) - 1} more" if len(record.damage) > 1 else ""
        found.append(Diagnosis.of("damaged-file", 0.5, f"{record.damage[0]}{more}"))
    if record.error:
        found.append(Diagnosis.of("crashed", 0.6, f"after {record.tokens:,} tokens: {record.error[:300]}"))
    return found
