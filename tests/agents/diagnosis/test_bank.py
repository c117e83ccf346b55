"""The bank of faults: the injected cause is named first in nine of ten runs, and few healthy runs raise an alarm."""

import pytest

from tests.agents.diagnosis.bank.runs import Bank, cases, place_of, wrong

NAMED = 0.9  # the share of faults whose cause is named first
ALARMS = 0.05  # the share of healthy runs that may raise a false alarm


def results(folder, **which):
    bank = Bank(folder)
    return [(case, bank.diagnosed(case, place_of(folder, case))) for case in cases(**which)]


def assert_bars(found):
    missed, alarms = wrong(found)
    n_faults = sum(case.cause is not None for case, _ in found)
    assert len(missed) <= (1 - NAMED) * n_faults, missed
    assert len(alarms) <= ALARMS * (len(found) - n_faults), alarms


@pytest.mark.slow
def test_the_causes_of_a_part_of_the_bank_are_named(tmp_path):
    assert_bars(results(tmp_path, quick=True))


@pytest.mark.long
@pytest.mark.parametrize("held_out", [False, True])
def test_the_causes_of_the_whole_bank_are_named(tmp_path, held_out):
    assert_bars(results(tmp_path, held_out=held_out))
