"""The matmul before attention for many tokens: its heads are normed and turned, K and V put into slots."""

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.launch import pdl, share
from lite_llm.ops.triton.norm import rms_norm
from lite_llm.ops.triton.rope import rope_store_kv_
from lite_llm.ops.triton.skinny import end, is_last, total
from lite_llm.ops.triton.wide import (
    Tile,
    begin,
    boxes,
    constexprs,
    default,
    descriptors,
    place,
    product,
    wide,
    workspace,
)


def wide_qkv(
    k_pool: Tensor, v_pool: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float,
    positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`project_qkv_` of any tokens; in one kernel behind the norm where a tile holds whole heads."""
    (tokens, in_features), (_, kv_heads, head_dim) = x.shape, k_pool.shape
    if head_dim != 2 * cos.shape[1] or not _whole(head_dim, tile):
        qkv = wide(x, weight, bias, norm, eps, False, None, ahead, tile)
        return rope_store_kv_(k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps)
    x = rms_norm(x, norm, eps)
    heads = len(weight) // head_dim - 2 * kv_heads
    q = x.new_empty(tokens, heads, head_dim)
    programs, dependent = triton.cdiv(tokens, tile.tokens) * triton.cdiv(len(weight), tile.rows), pdl(x.device)
    ahead, lines, each = share(ahead, tile.ahead, programs * tile.splits, tile.warps)
    _wide_qkv_kernel[(programs, tile.splits)](
        q, k_pool, v_pool, x, weight, *descriptors(x, weight, 1, tile), bias, positions, slots, cos, sin,
        q_norm, k_norm, ahead, *workspace(x, len(weight), programs, tile), eps, tokens, lines,
        k_pool.stride(0), v_pool.stride(0),
        IN=in_features, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, LINES=each, PDL=dependent,
        **constexprs(tile, in_features, tile.rows, dependent),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=dependent,
    )  # fmt: skip
    return q


def _whole(head_dim: int, tile: Tile) -> bool:
    """Whether a tile holds whole heads, and leaves registers for the angles of longer ones."""
    most = 128 if head_dim <= 64 or tile.splits > 1 else 64  # sums of a thread
    few = tile.tokens * tile.rows <= most * 32 * tile.warps
    return few and head_dim & (head_dim - 1) == 0 and tile.rows % head_dim == 0


@triton.jit(do_not_specialize=["eps", "tokens", "lines"], do_not_specialize_on_alignment=["positions", "slots"])
def _wide_qkv_kernel(
    q, k_pool, v_pool, x, weight, x_boxes, weight_boxes, bias, positions, slots, cos, sin, q_norm, k_norm, ahead,
    partial, arrivals, eps, tokens, lines, k_pool_stride, v_pool_stride,
    IN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    SOME: tl.constexpr, GROUP: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As `_wide_kernel`, with blocks of ROWS outputs that are whole heads."""
    ALL: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    SOME_HEADS: tl.constexpr = ROWS // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    tile, block = place(tokens, tl.cdiv(ALL, ROWS), TOKENS, GROUP)
    lane = block * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(lane, ALL - 1)
    # Never before the wait: attention, which comes next, takes all kernels before this one as done.
    begin(weight, row, tile, IN, PART, OWN, RELEASE if RELEASE > 0 else 1, PDL)
    acc = product(
        x, weight, x_boxes, weight_boxes, tokens, tile, block, row, IN, TOKENS, ROWS, COLUMNS, SPLITS, PART
    )  # fmt: skip
    end(ahead, lines, LINES, RELEASE, PDL)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    first_head = block * SOME_HEADS
    if SPLITS == 1:
        a, b = acc.reshape(TOKENS, SOME_HEADS, 2, HALF).permute(0, 1, 3, 2).split()
        _finish_heads(
            q, k_pool, v_pool, bias, positions, slots, cos, sin, q_norm, k_norm, a, b, token, first_head, eps,
            tokens, k_pool_stride, v_pool_stride, SOME_HEADS, HEADS, KV_HEADS, HEAD_DIM,
        )  # fmt: skip
    else:
        to = partial + (tl.program_id(1) * tokens + token)[:, None] * ALL + lane[None, :]
        tl.store(to, acc, (token < tokens)[:, None] & (lane < ALL)[None, :])
        if is_last(arrivals + tl.program_id(0), SPLITS):
            head, i = first_head + tl.arange(0, SOME_HEADS), tl.arange(0, HALF)
            for first in range(0, TOKENS, SOME):
                few = tile * TOKENS + first + tl.arange(0, SOME)
                here = (few < tokens)[:, None, None] & (head < HEADS + 2 * KV_HEADS)[None, :, None]
                at = partial + few[:, None, None] * ALL + head[None, :, None] * HEAD_DIM + i[None, None, :]
                a = total(at, here, tokens * ALL, SPLITS)
                b = total(at + HALF, here, tokens * ALL, SPLITS)
                _finish_heads(
                    q, k_pool, v_pool, bias, positions, slots, cos, sin, q_norm, k_norm, a, b, few, first_head, eps,
                    tokens, k_pool_stride, v_pool_stride, SOME_HEADS, HEADS, KV_HEADS, HEAD_DIM,
                )  # fmt: skip


@triton.jit
def _finish_heads(
    q, k_pool, v_pool, bias, positions, slots, cos, sin, q_norm, k_norm, a, b, token, first, eps, tokens,
    k_pool_stride, v_pool_stride, SOME_HEADS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store the heads from `first` on, given their halves a and b [tokens, SOME_HEADS, HALF]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head, i = first + tl.arange(0, SOME_HEADS), tl.arange(0, HALF)
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    there = token < tokens
    if bias is not None:
        at, exists = bias + head[:, None] * HEAD_DIM + i[None, :], (head < HEADS + 2 * KV_HEADS)[:, None]
        a += tl.load(at, exists, other=0.0).to(tl.float32)[None, :, :]
        b += tl.load(at + HALF, exists, other=0.0).to(tl.float32)[None, :, :]
    if q_norm is not None:
        rstd = tl.rsqrt((tl.sum(a * a, 2) + tl.sum(b * b, 2)) / HEAD_DIM + eps)[:, :, None]
        a = tl.where(is_v[None, :, None], a, a * rstd * _head_norm(q_norm, k_norm, is_q, i))
        b = tl.where(is_v[None, :, None], b, b * rstd * _head_norm(q_norm, k_norm, is_q, HALF + i))
    turn = tl.load(positions + token, there, other=0).to(tl.int64)[:, None] * HALF + i[None, :]
    c = tl.load(cos + turn, there[:, None], other=0.0)[:, None, :]
    s = tl.load(sin + turn, there[:, None], other=0.0)[:, None, :]
    low = tl.where(is_v[None, :, None], a, a * c - b * s)
    high = tl.where(is_v[None, :, None], b, b * c + a * s)
    low, high = low.to(q.dtype.element_ty), high.to(q.dtype.element_ty)
    slot = tl.load(slots + token, there, other=0).to(tl.int64)
    last = first + SOME_HEADS - 1
    if first < HEADS:
        _put(q, token.to(tl.int64) * (HEADS * HEAD_DIM), head, low, high, there, HEADS, HEAD_DIM)
    if (last >= HEADS) & (first < HEADS + KV_HEADS):
        _put(k_pool, slot * k_pool_stride, head - HEADS, low, high, there, KV_HEADS, HEAD_DIM)
    if last >= HEADS + KV_HEADS:
        _put(v_pool, slot * v_pool_stride, head - HEADS - KV_HEADS, low, high, there, KV_HEADS, HEAD_DIM)


@triton.jit
def _put(to, row, head, low, high, there, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the halves of those heads that are one of HEADS here, a token's from `row` on."""
    i = tl.arange(0, HEAD_DIM // 2)
    at = to + row[:, None, None] + head[None, :, None] * HEAD_DIM + i[None, None, :]
    mask = there[:, None, None] & ((head >= 0) & (head < HEADS))[None, :, None]
    tl.store(at, low, mask)
    tl.store(at + HEAD_DIM // 2, high, mask)


@triton.jit
def _head_norm(q_norm, k_norm, is_q, i):
    of_q, of_k = tl.load(q_norm + i).to(tl.float32), tl.load(k_norm + i).to(tl.float32)
    return tl.where(is_q[:, None], of_q[None, :], of_k[None, :])[None, :, :]


def aot_cases(capability: int) -> list[AotCase]:
    llama, qwen2, qwen3 = (2048, 32, 8, 64), (896, 14, 2, 64), (4096, 32, 8, 128)  # width, heads, kv_heads, head_dim
    cases = []
    for tokens in (128, 256, 1024):
        for model in (llama, qwen3):
            width, heads, kv_heads, head_dim = model
            tile = default("qkv", width, (heads + 2 * kv_heads) * head_dim, tokens, capability)
            cases.append(_case(capability, "bf16", *model, tokens, tile))
    for model in (llama, qwen2, qwen3):
        cases.append(_case(capability, "bf16", *model, 512, Tile(128, 128, 64, 8, 3), " pointers"))
    high = Tile(128, 256, 64, 8, 4 if SHARED[capability] > 200 << 10 else 2)
    cases.append(_case(capability, "bf16", *llama, 512, high, " high"))
    cases.append(_case(capability, "bf16", 2048, 8, 1, 256, 512, high._replace(tokens=64), " long"))
    cases.append(_case(capability, "fp16", *llama, 128, Tile(64, 64, 64, 4, 3, 2)))
    return cases


def _case(
    capability: int, dtype: str, width: int, heads: int, kv_heads: int, head_dim: int, tokens: int, tile: Tile,
    label: str = "",
) -> AotCase:  # fmt: skip
    dependent = capability >= 90
    absent = set() if width == 896 else {"bias"}
    absent |= set() if head_dim == 128 else {"q_norm", "k_norm"}
    absent |= set() if tile.splits > 1 else {"partial", "arrivals"}
    absent |= set() if tile.ahead else {"ahead"}
    absent |= set() if tile.tma else {"x_boxes", "weight_boxes"}
    names = ("q", "k_pool", "v_pool", "x", "weight", "bias", "q_norm", "k_norm", "ahead")
    kinds = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("cos", "sin", "partial"), "*fp32")
    kinds |= dict.fromkeys(("positions", "slots", "arrivals"), "*i32") | {"eps": "fp32"} | boxes(dtype, 1, tile)
    constants = constexprs(tile, width, tile.rows, dependent) | {"IN": width, "HEADS": heads, "KV_HEADS": kv_heads}
    constants |= {"HEAD_DIM": head_dim, "PDL": dependent} | dict.fromkeys(absent)
    return AotCase(
        name=f"wide_qkv {dtype} {width} {heads}/{kv_heads}x{head_dim} {tokens}{label}",
        kernel=_wide_qkv_kernel,
        signature=kinds | dict.fromkeys(("tokens", "lines", "k_pool_stride", "v_pool_stride"), "i32"),
        constexprs=constants | {"LINES": 32 * tile.warps if tile.ahead else 0},
        attrs=dict.fromkeys(("k_pool_stride", "v_pool_stride"), 16) | dict.fromkeys(("positions", "slots"), 1),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_shared=SHARED[capability],
    )
