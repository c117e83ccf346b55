"""The tables of docs/doctor.md: of the catalogue, and of what the bank of faults was found to have."""

from agents.diagnosis import CATALOGUE
from agents.evaluation.tables import markdown
from tests.helpers.house import ROOT

PAGE = ROOT / "docs" / "doctor.md"
MARKS = "<!-- {} -->\n", "\n<!-- end -->"


def catalogue_table():
    """Return the catalogue as a table in Markdown."""
    rows = [
        [f"`{name}`: {cause.title}", cause.seen, f"{cause.why} {cause.cure}", cause.source]
        for name, cause in CATALOGUE.items()
    ]
    return markdown(["cause", "seen", "why, and the cure", "source"], rows)


def section(name, text=None):
    """Return the table of the page with this name."""
    text = PAGE.read_text(encoding="utf-8") if text is None else text
    return text.partition(MARKS[0].format(name))[2].partition(MARKS[1])[0]


def write_section(name, table):
    """Replace the table of the page with this name."""
    text = PAGE.read_text(encoding="utf-8")
    begin = MARKS[0].format(name)
    before, _, rest = text.partition(begin)
    PAGE.write_text(before + begin + table + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
