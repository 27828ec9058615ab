import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, where gate and up are the halves of the last dim (SwiGLU, arXiv 2002.05202).

    silu is computed in fp32 and rounded to the dtype of `gate_up` before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).to(up.dtype) * up
