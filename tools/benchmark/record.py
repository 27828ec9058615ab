"""The JSON document of a benchmark: what was run, where, under which limits, and a row per work and side.

A ratio above 1 says that the row's side is the better one. Whoever shows one takes it from `Record.comparisons`, which
has none where a row, the row it is compared with, or a gate of either was refused.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lite_llm.errors import UsageError, shown
from tools.environment import environment, gpu_state

SCHEMA, READS = 2, (1, 2)
"""Version 2: `compiles` of a row may be null."""
INTERVAL, PERCENTILES = ("median", "low", "high"), ("p50", "p90", "p99")
_ONE_BATCH = {"ttft_ms": INTERVAL, "tpot_ms": INTERVAL, "tokens_per_second": INTERVAL}
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "latency": _ONE_BATCH,
    "throughput": {"requests_per_second": INTERVAL, "tokens_per_second": INTERVAL},
    "online": {
        "ttft_ms": PERCENTILES, "tpot_ms": PERCENTILES, "e2e_ms": PERCENTILES, "goodput_per_second": INTERVAL,
    },
    "startup": {"import_s": INTERVAL, "ready_s": INTERVAL, "first_token_s": INTERVAL},
    "ablation": _ONE_BATCH,
    "accuracy": {"agreement": (), "worst_gap_nats": (), "verdict": (), "first_layer": (), "error_ratio": ()},
}  # fmt: skip
"""The figures of each mode and their parts; those of `accuracy` are single values."""

HEADLINE = {
    "latency": "tokens_per_second", "throughput": "tokens_per_second", "online": "goodput_per_second",
    "startup": "first_token_s", "ablation": "tokens_per_second",
}  # fmt: skip
"""The figure that a row's `limit` is about, and its ratio but for RATIO."""
RATIO = HEADLINE | {"online": "e2e_ms"}
"""Of the mean: how many requests are in time is up to what the user calls so."""

VERDICTS = ("equal", "noise", "bug")


def spread(median: float, low: float, high: float, limit: dict | None = None) -> dict:
    """A figure with its interval, and the share of a physical limit that it reaches: {"name", "of_limit"}."""
    return dict(zip(INTERVAL, (median, low, high), strict=True)) | ({"limit": limit} if limit else {})


def more_is_better(figure: str) -> bool:
    return figure.endswith("_per_second") or figure == "agreement"


@dataclass(frozen=True)
class Row:
    """What one side did with one work. A refused row drops its ratios, so that nothing after it can show one.

    `work` names the work and all that makes it another one ("variant" of an ablation). `figures` are those of FIGURES;
    each may have a "limit" of its own, and a part of percentiles may be a number or have an interval over the runs.
    `against` may be given as None, one comparison or several: {"side", "ratio", "differs"} and, of another variant than
    the row's own, "variant"; of one run `differs` is None. Kernels compiled inside the timing refuse a row; None is
    unknown. `gpu` is the GPU's state right after it, `note` what a reader must know of this side.
    """

    mode: str
    work: dict
    side: str
    figures: dict
    runs: int
    limit: dict | None = None
    against: Any = ()
    compiles: int | None = 0
    refused: str | None = None
    gpu: dict | None = None
    note: str | None = None

    def __post_init__(self):
        _expect(self.mode in FIGURES, "mode", self.mode, "one of " + ", ".join(FIGURES))
        for name in ("runs", "compiles") if self.compiles is not None else ("runs",):
            _expect(type(getattr(self, name)) is int and getattr(self, name) >= 0, name, getattr(self, name), "a count")
        _expect(isinstance(self.side, str) and self.side, "side", self.side, "a name")
        work = self.work if isinstance(self.work, dict) else {}
        _expect(isinstance(work.get("name"), str) and work["name"], "work", self.work, 'an object with a "name"')
        _expect(isinstance(self.refused, str | None) and self.refused != "", "refused", self.refused, "null or why")
        _expect(isinstance(self.note, str | None) and self.note != "", "note", self.note, "null or a text")
        refused = self.refused
        if refused is None and self.compiles:
            refused = f"{self.compiles} kernels were compiled inside the timing"
        against = self.against if isinstance(self.against, list | tuple) else [self.against] if self.against else []
        unknown = {"differs": None} if self.runs == 1 else {}  # one pair tells nothing of the noise
        against = [] if refused else [_comparison(one) | unknown for one in against]
        for name, value in (("refused", refused), ("against", against), ("work", _plain("work", work))):
            object.__setattr__(self, name, value)
        _check_figures(self.mode, self.figures, needed=refused is None)
        if self.mode == "accuracy":
            _expect(refused is None or not self.figures, "figures", self.figures, "none of a refused accuracy row")
        _check_limit("limit", self.limit)

    @property
    def key(self) -> str:
        return _key(self.mode, self.work, self.side)

    @property
    def label(self) -> str:
        """The side, and in an ablation what is different about it."""
        variant = self.work.get("variant")
        return self.side if not variant else variant if self.side == "lite_llm" else f"{self.side}, {variant}"

    def refuse(self, why: str) -> "Row":
        return replace(self, refused=why)


