"""The page docs/doctor.md: the table of the catalogue is generated, and the page of log keys has those that rules read."""

from tests.agents.diagnosis.bank.page import PAGE, catalogue_table, section


def test_the_page_has_the_catalogue():
    assert section("catalogue") == catalogue_table(), "tests.agents.diagnosis.bank.page.write_section writes it anew"


def test_a_key_of_a_figure_that_a_rule_reads_is_in_the_table():
    keys = (PAGE.parent / "reference" / "log_keys.md").read_text()
    for key in ("episode/count", "text/repetition", "prompt/signal_share", "rollout/log_ratio", "kl/reference_nll"):
        assert f"`{key}`" in keys
