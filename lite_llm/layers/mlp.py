from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lite_llm.layers.norm import RMSNorm

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory
    from lite_llm.layers.linear import Linear


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matmul."""

    def __init__(self, make: LayerFactory, hidden: int, ffn: int, bias: bool = False):
        super().__init__()
        self.gate_up = make.linear(hidden, {"gate": ffn, "up": ffn}, split="out", bias=bias)
        self.down = make.linear(ffn, hidden, split="in", bias=bias)

    def add_(self, x: Tensor, norm: RMSNorm, ahead: Linear) -> Tensor:
        """`x += mlp(norm(x))`, in place; x is [T, hidden]. `ahead` is the layer whose weight is read next."""
        return self.down.add_(x, self.gate_up(x, norm, ahead=self.down, gated=True), ahead)
