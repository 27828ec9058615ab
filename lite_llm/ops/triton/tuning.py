"""Which kernel computes a matmul or attention, and with which tile: a table for each GPU model, made by tools/tune.py
and tools/tune_attention.py.

`tuned/<gpu>.json` has one line for a matmul, its shape and a number of tokens; a line serves all smaller numbers down
to the next line, and shapes that have no lines take those of the nearest shape. Attention's lines serve their own head
dimension alone; one that has none takes the defaults of attention_tiles.py. `default.json` is for GPUs without a table.
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lite_llm.errors import EnvironmentProblem, shown
from lite_llm.ops.reference.attention import HEAD_DIMS
from lite_llm.ops.triton import attention_tiles as attention
from lite_llm.ops.triton import gemv, hopper_gated, skinny, wide
from lite_llm.ops.triton.gpu import capability
from lite_llm.ops.triton.launch import TICKETS

OPS = ("add", "gated", "linear", "qkv")
TABLES = Path(__file__).parent / "tuned"
SHIPPED = {"nvidia-h200": 90}
"""Our tables but the default one, and the compute capability of their GPUs, for which aot.py compiles their tiles."""
REQUESTS = (attention.MANY, TICKETS)
"""What rows of flash-decoding are for: few requests, or as many as a launch may have."""
ANY = 1 << 30
"""Of pairs or tokens: more than there can be."""

Tile = gemv.Tile | skinny.Tile | wide.Tile | attention.Flash | attention.Decode


class Choice(NamedTuple):
    kernel: str  # of a matmul "gemv", "skinny", "wide", "cublas" or, for gate and up, "hopper", which is
    # hopper_gated.py; of prompts' attention "flash" or "hopper"; "decode"
    tile: Tile | None  # None: the kernel's default; always so of cublas and of gate and up's hopper. That of attention
    # has flash's, for what it cannot read


class Row(NamedTuple):
    """Of a matmul. All but the choice of any row say what it is for; no two in a table are for the same."""

    op: str
    in_features: int
    out_features: int  # rows of the weight: both halves of a gated one
    tokens: int
    choice: Choice


class AttendRow(NamedTuple):
    """Of prompts' attention. A row for few pairs, or in steps with decodes, comes with one for any that is `alike`."""

    op: str
    head_dim: int
    itemsize: int  # bytes of an element of q, K and V
    windowed: bool
    pairs: int  # for up to so many (token, head) pairs together, pads among them
    beside: bool  # only in steps in which others decode; there it goes before rows that are for any step
    choice: Choice


class DecodeRow(NamedTuple):
    """Of flash-decoding, for up to so many requests."""

    op: str
    head_dim: int
    itemsize: int
    requests: int
    choice: Choice


AnyRow = Row | AttendRow | DecodeRow


class _Kind(NamedTuple):
    row: type[AnyRow]
    keys: tuple[str, ...]  # in a file, as the row has them
    tiles: dict[str, type[Tile] | None]  # of each kernel; None: it has none


