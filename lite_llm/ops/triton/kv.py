"""Storing keys and values. One program per (token, block of features)."""

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.layout import FLOATS, INTS, check, token_stride

_BLOCK = 1024


def store_kv_(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    pool_strides = check_pools(k_pool, v_pool)
    width = k_pool.shape[1] * k_pool.shape[2]
    for name, x in (("k", k), ("v", v)):
        shape = (slots.shape[0], *k_pool.shape[1:])
        check(name, x, shape=shape, dtype=k_pool.dtype, like=k_pool, contiguous=False)
    strides = token_stride("k", k), token_stride("v", v)
    check("slots", slots, dtype=INTS, like=k_pool)
    if k.numel():
        grid = (slots.shape[0], triton.cdiv(width, _BLOCK))
        _store_kv_kernel[grid](k_pool, v_pool, k, v, slots, width, *pool_strides, *strides, _BLOCK)


def check_pools(k_pool: Tensor, v_pool: Tensor) -> tuple[int, int]:
    """Elements between the slots of each pool."""
    check("k_pool", k_pool, dtype=FLOATS, contiguous=False)
    check("v_pool", v_pool, shape=k_pool.shape, dtype=k_pool.dtype, like=k_pool, contiguous=False)
    return token_stride("k_pool", k_pool), token_stride("v_pool", v_pool)


@triton.jit
def _store_kv_kernel(
    k_pool, v_pool, k, v, slots, width, k_pool_stride, v_pool_stride, k_stride, v_stride, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    slot = tl.load(slots + token).to(tl.int64)  # int64: slot * width passes 2**31 in a pool of 4 GB
    tl.store(k_pool + slot * k_pool_stride + col, tl.load(k + token * k_stride + col, mask), mask)
    tl.store(v_pool + slot * v_pool_stride + col, tl.load(v + token * v_stride + col, mask), mask)


def aot_cases(capability: int) -> list[AotCase]:
    sizes = ("width", "k_pool_stride", "v_pool_stride", "k_stride", "v_stride")
    return [
        AotCase(
            name=f"store_kv {dtype}",
            kernel=_store_kv_kernel,
            signature=dict.fromkeys(("k_pool", "v_pool", "k", "v"), f"*{dtype}")
            | {"slots": "*i64"}
            | dict.fromkeys(sizes, "i32"),
            constexprs={"BLOCK": _BLOCK},
            attrs=dict.fromkeys(sizes, 16),
        )
        for dtype in ("bf16", "fp32")
    ]
