"""tools/benchmark/plot.py holds every bar inside its axes, and draws of `online` what requests waited."""

import importlib.util
import math

import pytest

from tests.tools.test_benchmark_record import figures, near, record, row
from tools.benchmark import plot
from tools.benchmark.record import spread

DRAWS = importlib.util.find_spec("matplotlib") is not None  # an optional extra: without it panels alone are seen


def drawn(*rows, **fields):
    found = record(*rows, **fields)
    return plot._draw(found, list(plot.panels(found)))


def by_batch(*values):
    return [row(work={"batch": 4**i}, figures=figures("latency") | {"tpot_ms": one}) for i, one in enumerate(values)]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]


@pytest.mark.parametrize("values", [
    [near(10.0), spread(10.7, 8.9, 12.54)],  # an interval that reaches beyond the highest point
    [near(3.0), spread(300.0, 200.0, 900.0), spread(3.0, 0.4, 4.0)],  # on a logarithmic axis, both ways
])  # fmt: skip
def test_axes_hold_all_of_an_error_bar(values):
    if not DRAWS:
        return
    axes = drawn(*by_batch(*values)).axes[1]
    low, high = axes.get_ylim()
    assert low < min(one["low"] for one in values) and max(one["high"] for one in values) < high


@pytest.mark.parametrize("highest, wanted", [
    (4_000.0, {"200", "500", "1,000", "2,000"}),  # one power of ten: matplotlib would label minor ticks too
    (4_000_000.0, {"1,000", "10,000", "1,000,000"}),
])  # fmt: skip
def test_numbers_beside_a_logarithmic_axis_are_written_one_way(highest, wanted):
    if not DRAWS:
        return
    figure = drawn(*by_batch(near(150.0), near(highest)))
    axes = figure.axes[1]
    figure.draw_without_rendering()
    assert axes.get_yscale() == "log"
    said = ticks(axes.yaxis)
    assert wanted <= set(said), said
    assert all(one.replace(",", "").isdigit() for one in said), said


def test_one_run_has_no_error_bar():
    x, y, (below, above) = plot._xy(plot.Line("lite_llm", [(1, 10.0, 10.0, 10.0), (8, 20.0, 18.0, 23.0)]))
    assert (x, y, below[1], above[1]) == ([1, 8], [10, 20], 2, 3) and math.isnan(below[0]) and math.isnan(above[0])
    assert not DRAWS or drawn(*by_batch(spread(10.0, 10.0, 10.0))).axes


def test_online_draws_the_percentiles_of_each_time():
    found = list(plot.panels(record(row("online"), row("online", "transformers", value=80.0))))
    assert [panel.figure for panel in found] == ["ttft_ms", "tpot_ms", "e2e_ms"]
    ours, theirs = found[0].lines
    assert [point[0] for point in ours.points] == ["lite_llm p50", "lite_llm p90", "lite_llm p99"]
    assert [point[1] for point in theirs.points] == [80, 160, 240]
    assert ours.points[1][2:] == (near(20.0)["low"], near(20.0)["high"])
    assert ours.points[0][1:] == (10, 10, 10), "one number has no interval"
    assert not DRAWS or len(drawn(row("online"), row("online", "transformers")).axes) == 3


def test_how_many_are_in_time_is_drawn_where_the_user_said_what_that_is():
    said = record(row("online"), arguments={"argv": [], "ttft": 0.5, "tpot": None})
    assert [panel.figure for panel in plot.panels(said)][-1] == "goodput_per_second"
