import torch
from torch import Tensor

from lite_llm import ops
from lite_llm.quant.base import Spec, WeightFormat


class Dense(WeightFormat):
    """fp16, bf16 or fp32, as the checkpoint has it."""

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Spec]:
        return {"weight": Spec((out_features, in_features), dtype, out_dim=0, in_dim=1)}

    def matmul(self, x: Tensor, stored: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.linear(x, stored["weight"], bias)
