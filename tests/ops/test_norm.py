import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES, assert_close

SHAPES = [(1, 1), (5, 31), (2, 3, 128), (3, 896), (2, 4096), (2, 11008), (1, 16384)]
BATCHES = [1, 2, 3, 7, 8, 16, 31, 32, 64, 128]


def inputs(shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype), (torch.randn(shape[-1]) + 1).to(DEVICE, dtype)


def exact(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rms_norm(shape, dtype, eps):
    x, weight = inputs(shape, dtype)
    assert_close(kernels.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps), exact(x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_updates_the_residual(shape, dtype):
    x, weight = inputs(shape, dtype)
    residual = torch.randn(shape).to(DEVICE, dtype)
    expected = residual.clone()
    want = reference.add_rms_norm_(expected, x, weight, 1e-6)
    got = kernels.add_rms_norm_(residual, x, weight, 1e-6)
    assert_close(got, want, exact(expected, weight, 1e-6))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm(shape, mean, dtype):
    """Also of rows whose mean is far from zero."""
    x, weight = inputs(shape, dtype)
    x, bias = x + mean, torch.randn(shape[-1]).to(DEVICE, dtype)
    want = torch.nn.functional.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), 1e-5)
    assert_close(kernels.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_extreme_rows(dtype):
    x, weight = inputs((5, 896), dtype)
    for row, value in enumerate((0.0, 1e-30, 60000.0)):
        x[row] = value
    x[3, 7], x[4, 7] = float("inf"), float("nan")
    bias = torch.randn(896).to(DEVICE, dtype)
    got, want = (package.layer_norm(x, weight, bias, 1e-5) for package in (kernels, reference))
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[:3], bias.expand(3, -1), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rows(dtype):
    """Zeros, tiny, the largest of fp16, one huge value, Inf, NaN: what fp32 can hold comes out finite."""
    x, weight = inputs((6, 896), dtype)
    for row, value in enumerate((0.0, 1e-30, 65504.0)):
        x[row] = value
    x[3, 7], x[4, 7], x[5, 7] = 6e4, float("inf"), float("nan")
    weight.clamp_(-1, 1)
    got, want = kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    assert got[:4].isfinite().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert_close(got[:4], want[:4], exact(x[:4], weight, 1e-6))


def test_a_row_does_not_depend_on_its_batch():
    x, weight = inputs((max(BATCHES), 896), torch.float16)
    whole = kernels.rms_norm(x, weight, 1e-6)
    for batch in BATCHES:
        assert torch.equal(kernels.rms_norm(x[-batch:], weight, 1e-6), whole[-batch:])
    whole = kernels.layer_norm(x, weight, weight, 1e-6)
    for batch in BATCHES:
        assert torch.equal(kernels.layer_norm(x[-batch:], weight, weight, 1e-6), whole[-batch:])


def test_columns_of_a_wider_tensor():
    x, weight = inputs((5, 300), torch.float32)
    part, weight = x[:, 100:228], weight[100:228]
    assert_close(kernels.rms_norm(part, weight, 1e-6), reference.rms_norm(part, weight, 1e-6))
    assert_close(kernels.layer_norm(part, weight, weight, 1e-6), reference.layer_norm(part, weight, weight, 1e-6))


def test_nothing_gives_nothing():
    x, weight = inputs((0, 64), torch.float32)
    assert kernels.rms_norm(x, weight, 1e-6).shape == (0, 64)
    assert kernels.layer_norm(x, weight, weight, 1e-6).shape == (0, 64)
    assert kernels.add_rms_norm_(x, x.clone(), weight, 1e-6).shape == (0, 64)


def test_wrong_arguments_are_named():
    x, weight = inputs((4, 64), torch.float32)
    for wrong, match in [
        ((x, weight[:32], 1e-6), "weight: shape"),
        ((x, weight.half(), 1e-6), "weight: torch.float16; expected torch.float32"),
        ((x.long(), weight, 1e-6), "x: torch.int64"),
        ((x, weight.to("meta"), 1e-6), "weight: on meta"),
        ((x.T, weight[:4], 1e-6), "x: strides"),
        ((torch.zeros(2, 16385, device=DEVICE), weight, 1e-6), "x: width 16385; expected 1 to 16384"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.rms_norm(*wrong)
        with pytest.raises(ValueError, match=match):
            kernels.layer_norm(wrong[0], wrong[1], weight[: wrong[0].shape[-1]], wrong[2])
    with pytest.raises(ValueError, match="bias: shape"):
        kernels.layer_norm(x, weight, weight[:32], 1e-6)
    with pytest.raises(ValueError, match="x: shape"):
        kernels.add_rms_norm_(x, x[:2], weight, 1e-6)


@pytest.mark.gpu
def test_a_thousand_runs_are_one_result():
    x, weight = inputs((64, 4096), torch.bfloat16)
    first = kernels.rms_norm(x, weight, 1e-6)
    for n in range(1000):
        kernels.rms_norm(x[: n % 64 + 1] + 1, weight, 1e-6)
        assert torch.equal(kernels.rms_norm(x, weight, 1e-6), first)
