"""Every family of causal models and encoder-decoders of the installed transformers: trained exactly, or refused.

The parameters are transformers' own mappings, so that a family that is new in a newer transformers is tested, too.
"""

import pytest
import transformers

from agents.doctor.model_row import ModelRow
from tests.helpers.families import (
    COMMAND,
    UNBUILT,
    Family,
    cells,
    default_config,
    documented,
    documented_version,
    examine_apart,
    families,
)

# CI has time for a third of them; the others run weekly.
WALK = [
    pytest.param(family, marks=pytest.mark.long if i % 3 else pytest.mark.slow) for i, family in enumerate(families())
]
SHARP = 1e-3  # nats by which a token moves the distribution two tokens later: less would prove nothing


@pytest.mark.parametrize("family", WALK, ids=str)
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


def test_the_families_are_those_of_transformers_with_a_flag_where_it_makes_one_causal():
    names = {str(family) for family in families()}
    assert {"gpt2", "bert", "bert, is_decoder=True", "xlm, causal=True", "bart", "bart (seq2seq)"} <= names
    assert "bart, is_decoder=True" not in names  # the causal BART is its decoder alone, which is one anyway
    assert UNBUILT.keys() <= names


def test_a_default_config_is_random_in_training_mode_wherever_it_can_be():
    config = default_config(Family("causal", "mixtral"))
    assert (config.router_jitter_noise, config.attention_dropout) == (0.3, 0.3)
    assert default_config(Family("causal", "bert", "is_decoder")).is_decoder
    decoder = default_config(Family("causal", "bart"))
    assert (decoder.is_encoder_decoder, decoder.decoder_layerdrop) == (False, 0.3)


@pytest.mark.slow
def test_an_examination_that_breaks_off_leaves_a_row():
    unknown, gpt2 = Family("causal", "no-such-family"), Family("causal", "gpt2")
    assert examine_apart(unknown).remarks.startswith("no config: KeyError")
    assert examine_apart(gpt2, timeout=0.0) == ModelRow("failed", remarks="no result after 0 s")
