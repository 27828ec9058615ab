import torch
from torch import Tensor

from lite_llm import ops
from lite_llm.quant.base import Spec, Stored, WeightFormat


class Dense(WeightFormat):
    """fp16, bf16 or fp32, as the checkpoint has it."""

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Spec]:
        return {"weight": Spec((out_features, in_features), dtype, out_dim=0, in_dim=1)}

    def linear(self, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
        return ops.linear(x, stored["weight"], bias)

    def matmul(
        self, x: Tensor, stored: Stored, bias: Tensor | None, norm: Tensor | None = None, eps: float = 0.0,
        gated: bool = False, ahead: Stored | None = None,
    ) -> Tensor:  # fmt: skip
        return ops.linear(x, stored["weight"], bias, norm, eps, gated, _weight(ahead))

    def add_(
        self, residual: Tensor, x: Tensor, stored: Stored, bias: Tensor | None, ahead: Stored | None = None
    ) -> Tensor:
        return ops.linear_add_(residual, x, stored["weight"], bias, _weight(ahead))

    def project_qkv_(
        self, k_pool: Tensor, v_pool: Tensor, x: Tensor, stored: Stored, bias: Tensor | None, norm: Tensor,
        eps: float, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, ahead: Stored | None = None,
    ) -> Tensor:  # fmt: skip
        return ops.project_qkv_(
            k_pool, v_pool, x, stored["weight"], bias, norm, eps, positions, slots, cos, sin, q_norm, k_norm,
            _weight(ahead),
        )  # fmt: skip


def _weight(stored: Stored | None) -> Tensor | None:
    return stored["weight"] if stored is not None else None
