"""The options of the verbs that write pages: their names, defaults and help."""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration.config import TrustOptions


@dataclass
class ReportOptions:
    """Write one HTML page of what happened in runs: curves, samples and single tokens, and differences of several.

    Args:
        runs: The folders of the runs, or of the runs of several seeds.
        out: The page to write; null is report.html in the folder of the run, or here for several.
    """

    runs: list[str]
    out: str | None = None


@dataclass
class WatchOptions:
    """Options of `textenv report`.

    Args:
        watch: Write the page again whenever a run has gone on, until all runs are finished; an open page follows.
    """

    watch: bool = False


@dataclass
class ShowFlags(TrustOptions):
    """Options of `textenv show`.

    Args:
        html: Write episode.html in the folder of the run instead: the tokens in colours, with their likeliest
            alternatives.
    """

    html: bool = False