@dataclass(frozen=True)
class Comparison:
    """`row` is `ratio` times as good as `other`, the row of its opponent if the document has one."""

    row: Row
    side: str
    ratio: dict
    differs: bool | None
    other: Row | None


@dataclass
class Record:
    """`arguments` hold "argv" and all it was resolved to; `model` a "name" and what else makes it another model.

    A gate is {"name", "wrong": null or why} and, if it says something about one side alone, "side": a row's side, or in
    an ablation its variant; and if it is about the answers to one work alone, "work": that of the rows, less a variant.
    """

    arguments: dict
    model: dict
    limits: dict
    environment: dict
    gates: list[dict] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    path: Path | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        argv = self.arguments.get("argv") if isinstance(self.arguments, dict) else None
        _expect(isinstance(argv, list), "arguments", self.arguments, 'an object with "argv", a list')
        name = self.model.get("name") if isinstance(self.model, dict) else None
        _expect(isinstance(name, str), "model", self.model, 'an object with a "name"')
        limits = self.limits if isinstance(self.limits, dict) else {}
        for name in ("copy_tb_s", "matmul_tflops"):
            known = name in limits and (limits[name] is None or _is_number(limits[name]))
            _expect(known, f"limits.{name}", limits.get(name), "a number or null")
        _expect(isinstance(self.environment, dict), "environment", self.environment, "an object")
        _expect(_is_number(self.seconds), "seconds", self.seconds, "a number")
        _expect(isinstance(self.gates, list), "gates", self.gates, "a list")
        for gate in self.gates:
            _check_gate(gate)
        _expect(
            len({row.key for row in self.rows}) == len(self.rows), "rows", len(self.rows), "each work and side once"
        )
        self._began = self.clock() - self.seconds

    @classmethod
    def begin(cls, arguments: dict, model: dict, limits: dict, path: Path | None = None) -> "Record":
        """Of this machine, now; written at once, so that a path that cannot be written fails before the work."""
        found = cls(arguments, model, limits, environment(), path=path)
        found.write()
        return found

    def add(self, row: Row) -> Row:
        """The row with the GPU's state, now in the document and in the file."""
        if any(row.key == there.key for there in self.rows):
            raise ValueError(
                f"row: {row.mode}, {row.work['name']}, {row.side} is there already; name the side otherwise"
            )
        if row.gpu is None and "gpu" in self.environment:
            row = replace(row, gpu=gpu_state())
        self.rows.append(row)
        self._tick()
        return row

    def add_gate(self, gate: dict) -> None:
        _check_gate(gate)
        if "work" in gate:
            gate = gate | {"work": _plain("work", gate["work"])}
        self.gates.append(gate)
        self._tick()

    def refusal(self, row: Row) -> str | None:
        """Why nothing may be said about this row's speed."""
        return row.refused or self._failed(row.work, {row.side, row.label})

    def _failed(self, work: dict, sides: set[str]) -> str | None:
        """The first gate that failed about this work and one of these sides."""
        bare = {name: value for name, value in work.items() if name != "variant"}
        for gate in self.gates:
            about = gate.get("work", bare) == bare and ("side" not in gate or gate["side"] in sides)
            if gate["wrong"] and about:
                return f"{gate['name']}: {gate['wrong']}"
        return None

    def comparisons(self, row: Row) -> Iterator[Comparison]:
        if self.refusal(row):
            return
        for against in row.against:
            work = row.work | ({"variant": against["variant"]} if "variant" in against else {})
            other = self.find(row.mode, work, against["side"])
            names = {against["side"], against.get("variant", against["side"])}
            if other is None and self._failed(row.work, names):
                continue
            if other is None or not self.refusal(other):
                label = other.label if other else against.get("variant", against["side"])
                yield Comparison(row, label, against["ratio"], against["differs"], other)

    def limit(self, row: Row, figure: str) -> dict | None:
        """The share of a physical limit that this figure reaches, if it is known and the row not refused."""
        if self.refusal(row) or figure not in row.figures or row.mode == "accuracy":
            return None
        return row.figures[figure].get("limit") or (row.limit if figure == HEADLINE[row.mode] else None)

    def find(self, mode: str, work: dict, side: str) -> Row | None:
        key = _key(mode, work, side)
        return next((row for row in self.rows if row.key == key), None)

    def to_json(self) -> dict:
        names = ("environment", "arguments", "model", "limits", "gates")
        rows = [asdict(row) for row in self.rows]
        return (
            {"schema_version": SCHEMA} | {n: getattr(self, n) for n in names} | {"rows": rows, "seconds": self.seconds}
        )

    def write(self) -> None:
        if self.path:
            replace_file(self.path, json.dumps(self.to_json(), indent=1, allow_nan=False).encode() + b"\n")

    def _tick(self) -> None:
        self.seconds = self.clock() - self._began
        self.write()


