"""Matmuls of a few tokens up to 128, on the tensor cores with the operands swapped: weights are the wide side.

The tensor cores want at least 64 of one side and are content with 8 of the other, so outputs take the place of rows
and tokens that of columns. `in` is split among programs where the outputs alone would not fill the GPU; the partial
sums go through memory, and the program that arrives last adds them up in order, so that every run gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.launch import (
    AT_ONCE,
    LAST,
    WAITED,
    pdl,
    prefetch_rows,
    prefetch_share,
    release,
    share,
    tickets,
    wait,
)
from lite_llm.ops.triton.norm import rms_norm

MOST_TOKENS = 128
_HELD = 64  # registers of a thread for partial sums on their way in
_POWERS = {1 << n for n in range(12)}


class Tile(NamedTuple):
    tokens: int  # the most it takes: 8, 16, 32, 64 or 128
    rows: int  # outputs of one program; of a gated matmul, rows of gate and as many of up
    columns: int  # of the input at a time
    warps: int = 4
    stages: int = 3  # tiles under way
    splits: int = 1  # programs that share the input of one block of outputs
    fuse_norm: bool = True  # or else normalise in a kernel of its own
    release: int = AT_ONCE  # or WAITED or LAST; qkv releases behind its wait in any case
    own: int = 0  # first columns of its slice of the weight that a program prefetches; 0 or a power of two >= 64
    ahead: int = 0  # bytes of the next weight that all programs together prefetch


def fits(
    tile: Tile, in_features: int, out_features: int, tokens: int, itemsize: int, gated: bool, capability: int
) -> bool:
    """Whether a GPU of this compute capability runs this tile from its shared memory and registers.

    `out_features` counts the rows of the weight.
    """
    if tokens > tile.tokens or not 8 <= tile.tokens <= MOST_TOKENS or in_features % 8 or out_features < 1:
        return False
    if not {tile.tokens, tile.rows, tile.columns, tile.warps, tile.own or 1} <= _POWERS:
        return False
    if tile.rows < 16 or tile.columns < 16 or not 1 <= tile.splits <= 16 or tile.warps not in (2, 4, 8):
        return False
    if 0 < tile.own < 64 or not 1 <= tile.stages <= 8 or tile.release not in (AT_ONCE, WAITED, LAST):
        return False
    rows, threads = tile.rows * (2 if gated else 1), 32 * tile.warps
    staged = (rows + tile.tokens) * tile.columns * itemsize * tile.stages
    normed = tile.columns * tile.tokens if tile.fuse_norm else 0
    if staged + normed * itemsize > SHARED.get(capability, min(SHARED.values())):
        return False
    sums, loads = rows * tile.tokens, (rows + tile.tokens) * tile.columns
    return sums <= 64 * threads and sums + normed <= 80 * threads and loads <= 192 * threads


def default(op: str, in_features: int, out_features: int, tokens: int, capability: int) -> Tile:
    """A tile for a GPU or a shape that nobody has tuned: 99 KB of shared memory, some 128 programs or more."""
    wide = max(triton.next_power_of_2(tokens), 16)
    gated = op == "gated"
    rows = 128 if wide > 32 and not gated and out_features >= 1 << 15 else 64
    warps = 8 if rows == 128 or wide > 64 else 4
    columns, stages = (64, 3) if gated or wide > 32 else (128, 3)
    blocks = triton.cdiv(out_features // (2 if gated else 1), rows)
    splits = 1
    while splits < 8 and blocks * splits < 128 and in_features >= 4 * splits * columns:
        splits *= 2
    return Tile(wide, rows, columns, warps, stages, splits, fuse_norm=wide <= 16 and op != "add", own=256)


def skinny(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, gated: bool,
    residual: Tensor | None, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`linear` or, if there is a residual, `linear_add_`, of 1 to 128 tokens; arguments are as `linear` has checked."""
    x, norm = normed(x, norm, eps, tile)
    (tokens, in_features), outputs = x.shape, len(weight) // (2 if gated else 1)
    out = x.new_empty(tokens, outputs) if residual is None else residual
    blocks, dependent = triton.cdiv(outputs, tile.rows), pdl(x.device)
    partial, squares, arrivals = workspace(x, len(weight), blocks, blocks, tile) if tile.splits > 1 else (None,) * 3
    ahead, lines, each = share(ahead, tile.ahead, blocks * tile.splits, tile.warps)
    _skinny_kernel[(blocks, tile.splits)](
        out, x, weight, bias, norm, residual, ahead, partial, squares, arrivals, eps, tokens, lines,
        IN=in_features, OUT=outputs, GATED=gated, LINES=each, PDL=dependent,
        **constexprs(tile, in_features, tile.rows * (2 if gated else 1), dependent),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=dependent,
    )  # fmt: skip
    return out


