"""What the wrappers check before a launch: a wrong argument is a ValueError that names it, not a wild read."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)


def check(
    name: str,
    x: Tensor,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Raise unless `x` has this shape, (one of) these dtypes, the device of `like`, and contiguous memory."""
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {list(x.shape)}; expected {list(shape)}")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if dtypes is not None and x.dtype not in dtypes:
        raise ValueError(f"{name}: {x.dtype}; expected {' or '.join(map(str, dtypes))}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: on {x.device}; expected {like.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name}: strides {list(x.stride())}; expected contiguous memory")


def row_stride(name: str, x: Tensor) -> int:
    """Elements between rows of the last dim; the rows must be dense and evenly strided (a slice of columns is)."""
    width = x.shape[-1]
    stride = span = None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if stride is not None and step != span:
            raise ValueError(f"{name}: strides {list(x.stride())}; expected evenly strided rows")
        stride, span = (step if stride is None else stride), step * size
    if width > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: strides {list(x.stride())}; expected a last dim of stride 1")
    return width if stride is None else stride


def token_stride(name: str, x: Tensor) -> int:
    """Elements between the tokens of `x[T, heads, head_dim]`, whose heads must lie densely one after the other."""
    if x.dim() != 3:
        raise ValueError(f"{name}: shape {list(x.shape)}; expected [tokens, heads, head_dim]")
    if not x[:1].is_contiguous():
        raise ValueError(f"{name}: strides {list(x.stride())}; expected contiguous heads within each token")
    return x.stride(0)
