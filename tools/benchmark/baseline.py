"""What became of the figures of an older record: one finding per row and figure that tells something."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lite_llm.errors import UsageError
from tools.benchmark.record import FIGURES, PERCENTILES, Record, Row, more_is_better
from tools.benchmark.table import TITLES, number

TOLERANCE = 0.03  # beyond both intervals: runs of the same code on another day differ by as much
LIMITS_TOLERANCE = 0.1
KINDS = {
    "incomparable": True, "slower": True, "worse": True, "refused": True,
    "faster": False, "better": False, "missing": False, "unknown": False, "note": False,
}  # fmt: skip
"""Kinds of findings, and whether one should fail a check."""


@dataclass(frozen=True)
class Finding:
    """`missing` is a row of the old record alone, `unknown` a row of the new one alone."""

    kind: str
    where: str  # "" if it is about all rows
    text: str

    @property
    def fails(self) -> bool:
        return KINDS[self.kind]

    def __str__(self) -> str:
        return ": ".join(part for part in (self.kind, self.where, self.text) if part)


def compare(record: Record, old: Record) -> list[Finding]:
    """Of another machine, model or prefix cache state one "incomparable" per reason, and nothing else."""
    if different := list(_different(record, old)):
        return different
    return [*_notes(record, old), *_rows(record, old)]


def check(planned: Record, old: Record, wanted: Sequence[tuple[str, dict, str]]) -> None:
    """UsageError if it is known before the work that nothing could be compared.

    `planned` is a record without rows; `wanted` has mode, work and side of those that it will get.
    """
    if different := list(_different(planned, old)):
        raise UsageError(
            f"--baseline: nothing could be compared: {'; '.join(finding.text for finding in different)}",
            "name a document of the same model on the same machine",
        )
    useful = [row for row in old.rows if not _useless(old, row)]
    known = [(row.mode, {key: row.work[key] for key in row.work if key != "variant"}, row.side) for row in useful]
    if not any(row in known for row in wanted):
        has = ", ".join(dict.fromkeys(f"{row.mode} {row.work['name']}" for row in useful)) or "no row with an interval"
        raise UsageError(
            f"--baseline: nothing could be compared: it has {has}; to be measured: {wanted[0][0]} "
            + ", ".join(dict.fromkeys(work["name"] for _, work, _ in wanted)),
            "measure the same works on the same sides",
        )


def summary(record: Record, old: Record, findings: Sequence[Finding]) -> str:
    """How many rows were compared, and how many of them are below the old ones. UsageError if none could be."""
    pairs = [(row, old.find(row.mode, row.work, row.side)) for row in record.rows]
    count = sum(before is not None and not (_useless(record, row) or _useless(old, before)) for row, before in pairs)
    if not count and not any(finding.fails for finding in findings):
        raise UsageError("--baseline: nothing could be compared", "the lines above say why, row by row")
    below = len({finding.where for finding in findings if finding.kind in ("slower", "worse")})
    word = "worse" if any(row.mode == "accuracy" for row in record.rows) else "slower"
    return f"{count} row{'s' * (count != 1)} compared, {below or 'none'} {word}"


def _different(record: Record, old: Record) -> Iterator[Finding]:
    for what in ("gpu",) if "gpu" in record.environment or "gpu" in old.environment else ("cpu", "cpu_name", "cores"):
        yield from _unequal(what, record.environment.get(what), old.environment.get(what))
    for what in sorted(record.model.keys() | old.model.keys()):
        yield from _unequal(f"model {what}", record.model.get(what), old.model.get(what))
    cache = "prefix_cache"
    yield from _unequal("prefix cache", record.arguments.get(cache, False), old.arguments.get(cache, False))


def _unequal(what: str, now, before) -> Iterator[Finding]:
    if now != before:
        yield Finding("incomparable", "", f"{what} was {before!r}, is {now!r}")


def _notes(record: Record, old: Record) -> Iterator[Finding]:
    for what in ("driver", "python", "torch", "triton", "transformers"):
        now, before = record.environment.get(what), old.environment.get(what)
        if now != before:
            yield Finding("note", "", f"{what} was {before}, is {now}")
    for what, now in record.limits.items():
        before = old.limits.get(what)
        if now and before and abs(now / before - 1) > LIMITS_TOLERANCE:
            yield Finding("note", "", f"{what} was {before:.4g}, is {now:.4g}: the machine itself is not as it was")


def _rows(record: Record, old: Record) -> Iterator[Finding]:
    for row in record.rows:
        before, now_refused = old.find(row.mode, row.work, row.side), record.refusal(row)
        if before is None:
            yield Finding("unknown", _where(row), "not in the old record")
        elif now_refused and not old.refusal(before):
            yield Finding("refused", _where(row), now_refused)
        elif why := _useless(record, row):
            yield Finding("note", _where(row), f"not compared, {why}")
        elif why := _useless(old, before):
            yield Finding("note", _where(row), f"not compared, in the old record {why}")
        elif row.mode == "accuracy":
            yield from _accuracy(row, before)
        else:
            yield from _figures(row, before)
    for row in old.rows:
        if record.find(row.mode, row.work, row.side) is None:
            yield Finding("missing", _where(row), "only in the old record")


def _useless(record: Record, row: Row) -> str | None:
    """Why nothing can be compared with this row."""
    if why := record.refusal(row):
        return f"refused: {why}"
    return "one run tells nothing of the noise" if row.runs < 2 and row.mode != "accuracy" else None


def _accuracy(row: Row, before: Row) -> Iterator[Finding]:
    now, then = (one.figures["verdict"] for one in (row, before))
    if (now == "bug") != (then == "bug"):
        yield Finding("worse" if now == "bug" else "better", _where(row), f"verdict was {then}, is {now}")
    elif now != then:
        yield Finding("note", _where(row), f"verdict was {then}, is {now}")


def _figures(row: Row, before: Row) -> Iterator[Finding]:
    for figure, parts in FIGURES[row.mode].items():
        told = [""] if parts != PERCENTILES else list(parts)
        for part in told:
            now, then = (one.figures[figure][part] if part else one.figures[figure] for one in (row, before))
            if not (isinstance(now, dict) and isinstance(then, dict)):
                continue  # one number without an interval cannot be told from noise
            if kind := _change(figure, now, then):
                yield Finding(kind, _where(row), _said(figure, part, now, then))


def _change(figure: str, now: dict, then: dict) -> str | None:
    more = now["low"] > then["high"] and now["median"] > then["median"] * (1 + TOLERANCE)
    less = now["high"] < then["low"] and now["median"] * (1 + TOLERANCE) < then["median"]
    if not (more or less):
        return None
    return "faster" if more == more_is_better(figure) else "slower"


def _said(figure: str, part: str, now: dict, then: dict) -> str:
    above, unit = TITLES[figure]
    change = f" ({now['median'] / then['median'] - 1:+.1%})" if then["median"] else ""
    values = [f"{number(one['median'])} ({number(one['low'])}-{number(one['high'])})" for one in (then, now)]
    return f"{above}{' ' * bool(part)}{part} was {values[0]}, is {values[1]} {unit}{change}"


def _where(row: Row) -> str:
    return f"{row.mode} {row.work['name']}, {row.label}"
