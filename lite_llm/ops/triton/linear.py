"""The matmuls of dense weights, with what surrounds them: cuBLAS between our own kernels."""

import torch.nn.functional as F
from torch import Tensor

from lite_llm.ops.triton.activation import silu_mul
from lite_llm.ops.triton.norm import rms_norm
from lite_llm.ops.triton.rope import rope_store_kv_


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    ahead: Tensor | None = None,
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = F.linear(x, weight, bias)
    return silu_mul(y) if gated else y


def linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, ahead: Tensor | None = None
) -> Tensor:
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
    qkv = linear(x, weight, bias, norm, eps)
    return rope_store_kv_(k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps)
