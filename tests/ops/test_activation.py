import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES, assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (2, 3, 1100), (2, 4864)], ids=str)
def test_silu_mul(shape, dtype):
    x = (torch.randn(*shape[:-1], 2 * shape[-1]) * 4).to(DEVICE, dtype)
    gate, up = x.double().chunk(2, -1)
    assert_close(kernels.silu_mul(x), reference.silu_mul(x), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (2, 3, 1100), (2, 4096)], ids=str)
def test_gelu(shape, quick, dtype):
    x = (torch.randn(shape) * 4).to(DEVICE, dtype)
    wide = x.double()
    exact = wide * (1.702 * wide).sigmoid() if quick else torch.nn.functional.gelu(wide)
    assert_close(kernels.gelu(x, quick), reference.gelu(x, quick), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quick", [False, True])
def test_gelu_of_large_inf_and_nan(quick, dtype):
    """Of Inf it is NaN or Inf: torch itself is not of one mind."""
    x = torch.tensor([[0.0, -0.0, 1e-3, 9.0, -9.0, -100.0, 6e4, -6e4, float("inf"), -float("inf"), float("nan")]])
    x = x.to(DEVICE, dtype)
    got, want = kernels.gelu(x, quick), reference.gelu(x, quick)
    assert torch.equal(got.isfinite(), want.isfinite()) and got[0, -1].isnan()
    got, want = got[got.isfinite()], want[want.isfinite()]
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_as_torch(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -100.0, 6e4, -6e4, float("inf"), -float("inf"), float("nan")])
    x = torch.cartesian_prod(values, values).T.reshape(1, -1).to(DEVICE, dtype)
    got, want = kernels.silu_mul(x), reference.silu_mul(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6, equal_nan=True)


def test_a_row_does_not_depend_on_its_batch():
    x = torch.randn(9, 2 * 1100, device=DEVICE).half()
    assert torch.equal(kernels.silu_mul(x)[4:5], kernels.silu_mul(x[4:5]))
    for quick in (False, True):
        assert torch.equal(kernels.gelu(x, quick)[4:5], kernels.gelu(x[4:5], quick))


def test_columns_of_a_wider_tensor():
    x = torch.randn(5, 300, device=DEVICE)[:, 20:220]
    assert_close(kernels.silu_mul(x), reference.silu_mul(x))
    assert_close(kernels.gelu(x), reference.gelu(x))


def test_nothing_gives_nothing():
    assert kernels.silu_mul(torch.zeros(0, 64, device=DEVICE)).shape == (0, 32)
    assert kernels.gelu(torch.zeros(0, 64, device=DEVICE)).shape == (0, 64)


def test_wrong_arguments_are_named():
    for wrong, match in [
        (torch.zeros(2, 7, device=DEVICE), "gate_up: width 7; expected an even one"),
        (torch.zeros(2, 8, device=DEVICE).int(), "gate_up: torch.int32"),
        (torch.zeros(8, 4, device=DEVICE).T, "gate_up: strides"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.silu_mul(wrong)
    for wrong, match in [
        (torch.zeros(2, 8, device=DEVICE).int(), "x: torch.int32"),
        (torch.zeros(8, 4, device=DEVICE).T, "x: strides"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.gelu(wrong)


@pytest.mark.gpu
def test_offsets_past_int32():
    """More than 2**31 elements: the last rows are right."""
    x = torch.zeros(80_000, 2 * 14336, dtype=torch.bfloat16, device=DEVICE)
    x[-2:] = torch.randn(2, 2 * 14336)
    assert_close(kernels.silu_mul(x)[-2:], reference.silu_mul(x[-2:]))
