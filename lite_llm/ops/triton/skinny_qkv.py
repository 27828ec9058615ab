"""The matmul before attention for a few tokens up to 128: its heads are normed and turned, K and V put into slots."""

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.launch import pdl, share
from lite_llm.ops.triton.skinny import (
    Tile,
    begin,
    constexprs,
    default,
    end,
    is_last,
    normed,
    product,
    total,
    workspace,
)


def skinny_qkv(
    k_pool: Tensor, v_pool: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float,
    positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    ahead: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """`project_qkv_` of 1 to 128 tokens whose heads turn as a whole."""
    x, norm = normed(x, norm, eps, tile)
    (tokens, in_features), (_, kv_heads, head_dim) = x.shape, k_pool.shape
    if head_dim != 2 * cos.shape[1]:
        raise ValueError(f"cos: for {2 * cos.shape[1]} features; expected all {head_dim} of a head to turn")
    heads = len(weight) // head_dim - 2 * kv_heads
    q = x.new_empty(tokens, heads, head_dim)
    per_head, per_block = _heads(head_dim, tile.rows)
    groups, dependent = triton.cdiv(heads + 2 * kv_heads, per_block), pdl(x.device)
    blocks, wide = groups * per_head, triton.next_power_of_2(head_dim // 2)
    partial, squares, arrivals = workspace(x, len(weight), blocks, groups, tile)
    ahead, lines, each = share(ahead, tile.ahead, blocks * tile.splits, tile.warps)
    _skinny_qkv_kernel[(blocks, tile.splits)](
        q, k_pool, v_pool, x, weight, bias, norm, positions, slots, cos, sin, q_norm, k_norm, ahead,
        partial, squares, arrivals, eps, tokens, lines, k_pool.stride(0), v_pool.stride(0),
        IN=in_features, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PER_HEAD=per_head, PER_BLOCK=per_block,
        WIDE=wide, LINES=each, PDL=dependent, **constexprs(tile, in_features, 4 * wide, dependent),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=dependent,
    )  # fmt: skip
    return q


def _heads(head_dim: int, rows: int) -> tuple[int, int]:
    """Blocks of rows that one head takes, and heads that one block takes; one of them is 1."""
    return (triton.cdiv(head_dim, rows), 1) if rows < head_dim else (1, rows // head_dim)


@triton.jit(do_not_specialize=["eps", "tokens", "lines"], do_not_specialize_on_alignment=["positions", "slots"])
def _skinny_qkv_kernel(
    q, k_pool, v_pool, x, weight, bias, norm, positions, slots, cos, sin, q_norm, k_norm, ahead,
    partial, squares, arrivals, eps, tokens, lines, k_pool_stride, v_pool_stride,
    IN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_BLOCK: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    SOME: tl.constexpr, RELEASE: tl.constexpr, OWN: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_skinny_kernel`, but the blocks of rows keep to heads: PER_HEAD blocks make one, or PER_BLOCK fit in one.

    All sums go through memory, for the two features that turn together are far from each other in a block.
    """
    ALL: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    block, split = tl.program_id(0), tl.program_id(1)
    group = block // PER_HEAD
    feature = block % PER_HEAD * ROWS + tl.arange(0, ROWS)
    lane = group * PER_BLOCK * HEAD_DIM + feature
    token = tl.arange(0, TOKENS)
    mask = ((feature < PER_BLOCK * HEAD_DIM) & (lane < ALL))[:, None] & (token < tokens)[None, :]
    row = tl.minimum(lane, ALL - 1)
    # Never before the wait: attention, which comes next, takes all kernels before this one as done.
    begin(weight, row, row, IN, PART, False, OWN, RELEASE if RELEASE > 0 else 1, PDL)
    acc, _, square = product(x, weight, norm, tokens, row, row, IN, False, TOKENS, ROWS, COLUMNS, SPLITS, PART)
    end(ahead, lines, LINES, RELEASE, PDL)
    tl.store(partial + split * TOKENS * ALL + token[None, :] * ALL + lane[:, None], acc, mask)
    if norm is not None:
        tl.store(squares + (block * SPLITS + split) * TOKENS + token, square)
    if is_last(arrivals + group, PER_HEAD * SPLITS):
        for within in tl.static_range(PER_BLOCK):
            head = group * PER_BLOCK + within
            if head < HEADS + 2 * KV_HEADS:
                _head(
                    q, k_pool, v_pool, bias, norm, positions, slots, cos, sin, q_norm, k_norm,
                    partial, squares + block * SPLITS * TOKENS, head, eps, tokens, k_pool_stride, v_pool_stride,
                    IN, HEADS, KV_HEADS, HEAD_DIM, WIDE, TOKENS, SPLITS, SOME,
                )  # fmt: skip


@triton.jit
def _head(
    q, k_pool, v_pool, bias, norm, positions, slots, cos, sin, q_norm, k_norm,
    partial, squares, head, eps, tokens, k_pool_stride, v_pool_stride,
    IN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Finish one head of all tokens, some tokens at a time: add up, norm, turn, and store it where its kind goes."""
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    i = tl.arange(0, WIDE)
    here = i < HALF
    for first in range(0, tokens, SOME):
        token = first + tl.arange(0, SOME)
        there = token < tokens
        mask = here[:, None] & there[None, :]
        at = partial + token[None, :] * ALL + head * HEAD_DIM + i[:, None]
        a = total(at, mask, TOKENS * ALL, SPLITS)
        b = total(at + HALF, mask, TOKENS * ALL, SPLITS)
        if norm is not None:
            rstd = tl.rsqrt(total(squares + token, there, TOKENS, SPLITS) / IN + eps)[None, :]
            a *= rstd
            b *= rstd
        if bias is not None:
            a += tl.load(bias + head * HEAD_DIM + i, here, other=0.0).to(tl.float32)[:, None]
            b += tl.load(bias + head * HEAD_DIM + HALF + i, here, other=0.0).to(tl.float32)[:, None]
        if head < HEADS + KV_HEADS:
            if q_norm is not None:
                rstd = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / HEAD_DIM + eps)[None, :]
                a *= rstd * _head_norm(q_norm, k_norm, head < HEADS, i, here)[:, None]
                b *= rstd * _head_norm(q_norm, k_norm, head < HEADS, HALF + i, here)[:, None]
            position = tl.load(positions + token, there, other=0).to(tl.int64)
            c = tl.load(cos + position[None, :] * HALF + i[:, None], mask, other=0.0)
            s = tl.load(sin + position[None, :] * HALF + i[:, None], mask, other=0.0)
            a, b = a * c - b * s, b * c + a * s
        low, high = a.to(q.dtype.element_ty), b.to(q.dtype.element_ty)
        slot = tl.load(slots + token, there, other=0).to(tl.int64)
        if head < HEADS:
            to = q + (token[None, :] * HEADS + head) * HEAD_DIM + i[:, None]
            tl.store(to, low, mask)
            tl.store(to + HALF, high, mask)
        elif head < HEADS + KV_HEADS:
            to = k_pool + slot[None, :] * k_pool_stride + (head - HEADS) * HEAD_DIM + i[:, None]
            tl.store(to, low, mask)
            tl.store(to + HALF, high, mask)
        else:
            to = v_pool + slot[None, :] * v_pool_stride + (head - HEADS - KV_HEADS) * HEAD_DIM + i[:, None]
            tl.store(to, low, mask)
            tl.store(to + HALF, high, mask)


@triton.jit
def _head_norm(q_norm, k_norm, is_q, i, mask):
    of_q = tl.load(q_norm + i, mask, other=0.0).to(tl.float32)
    return tl.where(is_q, of_q, tl.load(k_norm + i, mask, other=0.0).to(tl.float32))


def aot_cases(capability: int) -> list[AotCase]:
    llama, qwen2, qwen3 = (2048, 32, 8, 64), (896, 14, 2, 64), (4096, 32, 8, 128)  # width, heads, kv_heads, head_dim
    cases = []
    for tokens in (8, 16, 32, 64, 128):
        for model in (llama, qwen3):
            cases.append(_case(capability, "bf16", *model, tokens))
    cases += [_case(capability, "bf16", *qwen2, 16), _case(capability, "fp16", *llama, 16)]
    if capability in (90, 100):  # of the H200, for GPUs with as much shared memory
        cases.append(_case(capability, "bf16", *llama, 16, Tile(16, 64, 256, 4, 3, 2, own=512, ahead=1 << 21)))
    return cases


def _case(
    capability: int, dtype: str, width: int, heads: int, kv_heads: int, head_dim: int, tokens: int,
    tuned: Tile | None = None,
) -> AotCase:  # fmt: skip
    rows = (heads + 2 * kv_heads) * head_dim
    tile = tuned or default("qkv", width, rows, tokens, capability)._replace(tokens=tokens)
    dependent = capability >= 90
    per_head, per_block = _heads(head_dim, tile.rows)
    absent = set() if width == 896 else {"bias"}
    absent |= set() if head_dim == 128 else {"q_norm", "k_norm"}
    absent |= set() if tile.fuse_norm and dtype == "bf16" else {"norm"}
    absent |= set() if tile.ahead else {"ahead"}
    names = ("q", "k_pool", "v_pool", "x", "weight", "bias", "norm", "q_norm", "k_norm", "ahead")
    kinds = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("cos", "sin", "partial", "squares"), "*fp32")
    kinds |= dict.fromkeys(("positions", "slots", "arrivals"), "*i32") | {"eps": "fp32"}
    wide = triton.next_power_of_2(head_dim // 2)
    constants = constexprs(tile, width, 4 * wide, dependent) | {"IN": width, "HEADS": heads, "KV_HEADS": kv_heads}
    constants |= {"HEAD_DIM": head_dim, "PER_HEAD": per_head, "PER_BLOCK": per_block}
    constants |= {"WIDE": wide, "PDL": dependent} | dict.fromkeys(absent)
    return AotCase(
        name=f"skinny_qkv {dtype} {width} {heads}/{kv_heads}x{head_dim} {tokens}{' tuned' if tuned else ''}",
        kernel=_skinny_qkv_kernel,
        signature=kinds | dict.fromkeys(("tokens", "lines", "k_pool_stride", "v_pool_stride"), "i32"),
        constexprs=constants | {"LINES": 32 * tile.warps if tile.ahead else 0},
        attrs=dict.fromkeys(("k_pool_stride", "v_pool_stride"), 16) | dict.fromkeys(("positions", "slots"), 1),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_shared=SHARED[capability] if tuned else 99 << 10,
    )
