"""Matmuls of one to eight tokens, straight from memory to registers: a program computes a few outputs over all of `in`.

Up to four tokens are for the CUDA cores. More would keep these busier than the memory, so the tensor cores take them,
from the registers that a thread loaded: nothing goes through shared memory, and no thread needs what another has.

A weight is read once, so what counts is that the memory is never idle between two kernels of the chain. A program
therefore asks for its first weight tile, and for what else its `Tile` says, before it waits for the kernel before it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.gemv_tile import dots, numbered, scale_at, starts, tile_at
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED, pdl, prefetch, release, wait
from lite_llm.ops.triton.norm import rms_norm

MOST_TOKENS = 8
CUDA_CORES = 4  # tokens up to which these compute
_LINE = tl.constexpr(128)  # bytes that one prefetch brings


class Tile(NamedTuple):
    rows: int  # outputs of one program; where two weight rows make one (gated, qkv), such pairs. A power of two
    columns: int  # of the input at a time; a power of two, on the tensor cores a multiple of 32 * warps
    warps: int
    evict_first: bool = False  # weights leave the caches first
    release: int = AT_ONCE  # or WAITED or LAST; qkv releases behind its wait in any case
    own: int = 0  # columns behind the first tile that a program prefetches for itself; 0 or a power of two >= 64
    ahead: int = 0  # bytes of the next weight that all programs together prefetch


def fits(tile: Tile, in_features: int, tokens: int, paired: bool) -> bool:
    """Whether one program keeps this tile in its registers; `paired` is for gated and qkv."""
    powers = (tile.rows, tile.columns, tile.warps)
    if tokens > MOST_TOKENS or any(n < 1 or n & (n - 1) for n in powers) or tile.warps > 16:
        return False
    if tile.own and (tile.own < 64 or tile.own & (tile.own - 1)):
        return False
    rows, threads = tile.rows * (2 if paired else 1), 32 * tile.warps
    if tile.columns >= 2 * max(in_features, 256) or tile.release not in (AT_ONCE, WAITED, LAST):
        return False
    if tokens > CUDA_CORES:
        rows, parts = max(rows, 16), tile.columns // threads
        return parts > 0 and tile.warps <= 8 and (rows + 16) * parts + rows // 4 <= 144  # two tiles, and the sums
    mine = rows * tile.columns // threads
    most = 128 if tokens <= 2 and in_features <= tile.columns else 64  # a second tile is on its way where there is one
    return mine <= most


def default(op: str, in_features: int, out_features: int, tokens: int) -> Tile:
    """A tile for a GPU or a shape that nobody has tuned."""
    if tokens > CUDA_CORES:
        return Tile(8 if op in ("gated", "qkv") else 16, 256, 4)
    whole = max(triton.next_power_of_2(in_features), 256)
    columns = whole if whole <= 2048 else next((c for c in (2048, 1024) if -in_features % c * 8 <= in_features), 512)
    warps = max(columns // (512 if tokens == 1 else 256), 1)  # each token takes registers of its own
    rows = 4 if out_features >= 1024 else 2
    return Tile(rows // 2 if op in ("gated", "qkv") else rows, columns, warps)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, gated: bool,
    residual: Tensor | None, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`linear` or, if there is a residual, `linear_add_`, of 1 to 8 tokens; arguments are as `linear` has checked."""
    x, norm = _normed(x, norm, eps)
    (tokens, in_features), outputs = x.shape, len(weight) // (2 if gated else 1)
    out = x.new_empty(tokens, outputs) if residual is None else residual
    rows, dependent = min(tile.rows, 1 << outputs.bit_length() - 1), pdl(x.device)
    programs = triton.cdiv(outputs, rows)
    ahead, lines, share = _ahead(ahead, tile, programs, dependent)
    _gemv_kernel[(programs,)](
        out, x, weight, bias, norm, residual, ahead, eps, tokens, lines,
        IN=in_features, OUT=outputs, **_size(tokens, tile), ROWS=rows,
        GATED=gated, EVICT_FIRST=tile.evict_first, RELEASE=tile.release, OWN=tile.own, LINES=share, PDL=dependent,
        num_warps=tile.warps, num_stages=1, launch_pdl=dependent,
    )  # fmt: skip
    return out


