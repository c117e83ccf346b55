"""The figures of several seeds, and the comparison of two trainings: by hand, by brute force, and in simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, trim_mean

from agents import Evaluation, PromptScores, SeedComparison, SeedTable
from agents.evaluation.improvement import mann_whitney
from agents.evaluation.resampling import COVERAGE, Resampling
from textenv.metrics import Scores, mean_of

PROMPTS = ["The", "A", "This", "It"]


def scored(values, prompts=None, name="reward"):
    """Return the evaluation of one seed from a value of each prompt."""
    return PromptScores(prompts or [f"prompt {i}" for i in range(len(values))], {name: mean_of(values)})


def group(rows, prompts=None):
    return [scored(row, prompts) for row in rows]


def noisy(rng, n_seeds, n_prompts, between, of_prompts, noise=0.3, level=0.0):
    """Return values of seeds and prompts: a level of each seed, one of each prompt, and noise."""
    seeds, prompts = between * rng.standard_normal((n_seeds, 1)), of_prompts[:n_prompts]
    return level + seeds + prompts + noise * rng.standard_normal((n_seeds, n_prompts))


# The table of one training


def test_means_and_spreads_by_hand():
    before = group([[0.0, 0.0, 1.0, 1.0]] * 3, PROMPTS)
    after = group([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], PROMPTS)
    reward = SeedTable(after, before, names=["4", "5", "6"]).figures["reward"]
    assert reward.after.value == pytest.approx(0.75) and reward.before.value == 0.5
    assert reward.difference.value == pytest.approx(0.25)
    # Of the twelve values after training, three zeros and nine ones, the middle six are ones.
    assert reward.iqm_after.value == 1.0 and reward.iqm_before.value == 0.5
    assert [one.value for one in reward.seeds] == [0.75, 0.5, 1.0]
    assert reward.between == 0.5
    assert reward.within == pytest.approx(np.mean([one.high - one.low for one in reward.seeds]))
    assert reward.seeds[0] == Evaluation({"reward": mean_of([0.0, 1.0, 1.0, 1.0])}, []).figures["reward"]


def test_differences_are_paired_by_seed_and_prompt():
    """Each prompt of each seed gains the same, however much seeds and prompts differ: nothing is left to draw."""
    before = np.array([[0.0, 1.0, 5.0], [2.0, 9.0, 3.0]])
    table = SeedTable(group(before + 0.5), group(before))
    assert table.figures["reward"].difference == pytest.approx((0.5, 0.5, 0.5))
    assert table.figures["reward"].after.high - table.figures["reward"].after.low > 1.0


def test_the_draws_are_all_pairs_of_seeds_and_prompts():
    """Against the exact distribution of the means: 4 draws of seeds times 27 of prompts, the same for both seeds."""
    values = np.array([[0.0, 1.0, 4.0], [0.5, 3.0, 2.0]])
    exact = sorted(
        values[np.ix_(seeds, prompts)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for prompts in itertools.product(range(3), repeat=3)
    )
    after = SeedTable(group(values), n_resamples=20_000).figures["reward"].after
    assert exact[int(0.018 * 108)] <= after.low <= exact[int(0.034 * 108)]
    assert exact[int(0.966 * 108)] <= after.high <= exact[int(0.982 * 108)]


@pytest.mark.parametrize("shared", [True, False])
def test_figures_of_draws_are_those_of_a_loop(shared):
    rng = np.random.default_rng(1)
    values = rng.random((3, 5))
    lists = [[*PROMPTS, "x"]] * 3 if shared else [[f"{seed} {i}" for i in range(5)] for seed in range(3)]
    evaluations = [scored(row, prompts) for row, prompts in zip(values, lists, strict=True)]
    resampling = Resampling(evaluations)
    assert resampling.n_prompts == ([5] if shared else [5] * 3)
    seeds, prompts = rng.integers(3, size=(7, 3)), [rng.integers(5, size=(7, 5)) for _ in resampling.n_prompts]
    means = resampling.means(0, [one.scores["reward"] for one in evaluations], [seeds], prompts)
    drawn = resampling.of_prompts(0, values, [seeds], prompts)
    for b in range(7):
        slow = np.array([values[s][prompts[0 if shared else s][b]] for s in seeds[b]])
        np.testing.assert_allclose(means[b], slow.mean(), atol=1e-12)
        np.testing.assert_array_equal(drawn[b], slow)


def test_the_interquartile_mean_is_that_of_rliable():
    """Agarwal et al.'s library: the trimmed mean of the scores of all runs and tasks together."""
    values = np.random.default_rng(2).lognormal(size=(5, 12))
    figure = SeedTable(group(values)).figures["reward"]
    assert figure.iqm_after.value == pytest.approx(trim_mean(values, 0.25, axis=None))
    assert figure.iqm_after.low < figure.iqm_after.value < figure.iqm_after.high


