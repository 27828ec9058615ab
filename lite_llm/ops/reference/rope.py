import torch
from torch import Tensor

from lite_llm.ops.reference.attention import store_kv_
from lite_llm.ops.reference.norm import rms_norm


def rope_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x[T, heads, head_dim]` in place by its positions; returns x (RoPE, arXiv 2104.09864).

    `cos` and `sin` are fp32 tables [max_len, rotary / 2]; row p is for position p. Half-split pairing:
    feature i turns with feature i + rotary / 2; features from `rotary` on stay as they are.
    Computed in fp32, rounded once.
    """
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    x[..., : 2 * half] = rotated.to(x.dtype)
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
    """From the fused projection to rotated queries; keys (rotated) and values go to their slots.

    `qkv` is [T, (heads + 2 * kv_heads) * head_dim]: all query heads, then key heads, then value heads; it is
    not written. The pools are [slots, kv_heads, head_dim]. `q_norm` and `k_norm` [head_dim] are the weights of a
    per-head RMS norm before the rotation (Qwen3), both or neither. Returns a new q [T, heads, head_dim].
    """
    kv_heads, head_dim = k_pool.shape[1:]
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    q, k = (rope_(t.clone(), positions, cos, sin) for t in (q, k))
    store_kv_(k_pool, v_pool, k, v, slots)
    return q
