"""Matmuls of some 65 to some thousand tokens on the tensor cores, with all that surrounds them but the norm.

A program computes a tile of tokens by outputs. Programs that read the same weights run side by side, so that these
come from memory once. Where there are fewer tiles than multiprocessors, `in` is split among programs; the partial sums
go through memory, and the program that arrives last adds them up in order, so that every run gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED, pdl, prefetch_rows, release, share, tickets, wait
from lite_llm.ops.triton.norm import rms_norm
from lite_llm.ops.triton.skinny import end, is_last, total

MOST_TOKENS = 1 << 14
MOST_PARTIAL = 1024  # tokens times splits: what the engine's memory plan has room for, and as many as are of use
_TOGETHER = 1024  # tokens whose programs run side by side
_HELD = 128  # registers of a thread for partial sums on their way in
_TMA = range(90, 120)  # where tensor cores read shared memory; elsewhere it gains nothing, and ptxas spills around it
_POWERS = {1 << n for n in range(12)}


class Tile(NamedTuple):
    tokens: int  # of one program: 64, 128 or 256
    rows: int  # outputs of one program; of a gated matmul, rows of gate and as many of up
    columns: int  # of the input at a time
    warps: int = 8
    stages: int = 3  # tiles under way
    splits: int = 1  # programs that share the input of one tile of outputs
    tma: bool = False  # load by the tensor memory accelerator
    release: int = AT_ONCE  # or WAITED or LAST; qkv releases behind its wait in any case
    own: int = 0  # first columns of its slice of the weight that a program prefetches; 0 or a power of two >= 64
    ahead: int = 0  # bytes of the next weight that all programs together prefetch


def fits(
    tile: Tile, in_features: int, out_features: int, tokens: int, itemsize: int, gated: bool, capability: int
) -> bool:
    """Whether a GPU of this compute capability runs this tile from its shared memory and registers.

    `out_features` counts the rows of the weight.
    """
    if not 1 <= tokens <= MOST_TOKENS or in_features % 8 or not in_features or out_features < 1:
        return False
    if tile.tokens not in (64, 128, 256) or tile.warps not in (4, 8) or tile.tma and capability not in _TMA:
        return False
    if not {tile.rows, tile.columns, tile.own or 1} <= _POWERS or not 1 <= tile.splits <= 16:
        return False
    if 0 < tile.own < 64 or not 1 <= tile.stages <= 8 or tile.release not in (AT_ONCE, WAITED, LAST):
        return False
    rows, threads = tile.rows * (2 if gated else 1), 32 * tile.warps
    if tile.rows < 32 or rows > 256 or not 32 <= tile.columns <= 128:
        return False
    if tile.splits > 1 and tile.splits * tokens > MOST_PARTIAL:
        return False
    staged = (tile.tokens + rows) * tile.columns * itemsize * tile.stages
    handed = tile.tokens * rows * (4 if tile.splits > 1 else itemsize)  # from the tensor cores' layout to memory's
    if max(staged, handed) + 1024 > SHARED.get(capability, min(SHARED.values())):  # 1024: barriers
        return False
    return tile.tokens * rows <= 128 * threads


def default(op: str, in_features: int, out_features: int, tokens: int, capability: int) -> Tile:
    """A tile for a GPU or a shape that nobody has tuned: some 96 programs or more, if the shape has as many."""
    shared = SHARED.get(capability, min(SHARED.values()))
    high = 64 if tokens <= 64 else 128
    tall = triton.cdiv(tokens, high)
    across = 256 if shared > 128 << 10 and op != "qkv" and tall * triton.cdiv(out_features, 256) >= 96 else 128
    programs, splits = tall * triton.cdiv(out_features, across), 1
    while splits < 8 and programs * splits < 96 and in_features >= 512 * splits and 2 * splits * tokens <= MOST_PARTIAL:
        splits *= 2
    rows, warps = across // 2 if op == "gated" else across, 8 if high * across > 1 << 13 else 4
    return Tile(high, rows, 64, warps, 4 if shared > 200 << 10 else 3, splits, tma=capability in _TMA, own=256)


def wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, gated: bool,
    residual: Tensor | None, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`linear` or, if there is a residual, `linear_add_`, of any tokens; arguments are as `linear` has checked."""
    x = x if norm is None else rms_norm(x, norm, eps)
    (tokens, in_features), outputs = x.shape, len(weight) // (2 if gated else 1)
    out = x.new_empty(tokens, outputs) if residual is None else residual
    dependent, programs = pdl(x.device), triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.rows)
    ahead, lines, each = share(ahead, tile.ahead, programs * tile.splits, tile.warps)
    _wide_kernel[(programs, tile.splits)](
        out, x, weight, *descriptors(x, weight, 2 if gated else 1, tile), bias, residual, ahead,
        *workspace(x, len(weight), programs, tile), tokens, lines,
        IN=in_features, OUT=outputs, GATED=gated, LINES=each, PDL=dependent,
        **constexprs(tile, in_features, tile.rows * (2 if gated else 1), dependent),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=dependent,
    )  # fmt: skip
    return out