def gemv_qkv(
    k_pool: Tensor, v_pool: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float,
    positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`project_qkv_` of 1 to 8 tokens whose heads turn as a whole and have no norm of their own."""
    x, norm = _normed(x, norm, eps)
    (tokens, in_features), (_, kv_heads, head_dim) = x.shape, k_pool.shape
    heads = len(weight) // head_dim - 2 * kv_heads
    q = x.new_empty(tokens, heads, head_dim)
    half, dependent = head_dim // 2, pdl(x.device)
    rows = min(tile.rows, half & -half)  # a power of two that divides half a head
    programs = len(weight) // 2 // rows
    ahead, lines, share = _ahead(ahead, tile, programs, dependent)
    _gemv_qkv_kernel[(programs,)](
        q, k_pool, v_pool, x, weight, bias, norm, positions, slots, cos, sin, ahead, eps, tokens, lines,
        k_pool.stride(0), v_pool.stride(0),
        IN=in_features, **_size(tokens, tile), ROWS=rows,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        EVICT_FIRST=tile.evict_first, RELEASE=tile.release, OWN=tile.own, LINES=share, PDL=dependent,
        num_warps=tile.warps, num_stages=1, launch_pdl=dependent,
    )  # fmt: skip
    return q


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """The inputs, and the norm that is left to the matmul."""
    # The tensor cores take 16 bits, and in fp16 x * norm may pass 65504 before its scale brings it back.
    if norm is None or len(x) <= CUDA_CORES or x.dtype != torch.float16:
        return x, norm
    return rms_norm(x, norm, eps), None


def _size(tokens: int, tile: Tile) -> dict[str, int]:
    """WARPS is 0 on the CUDA cores."""
    tensor = tokens > CUDA_CORES
    return {
        "TOKENS": max(triton.next_power_of_2(tokens), 8 if tensor else 1),
        "COLUMNS": tile.columns, "WARPS": tile.warps if tensor else 0,
    }  # fmt: skip


def _ahead(ahead: Tensor | None, tile: Tile, programs: int, dependent: bool) -> tuple[Tensor | None, int, int]:
    """The weight to prefetch, how many of its lines, and how many of these one program takes (0: nothing is)."""
    if ahead is None or not tile.ahead or not dependent or not ahead.is_contiguous():
        return None, 0, 0
    lines = min(tile.ahead, ahead.numel() * ahead.element_size()) // _LINE.value
    return ahead, lines, max(triton.next_power_of_2(triton.cdiv(lines, programs)), 32 * tile.warps)


@triton.jit
def _fetch(rows, ahead, lines, IN: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr):
    """Bring to L2 the next OWN columns of these rows, and this program's share of the lines of the weight ahead."""
    if OWN > 0 and IN > COLUMNS:
        step: tl.constexpr = _LINE // (rows.dtype.element_ty.primitive_bitwidth // 8)
        col = tl.minimum(COLUMNS + tl.arange(0, OWN // step) * step, IN - 1)
        prefetch(rows[:, None] + col[None, :])
    if LINES > 0:
        first = tl.program_id(0) * LINES
        if first < lines:
            line = tl.minimum(first + tl.arange(0, LINES), lines - 1).to(tl.int64)
            prefetch(ahead.to(tl.pointer_type(tl.uint8)) + line * _LINE)


@triton.jit(do_not_specialize=["eps", "tokens", "lines"])
def _gemv_kernel(
    out, x, weight, bias, norm, residual, ahead, eps, tokens, lines,
    IN: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, GATED: tl.constexpr, EVICT_FIRST: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if RELEASE == 0:
        release(PDL)
    EACH: tl.constexpr = 2 if GATED else 1  # an output's weight rows lie side by side in a tile: gate, up, gate, up
    lane = tl.arange(0, ROWS * EACH)
    lane = lane // EACH + lane % EACH * OUT
    mine = tl.program_id(0) * ROWS
    first = tl.minimum(mine, OUT - ROWS)  # the last program may share outputs with the one before, but not store them
    # int64: a vocabulary times a width may pass 2**31. What all rows share is one scalar; the rest are constants.
    rows = starts(weight + first.to(tl.int64) * IN, EACH, OUT, ROWS * EACH, IN, COLUMNS, WARPS)
    w = tile_at(rows, 0, IN, COLUMNS, WARPS, EVICT_FIRST)
    numbers = numbered(tokens, TOKENS, COLUMNS, WARPS)
    if norm is not None:
        g = scale_at(norm, numbers, 0, IN, COLUMNS, WARPS)
    if bias is not None:
        b = tl.load(bias + first + lane).to(tl.float32)
    if PDL:
        _fetch(weight + (first + lane).to(tl.int64) * IN, ahead, lines, IN, COLUMNS, OWN, LINES)
    wait(PDL)
    if RELEASE == 1:
        release(PDL)

    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    h = tile_at(x + numbers * IN, 0, IN, COLUMNS, WARPS, False)
    if norm is None:
        g = h
    column = first + tl.arange(0, ROWS)
    at = token[:, None] * OUT + column[None, :]
    if residual is not None:
        r = tl.load(residual + at).to(tl.float32)
    y = dots(x, rows, norm, eps, numbers, w, h, g, IN, TOKENS, ROWS * EACH, COLUMNS, WARPS, EVICT_FIRST)
    if RELEASE == 2:
        release(PDL)
    if bias is not None:
        y += b[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(y, [TOKENS, ROWS, 2]))
        y = gate / (1.0 + tl.exp(-gate)) * up
    if residual is not None:
        y += r
    real = (tl.arange(0, TOKENS) < tokens)[:, None] & (column >= mine)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=["eps", "tokens", "lines", "k_pool_stride", "v_pool_stride"])
def _gemv_qkv_kernel(
    q, k_pool, v_pool, x, weight, bias, norm, positions, slots, cos, sin, ahead, eps, tokens, lines,
    k_pool_stride, v_pool_stride,
    IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EVICT_FIRST: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program has ROWS features of the first half of a head, and those of the second half they turn with."""
    HALF: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, 2 * ROWS)
    lane = lane // 2 + lane % 2 * HALF
    head = tl.program_id(0) // (HALF // ROWS)
    feature = tl.program_id(0) % (HALF // ROWS) * ROWS
    first = head * HEAD_DIM + feature
    rows = starts(weight + first.to(tl.int64) * IN, 2, HALF, 2 * ROWS, IN, COLUMNS, WARPS)
    w = tile_at(rows, 0, IN, COLUMNS, WARPS, EVICT_FIRST)
    numbers = numbered(tokens, TOKENS, COLUMNS, WARPS)
    if norm is not None:
        g = scale_at(norm, numbers, 0, IN, COLUMNS, WARPS)
    if bias is not None:
        b = tl.load(bias + first + lane).to(tl.float32)
    if PDL:
        _fetch(weight + (first + lane).to(tl.int64) * IN, ahead, lines, IN, COLUMNS, OWN, LINES)
    wait(PDL)
    if RELEASE < 2:  # never before the wait: attention, which comes next, takes all kernels before this one as done
        release(PDL)

    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    h = tile_at(x + numbers * IN, 0, IN, COLUMNS, WARPS, False)
    if norm is None:
        g = h
    column = feature + tl.arange(0, ROWS)
    angle = tl.load(positions + token).to(tl.int64)[:, None] * HALF + column[None, :]
    slot = tl.load(slots + token).to(tl.int32)  # half the registers, for as long as the loop lasts
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    y = dots(x, rows, norm, eps, numbers, w, h, g, IN, TOKENS, 2 * ROWS, COLUMNS, WARPS, EVICT_FIRST)
    if RELEASE == 2:
        release(PDL)
    if bias is not None:
        y += b[None, :]
    y, z = tl.split(tl.reshape(y, [TOKENS, ROWS, 2]))
    low, high = y, z
    if head < HEADS + KV_HEADS:
        low = y * c - z * s
        high = z * c + y * s

    real = (tl.arange(0, TOKENS) < tokens)[:, None] & (column >= 0)[None, :]
    low, high = low.to(q.dtype.element_ty), high.to(q.dtype.element_ty)
    if head < HEADS:
        at = q + ((token * HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
    elif head < HEADS + KV_HEADS:
        at = k_pool + (slot.to(tl.int64) * k_pool_stride + (head - HEADS) * HEAD_DIM)[:, None] + column[None, :]
    else:
        at = (
            v_pool
            + (slot.to(tl.int64) * v_pool_stride + (head - HEADS - KV_HEADS) * HEAD_DIM)[:, None]
            + column[None, :]
        )
    tl.store(at, low, real)
    tl.store(at + HALF, high, real)


def aot_cases(capability: int) -> list[AotCase]:
    shapes = [  # op, dtype, outputs, inputs, head_dim
        ("linear", "bf16", 128256, 2048, 0), ("linear", "fp16", 1152, 896, 0), ("add", "bf16", 4096, 14336, 0),
        ("add", "bf16", 896, 4864, 0), ("gated", "bf16", 16384, 2048, 0), ("gated", "bf16", 37888, 3584, 0),
        ("qkv", "bf16", 3072, 2048, 64), ("qkv", "bf16", 1152, 896, 64), ("qkv", "fp16", 6144, 4096, 128),
    ]  # fmt: skip
    cases = [_case(capability, *shape, tokens) for shape in shapes for tokens in (1, 2, 4, 8)]
    for shape, rows in ((shapes[0], 32), (shapes[2], 32), (shapes[4], 16), (shapes[6], 16)):
        cases += [_case(capability, *shape, 8, Tile(rows, 128, 2, True, AT_ONCE, 256, 1 << 20))]
        cases += [_case(capability, *shape, 8, Tile(rows // 2, 128, 1))]
    cases += [_case(capability, *shapes[0], 1, Tile(2, 2048, 2, True, WAITED, 0, 1 << 20))]
    cases += [_case(capability, *shapes[2], 2, Tile(8, 1024, 4, False, AT_ONCE, 1024, 1 << 20))]
    cases += [_case(capability, *shapes[4], 1, Tile(2, 512, 1))]
    cases += [_case(capability, *shapes[0], 1, Tile(4, 2048, 4, True, LAST))]
    cases += [_case(capability, *shapes[4], 1, Tile(4, 2048, 4, True, AT_ONCE, 0, 1 << 22))]
    return cases + [_case(capability, *shapes[6], 1, Tile(4, 2048, 4, False, WAITED, 0, 1 << 22))]


def _case(
    capability: int, op: str, dtype: str, outputs: int, width: int, head_dim: int, tokens: int, tile: Tile | None = None
) -> AotCase:
    tile, dependent = tile or default(op, width, outputs, tokens), capability >= 90
    qkv, ahead = op == "qkv", dependent and tile.ahead > 0
    present = {"x", "weight"} | {"add": {"out", "residual"}, "qkv": {"q", "k_pool", "v_pool"}}.get(op, {"out"})
    present |= {"bias"} if width == 896 else set()
    present |= {"norm"} if op != "add" and (tokens <= CUDA_CORES or dtype == "bf16") else set()
    kinds = dict.fromkeys(present, f"*{dtype}") | ({"ahead": f"*{dtype}"} if ahead else {})
    absent = {name for name in ("bias", "norm", "ahead", *(() if qkv else ("residual",))) if name not in kinds}
    integers = ("tokens", "lines", *(("k_pool_stride", "v_pool_stride") if qkv else ()))
    kinds |= {"eps": "fp32"} | dict.fromkeys(integers, "i32")
    constants = dict.fromkeys(absent) | {"IN": width, "ROWS": tile.rows} | _size(tokens, tile)
    constants |= {"EVICT_FIRST": tile.evict_first, "RELEASE": tile.release, "OWN": tile.own, "PDL": dependent}
    constants |= {"LINES": 32 * tile.warps if ahead else 0}
    if qkv:
        kinds |= dict.fromkeys(("positions", "slots"), "*i64") | dict.fromkeys(("cos", "sin"), "*fp32")
        constants |= {"HEADS": outputs // head_dim * 2 // 3, "KV_HEADS": outputs // head_dim // 6}
        constants |= {"HEAD_DIM": head_dim}
    else:
        constants |= {"GATED": op == "gated", "OUT": outputs // 2 if op == "gated" else outputs}
    return AotCase(
        name=f"gemv-{op}-{dtype}-{outputs}x{width}-t{tokens}-{tile.rows}x{tile.columns}w{tile.warps}r{tile.release}",
        kernel=_gemv_qkv_kernel if qkv else _gemv_kernel,
        signature=kinds,
        constexprs=constants,
        num_warps=tile.warps,
        num_stages=1,
    )
