import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES, assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 896, 2050])
def test_rows_are_copied_bit_by_bit(width, dtype):
    weight = torch.randn(301, width).to(DEVICE, dtype)
    weight[5, 0], weight[6, 0] = float("nan"), -0.0
    tokens = torch.tensor([0, 300, 5, 6, 6, 17], device=DEVICE)
    got, want = kernels.embed(tokens, weight), reference.embed(tokens, weight)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and got.signbit().equal(want.signbit())


def test_ids_outside_the_vocabulary_give_zeros():
    weight = torch.full((10, 48), float("nan"), device=DEVICE)
    got = kernels.embed(torch.tensor([-1, 10, 2**40, -(2**40)], device=DEVICE), weight)
    assert torch.equal(got, torch.zeros(4, 48, device=DEVICE))


def test_nothing_gives_nothing():
    tokens = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kernels.embed(tokens, torch.zeros(4, 8, device=DEVICE)).shape == (0, 8)


def test_wrong_arguments_are_named():
    tokens, weight = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    for wrong, match in [
        ((tokens.float(), weight), "tokens: torch.float32"),
        ((tokens, weight.int()), "weight: torch.int32"),
        ((tokens, weight.T), "weight: strides"),
        ((tokens, weight.to("meta")), "weight: on meta"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.embed(*wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    x, weight, bias = (torch.randn(shape).to(DEVICE, dtype) for shape in [(5, 64), (48, 64), (48,)])
    for b in (None, bias):
        exact = x.double() @ weight.double().T + (0 if b is None else b.double())
        assert_close(kernels.linear(x, weight, b), reference.linear(x, weight, b), exact)
