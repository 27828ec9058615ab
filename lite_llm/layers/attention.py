from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lite_llm import ops
from lite_llm.batch import Batch, KVPool
from lite_llm.config import ModelConfig
from lite_llm.layers.norm import RMSNorm
from lite_llm.layers.rope import RopeTable

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory
    from lite_llm.layers.linear import Linear


class Attention(nn.Module):
    """Grouped-query attention over the KV pool, with rotary positions. Q, K and V come from one matmul."""

    def __init__(self, make: LayerFactory, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, cfg.head_dim, cfg.windows[layer]
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.qkv = make.linear(cfg.hidden, {"q": q, "k": kv, "v": kv}, split="out", bias=cfg.qkv_bias)
        self.out = make.linear(q, cfg.hidden, split="in", bias=cfg.out_bias)
        self.q_norm = RMSNorm(make, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(make, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None

    def project_(self, kv: KVPool, x: Tensor, norm: RMSNorm, batch: Batch, rope: RopeTable) -> Tensor:
        """Queries [T, heads, head_dim] of `norm(x)`; keys and values go to their slots. x is [T, hidden]."""
        k_pool, v_pool = kv.k[self.layer], kv.v[self.layer]
        q_norm, k_norm = (self.q_norm.weight, self.k_norm.weight) if self.q_norm is not None else (None, None)
        return self.qkv.project_qkv_(k_pool, v_pool, x, norm, batch, rope, q_norm, k_norm, ahead=self.out)

    def add_(self, x: Tensor, q: Tensor, batch: Batch, kv: KVPool, ahead: Linear) -> Tensor:
        """Add what the queries find in the pool to x, in place. `ahead` is the layer whose weight is read next."""
        o = ops.attend(
            q, kv.k[self.layer], kv.v[self.layer], batch.table, batch.rows, batch.q_start, batch.kv_len, batch.decodes,
            self.head_dim**-0.5, self.window,
        )  # fmt: skip
        return self.out.add_(x, o.flatten(1), ahead)
