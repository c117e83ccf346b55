"""Several processes train one policy: the same update as one, what they agree on, and who logs."""

import numpy as np
import pytest

from tests.processes import train

SAME = 1e-6


def largest_difference(one, other):
    return max(np.abs(one[name] - other[name]).max() for name in one)


@pytest.fixture(scope="module")
def alone():
    """The weights after three updates in one process."""
    return {n: train(1, "scripted_updates", n)[0] for n in (1, 2)}


@pytest.mark.parametrize(("size", "n_minibatches"), [(2, 1), (2, 2), (4, 2)])
def test_the_update_is_that_of_one_process_on_the_union_of_the_data(alone, size, n_minibatches):
    weights, figures = alone[n_minibatches]
    results = train(size, "scripted_updates", n_minibatches)
    for theirs, their_figures in results:
        assert largest_difference(theirs, weights) < SAME
        assert their_figures == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("off", ["weights", "advantages", "returns", "scores", "divergence"])
def test_without_agreement_the_update_is_another(alone, off):
    weights, _ = alone[2]
    (theirs, _), (others, _) = train(2, "scripted_updates", 2, off)
    assert max(largest_difference(theirs, weights), largest_difference(others, weights)) > 10 * SAME


@pytest.mark.slow
def test_the_update_is_the_same_with_every_option():
    alone, (first, second) = train(1, "every_option")[0], train(2, "every_option", timeout=120)
    assert len(alone) > 10
    for option, weights in alone.items():
        tolerance = 1e-4 if option == "bfloat16" else SAME
        for theirs in (first[option], second[option]):
            assert largest_difference(theirs, weights) < tolerance, option
