"""The table of model families in docs/models.md: of the installed transformers, or of the version that it names."""

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from agents.doctor.model_row import COLUMNS, ModelRow
from tests.helpers import families
from tests.helpers.families import COMMAND, documented, documented_version, page


def test_the_page_has_a_row_for_each_family():
    rows, version = documented(), documented_version()
    assert {len(cells) for cells in rows.values()} == {len(COLUMNS)}
    if version != transformers.__version__:
        return  # another version has other families; the page says which one it is of
    expected = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *(f"{name} (seq2seq)" for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    }
    assert {name.partition(", ")[0] for name in rows} == expected, f"print the page anew: {COMMAND}"


def test_a_printed_page_is_read_back(tmp_path, monkeypatch):
    rows = {
        "a": ModelRow("exact", "yes", "sdpa", "shared, separate", "q, v"),
        "b, is_decoder=True": ModelRow("refused", remarks="Expected x | y,\ngot z."),
    }
    path = tmp_path / "models.md"
    monkeypatch.setattr(families, "PAGE", path)
    path.write_text(page(rows))
    assert "2 rows: 1 exact, 1 refused." in path.read_text()
    assert documented_version() == transformers.__version__
    assert documented() == {
        "a": ("exact", "yes", "sdpa", "shared, separate", "q, v", ""),
        "b, is_decoder=True": ("refused", "", "", "", "", r"Expected x \| y, got z."),
    }
