"""The matmuls of dense weights, with all that surrounds them: norms, biases, activations, the residual, RoPE.

Up to some tens of tokens one kernel does all of that in one pass over the weight: from registers for four tokens at
most (gemv.py), from shared memory for more (skinny.py). For more tokens one kernel does all but the norm (wide.py; of
gate and up on Hopper also hopper_gated.py). Which, and with which tile, stands in a table (tuning.py). All else, and
whatever those do not support, is cuBLAS between separate kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.activation import silu_mul
from lite_llm.ops.triton.gemv import MOST_TOKENS, gemv, gemv_qkv
from lite_llm.ops.triton.hopper_gated import hopper_gated, readable
from lite_llm.ops.triton.kv import check_pools
from lite_llm.ops.triton.layout import FLOATS, INTS, check
from lite_llm.ops.triton.norm import rms_norm
from lite_llm.ops.triton.rope import rope_store_kv_
from lite_llm.ops.triton.skinny import skinny
from lite_llm.ops.triton.skinny_qkv import skinny_qkv
from lite_llm.ops.triton.wide import wide
from lite_llm.ops.triton.wide_qkv import wide_qkv


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    ahead: Tensor | None = None,
) -> Tensor:
    _check(x, weight, bias, norm)
    if gated and len(weight) % 2:
        raise ValueError(f"weight: {len(weight)} rows; expected an even number, gate and up one after the other")
    kernel, tile = _choose("gated" if gated else "linear", x, weight)
    if kernel == "gemv":
        return gemv(x, weight, bias, norm, eps, gated, None, ahead, tile)
    if kernel == "skinny":
        return skinny(x, weight, bias, norm, eps, gated, None, ahead, tile)
    if kernel == "wide":
        return wide(x, weight, bias, norm, eps, gated, None, ahead, tile)
    if kernel == "hopper" and bias is None and readable(x, weight):
        return hopper_gated(x, weight, norm, eps)
    y = F.linear(x if norm is None else rms_norm(x, norm, eps), weight, bias)
    return silu_mul(y) if gated else y


def linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, ahead: Tensor | None = None
) -> Tensor:
    _check(x, weight, bias, None)
    check("residual", residual, (len(x), len(weight)), x.dtype, like=x, contiguous=False)
    kernel, tile = _choose("add", x, weight) if residual.is_contiguous() else tuning.CUBLAS
    if kernel == "gemv":
        return gemv(x, weight, bias, None, 0.0, False, residual, ahead, tile)
    if kernel == "skinny":
        return skinny(x, weight, bias, None, 0.0, False, residual, ahead, tile)
    if kernel == "wide":
        return wide(x, weight, bias, None, 0.0, False, residual, ahead, tile)
    residual.addmm_(x, weight.T)
    return residual if bias is None else residual.add_(bias)


def project_qkv_(
    k_pool: Tensor,
    v_pool: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Tensor:
    _check(x, weight, bias, norm)
    _check_heads(k_pool, v_pool, x, weight, positions, slots, cos, sin, q_norm, k_norm)
    # gemv has no norm of heads; skinny takes any number of tokens, so those models start with its smallest tile.
    least = 1 if q_norm is None else MOST_TOKENS + 1
    whole = 2 * cos.shape[1] == k_pool.shape[2]  # where only a part of each head turns, two kernels do it
    kernel, tile = _choose("qkv", x, weight, least) if whole else tuning.CUBLAS
    if kernel == "gemv":
        return gemv_qkv(k_pool, v_pool, x, weight, bias, norm, eps, positions, slots, cos, sin, ahead, tile)
    if kernel in ("skinny", "wide"):
        project = skinny_qkv if kernel == "skinny" else wide_qkv
        return project(
            k_pool, v_pool, x, weight, bias, norm, eps, positions, slots, cos, sin, q_norm, k_norm, ahead, tile
        )
    qkv = F.linear(rms_norm(x, norm, eps), weight, bias)
    return rope_store_kv_(k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps)


def _choose(op: str, x: Tensor, weight: Tensor, least: int = 1) -> tuning.Choice:
    """The table's choice; cuBLAS for what our kernels do not read: fp32, no tokens, strides, odd widths."""
    tokens, in_features = x.shape
    dense = x.is_contiguous() and weight.is_contiguous()
    if x.dtype == torch.float32 or not dense or not tokens or not len(weight) or in_features % 8 or not in_features:
        return tuning.CUBLAS
    return tuning.choose(x.device, op, in_features, len(weight), max(tokens, least))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None) -> None:
    for name, t in (("x", x), ("weight", weight)):
        if t.dim() != 2:
            raise ValueError(f"{name}: shape {list(t.shape)}; expected 2 dims")
    check("x", x, dtype=FLOATS, contiguous=False)
    check("weight", weight, (len(weight), x.shape[1]), x.dtype, like=x, contiguous=False)
    if bias is not None:
        check("bias", bias, (len(weight),), x.dtype, like=x)
    if norm is not None:
        check("norm", norm, (x.shape[1],), x.dtype, like=x)


def _check_heads(
    k_pool: Tensor, v_pool: Tensor, x: Tensor, weight: Tensor, positions: Tensor, slots: Tensor, cos: Tensor,
    sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
) -> None:  # fmt: skip
    check_pools(k_pool, v_pool)
    check("k_pool", k_pool, dtype=x.dtype, like=x, contiguous=False)
    kv_heads, head_dim = k_pool.shape[1:]
    if len(weight) % head_dim or len(weight) // head_dim <= 2 * kv_heads:
        raise ValueError(
            f"weight: {len(weight)} rows; expected a multiple of head_dim {head_dim}, for {2 * kv_heads} key and value"
            " heads and at least one query head"
        )
    check("positions", positions, (len(x),), INTS, like=x)
    check("slots", slots, (len(x),), INTS, like=x)
    check("cos", cos, dtype=torch.float32, like=x)
    check("sin", sin, cos.shape, torch.float32, like=x)
    if cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(f"cos: shape {list(cos.shape)}; expected [positions, 1 to {head_dim // 2}]")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("k_norm: q_norm and k_norm come together or not at all")
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        if t is not None:
            check(name, t, (head_dim,), x.dtype, like=x)
