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


class Attention(nn.Module):
    """Grouped-query attention over the KV pool, with rotary positions. Q, K and V come from one matmul."""

    def __init__(self, make: LayerFactory, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, cfg.head_dim, cfg.windows[layer]
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.qkv = make.linear(cfg.hidden, {"q": q, "k": kv, "v": kv}, split="out", bias=cfg.qkv_bias)
        self.out = make.linear(q, cfg.hidden, split="in", bias=cfg.out_bias)
        self.eps = cfg.norm_eps
        self.q_norm = RMSNorm(make, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(make, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None

    def forward(self, x: Tensor, batch: Batch, kv: KVPool, rope: RopeTable) -> Tensor:
        k_pool, v_pool = kv.k[self.layer], kv.v[self.layer]
        q_norm, k_norm = (self.q_norm.weight, self.k_norm.weight) if self.q_norm is not None else (None, None)
        q = ops.rope_store_kv_(
            k_pool, v_pool, self.qkv(x), batch.positions, batch.slots, rope.cos, rope.sin, q_norm, k_norm, self.eps
        )
        o = ops.attend(
            q, k_pool, v_pool, batch.table, batch.rows, batch.q_start, batch.kv_len, batch.decodes,
            self.head_dim**-0.5, self.window,
        )  # fmt: skip
        return self.out(o.flatten(1))
