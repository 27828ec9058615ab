"""A record as tables for a terminal of any width, and as CSV.

A refused row keeps its figures, dimmed, and says why in a note; its ratio and its share of the limit appear nowhere.
"""

import csv as _csv
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.benchmark.record import (
    FIGURES,
    INTERVAL,
    PERCENTILES,
    RATIO,
    Comparison,
    Record,
    Row,
    middle,
    replace_file,
)
from tools.benchmark.stats import SAME, SCATTER, alike

TITLES = {
    "ttft_ms": ("first token", "ms"), "tpot_ms": ("per token", "ms"), "e2e_ms": ("end to end", "ms"),
    "tokens_per_second": ("output", "tokens/s"), "requests_per_second": ("requests", "per s"),
    "goodput_per_second": ("in time", "requests/s"), "import_s": ("imported", "s"), "ready_s": ("ready", "s"),
    "first_token_s": ("first token", "s"), "agreement": ("tokens", "equal"), "worst_gap_nats": ("worst gap", "nats"),
    "verdict": ("verdict", ""), "first_layer": ("first layer", "that parts"), "error_ratio": ("error over", "its own"),
}  # fmt: skip
VERDICT_STYLE = {"equal": "green", "noise": "yellow", "bug": "bold red"}
HARMLESS = {"gpu_idle", "applications_clocks_setting", "display_clock_setting"}
"""Throttle reasons that hold no measurement back."""
ALIKE = (
    f"no difference: the ratio is within {SAME:.0%} of 1, as of one program run twice, and its interval within "
    f"{SCATTER:.0%}; not told apart: it is not, and the interval holds 1 or the ratio is within {SAME:.0%} of it"
)
LIMITED = {
    "online": ", at the median, a request that has the machine to itself",
    "startup": ": a first token reads the weights once and computes its prompt",
}
"""What the limit of a mode's figures is about, where that is not the work itself."""
UNLIMITED = {
    "online": "no limit: how many are in time is up to when they come and what is called so",
    "startup": "no limit: an import and loading are neither copies nor matmuls",
    "ablation": "no limit: requests of unequal lengths; the whole run has one",
}
"""Why some figures of a mode have none."""
ON_A_CPU = "on a CPU transformers may well be faster: lite_llm's kernels, graphs and pool are for GPUs"
BEYOND = 1.05  # of a limit: more than its own measurement's error
COLUMNS = (
    "mode", "work", "batch", "prompt", "new", "variant", "side", "figure", "against", "value", "low", "high",
    "limit", "of_limit", "differs", "runs", "compiles", "refused", "note",
)  # fmt: skip


def show(record: Record, console: Console) -> None:
    """Each mode's table in one line per row; where that is too wide for the console, stacked; else as a list."""
    console.print(Text(heading(record)))
    for mode in FIGURES:
        if any(row.mode == mode for row in record.rows):
            console.print()
            for stacked in (False, True):
                found = table(record, mode, stacked=stacked)
                if console.measure(found, options=console.options.update(max_width=10_000)).minimum <= console.width:
                    console.print(found)
                    break
            else:
                _list(record, mode, console)
            for note in notes(record, mode):
                console.print(Text(note))


def heading(record: Record) -> str:
    """What every figure below depends on."""
    env, model = record.environment, record.model
    words = [
        model["name"], model.get("dtype"), "random weights" if model.get("random_weights") else None,
        env.get("gpu") or env.get("cpu_name") or env.get("cpu"), env.get("driver") and f"driver {env['driver']}",
        *(f"{name} {env[name]}" for name in ("torch", "triton", "transformers") if env.get(name)),
        env.get("commit") and f"commit {env['commit'][:7]}", env.get("date"),
    ]  # fmt: skip
    if "prefix_cache" in record.arguments:
        words.append(f"prefix cache {'on' if record.arguments['prefix_cache'] else 'off'}")
    return ", ".join(word for word in words if word)