def test_figures_that_are_no_means_are_averaged_over_seeds():
    """A perplexity is exp of a sum by a sum: each seed's own, and then the mean."""
    rows = [np.array([[2.0, 4.0], [3.0, 2.0]]), np.array([[1.0, 2.0], [0.0, 1.0]])]
    evaluations = [
        PromptScores(["a", "b"], {"p": Scores(row, lambda sums: math.exp(sums[0] / sums[1]))}) for row in rows
    ]
    figure = SeedTable(evaluations).figures["p"]
    assert figure.after.value == pytest.approx((math.exp(5 / 6) + math.exp(1 / 3)) / 2)
    assert figure.iqm_after.value == pytest.approx(trim_mean(np.exp([0.5, 1.5, 0.5, 0.0]), 0.25))


def test_a_figure_of_all_texts_has_an_interval_over_seeds_alone():
    distinct = [PromptScores(PROMPTS, {"distinct": Scores(np.zeros((4, 0)), whole=one)}) for one in (0.2, 0.4, 0.9)]
    figure = SeedTable(distinct).figures["distinct"]
    assert figure.after == pytest.approx((0.5, 0.2, 0.9))
    assert figure.iqm_after is None and figure.within is None and figure.between == pytest.approx(0.7)


def test_dropped_texts_leave_no_interquartile_mean():
    rows = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 1.0]])  # the text of the first prompt was dropped
    figure = SeedTable([PromptScores(PROMPTS[:3], {"reward": Scores(rows)})] * 2).figures["reward"]
    assert figure.after.value == 2.0 and figure.iqm_after is None


def test_one_seed_has_an_interval_over_prompts_and_says_so():
    table = SeedTable([scored([0.0, 1.0, 1.0, 0.0])])
    assert table.figures["reward"].after == (0.5, 0.0, 1.0)
    assert "1 seed, 4 prompts. Intervals of 95 % are over prompts alone, and say nothing about another" in table.note


def test_the_table_says_what_it_is_made_of(tmp_path):
    values = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    table = SeedTable(group(values), group([[0.5] * 4] * 3))
    text = table.to_markdown()
    assert "| figure | mean before | mean after | difference | IQM before | IQM after |" in text
    assert "| figure | seed 0 | seed 1 | seed 2 | lowest to highest | width of one interval |" in text
    assert "3 seeds, 4 prompts. " in text and "such an interval contains the true mean in 75 % of all cases" in text
    table.save(tmp_path / "seeds")
    assert (tmp_path / "seeds.md").read_text() == text + "\n"
    numbers = table.to_dict()["figures"]["reward"]
    assert numbers["after"]["value"] == 0.75 and numbers["seeds"]["1"]["value"] == 0.5
    assert numbers["lowest_to_highest"] == 0.5
    alone = SeedTable(group(values)).to_markdown()
    assert "| figure | mean | IQM |" in alone and "| reward | 0.750 [" in alone
    apart = SeedTable([scored(row, [f"{i} {j}" for j in range(4)]) for i, row in enumerate(values)])
    assert "3 seeds, 4 prompts each." in apart.note


def test_evaluations_that_do_not_fit_are_refused():
    one, other = scored([0.0, 1.0]), scored([0.0, 1.0], ["x", "y"])
    for message, words in {
        "Expected as many names and evaluations before as after, got 1, 2 and 1": {"after": [one], "before": [one] * 2},
        "Expected the same prompts before and after training, got others for seed 7": {
            "after": [one],
            "before": [other],
            "names": ["7"],
        },
        "Expected equally many prompts for all seeds, got [2, 3]": {"after": [one, scored([0.0] * 3)]},
        "Expected one row of scores for each prompt, got 2 and 3 rows": {
            "after": [one, PromptScores(one.prompts, {"reward": mean_of([0.0] * 3)})]
        },
        "Expected the evaluation of at least one seed": {"after": []},
    }.items():
        with pytest.raises(ValueError) as error:
            SeedTable(**words)
        assert message in str(error.value)


# The comparison of two


def test_the_probability_of_improvement_is_the_mean_over_prompts_of_mann_whitneys_statistic():
    rng = np.random.default_rng(3)
    a, b = rng.integers(4, size=(4, 6)) / 2.0, rng.integers(4, size=(3, 6)) / 2.0  # with ties
    figure = SeedComparison(group(a), group(b)).figures["reward"]
    slow = np.mean([mannwhitneyu(a[:, p], b[:, p]).statistic / 12 for p in range(6)])
    assert figure.probability.value == pytest.approx(slow)
    assert figure.difference.value == pytest.approx(a.mean() - b.mean())
    turned = SeedComparison(group(b), group(a)).figures["reward"]
    assert turned.probability.value == pytest.approx(1 - slow)


