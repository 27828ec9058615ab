import torch.nn.functional as F
from torch import Tensor


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight[vocab, width]` by token id: `tokens[T]` (int64) gives `[T, width]`."""
    return F.embedding(tokens, weight)