def descriptors(
    x: Tensor, weight: Tensor, parts: int, tile: Tile
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """x and the weight, cut into its parts, as the tensor memory accelerator reads them; it fills with zeros."""
    if not tile.tma or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None, None
    rows, width = len(weight) // parts, x.shape[1]
    strides, box = [rows * width, width, 1], [parts, tile.rows, tile.columns]
    return (
        TensorDescriptor(x, list(x.shape), [width, 1], [tile.tokens, tile.columns]),
        TensorDescriptor(weight, [parts, rows, width], strides, box),
    )


def workspace(x: Tensor, rows: int, tiles: int, tile: Tile) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Partial sums [splits, tokens, rows] in fp32 and arrival tickets, if there are splits."""
    if tile.splits == 1:
        return None, None
    partial = torch.empty(tile.splits * len(x) * rows, dtype=torch.float32, device=x.device)
    return partial, tickets(tiles, x.device)


def constexprs(tile: Tile, in_features: int, sums: int, dependent: bool) -> dict[str, int]:
    """What both kernels take from a tile; `sums` counts what is held for a token where partial sums are added up."""
    part = triton.cdiv(in_features, tile.splits * tile.columns) * tile.columns
    own = min(tile.own, 1 << part.bit_length() - 1)
    held = max(_HELD * 32 * tile.warps // (sums * tile.splits), 1)
    return {
        "TOKENS": tile.tokens, "ROWS": tile.rows, "COLUMNS": tile.columns, "SPLITS": tile.splits, "PART": part,
        "SOME": min(tile.tokens, 1 << held.bit_length() - 1), "GROUP": max(_TOGETHER // tile.tokens, 1),
        "RELEASE": tile.release, "OWN": own if dependent and own >= 64 else 0,
    }  # fmt: skip


@triton.jit
def place(tokens, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of tokens and block of outputs: a group of tiles has all its blocks, one after the other."""
    program = tl.program_id(0)
    first = program // (GROUP * BLOCKS) * GROUP
    some = tl.minimum(tl.cdiv(tokens, TOKENS) - first, GROUP)
    within = program % (GROUP * BLOCKS)
    return first + within % some, within // some


@triton.jit
def begin(
    weight, row, tile, IN: tl.constexpr, PART: tl.constexpr, OWN: tl.constexpr, RELEASE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Prefetch the first columns of this program's part of the weight; wait for the kernel before this one."""
    if RELEASE == 0:
        release(PDL)
    if OWN > 0:
        at = weight + row.to(tl.int64) * IN
        if tile == 0:  # one for all programs that read these rows
            prefetch_rows(at, tl.program_id(1) * PART, IN - 1, OWN)
    wait(PDL)
    if RELEASE == 1:
        release(PDL)


@triton.jit
def product(
    x, weight, x_boxes, weight_boxes, tokens, tile, block, row,
    IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Products [TOKENS, rows] of a tile of x with weight rows, over this split's part of the input.

    `row` names the rows; of boxes, it is ROWS from block * ROWS on, of each part of the weight.
    """
    first = tl.program_id(1) * PART
    acc = tl.zeros([TOKENS, row.shape[0]], tl.float32)
    if weight_boxes is not None:
        for start in tl.range(first, first + PART, COLUMNS):
            h = x_boxes.load([tile * TOKENS, start])
            w = weight_boxes.load([0, block * ROWS, start]).reshape(row.shape[0], COLUMNS)
            acc = tl.dot(h, w.T, acc, input_precision="ieee")
    else:
        EVEN: tl.constexpr = PART * SPLITS == IN
        col = first + tl.arange(0, COLUMNS)
        token = tl.minimum(tile * TOKENS + tl.arange(0, TOKENS), tokens - 1)  # in place of a mask
        x_at = x + token.to(tl.int64)[:, None] * IN + col[None, :]
        weight_at = weight + row.to(tl.int64)[:, None] * IN + col[None, :]
        for start in tl.range(0, PART, COLUMNS):
            if EVEN:
                h, w = tl.load(x_at + start), tl.load(weight_at + start)
            else:
                there = (col + start < IN)[None, :]
                h, w = tl.load(x_at + start, there, other=0.0), tl.load(weight_at + start, there, other=0.0)
            acc = tl.dot(h, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _finish(
    out, bias, residual, acc, up, token, lane, tokens, OUT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What comes behind the sums: bias, activation, residual."""
    if bias is not None:
        acc += tl.load(bias + lane, lane < OUT, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            up += tl.load(bias + OUT + lane, lane < OUT, other=0.0).to(tl.float32)[None, :]
        acc = acc / (1.0 + tl.exp(-acc)) * up
    at = token.to(tl.int64)[:, None] * OUT + lane[None, :]
    mask = (token < tokens)[:, None] & (lane < OUT)[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "lines"])
def _wide_kernel(
    out, x, weight, x_boxes, weight_boxes, bias, residual, ahead, partial, arrivals, tokens, lines,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    SOME: tl.constexpr, GROUP: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, s) computes the t-th tile, in the order of `place`, from the s-th part of the input."""
    PARTS: tl.constexpr = 2 if GATED else 1
    tile, block = place(tokens, tl.cdiv(OUT, ROWS), TOKENS, GROUP)
    lane = tl.arange(0, PARTS * ROWS)  # gate rows, then up rows
    within, part = block * ROWS + lane % ROWS, lane // ROWS * OUT
    row = tl.minimum(within, OUT - 1) + part
    begin(weight, row, tile, IN, PART, OWN, RELEASE, PDL)
    acc = product(
        x, weight, x_boxes, weight_boxes, tokens, tile, block, row, IN, TOKENS, ROWS, COLUMNS, SPLITS, PART
    )  # fmt: skip
    end(ahead, lines, LINES, RELEASE, PDL)
    token, output = tile * TOKENS + tl.arange(0, TOKENS), block * ROWS + tl.arange(0, ROWS)
    if SPLITS == 1:
        up = acc
        if GATED:
            acc, up = acc.reshape(TOKENS, 2, ROWS).permute(0, 2, 1).split()
        _finish(out, bias, residual, acc, up, token, output, tokens, OUT, GATED)
    else:
        ALL: tl.constexpr = PARTS * OUT
        to = partial + (tl.program_id(1) * tokens + token)[:, None] * ALL + (within + part)[None, :]
        tl.store(to, acc, (token < tokens)[:, None] & (within < OUT)[None, :])
        if is_last(arrivals + tl.program_id(0), SPLITS):
            for first in range(0, TOKENS, SOME):
                few = tile * TOKENS + first + tl.arange(0, SOME)
                here = (few < tokens)[:, None] & (output < OUT)[None, :]
                at = partial + few[:, None] * ALL + output[None, :]
                sums = total(at, here, tokens * ALL, SPLITS)
                up_sums = sums
                if GATED:
                    up_sums = total(at + OUT, here, tokens * ALL, SPLITS)
                _finish(out, bias, residual, sums, up_sums, few, output, tokens, OUT, GATED)


def aot_cases(capability: int) -> list[AotCase]:
    shapes = {"linear": (2048, 128256), "gated": (2048, 16384), "add": (8192, 2048)}  # of Llama-3.2-1B
    cases = []
    for op, (width, rows) in shapes.items():
        for tokens in (64, 128, 256, 1024):
            tile = default(op, width, rows, tokens, capability)
            cases.append(_case(capability, op, "bf16", width, rows, tokens, tile))
        small = Tile(128, 64 if op == "gated" else 128, 64, 8, 3, 4 if op == "add" else 1, ahead=1 << 21)
        cases.append(_case(capability, op, "bf16", width, rows, 256, small, " pointers"))
        if SHARED[capability] > 128 << 10:
            half = 2 if op == "gated" else 1
            for label, tile in {
                " high": Tile(256, 128 // half, 64, 8, 3),
                " few warps": Tile(128, 128 // half, 64, 4, 3),
            }.items():
                tile = tile._replace(tma=capability in _TMA, splits=2 if op == "add" else 1)
                cases.append(_case(capability, op, "bf16", width, rows, 512, tile, label))
    for op, (width, rows) in {"linear": (896, 151936), "gated": (896, 9728), "add": (4864, 896)}.items():
        tile = default(op, width, rows, 128, capability)._replace(splits=2)
        cases.append(_case(capability, op, "fp16", width, rows, 128, tile, " bias"))
    return cases


def _case(
    capability: int, op: str, dtype: str, width: int, rows: int, tokens: int, tile: Tile, label: str = ""
) -> AotCase:
    parts = 2 if op == "gated" else 1
    dependent, more = capability >= 90, tile.splits > 1
    absent = set() if label == " bias" else {"bias"}
    absent |= set() if op == "add" else {"residual"}
    absent |= set() if more else {"partial", "arrivals"}
    absent |= set() if tile.ahead else {"ahead"}
    absent |= set() if tile.tma else {"x_boxes", "weight_boxes"}
    kinds = dict.fromkeys(("out", "x", "weight", "bias", "residual", "ahead"), f"*{dtype}")
    constants = constexprs(tile, width, tile.rows * parts, dependent)
    constants |= {"IN": width, "OUT": rows // parts, "GATED": parts == 2}
    constants |= {"LINES": 32 * tile.warps if tile.ahead else 0, "PDL": dependent} | dict.fromkeys(absent)
    return AotCase(
        name=f"wide {op} {dtype} {width}x{rows} {tokens}{label}",
        kernel=_wide_kernel,
        signature=kinds
        | boxes(dtype, parts, tile)
        | {"partial": "*fp32", "arrivals": "*i32", "tokens": "i32", "lines": "i32"},
        constexprs=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_shared=SHARED[capability],
    )


def boxes(dtype: str, parts: int, tile: Tile) -> dict[str, str]:
    """The types of `descriptors`."""
    return {
        "x_boxes": f"tensordesc<{dtype}[{tile.tokens}, {tile.columns}]>",
        "weight_boxes": f"tensordesc<{dtype}[{parts}, {tile.rows}, {tile.columns}]>",
    }
