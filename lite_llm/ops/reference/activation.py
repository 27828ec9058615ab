import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, where gate and up are the halves of the last dim (SwiGLU, arXiv 2002.05202).

    silu is computed in fp32 and rounded to the dtype of `gate_up` before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).to(up.dtype) * up


def gelu(x: Tensor, quick: bool = False) -> Tensor:
    """`x * Phi(x)` by the error function (arXiv 1606.08415), or CLIP's cheap form of it, `x * sigmoid(1.702 * x)`.

    Computed in fp32 and rounded once.
    """
    wide = x.float()
    return (wide * (1.702 * wide).sigmoid() if quick else F.gelu(wide)).to(x.dtype)
