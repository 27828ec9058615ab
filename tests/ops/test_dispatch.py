"""An op runs where its first tensor lives, unless `use` says otherwise; a meta tensor stands for a foreign device."""

import pytest
import torch

import lite_llm.ops as ops
import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops import dispatch
from tests.close import DEVICE


@pytest.fixture
def called(monkeypatch):
    """The packages whose silu_mul was called, in order."""
    calls = []
    for package in (reference, kernels):
        monkeypatch.setattr(package, "silu_mul", lambda x, name=package.__name__: calls.append(name.split(".")[-1]))
    dispatch._implementation.cache_clear()
    yield calls
    dispatch._implementation.cache_clear()


def test_the_device_of_the_first_tensor_decides(called):
    ops.silu_mul(torch.zeros(1, 2))
    ops.silu_mul(torch.zeros(1, 2, device=DEVICE))
    assert called == ["reference", "triton" if DEVICE == "cuda" else "reference"]


def test_use_forces_a_backend_and_restores_the_one_before(called):
    x = torch.zeros(1, 2)
    with ops.use("triton"):
        ops.silu_mul(x)
        with ops.use("reference"):
            ops.silu_mul(x)
        ops.silu_mul(x)
    ops.silu_mul(x)
    assert called == ["triton", "reference", "triton", "reference"]


def test_use_restores_after_an_error(called):
    with pytest.raises(RuntimeError, match="mine"), ops.use("triton"):
        raise RuntimeError("mine")
    ops.silu_mul(torch.zeros(1, 2))
    assert called == ["reference"]


def test_an_op_without_kernel_is_named():
    def nameless(x):
        return x

    with ops.use("triton"), pytest.raises(NotImplementedError, match="op 'nameless' has no triton implementation"):
        ops.op(nameless)(torch.zeros(1))


def test_an_unknown_backend_is_named():
    with ops.use("cutlass"), pytest.raises(ImportError, match="cutlass"):
        ops.silu_mul(torch.zeros(1, 2))