def table(record: Record, mode: str, *, stacked: bool) -> Table:
    """Rows stand below the name of their work. What a row reaches against others stands beside those others."""
    rows = [row for row in record.rows if row.mode == mode]
    placed, head = _ratios(record, rows)
    marks = {row.key: f"[{i}]" for i, row in enumerate((row for row in rows if record.refusal(row)), 1)}
    percentiles = stacked and any("p50" in parts for parts in FIGURES[mode].values())

    found = Table(box=box.SIMPLE_HEAD, title=mode, title_justify="left", show_edge=False, padding=(0, int(not stacked)))
    found.add_column("variant" if mode == "ablation" else "side")
    if percentiles:
        found.add_column("")
    for name, parts in FIGURES[mode].items():
        above, unit = TITLES[name]
        unit += " p50 / p90 / p99" * ("p50" in parts and not stacked)
        found.add_column(f"{above}\n{unit}", justify="left" if name == "verdict" else "right")
    if head:
        found.add_column(head, justify="right")
    for work, group in _by_work(rows).items():
        found.add_row(Text(work, style="bold"), *[""] * (len(found.columns) - 1))
        for row in group:
            mark = marks.get(row.key)
            cells = [Text(f" {row.label}" if head or not mark else f" {row.label} {mark}")]
            cells += [Text("\n".join(PERCENTILES))] * percentiles
            cells += [_cell(record, row, name, stacked) for name in FIGURES[mode]]
            if head:
                cells.append(_stack([f"refused {mark}"] if mark else placed[row.key], stacked))
            found.add_row(*cells, style="dim" if mark else None)
    works = {row.work["name"] for row in rows}
    for column in found.columns:  # only the names of works may wrap
        lines = (line for cell in (column.header, *column.cells) for line in str(cell).split("\n") if line not in works)
        column.min_width = max(map(len, lines))
        column.no_wrap = column is not found.columns[0]
    return found


def notes(record: Record, mode: str) -> Iterator[str]:
    """What stands below a mode's table: why rows are refused, how to read it, and what spoils it."""
    rows = [row for row in record.rows if row.mode == mode]
    refused = [row for row in rows if record.refusal(row)]
    shown = [row for row in rows if row not in refused]
    for i, row in enumerate(refused, 1):
        yield f"[{i}] no speed-up is shown: {record.refusal(row)}"
    for label, note in dict.fromkeys((row.label, row.note) for row in rows if row.note):
        yield f"{label}: {note}"
    if mode == "accuracy":
        yield "error over its own: the logits' distance from float32, over that of the side compared with"
        return
    pairs = [pair for row in shown for pair in record.comparisons(row)]
    if shown:
        ratio = f"; x: ratio of {', '.join(TITLES[RATIO[mode]])}, above 1 is better"
        yield _runs(shown) + ratio * bool(pairs)
    if any(pair.differs is False for pair in pairs):
        yield ALIKE
    limits = [limit for row in shown for name in FIGURES[mode] if (limit := record.limit(row, name))]
    if limits:
        names = " or ".join(sorted({limit["name"] for limit in limits}))
        yield f"%: of what {names} allows on this machine{LIMITED.get(mode, '')}"
    if mode in UNLIMITED and len(limits) < len(shown) * len(FIGURES[mode]):
        yield f"-: {UNLIMITED[mode]}"
    if unknown := dict.fromkeys(row.label for row in shown if row.compiles is None and mode != "startup"):
        yield f"{', '.join(unknown)}: ? kernels compiled inside the timing, this side does not tell"
    if over := sum(limit["of_limit"] > BEYOND for limit in limits):
        yield f"{over} of {len(limits)} shares are beyond the limit: the work fits a cache, or the figure is wrong"
    if held := held_back([row.gpu for row in rows]):
        yield held
    theirs = any(row.side.startswith("transformers") for row in shown)
    if mode == "latency" and theirs and record.model.get("device") == "cpu":
        yield ON_A_CPU


def held_back(states: Sequence[dict | None]) -> str | None:
    """What the GPU's states after rows say of its clocks, if they were lower than they could be."""
    held = [reasons for gpu in states if (reasons := set((gpu or {}).get("throttle_reasons") or ()) - HARMLESS)]
    names = ", ".join(sorted(set().union(*held)))
    return f"the GPU's clocks were held back after {len(held)} of {len(states)} rows: {names}" if held else None


def _runs(rows: Sequence[Row]) -> str:
    low, high = min(row.runs for row in rows), max(row.runs for row in rows)
    if high == 1:
        return "1 run: no interval, and nobody can tell noise from a difference"
    return f"median of {f'{low} to {high}' if low < high else low} runs (95 % interval)"


def csv(record: Record, path: Path) -> None:
    """A line per figure, and one with figure "ratio" per comparison; of a refused row there is no ratio or share."""
    text = io.StringIO()
    writer = _csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in record.rows:
        writer.writerows(_lines(record, row))
    replace_file(path, text.getvalue().encode())


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    if value == 0 or value >= 99.95:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(float(f"{value:.2e}")))  # of what is left after rounding: 9.996 is 10.0
    return f"{value:.{digits}f}" if digits < 7 else f"{value:.2e}"


