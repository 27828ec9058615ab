"""One definition of "the kernel matches the reference", for every test."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates bf16 casts and adds bf16 bit patterns, so bf16 needs a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Neither library rounds float32 to TF32. pytest's monkeypatch cannot take back what it sets on these objects."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def assert_close(actual: Tensor, expected: Tensor, exact: Tensor | None = None, what: str = "output") -> None:
    """Row by row: |actual - exact| is at most twice |expected - exact|, plus the dtype's rounding of the row.

    `expected` is plain torch in the same dtype, `exact` the same in float64 (default: `expected`, so that the floor
    alone decides). Norms are over the last dim; rows of zeros must be zeros.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (actual.shape, expected.shape)
    exact = (expected if exact is None else exact).double()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: not finite where the reference is, or the reverse"
    zero = torch.zeros((), dtype=torch.float64, device=actual.device)
    ours, theirs, scale = (
        torch.where(finite, t, zero).norm(dim=-1) for t in (actual.double() - exact, expected.double() - exact, exact)
    )
    limit = 2 * theirs + FLOOR[expected.dtype] * scale
    worst = (ours - limit).argmax()
    assert (ours <= limit).all(), (
        f"{what}: row {worst.item()} is off by {ours.flatten()[worst]:.3e}, limit {limit.flatten()[worst]:.3e}"
    )
