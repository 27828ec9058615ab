"""Matmuls of one to four tokens, on the CUDA cores: one program computes a few outputs over all of `in`.

A weight is read once, so what counts is that the memory is never idle between two kernels of the chain. A program
therefore asks for its first weight tile, and for what else its `Tile` says, before it waits for the kernel before it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED, pdl, prefetch_rows, prefetch_share, release, share, wait

MOST_TOKENS = 4


class Tile(NamedTuple):
    rows: int  # outputs of one program; where two weight rows make one (gated, qkv), such pairs. A power of two
    columns: int  # of the input at a time; a power of two
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
    mine = tile.rows * (2 if paired else 1) * tile.columns // (32 * tile.warps)
    most = 128 if tokens <= 2 and in_features <= tile.columns else 64  # a second tile is on its way where there is one
    return mine <= most and tile.columns < 2 * max(in_features, 256) and tile.release in (AT_ONCE, WAITED, LAST)


def default(op: str, in_features: int, out_features: int, tokens: int) -> Tile:
    """A tile for a GPU or a shape that nobody has tuned."""
    whole = max(triton.next_power_of_2(in_features), 256)
    columns = whole if whole <= 2048 else next((c for c in (2048, 1024) if -in_features % c * 8 <= in_features), 512)
    warps = max(columns // (512 if tokens == 1 else 256), 1)  # each token takes registers of its own
    rows = 4 if out_features >= 1024 else 2
    return Tile(rows // 2 if op in ("gated", "qkv") else rows, columns, warps)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, gated: bool,
    residual: Tensor | None, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`linear` or, if there is a residual, `linear_add_`, of 1 to 4 tokens; arguments are as `linear` has checked."""
    (tokens, in_features), outputs = x.shape, len(weight) // (2 if gated else 1)
    out = x.new_empty(tokens, outputs) if residual is None else residual
    rows, dependent = min(tile.rows, 1 << outputs.bit_length() - 1), pdl(x.device)
    programs = triton.cdiv(outputs, rows)
    ahead, lines, each = share(ahead, tile.ahead, programs, tile.warps)
    _gemv_kernel[(programs,)](
        out, x, weight, bias, norm, residual, ahead, eps, tokens, lines,
        IN=in_features, OUT=outputs, TOKENS=triton.next_power_of_2(tokens), ROWS=rows, COLUMNS=tile.columns,
        GATED=gated, EVICT_FIRST=tile.evict_first, RELEASE=tile.release, OWN=tile.own, LINES=each, PDL=dependent,
        num_warps=tile.warps, num_stages=1, launch_pdl=dependent,
    )  # fmt: skip
    return out