def share(limit: dict) -> str:
    of = limit["of_limit"]
    return f"{f'{of:.{0 if of >= 0.0095 else 1}%}' if of >= 0.0005 else '<0.1%'} {limit['name']}"


def _list(record: Record, mode: str, console: Console) -> None:
    """A line per figure, for a terminal too narrow for a table."""
    found = table(record, mode, stacked=False)
    heads = [str(column.header).replace("\n", " ") for column in found.columns[1:]]
    console.print(Text(mode, style="italic"))
    first, *others = (list(column.cells) for column in found.columns)
    for name, *cells in zip(first, *others, strict=True):
        console.print(name)
        for head, cell in zip(heads, cells, strict=True):
            if str(cell):
                console.print(Text(f"   {head}: ").append(cell))


def _cell(record: Record, row: Row, name: str, stacked: bool) -> Text:
    value, between = row.figures.get(name), "\n" if stacked else " "
    if name not in row.figures:
        return Text("-")
    if row.mode == "accuracy":
        return _accuracy(name, value)
    if "p50" in value:
        found = Text(("\n" if stacked else " / ").join(number(middle(value[p])) for p in FIGURES[row.mode][name]))
    else:
        found = Text(number(value["median"]))
        if row.runs > 1:
            found.append(f"{between}({number(value['low'])}-{number(value['high'])})", style="dim")
    if limit := record.limit(row, name):
        style = "red" if limit["of_limit"] > BEYOND else "cyan"
        found.append(f"{between}{share(limit)}", style=style)
    elif not record.refusal(row):
        found.append(f"{between}-", style="dim")
    return found


def _accuracy(name: str, value: float | str | None) -> Text:
    if name == "agreement":
        return Text("all" if value == 1 else f"{min(value, 0.9999):.2%}")
    if value is None:
        return Text("-")
    if name == "verdict":
        return Text(value, style=VERDICT_STYLE[value])
    return Text(str(value) if name == "first_layer" else number(value))


def _ratios(record: Record, rows: list[Row]) -> tuple[dict[str, list[str]], str]:
    """Words of each row's ratio column, and its head; no head, no such column."""
    found: dict[str, list[str]] = defaultdict(list)
    if rows[0].mode == "accuracy" or not any(row.against or record.refusal(row) for row in rows):
        return found, ""
    pairs = [pair for row in rows for pair in record.comparisons(row)]
    subjects = {pair.row.side for pair in pairs}
    beside = len(subjects) == 1 and rows[0].mode != "ablation" and all(pair.other for pair in pairs)
    for pair in pairs:
        words = _ratio(pair) + ([] if pair.differs is not False else [alike(pair.ratio)])
        found[pair.other.key if beside else pair.row.key] += words if beside else [*words, f"against {pair.side}"]
    return found, f"{subjects.pop()} is\nas fast" if beside else "as fast"


def _ratio(pair: Comparison) -> list[str]:
    median, low, high = (number(pair.ratio[part]) for part in INTERVAL)
    return [f"{median}x"] + [f"({low}-{high})"] * (pair.row.runs > 1)


def _stack(words: list[str], stacked: bool) -> Text:
    found = Text(("\n" if stacked else " ").join(words))
    found.highlight_regex(r"\(.*?\)", "dim")
    return found


def _by_work(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.work["name"]].append(row)
    return found


def _lines(record: Record, row: Row) -> Iterator[dict]:
    same = {name: row.work.get(name, "") for name in ("batch", "prompt", "new", "variant")} | {
        "mode": row.mode, "work": row.work["name"], "side": row.side, "runs": row.runs,
        "compiles": "?" if row.compiles is None else row.compiles, "refused": record.refusal(row) or "",
        "note": row.note or "",
    }  # fmt: skip
    for name, value in row.figures.items():
        if row.mode == "accuracy":
            yield same | {"figure": name, "value": "" if value is None else value}
            continue
        limit = record.limit(row, name)
        share = {"limit": limit["name"], "of_limit": limit["of_limit"]} if limit else {}
        parts = {name: value} if "median" in value else {f"{name}_{p}": value[p] for p in FIGURES[row.mode][name]}
        for part, told in parts.items():
            yield same | (share if part in (name, f"{name}_p50") else {}) | {"figure": part} | _interval(row, told)
    if not row.figures:
        yield same
    for pair in record.comparisons(row):
        about = {"figure": "ratio", "against": pair.side, "differs": pair.differs}
        yield same | about | _interval(row, pair.ratio)


def _interval(row: Row, value: dict | float) -> dict:
    if row.runs == 1 or not isinstance(value, dict):
        return {"value": middle(value)}
    return {"value": value["median"], "low": value["low"], "high": value["high"]}
