"""tools/benchmark/table.py and plot.py show every figure, and of a refused row no ratio and no share of a limit."""

import csv
import importlib.util
import sys
from io import StringIO

import pytest
from rich.console import Console

from lite_llm.errors import EnvironmentProblem, UsageError
from tests.tools.test_benchmark_record import (
    SEEN,
    SHARE,
    compared,
    every_mode,
    figures,
    near,
    reached,
    record,
    row,
)
from tools.benchmark import plot, table
from tools.benchmark.record import FIGURES, HEADLINE

WIDTHS = (40, 80, 140, 240)  # a list, stacked, one or the other, one line per row
SHOWN_SEEN, SHOWN_SHARE = f"{SEEN:.2f}x", f"{SHARE:.0%}"


def told(record, width):
    out = StringIO()
    table.show(record, Console(file=out, width=width))
    return out.getvalue()


def in_csv(record, path):
    table.csv(record, path)
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_stands_whole_at_any_width(width):
    value = 4321.0
    rows = [row(mode, "transformers", value=value, against=None) for mode in FIGURES]
    text = told(record(*rows), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("4,321") == sum(len(parts) for mode, parts in FIGURES.items() if mode != "accuracy")
    assert text.count("(4,278-4,364)") == sum(
        "median" in f for r in rows if r.mode in HEADLINE for f in r.figures.values()
    )
    assert text.count(SHOWN_SHARE) == len(HEADLINE)
    words = " ".join(text.split())
    assert all(word in words for word in ("noise", "NVIDIA H200", "prefix cache off", "commit 0123456,"))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ratio_stands_once_beside_the_opponent(width):
    text = told(record(row(), row(side="transformers", value=80.0)), width)
    assert text.count(SHOWN_SEEN) == 1 and text.index(SHOWN_SEEN) > text.index("transformers")
    assert "lite_llm is" in text and "refused" not in text and "no difference" not in text


def test_ratios_without_the_opponents_rows_name_them():
    text = told(record(row(against=[compared(), compared("vllm", differs=False)])), 200)
    assert f"{SHOWN_SEEN} (7.76-7.78) against transformers" in text and "not told apart against vllm" in text
    near = {"median": 1.02, "low": 1.01, "high": 1.03}
    text = told(record(row(against=[compared(), compared("vllm", differs=False, ratio=near)])), 200)
    assert "(1.01-1.03) no difference against vllm" in text
    for wide in ({"median": 1.0, "low": 0.0, "high": 1.02}, {"median": 1.0, "low": 0.98, "high": 1.11}):
        assert "not told apart against vllm" in told(
            record(row(against=[compared(), compared("vllm", differs=False, ratio=wide)])), 200
        )


def test_a_variant_is_compared_in_words():
    base, less = {"variant": "as it is"}, {"variant": "no graph"}
    against = [compared("lite_llm", variant="as it is")]
    text = told(record(row("ablation", work=base, against=None), row("ablation", work=less, against=against)), 200)
    assert "against as it is" in text and "as as" not in text


def test_when_no_difference_is_said_its_rule_stands_below():
    notes = ["\n".join(table.notes(record(row(against=[compared(differs=d)])), "latency")) for d in (True, False)]
    assert ["within 3% of 1" in text for text in notes] == [False, True]


@pytest.mark.parametrize("width", WIDTHS)
def test_one_run_has_no_interval_and_no_difference(width, tmp_path):
    rows = [row(mode, side, runs=1) for mode in FIGURES if mode != "ablation" for side in ("lite_llm", "transformers")]
    found = record(*rows)
    text = told(found, width)
    assert SHOWN_SEEN in text and "7.76" not in text and "9.90" not in text and "10.1)" not in text
    assert "no difference" not in text and "95 %" not in text and "no interval" in text
    lines = [line for line in in_csv(found, tmp_path / "run.csv") if line["figure"] in ("ratio", "tokens_per_second")]
    assert lines and all(line["value"] and not line["low"] + line["high"] + line["differs"] for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_must_be_known_of_a_side_stands_below(width, tmp_path):
    note = "static cache; nothing is compiled on a CPU"
    found = record(row(), row(side="transformers-compile", note=note))
    assert f"transformers-compile: {note}" in " ".join(told(found, width).split())
    assert [line["side"] for line in in_csv(found, tmp_path / "run.csv") if line["note"] == note] == (
        ["transformers-compile"] * 3
    )


def test_on_a_cpu_the_table_says_what_the_kernels_are_for():
    rows = [row(), row(side="transformers")]
    notes = {device: "\n".join(table.notes(record(*rows, model={"name": "demo", "device": device}), "latency"))
             for device in ("cpu", "cuda")}  # fmt: skip
    assert "are for GPUs" in notes["cpu"] and "GPUs" not in notes["cuda"]
    alone = record(row(against=None), model={"name": "demo", "device": "cpu"})
    assert "GPUs" not in "\n".join(table.notes(alone, "latency"))


@pytest.mark.parametrize("mode", ["online", "startup", "throughput"])
def test_a_figure_without_a_limit_says_so_and_why(mode):
    found = record(row(mode))
    notes = list(table.notes(found, mode))
    assert any(line.startswith("-: no limit: ") for line in notes) == (mode != "throughput")
    for width in WIDTHS:
        cells = told(found, width).replace("─", "").split()
        assert cells.count("-") == len(FIGURES[mode]) - 1  # one has a limit
    of = {"online": "to itself", "startup": "computes its prompt"}.get(mode, "this machine")
    assert any(line.startswith("%: of what memory allows") and line.endswith(of) for line in notes)
    made = {name: value | {"limit": reached()} for name, value in figures(mode).items()}
    assert not any(line.startswith("-:") for line in table.notes(record(row(mode, figures=made)), mode))


def test_a_share_of_percentiles_is_that_of_the_median(tmp_path):
    made = figures("online")
    made["e2e_ms"]["limit"] = {"name": "matmul", "of_limit": 0.0002}
    found = record(row("online", figures=made))
    shares = {line["figure"]: line["of_limit"] for line in in_csv(found, tmp_path / "run.csv") if line["of_limit"]}
    assert shares == {"e2e_ms_p50": "0.0002", "goodput_per_second": str(SHARE)}
    assert all("<0.1% matmul" in " ".join(told(found, width).split()) for width in WIDTHS)


def test_a_count_that_nobody_knows_is_a_question_mark(tmp_path):
    found = record(row(), row(side="vllm", compiles=None))
    assert {(line["side"], line["compiles"]) for line in in_csv(found, tmp_path / "run.csv")} == {
        ("lite_llm", "0"), ("vllm", "?"),
    }  # fmt: skip
    for width in WIDTHS:
        assert "vllm: ? kernels compiled inside the timing" in " ".join(told(found, width).split())
    assert "?" not in "\n".join([*table.notes(record(row()), "latency")])


def test_a_variant_stands_with_its_ratio():
    lines = told(record(*(one for one in every_mode() if one.mode == "ablation")), 200).splitlines()
    assert [SHOWN_SEEN in line for line in lines if line.startswith(("  full", "  no graph"))] == [False, True]


def refusals():
    """Records of every mode in which no ratio and no share may be shown, and why."""
    rows = [one for one in every_mode() if one.mode != "accuracy"]
    bad = [
        [one.refuse("tokens differ") for one in rows],
        [row(one.mode, one.side, work=one.work, compiles=3) for one in rows],
    ]
    yield record(*bad[0]), "tokens differ"
    yield record(*bad[1]), "3 kernels were compiled inside the timing"
    yield record(*rows, gates=[{"name": "demo", "wrong": "answers differ"}]), "demo: answers differ"


@pytest.mark.parametrize("case", range(3))
def test_a_refused_row_shows_why_and_nothing_to_be_proud_of(case, tmp_path):
    refused, why = list(refusals())[case]
    for width in WIDTHS:
        text = told(refused, width)
        assert SHOWN_SEEN not in text and SHOWN_SHARE not in text and "no difference" not in text
        assert " ".join(text.split()).count(f"no speed-up is shown: {why}") == len(refused.rows)
    lines = in_csv(refused, tmp_path / "run.csv")
    assert lines and {line["refused"] for line in lines} == {why}
    assert all(line["figure"] != "ratio" and not line["of_limit"] and not line["limit"] for line in lines)
    assert not list(plot.panels(refused))
    with pytest.raises(UsageError, match=why):
        plot.plot(refused, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ratio_over_a_refused_opponent_is_not_shown(width, tmp_path):
    found = record(row(), row(side="transformers", figures={}, refused="out of memory"))
    text = told(found, width)
    assert (
        SHOWN_SEEN not in text and SHOWN_SHARE in text and "[1]" in text and "out of memory" in " ".join(text.split())
    )
    lines = in_csv(found, tmp_path / "run.csv")
    assert [line["side"] for line in lines] == ["lite_llm"] * 3 + ["transformers"]


def test_notes_say_what_spoils_a_figure():
    found = record(
        row(limit={"name": "memory", "of_limit": 1.3}, gpu={"throttle_reasons": ["gpu_idle", "sw_power_cap"]}),
        row(side="transformers", gpu={"throttle_reasons": ["gpu_idle"]}),
    )
    notes = "\n".join(table.notes(found, "latency"))
    assert "held back after 1 of 2 rows: sw_power_cap" in notes and "gpu_idle" not in notes
    assert "1 of 2 shares are beyond the limit" in notes
    assert "beyond" not in "".join(table.notes(record(row()), "latency"))


def test_names_are_not_markup_and_may_be_long():
    name = "[red]256 requests, in 10-30, out lognormal:200:0.8, poisson 8/s[/]"
    assert name in told(record(row(name=name)), 200)
    for mode in ("latency", "throughput"):
        found = record(*(row(mode, side, name=name, value=4321.0) for side in ("lite_llm", "transformers")))
        for width in range(80, 130):  # the name wraps, and the table is still one with whole figures
            text = told(found, width)
            assert "[red]256" in text and "───" in text and text.count("(4,278-4,364)") == 2 * len(FIGURES[mode])
            assert "(7.76-7.78)" in text and all(len(line) <= width for line in text.splitlines())


def test_csv_has_a_line_per_figure_and_ratio(tmp_path):
    found = record(*every_mode())
    lines = in_csv(found, tmp_path / "run.csv")
    assert list(lines[0]) == list(table.COLUMNS)
    ratios = [line for line in lines if line["figure"] == "ratio"]
    assert [line["mode"] for line in ratios] == list(HEADLINE) and {float(line["value"]) for line in ratios} == {SEEN}
    assert {(line["side"], line["against"]) for line in ratios} == {("lite_llm", "transformers"), ("lite_llm", "full")}
    tails = {line["figure"]: line for line in lines if line["mode"] == "online" and line["side"] == "lite_llm"}
    assert tails["e2e_ms_p90"]["value"] == "20.0" and tails["e2e_ms_p90"]["high"] == "20.2"
    assert tails["e2e_ms_p99"]["value"] == "30.0" and tails["e2e_ms_p99"]["high"] == ""
    shares = [line["figure"] for line in lines if line["of_limit"] == str(SHARE)]
    assert set(shares) == set(HEADLINE.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0123456, "0.0123"), (0.77, "0.770"), (0.99999, "1.00"), (9.996, "10.0"), (99.94, "99.9"),
        (99.96, "100"), (1286.4, "1,286"), (1e-9, "1.00e-09"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert table.number(value) == text


def by_batch():
    for batch in (8, 1, 32):
        for side, speed in (("lite_llm", 100.0), ("transformers", 20.0)):
            made = figures("latency", 5.0) | {"tokens_per_second": near(speed * batch)}
            share = {"name": "memory", "of_limit": speed / 200}
            made["tpot_ms"] = near(1000 / speed, share)
            wrong = "differs" if (batch, side) == (8, "lite_llm") else None
            yield row(side=side, name=f"b{batch}", work={"batch": batch}, figures=made, limit=share, refused=wrong)


def test_lines_go_up_by_batch_with_the_limit_beyond_them():
    rate, time = plot.panels(record(*by_batch()))
    assert (rate.figure, time.figure) == ("tokens_per_second", "tpot_ms") and rate.title == "prompt 64, new 32"
    points = {line.name: [point[:2] for point in line.points] for line in rate.lines}
    assert points == {"transformers": [(1, 20), (8, 160), (32, 640)], "lite_llm": [(1, 100), (32, 3200)]}
    assert rate.limits == pytest.approx({1: 200, 8: 1600, 32: 6400})
    assert time.limits == pytest.approx({1: 5, 8: 5, 32: 5}) and time.limit_name == "memory"


def test_the_limit_drawn_is_the_farthest_of_the_sides():
    rows = [row(), row(side="transformers", limit={"name": "memory", "of_limit": SHARE / 2})]
    assert next(plot.panels(record(*rows))).limits == pytest.approx({8: 20 / SHARE})


def test_a_refused_row_leaves_a_gap_in_its_line():
    if importlib.util.find_spec("matplotlib"):
        drawn = plot._draw(found := record(*by_batch()), list(plot.panels(found)))
        heights = {str(c.get_label()): c.lines[0].get_ydata() for c in drawn.axes[0].containers}
        assert str(list(heights["lite_llm"])) == "[100.0, nan, 3200.0]" and list(heights["transformers"]) == [
            20,
            160,
            640,
        ]


def test_other_modes_are_bars():
    found = {panel.mode: panel for panel in plot.panels(record(*every_mode())) if panel.mode != "latency"}
    assert found.keys() == HEADLINE.keys() - {"latency"}
    assert [point[0] for line in found["ablation"].lines for point in line.points] == ["full", "no graph"]
    assert found["throughput"].limits == pytest.approx({"lite_llm": 10 / SHARE, "transformers": 80 / SHARE})
    assert found["startup"].limits == pytest.approx({"lite_llm": 10 * SHARE, "transformers": 80 * SHARE})


@pytest.mark.parametrize("form", ["png", "svg"])
def test_a_picture_of_every_mode(form, tmp_path):
    path = tmp_path / f"run.{form}"
    if importlib.util.find_spec("matplotlib") is None:  # an optional extra: without it the other half is seen
        with pytest.raises(EnvironmentProblem, match="pip install -r requirements-plot.txt"):
            plot.plot(record(*every_mode()), path)
        return
    plot.plot(record(*every_mode(), row(name="b16", refused="tokens differ")), path)
    data = path.read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[form]) and len(data) > 10_000


def test_a_picture_needs_matplotlib_and_a_known_form(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="ends in .png"):
        plot.plot(record(row()), tmp_path / "run.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for use in (lambda: plot.check("run.png"), lambda: plot.plot(record(row()), tmp_path / "run.png")):
        with pytest.raises(EnvironmentProblem, match="pip install -r requirements-plot.txt"):
            use()
    assert not list(tmp_path.iterdir())
