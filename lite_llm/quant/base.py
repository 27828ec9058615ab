"""How a weight is stored and multiplied. Knows nothing of tensor parallelism."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_llm import ops

Stored = dict[str, Tensor]
"""The tensors of one weight, by checkpoint suffix."""


@dataclass(frozen=True)
class Spec:
    """One stored tensor of a weight, and how its dims follow the weight's features.

    `out_dim` and `in_dim` are the dims a shard is cut along. One element along `out_dim`
    covers `out_per` output features: 8 for eight 4-bit values packed in an int32.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None
    in_dim: int | None
    out_per: int = 1


class WeightFormat(ABC):
    """How a weight is multiplied. In every method `ahead` is the weight that is read next, if that is known: a hint.

    `linear` makes a format; the fused forms below it give the same numbers, and a format may have one kernel for each.
    """

    @abstractmethod
    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that store one weight, by checkpoint suffix."""

    @abstractmethod
    def linear(self, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`."""

    def matmul(
        self, x: Tensor, stored: Stored, bias: Tensor | None, norm: Tensor | None = None, eps: float = 0.0,
        gated: bool = False, ahead: Stored | None = None,
    ) -> Tensor:  # fmt: skip
        """`linear` of x, or of its RMS norm with weight `norm`; then `silu_mul` if `gated`."""
        y = self.linear(x if norm is None else ops.rms_norm(x, norm, eps), stored, bias)
        return ops.silu_mul(y) if gated else y

    def add_(
        self, residual: Tensor, x: Tensor, stored: Stored, bias: Tensor | None, ahead: Stored | None = None
    ) -> Tensor:
        """`residual += linear(x)`, in place."""
        return residual.add_(self.linear(x, stored, bias))

    def project_qkv_(
        self, k_pool: Tensor, v_pool: Tensor, x: Tensor, stored: Stored, bias: Tensor | None, norm: Tensor,
        eps: float, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, ahead: Stored | None = None,
    ) -> Tensor:  # fmt: skip
        """Rotated queries [T, heads, head_dim]; keys and values of the normed x go to their slots."""
        qkv = self.matmul(x, stored, bias, norm, eps)
        return ops.rope_store_kv_(k_pool, v_pool, qkv, positions, slots, cos, sin, q_norm, k_norm, eps)
