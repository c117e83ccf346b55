"""The command `textenv doctor`: what may be wrong before a run, or went wrong in one, which needs no torch."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from textenv.text.printable import printable

from ..configuration.config import TrainConfig
from ..diagnosis.diagnose import findings_of
from ..diagnosis.findings import Diagnosis
from ..diagnosis.run_files import RunRecord, read_run
from ..errors import Exit
from ..runs.folder import RunFolder
from .options import DoctorOptions, ExaminedRun, OneModel

WIDTHS = 60, 100  # the narrowest and the widest lines


def examine(config: TrainConfig | OneModel | ExaminedRun, options: DoctorOptions) -> int:
    """Print what may be wrong with settings or a model, or the likely causes of what went wrong in a run.

    Args:
        config: The settings, the model or the run.
        options: The permissions of the command line, and whether to print JSON.

    Returns:
        The exit code: 1 if there is something to mend.
    """
    if not isinstance(config, ExaminedRun):
        from .trained_model import examine as examine_settings  # which loads torch, and files need none

        return examine_settings(config, options)
    if not (Path(config.run) / "run.json").is_file():
        RunFolder.open(config.run)  # raises, and names the runs of a folder of seeds
    record = read_run(config.run)
    findings = findings_of(record)
    if options.json:
        row = {"run": config.run, "tokens": record.tokens, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(row))
    else:
        width = min(max(shutil.get_terminal_size().columns, WIDTHS[0]), WIDTHS[1])
        print(report(record, findings, width))
    return Exit.FAILED if findings else Exit.DONE


def report(record: RunRecord, findings: Sequence[Diagnosis], width: int = WIDTHS[1]) -> str:
    """Return findings as text for people, most likely first.

    Args:
        record: The run.
        findings: What was found in it.
        width: The most columns of a line.
    """
    n_rollouts = sum(row["tokens"] > 0 for row in record.rows)  # the first row is the evaluation before training
    seen = f"{printable(str(record.path))}: {n_rollouts} rollouts, {record.tokens:,} tokens"
    if not findings:
        return f"{seen}. Nothing in its figures and texts speaks for a known fault."
    n = len(findings)
    lines = [f"{seen}. {'1 likely cause' if n == 1 else f'{n} likely causes, the likeliest first'}:"]
    for number, finding in enumerate(findings, 1):
        lines += ["", f"{number}. {finding.cause[0].upper()}{finding.cause[1:]} ({finding.id})"]
        parts = {"seen": finding.evidence, "why": finding.why, "cure": finding.cure, "source": finding.source}
        for name, text in parts.items():
            indents = {"initial_indent": f"   {name:<8}", "subsequent_indent": " " * 11}
            lines += textwrap.wrap(printable(text), width, **indents)  # type: ignore[arg-type]
    return "\n".join(lines)
