"""Pictures of training curves: shown ranges, cut spikes, and a layout without overlaps."""

import itertools
import math

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from agents.evaluation.curves import CURVES, draw_curves, shown_range

RISE = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.98, 0.97, 0.98]


def rows(*curves):
    """Return rows of figures, one per 1000 tokens, in which each curve belongs to one of the first keys."""
    keys = [key for key, _ in CURVES]
    return [{"tokens": 1000 * (i + 1), **dict(zip(keys, values))} for i, values in enumerate(zip(*curves))]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws curves to a file and returns the matplotlib figure, laid out."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(runs, title="", groups=None):
        draw_curves(tmp_path / "curves.png", runs, title, groups)
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        assert image.imread(tmp_path / "curves.png").std() > 0
        figures[-1].draw_without_rendering()  # at its own resolution
        return figures[-1]

    return draw


def test_a_judge_and_its_gap_have_panels_of_their_own(drawn):
    """They are in the rows with an evaluation alone; a run without a judge has no such panel."""
    plain = rows(RISE[:4], RISE[:4])
    judged = [row | ({"eval/judge": 0.5, "eval/gap": float(i)} if i % 2 == 0 else {}) for i, row in enumerate(plain)]
    axes = drawn({"judged": judged}).get_axes()
    titles = ["reward", "KL from the reference, nats", "judge", "reward ahead of the judge, deviations"]
    assert [axis.get_title() for axis in axes] == titles
    assert list(axes[3].get_lines()[0].get_ydata()) == [0.0, 2.0]
    assert [axis.get_title() for axis in drawn({"plain": plain}).get_axes()] == titles[:2]


@pytest.mark.parametrize(
    ("curves", "shown"),
    [
        ([RISE], None),  # the start of a curve is no spike, though most values are far from it
        ([[math.exp(i) for i in range(12)]], None),  # nor is the end of a run that diverges
        ([[1.5, 480.0, 1.2, 1.8, 1.4, 1.6]], (1.2, 1.8)),
        ([[-1.5, -480.0, -1.2, -1.8, -1.4, -1.6]], (-1.8, -1.2)),
        ([[0.0, 1.0, 2.0, 2.0, 2.2, 3.8, 2.1, 2.0, 1.5]], None),  # a bump that fits the panel
        ([[1.5, 1.2, 1.8, 1.4, 1.6, 480.0]], (1.2, 1.8)),  # the last one
        ([[1.5, 1.3, 1.2, 480.0, 500.0, 1.2, 1.8, 1.4, 1.6]], (1.2, 1.8)),  # two at a time
        ([[1.5, 1.2, 1.8, 1.4], [480.0, 490.0, 470.0, 480.0]], None),  # another run is no spike
        ([[12.0] * 9], None),
        ([[12.0] * 9 + [13.0] + [12.0] * 9], None),
        ([[1.0], [1.2, 1.0]], None),
        ([[1.0, 480.0]], None),
        ([[1.0], []], None),
    ],
)
def test_a_panel_leaves_out_spikes_alone(curves, shown):
    assert shown_range(curves) == shown


def test_a_spike_is_cut_and_marked_with_its_value(drawn):
    kl = [1.5, 1.2, 1.8, 1.4, 480.3, 1.6, 1.3, 1.5, -70.0, 1.4, 1.6, 1.5]
    figure = drawn({"run": rows(RISE, kl)}, "a title")
    reward, divergence = figure.axes
    assert divergence.get_ylim() == pytest.approx((1.2 - 0.09, 1.8 + 0.09))
    marks = {(*line.get_xdata(), line.get_marker()) for line in divergence.get_lines()[1:]}
    assert marks == {(5000, "^"), (9000, "v")}
    assert {text.get_text() for text in divergence.texts} == {"480", "-70"}
    assert list(divergence.get_lines()[0].get_ydata()) == kl  # the line leaves the panel and comes back
    # The controls: a panel without spikes, and a curve that is as high everywhere.
    assert not reward.texts and len(reward.get_lines()) == 1 and reward.get_ylim()[1] > max(RISE)
    high = drawn({"run": rows(RISE, [480.0 + value for value in RISE])})
    assert not high.axes[1].texts and len(high.axes[1].get_lines()) == 1


def test_of_many_spikes_the_farthest_are_written(drawn):
    kl = ([1.5, 1.2, 1.8, 1.4] * 12)[:40]
    kl[4::8] = 100.0, 200.0, 300.0, 400.0, 500.0
    divergence = drawn({"a": rows([1.0] * 40, [1.5] * 40), "b": rows([1.0] * 40, kl)}).axes[1]
    marks = divergence.get_lines()[2:]
    assert len(marks) == 5 and {text.get_text() for text in divergence.texts} == {"300", "400", "500"}
    assert {line.get_color() for line in marks} == {divergence.get_lines()[1].get_color()}


def test_titles_and_names_touch_nothing(drawn):
    curve = [1.0, 2.0, 1.5, 1.2]
    long = "a run with a name that says all of its settings learning_rate=0.0003 coef=0.02 seed=1"
    figure = drawn({long: rows(curve, curve, curve), "short": rows(curve, curve, curve)}, "PPO with a KL penalty")
    boxes = [figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()]
    boxes += [axis.title.get_window_extent() for axis in figure.axes]
    boxes += [axis.get_window_extent() for axis in figure.axes]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.padded(2).overlaps(other), (box, other)
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1 for box in boxes)
    # The figure's title is a clear distance above the panels' titles.
    gap = boxes[0].y1 - boxes[2].y1
    assert gap > 1.5 * boxes[2].height


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": rows([math.nan] * 3)}, {"a": [{"tokens": 1}]}])
def test_nothing_to_draw_is_said(drawn, runs):
    [axis] = drawn(runs).axes
    assert [text.get_text() for text in axis.texts] == ["no figures"]


def test_few_points_are_seen_and_what_is_not_finite_is_left_out(drawn):
    figure = drawn({"one": rows([0.5]), "two": rows([0.1, 0.2])})
    one, two = figure.axes[0].get_lines()
    assert one.get_marker() == "o" and two.get_marker() in ("", "None")
    gaps = drawn({"gaps": rows([0.1, math.nan, math.inf, 0.4, -math.inf, 0.6])})
    assert np.allclose(gaps.axes[0].get_lines()[0].get_ydata(), [0.1, 0.4, 0.6])
    assert drawn({"constant": rows([0.0] * 5)}).axes[0].get_ylim()[0] < 0


def test_the_runs_of_a_group_have_one_colour_and_one_name(drawn):
    runs = {name: rows(RISE) for name in ("new/seed_0", "new/seed_1", "old", "old/seed_1")}
    groups = {"new/seed_0": "new", "new/seed_1": "new", "old/seed_1": "old"}
    figure = drawn(runs, groups=groups)
    colors = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["new", "old"]
    assert [line.get_color() for line in legend.get_lines()] == [colors[0], colors[2]]
    assert not drawn(runs, groups=dict.fromkeys(runs, "all")).legends, "one group needs no legend"
