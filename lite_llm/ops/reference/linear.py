import torch.nn.functional as F
from torch import Tensor

from lite_llm.ops.reference.activation import silu_mul
from lite_llm.ops.reference.norm import rms_norm
from lite_llm.ops.reference.rope import rope_store_kv_


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    ahead: Tensor | None = None,
) -> Tensor:
    """`rms_norm(x, norm, eps) @ weight.T + bias`, then `silu_mul` if `gated`; without `norm`, of x itself.

    x is [T, in], weight [out, in] (gated: all gate rows, then all up rows), bias [out]; the result is [T, out], or
    [T, out / 2] if gated, in x's dtype. Sums in fp32. `ahead` changes no number: it is the weight that will be read
    next, for a kernel that would otherwise leave the memory idle.
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = F.linear(x, weight, bias)
    return silu_mul(y) if gated else y


def linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, ahead: Tensor | None = None
) -> Tensor:
    """`residual += x @ weight.T + bias` in place; returns residual [T, out]. `ahead` is as `linear` has it."""
    return residual.add_(F.linear(x, weight, bias))


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
    """The first half of attention: `linear` with `norm`, then `rope_store_kv_`; returns q [T, heads, head_dim].

    `weight` is [(heads + 2 * kv_heads) * head_dim, in]: queries, keys, values. `eps` is that of all norms.
    """
    qkv = linear(x, weight, bias, norm, eps)
    return rope_store_kv_(k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps)