def gemv_qkv(
    k_pool: Tensor, v_pool: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float,
    positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`project_qkv_` of 1 to 4 tokens whose heads turn as a whole and have no norm of their own."""
    (tokens, in_features), (_, kv_heads, head_dim) = x.shape, k_pool.shape
    heads = len(weight) // head_dim - 2 * kv_heads
    q = x.new_empty(tokens, heads, head_dim)
    half, dependent = head_dim // 2, pdl(x.device)
    rows = min(tile.rows, half & -half)  # a power of two that divides half a head
    programs = len(weight) // 2 // rows
    ahead, lines, each = share(ahead, tile.ahead, programs, tile.warps)
    _gemv_qkv_kernel[(programs,)](
        q, k_pool, v_pool, x, weight, bias, norm, positions, slots, cos, sin, ahead, eps, tokens, lines,
        k_pool.stride(0), v_pool.stride(0),
        IN=in_features, TOKENS=triton.next_power_of_2(tokens), ROWS=rows, COLUMNS=tile.columns,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        EVICT_FIRST=tile.evict_first, RELEASE=tile.release, OWN=tile.own, LINES=each, PDL=dependent,
        num_warps=tile.warps, num_stages=1, launch_pdl=dependent,
    )  # fmt: skip
    return q


@triton.jit
def _weights(rows, start, IN: tl.constexpr, COLUMNS: tl.constexpr, EVICT_FIRST: tl.constexpr):
    """A tile [1, rows, COLUMNS] of a weight; `rows` are pointers to the starts of its rows."""
    POLICY: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    col = tl.arange(0, COLUMNS)[None, None, :]
    at = rows[None, :, None] + col + start
    if IN % COLUMNS == 0:
        return tl.load(at, eviction_policy=POLICY)
    else:
        return tl.load(at, start + col < IN, other=0.0, eviction_policy=POLICY)


@triton.jit
def _inputs(x, token, start, IN: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [tokens, 1, COLUMNS] of the inputs, or, for token 0 alone, of the norm's weight."""
    col = start + tl.arange(0, COLUMNS)[None, None, :]
    at = x + token[:, None, None] * IN + col
    if IN % COLUMNS == 0:
        return tl.load(at)
    else:
        return tl.load(at, col < IN, other=0.0)


@triton.jit
def _halves(x):
    """Even and odd columns. One thread holds eight neighbours, so three times this moves nothing between threads."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def _add_2(sums, w, h):
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    sums += w0.to(tl.float32) * h0
    return sums + w1.to(tl.float32) * h1


@triton.jit
def _add_4(sums, w, h):
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    return _add_2(_add_2(sums, w0, h0), w1, h1)


@triton.jit
def _add_8(sums, w, h):
    """sums [tokens, rows, C] + the products of w [1, rows, 8 C] and h [tokens, 1, 8 C], each a fused multiply-add."""
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    return _add_4(_add_4(sums, w0, h0), w1, h1)


@triton.jit
def _add(sums, squares, w, h, g, norm):
    h = h.to(tl.float32)
    if norm is not None:
        squares = _add_8(squares, h, h)
        h *= g.to(tl.float32)
    return _add_8(sums, w, h), squares


@triton.jit
def _dots(
    x, rows, norm, eps, token, w, h, g,
    IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVICT_FIRST: tl.constexpr,
):  # fmt: skip
    """Products [TOKENS, ROWS] of the normed inputs with weight rows; w, h and g are the first tiles of their kinds.

    The norm's scale is one factor per token, so it comes last, when the sum of squares is known.
    """
    zero = tl.zeros([1], tl.int32)
    sums = tl.zeros([TOKENS, ROWS, COLUMNS // 8], tl.float32)
    squares = tl.zeros([TOKENS, 1, COLUMNS // 8], tl.float32)
    for start in range(COLUMNS, IN, COLUMNS):
        next_w = _weights(rows, start, IN, COLUMNS, EVICT_FIRST)
        next_h = _inputs(x, token, start, IN, COLUMNS)
        next_g = next_h
        if norm is not None:
            next_g = _inputs(norm, zero, start, IN, COLUMNS)
        sums, squares = _add(sums, squares, w, h, g, norm)
        w, h, g = next_w, next_h, next_g
    sums, squares = _add(sums, squares, w, h, g, norm)
    products = tl.sum(sums, 2)
    if norm is not None:
        products *= tl.rsqrt(tl.sum(squares, 2) / IN + eps)
    return products


@triton.jit
def _fetch(rows, ahead, lines, IN: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr):
    """Bring to L2 the next OWN columns of these rows, and this program's share of the lines of the weight ahead."""
    if OWN > 0 and IN > COLUMNS:
        prefetch_rows(rows, COLUMNS, IN - 1, OWN)
    prefetch_share(ahead, lines, tl.program_id(0), LINES)


@triton.jit(do_not_specialize=["eps", "tokens", "lines"])
def _gemv_kernel(
    out, x, weight, bias, norm, residual, ahead, eps, tokens, lines,
    IN: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr, EVICT_FIRST: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if RELEASE == 0:
        release(PDL)
    EACH: tl.constexpr = 2 if GATED else 1  # an output's weight rows lie side by side in a tile: gate, up, gate, up
    lane = tl.arange(0, ROWS * EACH)
    lane = lane // EACH + lane % EACH * OUT
    mine = tl.program_id(0) * ROWS
    first = tl.minimum(mine, OUT - ROWS)  # the last program may share outputs with the one before, but not store them
    # int64: a vocabulary times a width may pass 2**31. What all rows share is one scalar; the rest are constants.
    rows = weight + first.to(tl.int64) * IN + lane.to(tl.int64) * IN
    w = _weights(rows, 0, IN, COLUMNS, EVICT_FIRST)
    if norm is not None:
        g = _inputs(norm, tl.zeros([1], tl.int32), 0, IN, COLUMNS)
    if bias is not None:
        b = tl.load(bias + first + lane).to(tl.float32)
    if PDL:
        _fetch(rows, ahead, lines, IN, COLUMNS, OWN, LINES)
    wait(PDL)
    if RELEASE == 1:
        release(PDL)

    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    h = _inputs(x, token, 0, IN, COLUMNS)
    if norm is None:
        g = h
    column = first + tl.arange(0, ROWS)
    at = token[:, None] * OUT + column[None, :]
    if residual is not None:
        r = tl.load(residual + at).to(tl.float32)
    y = _dots(x, rows, norm, eps, token, w, h, g, IN, TOKENS, ROWS * EACH, COLUMNS, EVICT_FIRST)
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
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EVICT_FIRST: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program has ROWS features of the first half of a head, and those of the second half they turn with."""
    HALF: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, 2 * ROWS)
    lane = lane // 2 + lane % 2 * HALF
    head = tl.program_id(0) // (HALF // ROWS)
    feature = tl.program_id(0) % (HALF // ROWS) * ROWS
    first = head * HEAD_DIM + feature
    rows = weight + first.to(tl.int64) * IN + lane.to(tl.int64) * IN
    w = _weights(rows, 0, IN, COLUMNS, EVICT_FIRST)
    g = _inputs(norm, tl.zeros([1], tl.int32), 0, IN, COLUMNS)
    if bias is not None:
        b = tl.load(bias + first + lane).to(tl.float32)
    if PDL:
        _fetch(rows, ahead, lines, IN, COLUMNS, OWN, LINES)
    wait(PDL)
    if RELEASE < 2:  # never before the wait: attention, which comes next, takes all kernels before this one as done
        release(PDL)

    token = tl.minimum(tl.arange(0, TOKENS), tokens - 1)
    h = _inputs(x, token, 0, IN, COLUMNS)
    column = feature + tl.arange(0, ROWS)
    angle = tl.load(positions + token).to(tl.int64)[:, None] * HALF + column[None, :]
    slot = tl.load(slots + token).to(tl.int32)  # half the registers, for as long as the loop lasts
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    y = _dots(x, rows, norm, eps, token, w, h, g, IN, TOKENS, 2 * ROWS, COLUMNS, EVICT_FIRST)
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
    cases = [_case(capability, *shape, tokens) for shape in shapes for tokens in (1, 2, 4)]
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
    present |= {"norm"} if op != "add" else set()
    kinds = dict.fromkeys(present, f"*{dtype}") | ({"ahead": f"*{dtype}"} if ahead else {})
    absent = {name for name in ("bias", "norm", "ahead", *(() if qkv else ("residual",))) if name not in kinds}
    integers = ("tokens", "lines", *(("k_pool_stride", "v_pool_stride") if qkv else ()))
    kinds |= {"eps": "fp32"} | dict.fromkeys(integers, "i32")
    constants = dict.fromkeys(absent) | {"IN": width, "TOKENS": tokens, "ROWS": tile.rows, "COLUMNS": tile.columns}
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
