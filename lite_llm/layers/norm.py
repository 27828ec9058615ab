from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lite_llm import ops
from lite_llm.weights.rules import fill

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class RMSNorm(nn.Module):
    """Mostly an argument: the linear layer behind a norm computes it on the way in."""

    def __init__(self, make: LayerFactory, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = make.empty(width), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        return fill(self.weight, tensor)


class LayerNorm(nn.Module):
    def __init__(self, make: LayerFactory, width: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = make.empty(width), make.empty(width), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        return fill(getattr(self, name), tensor)
