"""The one linear layer: splits over ranks; leaves storage to a `WeightFormat`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from lite_llm.quant import Spec
from lite_llm.weights.rules import fill

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class Linear(nn.Module):
    def __init__(
        self,
        make: LayerFactory,
        in_features: int,
        parts: dict[str, int],
        split: Literal["out", "in"],
        bias: bool,
    ):
        super().__init__()
        self.split, self.tp, self.fmt = split, make.tp, make.fmt
        if split == "in":
            in_features = make.tp.share(in_features, "in_features")
        else:
            parts = {name: make.tp.share(n, name or "out_features") for name, n in parts.items()}
        self.parts = parts
        self.specs = make.fmt.specs(sum(parts.values()), in_features, make.dtype)
        for name, spec in self.specs.items():
            self.register_parameter(name, make.empty(*spec.shape, dtype=spec.dtype))
        self.register_parameter("bias", make.empty(sum(parts.values())) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: [T, in] to [T, out], the parts side by side."""
        bias = self.bias if self.split == "out" or self.tp.rank == 0 else None
        y = self.fmt.matmul(x, {name: getattr(self, name) for name in self.specs}, bias)
        return self.tp.all_reduce_(y) if self.split == "in" else y

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        """Copy this rank's share of one checkpoint tensor into place; returns how many elements that filled."""
        spec = self.specs.get(name) or Spec((), tensor.dtype, out_dim=0, in_dim=None)  # else the bias
        dest = getattr(self, name)
        if spec.out_dim is not None:
            first = sum(n for _, n in itertools.takewhile(lambda item: item[0] != part, self.parts.items()))
            dest = dest.narrow(spec.out_dim, first // spec.out_per, self.parts[part] // spec.out_per)
        cut = spec.out_dim if self.split == "out" else spec.in_dim
        if cut is not None and self.tp.size > 1:
            tensor = tensor.narrow(cut, self.tp.rank * dest.shape[cut], dest.shape[cut])
        return fill(dest, tensor)
