from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lite_llm import ops
from lite_llm.layers.norm import RMSNorm
from lite_llm.quant import Stored
from lite_llm.weights.rules import fill

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class Embedding(nn.Module):
    def __init__(self, make: LayerFactory, vocab: int, width: int):
        super().__init__()
        self.weight = make.empty(vocab, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embed(tokens, self.weight)

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        return fill(self.weight, tensor)


class Head(Embedding):
    """Logits of the normed stream: the embedding matrix used the other way round."""

    @property
    def stored(self) -> Stored:
        return {"weight": self.weight}

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return ops.linear(x, self.weight, norm=norm.weight, eps=norm.eps)
