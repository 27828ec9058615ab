import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dim of `x[N, V]`, computed and returned in fp32; -inf entries get 0."""
    return torch.softmax(x.float(), dim=-1)
