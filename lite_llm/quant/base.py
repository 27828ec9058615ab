"""How a weight is stored and multiplied. Knows nothing of tensor parallelism."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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
    @abstractmethod
    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that store one weight, by checkpoint suffix."""

    @abstractmethod
    def matmul(self, x: Tensor, stored: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`."""
