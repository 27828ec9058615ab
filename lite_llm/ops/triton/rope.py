"""Rotary embedding, alone and fused with what surrounds it in attention: per-head norm, KV store. One program per
(token, block of heads); a head is held as the two halves that turn together and, if any, the rest that stays.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.kv import check_pools
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import FLOATS, INTS, check, row_stride, token_stride

_NUMBERS = 1024
"""Of a program: heads times features. With half as many, 2,048 tokens of 32 heads over 8 took a third longer on an
H200 at head dimension 128, and with a quarter 2.7 times as long at 64; with twice as many nothing was gained.
"""
_FEW = 512
"""Tokens up to which a launch ahead of its turn pays, by an estimate: of more, that each small program waits costs more
than it brings. 8,192 tokens of Llama-3.1-8B took 65 us on an H200 before this kernel was launched so, 122 since.
"""


def rope_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check("x", x, dtype=FLOATS, contiguous=False)
    stride = token_stride("x", x)
    tokens, heads, head_dim = x.shape
    half = _check_tables(positions, cos, sin, x, tokens, head_dim)
    if x.numel():
        together = _heads(head_dim)
        grid = (tokens, triton.cdiv(heads, together))
        dependent = tokens <= _FEW and pdl(x.device)
        _rope_kernel[grid](
            x, positions, cos, sin, heads, stride, head_dim, half, *_blocks(head_dim, half)[:1], together, dependent,
            launch_pdl=dependent,
        )  # fmt: skip
    return x


def rope_store_kv_(
    k_pool: Tensor,
    v_pool: Tensor,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    pool_strides = check_pools(k_pool, v_pool)
    kv_heads, head_dim = k_pool.shape[1:]
    check("qkv", qkv, dtype=k_pool.dtype, like=k_pool, contiguous=False)
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    if width % head_dim or heads < 1:
        raise ValueError(
            f"qkv: width {width}; expected a multiple of head_dim {head_dim}, for {2 * kv_heads} key and value heads"
            " and at least one query head"
        )
    qkv_stride = row_stride("qkv", qkv)
    half = _check_tables(positions, cos, sin, qkv, tokens, head_dim)
    check("slots", slots, shape=(tokens,), dtype=INTS, like=qkv)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("k_norm: q_norm and k_norm come together or not at all")
    if q_norm is not None:
        check("q_norm", q_norm, shape=(head_dim,), dtype=qkv.dtype, like=qkv)
        check("k_norm", k_norm, shape=(head_dim,), dtype=qkv.dtype, like=qkv)

    q = qkv.new_empty(tokens, heads, head_dim)
    if tokens:
        together = _heads(head_dim)
        grid = (tokens, triton.cdiv(heads + 2 * kv_heads, together))
        dependent = tokens <= _FEW and pdl(qkv.device)
        _rope_store_kv_kernel[grid](
            q, k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps, heads, kv_heads,
            qkv_stride, *pool_strides, head_dim, half, *_blocks(head_dim, half), together, dependent,
            launch_pdl=dependent,
        )  # fmt: skip
    return q


def _check_tables(positions: Tensor, cos: Tensor, sin: Tensor, x: Tensor, tokens: int, head_dim: int) -> int:
    """Half the number of features that turn."""
    check("positions", positions, shape=(tokens,), dtype=INTS, like=x)
    check("cos", cos, dtype=(torch.float32,), like=x)
    check("sin", sin, shape=cos.shape, dtype=(torch.float32,), like=x)
    half = cos.shape[-1]
    if cos.dim() != 2 or not 0 < 2 * half <= head_dim:
        raise ValueError(f"cos: shape {list(cos.shape)}; expected [positions, 1 to {head_dim // 2}]")
    return half


def _heads(head_dim: int) -> int:
    """Heads of a program."""
    return min(max(_NUMBERS // triton.next_power_of_2(head_dim), 1), 32)


def _blocks(head_dim: int, half: int) -> tuple[int, int]:
    """Columns of a block of each half, and of the rest (0: there is none)."""
    rest = head_dim - 2 * half
    return triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0


@triton.jit
def _turn(a, b, cos, sin, position, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Rotate the halves a and b `[heads, HALF_BLOCK]` to a position."""
    col = tl.arange(0, HALF_BLOCK)
    mask = col < HALF
    c = tl.load(cos + position * HALF + col, mask, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + col, mask, other=0.0)[None, :]
    return a * c - b * s, b * c + a * s


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _rope_kernel(
    x, positions, cos, sin, heads, stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, HALF_BLOCK)
    mask = (head < heads)[:, None] & (col < HALF)[None, :]
    at = x + token * stride + head[:, None] * HEAD_DIM + col[None, :]
    a = tl.load(at, mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    a, b = _turn(a, b, cos, sin, tl.load(positions + token).to(tl.int64), HALF, HALF_BLOCK)
    tl.store(at, a.to(x.dtype.element_ty), mask)
    tl.store(at + HALF, b.to(x.dtype.element_ty), mask)


@triton.jit
def _scaled(x, rstd, q_norm, k_norm, is_q, col, mask, dtype: tl.constexpr):
    """One part of each head, normalised: rounded before and after the product with the weight, as `rms_norm` does."""
    w = tl.where(
        is_q[:, None],
        tl.load(q_norm + col, mask, other=0.0).to(tl.float32)[None, :],
        tl.load(k_norm + col, mask, other=0.0).to(tl.float32)[None, :],
    )
    return ((x * rstd[:, None]).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)


@triton.jit
def _put(q, k_pool, v_pool, q_at, k_at, v_at, x, is_q, is_k, is_v, col, mask):
    """Store one part of each head where heads of its kind go."""
    x = x.to(q.dtype.element_ty)
    tl.store(q + q_at[:, None] + col[None, :], x, is_q[:, None] & mask[None, :])
    tl.store(k_pool + k_at[:, None] + col[None, :], x, is_k[:, None] & mask[None, :])
    tl.store(v_pool + v_at[:, None] + col[None, :], x, is_v[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["eps"], do_not_specialize_on_alignment=["positions", "slots"])
def _rope_store_kv_kernel(
    q, k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps, heads, kv_heads,
    qkv_stride, k_pool_stride, v_pool_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    q_at = (token * heads + head) * HEAD_DIM
    k_at = slot * k_pool_stride + (head - heads) * HEAD_DIM
    v_at = slot * v_pool_stride + (head - heads - kv_heads) * HEAD_DIM

    dtype: tl.constexpr = q.dtype.element_ty
    exists = head < heads + 2 * kv_heads
    head_at = qkv + token * qkv_stride + head * HEAD_DIM
    col = tl.arange(0, HALF_BLOCK)
    mask = col < HALF
    at, loads = head_at[:, None] + col[None, :], exists[:, None] & mask[None, :]
    a = tl.load(at, loads, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, loads, other=0.0).to(tl.float32)
    if REST_BLOCK > 0:
        rest_col = 2 * HALF + tl.arange(0, REST_BLOCK)
        rest_mask = rest_col < HEAD_DIM
        rest = tl.load(head_at[:, None] + rest_col[None, :], exists[:, None] & rest_mask[None, :], other=0.0)
        rest = rest.to(tl.float32)

    if q_norm is not None:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST_BLOCK > 0:
            squares += tl.sum(rest * rest, 1)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)
        a = tl.where(is_v[:, None], a, _scaled(a, rstd, q_norm, k_norm, is_q, col, mask, dtype))
        b = tl.where(is_v[:, None], b, _scaled(b, rstd, q_norm, k_norm, is_q, HALF + col, mask, dtype))
        if REST_BLOCK > 0:
            normed = _scaled(rest, rstd, q_norm, k_norm, is_q, rest_col, rest_mask, dtype)
            rest = tl.where(is_v[:, None], rest, normed)

    turned_a, turned_b = _turn(a, b, cos, sin, tl.load(positions + token).to(tl.int64), HALF, HALF_BLOCK)
    a, b = tl.where(is_v[:, None], a, turned_a), tl.where(is_v[:, None], b, turned_b)
    _put(q, k_pool, v_pool, q_at, k_at, v_at, a, is_q, is_k, is_v, col, mask)
    _put(q, k_pool, v_pool, q_at, k_at, v_at, b, is_q, is_k, is_v, HALF + col, mask)
    if REST_BLOCK > 0:
        _put(q, k_pool, v_pool, q_at, k_at, v_at, rest, is_q, is_k, is_v, rest_col, rest_mask)


def aot_cases(capability: int) -> list[AotCase]:
    strides = ("qkv_stride", "k_pool_stride", "v_pool_stride")
    tables = {"positions": "*i32", "cos": "*fp32", "sin": "*fp32"}

    def rope(dtype: str) -> AotCase:
        return AotCase(
            name=f"rope {dtype} 128",
            kernel=_rope_kernel,
            signature={"x": f"*{dtype}", "heads": "i32", "stride": "i32"} | tables,
            constexprs={"HEAD_DIM": 128, "HALF": 64, "HALF_BLOCK": 64, "HEADS": _heads(128), "PDL": capability >= 90},
            attrs={"stride": 16},
        )

    def rope_store_kv(dtype: str, head_dim: int, half: int, norm: bool, few: bool = True) -> AotCase:
        half_block, rest_block = _blocks(head_dim, half)
        norms = ("q_norm", "k_norm")
        return AotCase(
            name=f"rope_store_kv {dtype} {head_dim} {2 * half}{' norm' * norm}{' many' * (not few)}",
            kernel=_rope_store_kv_kernel,
            signature=dict.fromkeys(("q", "k_pool", "v_pool", "qkv"), f"*{dtype}")
            | dict.fromkeys(norms if norm else (), f"*{dtype}")
            | dict.fromkeys(("heads", "kv_heads", *strides), "i32")
            | {"slots": "*i32", "eps": "fp32"}
            | tables,
            constexprs={"HEAD_DIM": head_dim, "HALF": half, "HALF_BLOCK": half_block, "REST_BLOCK": rest_block}
            | {"HEADS": _heads(head_dim), "PDL": few and capability >= 90}
            | dict.fromkeys(() if norm else norms),
            attrs=dict.fromkeys(strides, 16),
        )

    return [
        rope("bf16"),
        rope("fp32"),
        rope_store_kv("bf16", 128, 64, norm=True),
        rope_store_kv("bf16", 80, 16, norm=False),
        *([rope_store_kv("bf16", 128, 64, norm=False, few=False)] if capability >= 90 else []),
        rope_store_kv("fp32", 256, 64, norm=True),
    ]
