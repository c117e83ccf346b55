"""One finding of the diagnosis: a cause of the catalogue, with the evidence of a run."""

from __future__ import annotations

from dataclasses import dataclass

from .catalogue import CATALOGUE


@dataclass(frozen=True)
class Diagnosis:
    """A cause of what went wrong in a run, with its evidence.

    Attributes:
        id: The cause's id in the catalogue, such as "constant-reward".
        cause: What went wrong, as one clause.
        evidence: The figures of the run that show it, with the number of tokens where they were seen.
        why: Why these figures show it, or what it leads to.
        cure: What to change.
        source: Where the claim comes from: a paper, an invariant, or a page of the docs.
        weight: How likely it is the cause of the trouble, 0 to 1; `diagnose` sorts by it.
    """

    id: str
    cause: str
    evidence: str
    why: str
    cure: str
    source: str
    weight: float

    @classmethod
    def of(cls, cause_id: str, weight: float, evidence: str) -> Diagnosis:
        """Return a finding of a cause of the catalogue.

        Args:
            cause_id: The cause's id.
            weight: How likely it is, 0 to 1.
            evidence: The figures that show it.

        Example:
            >>> Diagnosis.of("constant-reward", 0.9, "all episodes earned 0").cause
            'all texts earn the same reward'
        """
        cause = CATALOGUE[cause_id]
        return cls(cause_id, cause.title, evidence, cause.why, cause.cure, cause.source, weight)
