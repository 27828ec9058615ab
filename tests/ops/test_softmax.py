import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES, assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 4096, 4097, 32000, pytest.param(262144, marks=pytest.mark.gpu)])
def test_softmax(vocab, dtype):
    x = (torch.randn(2, vocab) * 5).to(DEVICE, dtype)
    got = kernels.softmax(x)
    assert_close(got, reference.softmax(x), torch.softmax(x.double(), -1))
    torch.testing.assert_close(got.sum(-1), torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("vocab", [2, 31, 5000])
def test_extreme_rows(vocab):
    x = torch.full((8, vocab), -torch.inf, device=DEVICE)
    x[0, 1], x[1] = 3.0, 2.5  # all -inf but one; all equal
    x[2], x[2, 0] = -1e38, 1e38
    x[3] = 1e38
    x[5, 0], x[6, 0] = float("nan"), float("inf")  # row 4 stays -inf
    x[7] = torch.linspace(-1e30, 1e30, vocab)
    got, want = kernels.softmax(x), reference.softmax(x)
    assert torch.equal(got.isnan(), want.isnan()) and want[4:7].isnan().all()
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[1].argmax() == 0 and torch.equal(got[1], got[1, :1].expand(vocab))


def test_a_row_does_not_depend_on_its_batch():
    x = torch.randn(7, 5000, device=DEVICE)
    assert torch.equal(kernels.softmax(x)[3:4], kernels.softmax(x[3:4]))
    assert_close(kernels.softmax(x[::2]), kernels.softmax(x)[::2])  # another row stride may mean another load width


def test_nothing_gives_nothing():
    assert kernels.softmax(torch.zeros(0, 64, device=DEVICE)).shape == (0, 64)


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 4, device=DEVICE)
    for wrong, match in [(x[0], "x: shape"), (x.int(), "x: torch.int32"), (x.T, "x: strides")]:
        with pytest.raises(ValueError, match=match):
            kernels.softmax(wrong)
