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
def test_inf_and_nan_as_torch(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -100.0, 6e4, -6e4, float("inf"), -float("inf"), float("nan")])
    x = torch.cartesian_prod(values, values).T.reshape(1, -1).to(DEVICE, dtype)
    got, want = kernels.silu_mul(x), reference.silu_mul(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6, equal_nan=True)


def test_a_row_does_not_depend_on_its_batch():
    x = torch.randn(9, 2 * 1100, device=DEVICE).half()
    assert torch.equal(kernels.silu_mul(x)[4:5], kernels.silu_mul(x[4:5]))


def test_columns_of_a_wider_tensor():
    x = torch.randn(5, 300, device=DEVICE)[:, 20:220]
    assert_close(kernels.silu_mul(x), reference.silu_mul(x))


def test_nothing_gives_nothing():
    assert kernels.silu_mul(torch.zeros(0, 64, device=DEVICE)).shape == (0, 32)


def test_wrong_arguments_are_named():
    for wrong, match in [
        (torch.zeros(2, 7, device=DEVICE), "gate_up: width 7; expected an even one"),
        (torch.zeros(2, 8, device=DEVICE).int(), "gate_up: torch.int32"),
        (torch.zeros(8, 4, device=DEVICE).T, "gate_up: strides"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.silu_mul(wrong)


@pytest.mark.gpu
def test_offsets_past_int32():
    """More than 2**31 elements: the last rows are right."""
    x = torch.zeros(80_000, 2 * 14336, dtype=torch.bfloat16, device=DEVICE)
    x[-2:] = torch.randn(2, 2 * 14336)
    assert_close(kernels.silu_mul(x)[-2:], reference.silu_mul(x[-2:]))
