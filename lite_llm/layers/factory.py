"""How to build a layer here: dtype, device, weight format, and which rank this is."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from lite_llm.layers.linear import Linear
from lite_llm.parallel import SOLO, Group
from lite_llm.quant import Dense, WeightFormat


@dataclass(frozen=True)
class LayerFactory:
    """Passed to every layer as `make`, so that no layer reads a global.

    A model file says what it computes; `make` says how it is stored and split.
    """

    dtype: torch.dtype
    device: torch.device | str = "cpu"
    fmt: WeightFormat = Dense()
    tp: Group = SOLO

    def whole(self) -> "LayerFactory":
        """The same for a part that is small: every rank has all of it, and it is not quantized."""
        return replace(self, fmt=Dense(), tp=SOLO)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        data = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        return torch.nn.Parameter(data, requires_grad=False)

    def linear(
        self,
        in_features: int,
        parts: int | dict[str, int],
        *,
        split: Literal["out", "in"],
        bias: bool = False,
    ) -> Linear:
        """A linear layer, split over ranks along its outputs or its inputs.

        `parts` names the weights fused into one matmul: `{"q": 4096, "k": 1024, "v": 1024}`.
        """
        return Linear(self, in_features, parts if isinstance(parts, dict) else {"": parts}, split, bias)