def load(path: str | Path) -> Record:
    """A document as it was written; it is bound to no file, so that what is added to it does not overwrite it."""
    path = Path(path)
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "expected a document that --json wrote") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path}: not a JSON document: {error}", "expected one that --json wrote") from None
    if not isinstance(found, dict) or "schema_version" not in found:
        raise UsageError(f"{path}: no schema_version", "expected a document that benchmark.py --json wrote")
    if found["schema_version"] not in READS:
        version, known = shown(found["schema_version"]), " and ".join(map(str, READS))
        raise UsageError(f"{path}: schema_version = {version}; this version reads {known}", "measure again")
    try:
        names = {"arguments", "model", "limits", "environment", "gates", "rows", "seconds"}
        if wrong := names ^ (found.keys() - {"schema_version"}):
            raise ValueError(f"{', '.join(sorted(wrong))}: missing or unknown")
        _expect(isinstance(found["rows"], list), "rows", found["rows"], "a list")
        rows = [_row(i, row) for i, row in enumerate(found["rows"])]
        return Record(**{name: found[name] for name in names - {"rows"}}, rows=rows)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def replace_file(path: Path, data: bytes) -> None:
    """All of `data` or what was there before, whenever the process is killed."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: not a regular file", "name a file to write")
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _row(i: int, row: Any) -> Row:
    names = Row.__dataclass_fields__
    _expect(isinstance(row, dict), f"rows[{i}]", row, "an object")
    if wrong := (names.keys() - {"gpu", "note"} - row.keys()) | (row.keys() - names.keys()):
        raise ValueError(f"rows[{i}].{', '.join(sorted(wrong))}: missing or unknown")
    try:
        return Row(**row)
    except ValueError as error:
        raise ValueError(f"rows[{i}].{error}") from None


def _key(mode: str, work: dict, side: str) -> str:
    return json.dumps([mode, side, work], sort_keys=True)


def _check_figures(mode: str, figures: Any, needed: bool) -> None:
    names = FIGURES[mode]
    _expect(isinstance(figures, dict) and figures.keys() <= names.keys(), "figures", figures, "those of " + mode)
    if needed and (missing := names.keys() - figures.keys()):
        raise ValueError(f"figures.{', '.join(sorted(missing))}: missing; only a refused row may lack figures")
    if mode == "accuracy":
        for name, value in figures.items():
            _check_accuracy(f"figures.{name}", name, value)
        return
    for name, value in figures.items():
        parts, what = names[name], f"figures.{name}"
        known = isinstance(value, dict) and value.keys() - {"limit"} == set(parts)
        _expect(known, what, value, "an object of " + ", ".join(parts))
        if parts == INTERVAL:
            _check_interval(what, value)
        else:
            middles = [middle(value[part]) for part in parts]
            for part in parts:
                if isinstance(value[part], dict):
                    _check_interval(f"{what}.{part}", value[part])
            _expect(
                all(map(_is_number, middles)) and middles == sorted(middles), what, value, "numbers, p50 <= p90 <= p99"
            )
        _check_limit(f"{what}.limit", value.get("limit"))


def middle(value: Any) -> Any:
    return value.get("median") if isinstance(value, dict) else value


def _check_accuracy(what: str, name: str, value: Any) -> None:
    if name == "agreement":
        _expect(_is_number(value) and value <= 1, what, value, "a share from 0 to 1")
    elif name == "verdict":
        _expect(value in VERDICTS, what, value, "one of " + ", ".join(VERDICTS))
    elif name == "first_layer":
        _expect(value is None or type(value) is int, what, value, "null or a layer's index")
    else:
        _expect(value is None or _is_number(value), what, value, "null or a number")


def _check_interval(what: str, value: Any) -> None:
    numbers = [value.get(part) if isinstance(value, dict) else None for part in INTERVAL]
    ordered = all(map(_is_number, numbers)) and numbers[1] <= numbers[0] <= numbers[2]
    _expect(ordered, what, value, "numbers, low <= median <= high")


def _comparison(one: Any) -> dict:
    keys = one.keys() if isinstance(one, dict) else set()
    whole = keys - {"variant"} == {"side", "ratio", "differs"} and isinstance(one["differs"], bool | None)
    _expect(whole, "against", one, "objects of side, ratio, differs")
    _check_interval("against.ratio", one["ratio"])
    return one


def _check_limit(what: str, limit: Any) -> None:
    known = isinstance(limit, dict) and isinstance(limit.get("name"), str) and _is_number(limit.get("of_limit"))
    _expect(limit is None or known, what, limit, "null or an object of name, of_limit")


def _check_gate(gate: Any) -> None:
    known = isinstance(gate, dict) and {"name", "wrong"} <= gate.keys() and isinstance(gate["wrong"], str | None)
    known = known and isinstance(gate.get("work", {}), dict)
    _expect(known, "gates", gate, 'objects of "name", "wrong": null or why')


def _plain(what: str, value: dict) -> dict:
    """As it comes back from the file, or a work read from it would not be the same."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} = {shown(value)}; {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _expect(true: Any, name: str, found: Any, expected: str) -> None:
    if not true:
        raise ValueError(f"{name} = {shown(found)}; expected {expected}")
