"""The one linear layer: splits over ranks; leaves storage to a `WeightFormat`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from lite_llm.batch import Batch
from lite_llm.layers.norm import RMSNorm
from lite_llm.layers.rope import RopeTable
from lite_llm.quant import Spec, Stored
from lite_llm.weights.rules import fill

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class Linear(nn.Module):
    """Callers may name the layer whose weight is read next, `ahead`, so that a kernel can fetch some of it early."""

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

    @property
    def stored(self) -> Stored:
        return {name: getattr(self, name) for name in self.specs}

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, gated: bool = False, ahead: Linear | None = None
    ) -> Tensor:
        """`norm(x) @ weight.T + bias`: [T, in] to [T, out], the parts side by side, or `silu(gate) * up` if `gated`.

        Of a layer that is split by outputs; one that is split by inputs adds its output up over the ranks, in `add_`.
        """
        assert self.split == "out"
        weight, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
        return self.fmt.matmul(x, self.stored, self.bias, weight, eps, gated, _stored(ahead))

    def add_(self, residual: Tensor, x: Tensor, ahead: Linear | None = None) -> Tensor:
        """`residual += x @ weight.T + bias`, in place: [T, in] to [T, out]."""
        assert self.split == "in"
        bias = self.bias if self.tp.rank == 0 else None
        if self.tp.size == 1:
            return self.fmt.add_(residual, x, self.stored, bias, _stored(ahead))
        return residual.add_(self.tp.all_reduce_(self.fmt.matmul(x, self.stored, bias)))

    def project_qkv_(
        self, k_pool: Tensor, v_pool: Tensor, x: Tensor, norm: RMSNorm, batch: Batch, rope: RopeTable,
        q_norm: Tensor | None, k_norm: Tensor | None, ahead: Linear | None = None,
    ) -> Tensor:  # fmt: skip
        """Of a layer whose parts are q, k and v: rotated queries; keys and values go to their slots of the pools."""
        return self.fmt.project_qkv_(
            k_pool, v_pool, x, self.stored, self.bias, norm.weight, norm.eps, batch.positions, batch.slots,
            rope.cos, rope.sin, q_norm, k_norm, _stored(ahead),
        )  # fmt: skip

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


def _stored(layer: Linear | None) -> Stored | None:
    return layer.stored if layer is not None else None
