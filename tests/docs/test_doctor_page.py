"""The tables of docs/doctor.md: the catalogue's is generated, the bank's has a row for each of its runs."""

from agents.diagnosis import CATALOGUE
from tests.agents.diagnosis.bank.faults import FAULTS, SOUND
from tests.agents.diagnosis.bank.page import PAGE, catalogue_table, section


def test_the_page_has_the_catalogue():
    assert section("catalogue") == catalogue_table(), "tests.agents.diagnosis.bank.page.write_section writes it anew"


def test_the_page_has_a_row_for_each_run_of_the_bank():
    table = section("bank")
    for case in FAULTS:
        assert f"| {case.name} | `{case.cause}` |" in table
    assert table.count("| healthy ") == len(SOUND)
    missed = [line for line in table.splitlines() if line.startswith("| held out") and "| nothing |" not in line]
    assert len(missed) <= 1


def test_each_cause_with_a_run_is_in_the_catalogue():
    assert {case.cause for case in FAULTS} <= CATALOGUE.keys()
    assert len(FAULTS) >= 20 and len(SOUND) >= 20


def test_a_key_of_a_figure_that_a_rule_reads_is_in_the_table():
    keys = (PAGE.parent / "reference" / "log_keys.md").read_text()
    for key in ("episode/count", "text/repetition", "prompt/signal_share", "rollout/log_ratio", "kl/reference_nll"):
        assert f"`{key}`" in keys