def test_other_prompts_are_compared_without_pairs():
    rng = np.random.default_rng(4)
    a, b = rng.integers(4, size=(2, 6)) / 2.0, rng.integers(4, size=(3, 4)) / 2.0
    comparison = SeedComparison(group(a, [f"a{i}" for i in range(6)]), group(b, [f"b{i}" for i in range(4)]))
    figure = comparison.figures["reward"]
    statistic = mannwhitneyu(a.ravel(), b.ravel()).statistic / (12 * 12)
    assert figure.probability.value == pytest.approx(statistic)
    assert mann_whitney(a.ravel(), b.ravel()) == pytest.approx(statistic)
    assert not comparison.is_paired and "A: 2 seeds, B: 3 seeds; other prompts" in comparison.note


def test_the_same_prompts_are_drawn_for_both():
    """Prompts differ by far more than A and B: paired that is seen, and with other prompts not."""
    rng = np.random.default_rng(5)
    levels = 10.0 * rng.standard_normal(20)
    a, b = (noisy(rng, 4, 20, 0.02, levels, 0.1, level) for level in (0.3, 0.0))
    paired = SeedComparison(group(a), group(b)).figures["reward"]
    apart = SeedComparison(group(a), group(b, [f"other {i}" for i in range(20)])).figures["reward"]
    assert paired.higher == "a" and paired.difference.low > 0.1 and paired.probability.low > 0.9
    assert apart.higher is None and apart.difference.low < -1.0
    assert SeedComparison(group(b), group(a)).figures["reward"].higher == "b"


def test_a_difference_of_one_seed_is_not_shown_where_seeds_differ():
    """A negative control: two trainings of equal distribution, whose seeds differ by more than their prompts."""
    rng = np.random.default_rng(6)
    shown = sum(
        SeedComparison(*(group(noisy(rng, 5, 16, 0.5, np.zeros(16))) for _ in range(2)), seed=trial, n_resamples=200)
        .figures["reward"]
        .higher
        is not None
        for trial in range(20)
    )
    assert shown <= 5


def test_a_comparison_as_a_table():
    comparison = SeedComparison(group([[1.0, 1.0], [1.0, 1.0]]), group([[0.0, 0.0], [0.0, 0.0]]), ("new", "old"))
    text = comparison.to_markdown()
    assert "| figure | new | old | difference | P(new > old) | higher |" in text
    assert "| reward | 1.00 [1.00, 1.00] | 0.00 [0.00, 0.00] | +1.00 [+1.00, +1.00] | 1.00 [1.00, 1.00] | new |" in text
    assert "new: 2 seeds, old: 2 seeds; the same 2 prompts. Intervals of 95 % are over seeds and prompts." in text


# Simulations


def holds(values, prompts=None, seed=0):
    """Return whether the interval of the mean holds 0, the mean of all seeds and prompts."""
    lists = prompts or [None] * len(values)
    evaluations = [scored(row, own) for row, own in zip(values, lists, strict=True)]
    resampling, scores = (
        Resampling(evaluations, seed=seed, n_resamples=400),
        [one.scores["reward"] for one in evaluations],
    )
    interval = resampling.estimate(lambda *drawn: resampling.means(0, scores, *drawn))
    return interval.low <= 0.0 <= interval.high


@pytest.mark.slow  # a thousand bootstraps
def test_the_intervals_hold_as_often_as_the_docstring_says():
    rng = np.random.default_rng(7)

    def share(n_seeds, between, trials=120):
        draws = (noisy(rng, n_seeds, 32, between, 0.3 * rng.standard_normal(32)) for _ in range(trials))
        return np.mean([holds(values, seed=trial) for trial, values in enumerate(draws)])

    for n_seeds in (3, 10):
        assert share(n_seeds, 0.0) > 0.9, "prompts that differ for all seeds alike are not averaged away"
    assert share(10, 0.1) > 0.88
    for n_seeds, per_cent in COVERAGE.items():
        assert share(n_seeds, 3.0) == pytest.approx(per_cent / 100, abs=0.12)
    assert 0.8 < share(10, 3.0) < 0.97


@pytest.mark.slow  # a hundred bootstraps
def test_draws_of_each_seeds_own_prompts_would_not_hold():
    """The control of the test above: with the same values under other names of prompts, intervals are too narrow."""
    rng, held = np.random.default_rng(8), []
    for trial in range(100):
        values = noisy(rng, 10, 32, 0.0, 0.3 * rng.standard_normal(32))
        held.append(holds(values, [[f"{seed} {i}" for i in range(32)] for seed in range(10)], trial))
    assert np.mean(held) < 0.82
