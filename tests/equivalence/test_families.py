"""Every family of causal models and encoder-decoders of the installed transformers: trained exactly, or refused.

The parameters are transformers' own mappings, so that a family that is new in a newer transformers is tested, too.
"""

import pytest
import transformers

from tests.helpers.families import COMMAND, UNBUILT, cells, documented, documented_version, examine_apart, families

SHARP = 1e-3  # nats by which a token moves the distribution two tokens later: less would prove nothing


@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=str)
def test_a_family_is_trained_exactly_or_refused(family):
    row = examine_apart(family)
    if str(family) in UNBUILT:
        assert row.verdict in ("failed", "refused"), f"transformers builds it now: take it out of UNBUILT\n{row}"
        pytest.skip(UNBUILT[str(family)])
    assert row.verdict in ("exact", "refused"), str(row)
    if row.verdict == "exact":
        assert row.sensitivity > SHARP, f"the model is too blunt to prove anything\n{row}"
    if documented_version() == transformers.__version__:
        assert documented()[str(family)] == cells(row), f"docs/models.md says something else: {COMMAND} prints it anew"
