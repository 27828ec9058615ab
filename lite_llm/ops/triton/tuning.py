"""Which kernel computes a matmul, and with which tile: a table for each GPU model, made by tools/tune.py.

`tuned/<gpu>.json` has one line for an op, a shape and a number of tokens; a line serves all smaller numbers down to the
next line, and shapes that have no lines take those of the nearest shape. `default.json` is for GPUs without a table.
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lite_llm.errors import EnvironmentProblem, shown
from lite_llm.ops.triton import gemv, skinny, wide
from lite_llm.ops.triton.decode import capability

OPS = ("add", "gated", "linear", "qkv")
TABLES = Path(__file__).parent / "tuned"
_KEYS = {"op", "in", "out", "tokens", "kernel", "tile"}


class Choice(NamedTuple):
    kernel: str  # "gemv", "skinny", "wide" or "cublas"
    tile: gemv.Tile | skinny.Tile | wide.Tile | None  # None: the kernel's default; always so of cublas


class Row(NamedTuple):
    op: str
    in_features: int
    out_features: int  # rows of the weight: both halves of a gated one
    tokens: int
    choice: Choice


CUBLAS = Choice("cublas", None)
_TILES = {"gemv": gemv.Tile, "skinny": skinny.Tile, "wide": wide.Tile}
_MOST_TOKENS = {
    "gemv": gemv.MOST_TOKENS, "skinny": skinny.MOST_TOKENS, "wide": wide.MOST_TOKENS, "cublas": 1 << 30
}  # fmt: skip

Table = dict[str, dict[tuple[int, int], list[Row]]]
"""The rows of each op and shape (in, out), by rising number of tokens."""


@functools.cache
def choose(device: torch.device, op: str, in_features: int, out_features: int, tokens: int) -> Choice:
    """The kernel for `tokens` tokens, with a tile that this GPU can run at this shape; cublas beyond the table."""
    shapes = table(device).get(op)
    if not shapes:
        return CUBLAS
    nearest = min(shapes, key=lambda shape: (_distance(shape, in_features, out_features), shape))
    row = next((row for row in shapes[nearest] if row.tokens >= tokens), None)
    return _fitting(row.choice, device, op, in_features, out_features, tokens) if row else CUBLAS


@functools.cache
def table(device: torch.device) -> Table:
    """The table of this device's GPU model, else the default one."""
    path = TABLES / f"{file_name(device)}.json"
    return by_shape(read(path if path.exists() else TABLES / "default.json"))


def file_name(device: torch.device) -> str:
    """nvidia-h200 for an NVIDIA H200. Where kernels are interpreted there is no GPU, and no table of that name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def by_shape(rows: Iterable[Row]) -> Table:
    found: Table = {}
    for row in sorted(rows, key=lambda row: row[:4]):
        found.setdefault(row.op, {}).setdefault((row.in_features, row.out_features), []).append(row)
    return found


def _distance(shape: tuple[int, int], in_features: int, out_features: int) -> float:
    return abs(math.log(shape[0] / in_features)) + abs(math.log(shape[1] / out_features))


def _fitting(choice: Choice, device: torch.device, op: str, in_features: int, out_features: int, tokens: int) -> Choice:
    paired = op in ("gated", "qkv")
    if choice.kernel == "gemv":
        tile = choice.tile or gemv.default(op, in_features, out_features, tokens)
        if not gemv.fits(tile, in_features, tokens, paired):
            tile = gemv.default(op, in_features, out_features, tokens)
        return Choice("gemv", tile)
    if choice.kernel in ("skinny", "wide"):
        family, gpu = skinny if choice.kernel == "skinny" else wide, capability(device)
        default = family.default(op, in_features, out_features, tokens, gpu)
        for tile in (choice.tile or default, default):
            if family.fits(tile, in_features, out_features, tokens, 2, op == "gated", gpu):
                return Choice(choice.kernel, tile)
    return CUBLAS


def read(path: Path) -> list[Row]:
    """The rows of a table file. EnvironmentProblem, naming file and row, for anything a row may not hold."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list):
            raise ValueError(f"rows is {shown(rows)}; expected a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(f"{path}: no table of tiles: {error!r}", "make one with tools/tune.py") from None
    done: dict[tuple, Row] = {}
    for number, entry in enumerate(rows):
        try:
            row = _row(entry)
            if row[:4] in done:
                raise ValueError("stands there twice")
            done[row[:4]] = row
        except ValueError as error:
            raise EnvironmentProblem(f"{path}: row {number}, {shown(entry)}: {error}") from None
    return list(done.values())


def _row(entry: Any) -> Row:
    if not isinstance(entry, dict) or not _KEYS - {"tile"} <= entry.keys() <= _KEYS:
        raise ValueError(f"expected the keys {', '.join(sorted(_KEYS))}")
    if entry["op"] not in OPS:
        raise ValueError(f"op = {shown(entry['op'])}; expected {', '.join(OPS)}")
    for key in ("in", "out", "tokens"):
        if type(entry[key]) is not int or entry[key] < 1:
            raise ValueError(f"{key} = {shown(entry[key])}; expected a whole number above 0")
    kernel = entry["kernel"]
    if kernel not in tuple(_MOST_TOKENS):
        raise ValueError(f"kernel = {shown(kernel)}; expected {', '.join(_MOST_TOKENS)}")
    if entry["tokens"] > _MOST_TOKENS[kernel]:
        raise ValueError(f"tokens = {entry['tokens']}; {kernel} takes at most {_MOST_TOKENS[kernel]}")
    tile = _tile(kernel, entry["tile"]) if "tile" in entry else None
    return Row(entry["op"], entry["in"], entry["out"], entry["tokens"], Choice(kernel, tile))


def _tile(kernel: str, values: Any) -> gemv.Tile | skinny.Tile | wide.Tile:
    if kernel not in _TILES:
        raise ValueError(f"{kernel} has no tile")
    known = _TILES[kernel].__annotations__
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ValueError(f"tile = {shown(values)}; expected an object of {', '.join(known)}")
    for name, value in values.items():
        if type(value) is not known[name] or (known[name] is int and value < 0):
            raise ValueError(f"{name} = {shown(value)}; expected {known[name].__name__} of at least 0")
    if missing := known.keys() - _TILES[kernel]._field_defaults.keys() - values.keys():
        raise ValueError(f"tile has no {', '.join(sorted(missing))}")
    return _TILES[kernel](**values)


def write(path: Path, gpu: str, rows: Iterable[Row]) -> None:
    """A table file of sorted rows, one to a line; `read` gives them back."""
    lines = []
    for op, in_features, out_features, tokens, (kernel, tile) in sorted(rows, key=lambda row: row[:4]):
        entry = {"op": op, "in": in_features, "out": out_features, "tokens": tokens, "kernel": kernel}
        lines.append(json.dumps(entry | ({"tile": tile._asdict()} if tile else {})))
    path.write_text(f'{{"gpu": {json.dumps(gpu)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
