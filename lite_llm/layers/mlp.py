from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lite_llm import ops

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matmul."""

    def __init__(self, make: LayerFactory, hidden: int, ffn: int, bias: bool = False):
        super().__init__()
        self.gate_up = make.linear(hidden, {"gate": ffn, "up": ffn}, split="out", bias=bias)
        self.down = make.linear(ffn, hidden, split="in", bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))
