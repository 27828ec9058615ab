import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x is [T, in], weight [out, in], bias [out]; accumulates in fp32."""
    return F.linear(x, weight, bias)