def normed(x: Tensor, norm: Tensor | None, eps: float, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """The inputs, and the norm that is left to the matmul."""
    # In fp16, x * norm may pass 65504 before the division by the root mean square brings it back.
    if norm is None or tile.fuse_norm and x.dtype != torch.float16:
        return x, norm
    return rms_norm(x, norm, eps), None


def workspace(x: Tensor, rows: int, blocks: int, groups: int, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums [splits, tokens, rows], sums of squares of x [blocks, splits, tokens], and arrival tickets."""
    partial = torch.empty(tile.splits * tile.tokens * rows, dtype=torch.float32, device=x.device)
    squares = torch.empty(blocks * tile.splits * tile.tokens, dtype=torch.float32, device=x.device)
    return partial, squares, tickets(groups, x.device)


def constexprs(tile: Tile, in_features: int, sums: int, dependent: bool) -> dict[str, int]:
    """What both kernels take from a tile; `sums` counts what is held for a token where partial sums are added up."""
    part = triton.cdiv(in_features, tile.splits * tile.columns) * tile.columns
    own = min(tile.own, 1 << part.bit_length() - 1)
    held = max(_HELD * 32 * tile.warps // (sums * tile.splits), 1)
    return {
        "TOKENS": tile.tokens, "ROWS": tile.rows, "COLUMNS": tile.columns, "SPLITS": tile.splits, "PART": part,
        "SOME": min(tile.tokens, 1 << held.bit_length() - 1),
        "RELEASE": tile.release, "OWN": own if dependent and own >= 64 else 0,
    }  # fmt: skip


@triton.jit
def begin(
    weight, row, up_row, IN: tl.constexpr, PART: tl.constexpr, GATED: tl.constexpr, OWN: tl.constexpr,
    RELEASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Prefetch the first columns of this program's part of the weight; wait for the kernel before this one."""
    if RELEASE == 0:
        release(PDL)
    if OWN > 0:
        first = tl.program_id(1) * PART
        prefetch_rows(weight + row.to(tl.int64) * IN, first, IN - 1, OWN)
        if GATED:
            prefetch_rows(weight + up_row.to(tl.int64) * IN, first, IN - 1, OWN)
    wait(PDL)
    if RELEASE == 1:
        release(PDL)


@triton.jit
def end(ahead, lines, LINES: tl.constexpr, RELEASE: tl.constexpr, PDL: tl.constexpr):
    """Behind the loop the memory has nothing to do: prefetch this program's share of the weight ahead."""
    if RELEASE == 2:
        release(PDL)
    prefetch_share(ahead, lines, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), LINES)


@triton.jit
def _weights(at, col, start, IN: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at + start)
    return tl.load(at + start, (col + start < IN)[None, :], other=0.0)


@triton.jit
def _scale(norm, col, IN: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(norm + tl.minimum(col, IN - 1)).to(tl.float32)
    return tl.load(norm + col, col < IN, other=0.0).to(tl.float32)


@triton.jit
def product(
    x, weight, norm, tokens, row, up_row,
    IN: tl.constexpr, GATED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, TOKENS] of weight rows with this split's part of x (times `norm`), those with the up rows if
    gated, and the sums of squares [TOKENS] of that part, with which the caller makes up for the norm's division.
    """
    EVEN: tl.constexpr = PART * SPLITS == IN
    col = tl.program_id(1) * PART + tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    at = weight + row.to(tl.int64)[:, None] * IN + col[None, :]  # int64: a vocabulary times a width may pass 2**31
    up_at = weight + up_row.to(tl.int64)[:, None] * IN + col[None, :]
    x_at = x + token[None, :] * IN + col[:, None]
    there = (token < tokens)[None, :]
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    squares = tl.zeros([COLUMNS, TOKENS], tl.float32)
    if norm is not None:
        scale = _scale(norm, col, IN, EVEN)
    for start in tl.range(0, PART, COLUMNS):
        w = _weights(at, col, start, IN, EVEN)
        if EVEN:
            h = tl.load(x_at + start, there, other=0.0)
        else:
            h = tl.load(x_at + start, there & (col + start < IN)[:, None], other=0.0)
        if norm is not None:
            wide = h.to(tl.float32)
            squares += wide * wide
            h = (wide * scale[:, None]).to(x.dtype.element_ty)
            # Loaded one round early: too small to be pipelined, it would stop the loop where it is used.
            scale = _scale(norm, col + start + COLUMNS, IN, EVEN)
        acc = tl.dot(w, h, acc, input_precision="ieee")
        if GATED:
            up = tl.dot(_weights(up_at, col, start, IN, EVEN), h, up, input_precision="ieee")
    return acc, up, tl.sum(squares, 0)


@triton.jit
def is_last(ticket, arrivals):
    """Whether all others have come here before this program; what they stored is then visible to it."""
    tl.debug_barrier()  # all threads have stored before one of them takes the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def total(at, mask, step, SPLITS: tl.constexpr):
    """The sum, in their order, of the partial sums at `at + split * step`."""
    # .cg: other programs wrote these, and this processor's L1 may not know.
    acc = tl.load(at, mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(at + split * step, mask, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def _finish(
    out, bias, norm, residual, acc, up, squares, eps, row, token, mask,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What comes behind the sums: the norm's division, bias, activation, residual."""
    if norm is not None:
        rstd = tl.rsqrt(squares / IN + eps)[None, :]
        acc *= rstd
        up *= rstd
    if bias is not None:
        acc += tl.load(bias + row, row < OUT, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if bias is not None:
            up += tl.load(bias + OUT + row, row < OUT, other=0.0).to(tl.float32)[:, None]
        acc = acc / (1.0 + tl.exp(-acc)) * up
    at = token[None, :] * OUT + row[:, None]
    if residual is not None:
        acc += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["eps", "tokens", "lines"])
def _skinny_kernel(
    out, x, weight, bias, norm, residual, ahead, partial, squares, arrivals, eps, tokens, lines,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    SOME: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b, s) computes the b-th ROWS outputs of all tokens from the s-th part of the input."""
    block, split = tl.program_id(0), tl.program_id(1)
    lane = block * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    mask = (lane < OUT)[:, None] & (token < tokens)[None, :]
    row = tl.minimum(lane, OUT - 1)  # in place of a mask on the weights; not for stores, which it would scatter
    begin(weight, row, row + OUT, IN, PART, GATED, OWN, RELEASE, PDL)
    acc, up, square = product(
        x, weight, norm, tokens, row, row + OUT, IN, GATED, TOKENS, ROWS, COLUMNS, SPLITS, PART
    )  # fmt: skip
    end(ahead, lines, LINES, RELEASE, PDL)
    if SPLITS == 1:
        _finish(out, bias, norm, residual, acc, up, square, eps, lane, token, mask, IN, OUT, GATED)
    else:
        each: tl.constexpr = 2 * OUT if GATED else OUT
        square_at = squares + block * SPLITS * TOKENS
        to = partial + (split * TOKENS + token)[None, :] * each + lane[:, None]
        tl.store(to, acc, mask)
        if GATED:
            tl.store(to + OUT, up, mask)
        if norm is not None:
            tl.store(square_at + split * TOKENS + token, square)
        if is_last(arrivals + block, SPLITS):
            for first in range(0, tokens, SOME):
                few = first + tl.arange(0, SOME)
                here = (lane < OUT)[:, None] & (few < tokens)[None, :]
                at = partial + few[None, :] * each + lane[:, None]
                sums = total(at, here, TOKENS * each, SPLITS)
                up_sums = sums
                if GATED:
                    up_sums = total(at + OUT, here, TOKENS * each, SPLITS)
                square_sums = tl.zeros([SOME], tl.float32)
                if norm is not None:
                    square_sums = total(square_at + few, few < tokens, TOKENS, SPLITS)
                _finish(out, bias, norm, residual, sums, up_sums, square_sums, eps, lane, few, here, IN, OUT, GATED)


def aot_cases(capability: int) -> list[AotCase]:
    shapes = {"linear": (2048, 128256), "gated": (2048, 16384), "add": (8192, 2048)}  # of Llama-3.2-1B
    tuned = {  # of the H200, for GPUs with as much shared memory
        "linear": Tile(64, 128, 128, 8, 3, fuse_norm=False), "gated": Tile(64, 64, 128, 4, 3, fuse_norm=False, own=512),
        "add": Tile(16, 64, 256, 4, 4, 4, ahead=1 << 21),
    }  # fmt: skip
    cases = []
    for op, (width, rows) in shapes.items():
        for tokens in (8, 16, 32, 64, 128):
            tile = default(op, width, rows, tokens, capability)._replace(tokens=tokens)
            cases.append(_case(capability, op, "bf16", width, rows, tile))
        if capability in (90, 100):
            cases.append(_case(capability, op, "bf16", width, rows, tuned[op], " tuned"))
    for op, (width, rows) in {"linear": (896, 151936), "gated": (896, 9728), "add": (4864, 896)}.items():
        tile = default(op, width, rows, 16, capability)._replace(splits=2)
        cases.append(_case(capability, op, "fp16", width, rows, tile, " bias"))
    return cases


def _case(capability: int, op: str, dtype: str, width: int, rows: int, tile: Tile, label: str = "") -> AotCase:
    outputs = rows // 2 if op == "gated" else rows
    dependent = capability >= 90
    absent = set() if label == " bias" else {"bias"}
    absent |= set() if tile.fuse_norm and op != "add" and dtype == "bf16" else {"norm"}
    absent |= set() if op == "add" else {"residual"}
    absent |= set() if tile.splits > 1 else {"partial", "squares", "arrivals"}
    absent |= set() if tile.ahead else {"ahead"}
    floats = dict.fromkeys(("out", "x", "weight", "bias", "norm", "residual", "ahead"), f"*{dtype}")
    kinds = floats | {"partial": "*fp32", "squares": "*fp32", "arrivals": "*i32"}
    constants = constexprs(tile, width, tile.rows * rows // outputs, dependent)
    constants |= {"IN": width, "OUT": outputs, "GATED": op == "gated"}
    constants |= {"LINES": 32 * tile.warps if tile.ahead else 0, "PDL": dependent} | dict.fromkeys(absent)
    return AotCase(
        name=f"skinny {op} {dtype} {width}x{rows} {tile.tokens}{label}",
        kernel=_skinny_kernel,
        signature=kinds | {"eps": "fp32", "tokens": "i32", "lines": "i32"},
        constexprs=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_shared=SHARED[capability] if label == " tuned" else 99 << 10,
    )