CUBLAS = Choice("cublas", None)
_MATMUL = _Kind(
    Row,
    ("in", "out", "tokens"),
    {"gemv": gemv.Tile, "skinny": skinny.Tile, "wide": wide.Tile, "hopper": None, "cublas": None},
)
_KINDS = dict.fromkeys(OPS, _MATMUL) | {
    "attend": _Kind(
        AttendRow,
        ("head_dim", "itemsize", "windowed", "pairs", "beside"),
        {"flash": attention.Flash, "hopper": attention.Flash},
    ),
    "decode": _Kind(DecodeRow, ("head_dim", "itemsize", "requests"), {"decode": attention.Decode}),
}
_MOST_TOKENS = {
    "gemv": gemv.MOST_TOKENS, "skinny": skinny.MOST_TOKENS, "wide": wide.MOST_TOKENS, "hopper": ANY, "cublas": ANY
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
def choose_attend(
    device: torch.device, head_dim: int, itemsize: int, windowed: bool, pairs: int, beside: bool
) -> Choice:
    """The kernel for so many (token, head) pairs of prompts, and the tile of flash attention, one that this GPU can
    run; `beside`: others decode in the same step.
    """
    gpu = capability(device)
    tile = attention.flash_default(head_dim, itemsize, windowed, gpu)
    rows = [row for row in _rows(device) if row[:4] == ("attend", head_dim, itemsize, windowed)]
    rows = [row for row in rows if row.pairs >= pairs and row.beside <= beside]
    nearest = min(rows, key=lambda row: (not row.beside, row.pairs), default=None)
    kernel, tuned = nearest.choice if nearest else ("hopper", None)
    if tuned and attention.flash_fits(tuned, head_dim, itemsize, gpu):
        tile = tuned
    served = kernel == "hopper" and attention.hopper_serves(head_dim, itemsize, gpu)
    return Choice("hopper" if served else "flash", tile)


@functools.cache
def choose_decode(device: torch.device, head_dim: int, itemsize: int, requests: int) -> attention.Decode:
    """The tile for so many requests that decode, one that this GPU can run."""
    gpu = capability(device)
    rows = [row for row in _rows(device) if row[:3] == ("decode", head_dim, itemsize) and row.requests >= requests]
    tile = min(rows, key=lambda row: row.requests).choice.tile if rows else None
    if tile and attention.decode_fits(tile, head_dim, itemsize, gpu):
        return tile
    return attention.decode_default(head_dim, itemsize, gpu)


@functools.cache
def table(device: torch.device) -> Table:
    """The matmuls of the table of this device's GPU model, else of the default one."""
    return by_shape(_rows(device))


@functools.cache
def _rows(device: torch.device) -> list[AnyRow]:
    path = TABLES / f"{file_name(device)}.json"
    return read(path if path.exists() else TABLES / "default.json")


def shipped(op: str, capability: int) -> list[AnyRow]:
    """The rows of an op in our tables for GPUs of this compute capability."""
    names = [name for name, of in SHIPPED.items() if of == capability]
    return [row for name in names for row in read(TABLES / f"{name}.json") if row.op == op]


def file_name(device: torch.device) -> str:
    """nvidia-h200 for an NVIDIA H200. Where kernels are interpreted there is no GPU, and no table of that name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def by_shape(rows: Iterable[AnyRow]) -> Table:
    """The matmuls among these rows."""
    found: Table = {}
    for row in sorted((row for row in rows if isinstance(row, Row)), key=lambda row: row[:-1]):
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
    if choice.kernel == "hopper" and hopper_gated.serves(in_features, out_features, capability(device)):
        return choice
    return CUBLAS


def read(path: Path) -> list[AnyRow]:
    """The rows of a table file. EnvironmentProblem, naming file and row, for anything a row may not hold."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list):
            raise ValueError(f"rows is {shown(rows)}; expected a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(f"{path}: no table of tiles: {error!r}", "make one with tools/tune.py") from None
    done: dict[tuple, AnyRow] = {}
    for number, entry in enumerate(rows):
        try:
            row = _row(entry)
            if row[:-1] in done:
                raise ValueError("stands there twice")
            done[row[:-1]] = row
        except ValueError as error:
            raise EnvironmentProblem(f"{path}: row {number}, {shown(entry)}: {error}") from None
    for number, row in enumerate(done.values()):
        if isinstance(row, AttendRow) and (row.beside or row.pairs < ANY):
            other = done.get((*row[:4], ANY, False))
            if other is None or not alike(row, other):
                raise EnvironmentProblem(
                    f"{path}: row {number}, {shown(rows[number])}: expected a row of its head_dim with pairs = {ANY},"
                    " beside = false, for both itemsize = 2, kernel = flash, one block_n, and block_m = 64 or more, as"
                    " an answer's bits may depend on neither pairs nor beside"
                )
    return list(done.values())


def alike(row: AttendRow, other: AttendRow) -> bool:
    """Whether attention gives the same bits with both: keys are added up in the same blocks, and each token by itself.

    Compared on an H200. In lower tiles, and with fp32, a token's keys are dealt out to threads in other ways.
    """
    (kernel, tile), (other_kernel, other_tile) = row.choice, other.choice
    if not (kernel == other_kernel == "flash" and tile and other_tile and row.itemsize == 2):
        return False
    return tile.block_n == other_tile.block_n and min(tile.block_m, other_tile.block_m) >= 64


def _row(entry: Any) -> AnyRow:
    if not isinstance(entry, dict) or entry.get("op") not in tuple(_KINDS):
        op = entry.get("op") if isinstance(entry, dict) else None
        raise ValueError(f"op = {shown(op)}; expected {', '.join(_KINDS)}")
    kind = _KINDS[entry["op"]]
    expected = {"op", *kind.keys, "kernel", "tile"}
    if not expected - {"tile"} <= entry.keys() <= expected:
        raise ValueError(f"expected the keys {', '.join(sorted(expected))}")
    for key in kind.keys:
        flag = key in ("windowed", "beside")
        if flag and type(entry[key]) is not bool:
            raise ValueError(f"{key} = {shown(entry[key])}; expected true or false")
        if not flag and (type(entry[key]) is not int or entry[key] < 1):
            raise ValueError(f"{key} = {shown(entry[key])}; expected a whole number above 0")
    kernel = entry["kernel"]
    if kernel not in tuple(kind.tiles):
        raise ValueError(f"kernel = {shown(kernel)}; expected {', '.join(kind.tiles)}")
    row = kind.row(entry["op"], *(entry[key] for key in kind.keys), Choice(kernel, None))
    _check(row)
    if "tile" not in entry:
        return row
    return row._replace(choice=Choice(kernel, _tile(kernel, kind.tiles[kernel], entry["tile"])))


def _check(row: AnyRow) -> None:
    """ValueError for a row that no kernel would be asked for, or that would make bits depend on a batch."""
    kernel = row.choice.kernel
    if isinstance(row, Row):
        if row.tokens > _MOST_TOKENS[kernel]:
            raise ValueError(f"tokens = {row.tokens}; {kernel} takes at most {_MOST_TOKENS[kernel]}")
        if kernel == "hopper" and row.op != "gated":
            raise ValueError(f"op = {row.op}; hopper takes gated alone")
        return
    if row.head_dim not in HEAD_DIMS or row.itemsize not in (2, 4):
        dims = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"head_dim = {row.head_dim}, itemsize = {row.itemsize}; expected {dims}, of 2 or 4 bytes")
    if kernel == "hopper" and not attention.hopper_serves(row.head_dim, row.itemsize, 90):
        raise ValueError(f"hopper takes head_dim = {attention.HOPPER_HEAD_DIM}, itemsize = 2 alone")
    if isinstance(row, AttendRow) and row.pairs > ANY:
        raise ValueError(f"pairs = {row.pairs}; expected at most {ANY}, which is for any number")
    if isinstance(row, DecodeRow) and row.requests not in REQUESTS:
        few, most = REQUESTS
        raise ValueError(
            f"requests = {row.requests}; expected {few} or {most}, for an answer's bits may depend on no other number"
        )


def _tile(kernel: str, kind: type[Tile] | None, values: Any) -> Tile:
    if kind is None:
        raise ValueError(f"{kernel} has no tile")
    known = kind.__annotations__
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ValueError(f"tile = {shown(values)}; expected an object of {', '.join(known)}")
    for name, value in values.items():
        if type(value) is not known[name] or (known[name] is int and value < 0):
            raise ValueError(f"{name} = {shown(value)}; expected {known[name].__name__} of at least 0")
    if missing := known.keys() - kind._field_defaults.keys() - values.keys():
        raise ValueError(f"tile has no {', '.join(sorted(missing))}")
    return kind(**values)


def write(path: Path, gpu: str, rows: Iterable[AnyRow]) -> None:
    """A table file of sorted rows, one to a line; `read` gives them back."""
    lines = []
    for row in sorted(rows, key=lambda row: row[:-1]):
        kernel, tile = row.choice
        entry = {"op": row.op} | dict(zip(_KINDS[row.op].keys, row[1:-1])) | {"kernel": kernel}
        lines.append(json.dumps(entry | ({"tile": tile._asdict()} if tile else {})))
    path.write_text(f'{{"gpu": {json.dumps(gpu)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
