"""A record as a picture: throughput and time per token by batch, and bars of the other modes, those of `online` times.

matplotlib is an optional extra, imported where it is used. A refused row is not drawn: its distance to another line
would be the ratio that it must not show. What is left out is named below the picture.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from textwrap import fill

from lite_llm.errors import EnvironmentProblem, UsageError
from tools.benchmark.record import HEADLINE, PERCENTILES, Record, Row, more_is_better, replace_file
from tools.benchmark.table import TITLES, heading

COLORS = {
    "lite_llm": "#d55e00", "transformers": "#0072b2", "transformers-compile": "#56b4e9", "transformers-cb": "#009e73",
    "vllm": "#cc79a7",
}  # fmt: skip
OTHER_COLORS, LIMIT_COLOR = ("#e69f00", "#7a5195", "#666666"), "#222222"
SPAN = 20  # of values: beyond it an axis is logarithmic, else it starts at 0
BY_BATCH = ("tokens_per_second", "tpot_ms")
TIMES = ("ttft_ms", "tpot_ms", "e2e_ms")  # of `online`, whose requests per second are those that arrive
NUMBERS = "{x:,.10g}"  # 10,000 and 0.3, never 1e+04 or 0.30000000000000004


@dataclass
class Line:
    """Points (x, median, low, high) of one side."""

    name: str
    points: list[tuple] = field(default_factory=list)


@dataclass
class Panel:
    """One figure of one mode; `limits` is where a perfect program would be: {x: value}."""

    mode: str
    title: str
    figure: str
    lines: list[Line]
    limits: dict
    limit_name: str = ""


def plot(record: Record, path: str | Path) -> None:
    path = Path(path)
    form = path.suffix[1:].lower()
    chosen = list(panels(record))
    if not chosen:
        why = "; ".join(left_out(record)) or "it has no row with a time or a rate"
        raise UsageError(f"--plot {path}: nothing can be drawn", why)
    check(path)
    picture = io.BytesIO()
    _draw(record, chosen).savefig(picture, format=form, dpi=150)
    replace_file(path, picture.getvalue())


def check(path: str | Path) -> None:
    """Before the work, so that a picture asked for does not fail after it."""
    if Path(path).suffix[1:].lower() not in ("png", "svg", "pdf"):
        raise UsageError(f"--plot {path}: name a file that ends in .png, .svg or .pdf")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EnvironmentProblem("--plot needs matplotlib", "pip install -r requirements-plot.txt") from None


def panels(record: Record) -> Iterator[Panel]:
    """What is drawn: per prompt and answer length two panels by batch, and for each other mode one or more of bars."""
    rows = [row for row in record.rows if row.mode in HEADLINE and not record.refusal(row)]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.mode == "latency" and "batch" in row.work:
            same = {key: value for key, value in row.work.items() if key not in ("name", "batch")}
            title = ", ".join(f"{key} {value}" for key, value in same.items())
            groups.setdefault(title, []).append(row)
    for title, group in groups.items():
        for figure in BY_BATCH:
            yield _panel(record, group, title, figure, lambda row: row.work["batch"])
    for mode in HEADLINE:
        bars = [row for row in rows if row.mode == mode and not (mode == "latency" and "batch" in row.work)]
        if bars:
            several = len({row.work["name"] for row in bars}) > 1
            names = {row.key: f"{row.work['name']}, " * several + row.label for row in bars}
            for figure in _figures(record, mode):
                yield _panel(record, bars, mode, figure, lambda row, names=names: names[row.key])


def _figures(record: Record, mode: str) -> tuple[str, ...]:
    """What is drawn of a mode in bars. Which requests are in time is told only where the user said what that is."""
    if mode != "online":
        return (HEADLINE[mode],)
    asked = record.arguments.get("ttft") or record.arguments.get("tpot")
    return (*TIMES, HEADLINE[mode]) if asked else TIMES


def left_out(record: Record) -> list[str]:
    refused = ((row, record.refusal(row)) for row in record.rows if row.mode in HEADLINE)
    return [f"{row.label} {row.work['name']}: {why}" for row, why in refused if why]


def _panel(record: Record, rows: list[Row], title: str, figure: str, where) -> Panel:
    found, lines, names = Panel(rows[0].mode, title, figure, [], {}), {}, set()
    for row in rows:
        value = row.figures[figure]
        line = lines.setdefault(row.side, Line(row.side))
        line.points += [(at, *ends) for at, ends in _spreads(where(row), value).items()]
        limit = record.limit(row, figure)
        if limit and limit["of_limit"] > 0 and "median" in value:
            share = limit["of_limit"] if not more_is_better(figure) else 1 / limit["of_limit"]
            # Sides whose limits differ (another dtype, another order of work): the farthest is a limit of all.
            best, value = max if more_is_better(figure) else min, value["median"] * share
            found.limits[where(row)] = best(found.limits.get(where(row), value), value)
            names.add(limit["name"])
    for line in lines.values():
        line.points.sort(key=lambda point: point[0] if type(point[0]) is int else 0)  # bars stay as they came
    found.lines, found.limit_name = list(lines.values()), " and ".join(sorted(names))
    return found


def _spreads(where, value: dict) -> dict:
    """Median, low and high by place: percentiles have three places, and may have no interval."""
    if "median" in value:
        return {where: (value["median"], value["low"], value["high"])}
    known = {name: value[name] if isinstance(value[name], dict) else {"median": value[name]} for name in PERCENTILES}
    return {
        f"{where} {name}": (one["median"], one.get("low", one["median"]), one.get("high", one["median"]))
        for name, one in known.items()
    }


def _draw(record: Record, chosen: list[Panel]):
    from matplotlib.figure import Figure

    by_batch = [panel for panel in chosen if panel.title != panel.mode]
    bars = [panel for panel in chosen if panel.title == panel.mode]
    heights = [3.4] * (len(by_batch) // 2) + [0.9 + 0.32 * sum(len(line.points) for line in p.lines) for p in bars]
    below = "\n".join(fill(text, 130) for text in [heading(record), *(f"not drawn: {why}" for why in left_out(record))])
    foot = 0.18 * (below.count("\n") + 1) + 0.15
    figure = Figure(figsize=(10, sum(heights) + foot + 0.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[sum(heights) + 0.4, foot])
    bottom.text(0.01, 0.5, below, fontsize=7, va="center", color="#444444")
    grid = top.add_gridspec(len(heights), 2, height_ratios=heights)
    others = cycle(OTHER_COLORS)
    sides = dict.fromkeys(line.name for panel in chosen for line in panel.lines)
    colors = {side: COLORS[side] if side in COLORS else next(others) for side in sides}
    for i, panel in enumerate(by_batch):
        _lines(top.add_subplot(grid[i // 2, i % 2]), panel, colors)
    for i, panel in enumerate(bars, len(by_batch) // 2):
        _bars(top.add_subplot(grid[i, :]), panel, colors)
    return figure


def _lines(axes, panel: Panel, colors: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    batches = sorted({point[0] for line in panel.lines for point in line.points})
    for line in panel.lines:
        known = {point[0]: point for point in line.points}
        # A line over a batch that was refused would tell what it did there.
        x, y, errors = _xy(Line(line.name, [known.get(batch, (batch, *[math.nan] * 3)) for batch in batches]))
        ours = line.name == "lite_llm"
        axes.errorbar(
            x, y, errors, label=line.name, color=colors[line.name], marker="o", markersize=4, capsize=3,
            linewidth=2.2 if ours else 1.3, zorder=3 if ours else 2,
        )  # fmt: skip
    limits = sorted(panel.limits.items())
    if limits:
        label = f"limit of the {panel.limit_name}"
        axes.plot(*zip(*limits), color=LIMIT_COLOR, linestyle="--", marker="_", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    if len(batches) == 1:
        axes.set_xlim(batches[0] / 2, batches[0] * 2)
    values = [point[1] for line in panel.lines for point in line.points] + [value for _, value in limits]
    ends = [end for line in panel.lines for point in line.points for end in point[2:]] + values
    if min(values) > 0 and max(values) > SPAN * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_ylim(min(end for end in ends if end > 0) / 1.3, max(ends) * 1.3)
    else:
        axes.set_ylim(0, max(ends) * 1.1 or 1)
    axes.yaxis.set_major_formatter(NUMBERS)
    axes.minorticks_off()  # of both axes, whose labels would be 4 x 10^3
    axes.set_xlabel("batch")
    axes.set_ylabel(", ".join(TITLES[panel.figure]))
    axes.set_title(panel.title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _bars(axes, panel: Panel, colors: dict[str, str]) -> None:
    names = []
    for line in panel.lines:
        for point in line.points:
            y, (_, values, errors) = len(names), _xy(Line(line.name, [point]))
            axes.barh(y, values, xerr=errors, color=colors[line.name], height=0.7, capsize=3)
            if point[0] in panel.limits:
                axes.plot([panel.limits[point[0]]] * 2, [y - 0.42, y + 0.42], color=LIMIT_COLOR, linestyle="--")
            names.append(point[0])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    more = "more" if more_is_better(panel.figure) else "less"
    dashed = f"; dashed: limit of the {panel.limit_name}" * bool(panel.limits)
    axes.set_title(f"{panel.mode}: {', '.join(TITLES[panel.figure])} ({more} is better{dashed})", fontsize=9)
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)


def _xy(line: Line) -> tuple[list, list, tuple[list, list]]:
    x, y, low, high = (list(values) for values in zip(*line.points, strict=True))
    known = [a < b for a, b in zip(low, high)]  # one run has no interval, and so no caps
    below = [a - b if told else math.nan for a, b, told in zip(y, low, known)]
    return x, y, (below, [b - a if told else math.nan for a, b, told in zip(y, high, known)])
