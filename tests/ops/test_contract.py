"""The public op, its reference and its kernel are one function with one signature."""

import inspect

import pytest

import lite_llm.ops as ops
import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels


def test_the_two_backends_have_the_same_ops():
    assert reference.__all__ == kernels.__all__
    assert set(ops.__all__) == {*reference.__all__, "use"}


@pytest.mark.parametrize("name", reference.__all__)
def test_kernel_has_the_signature_of_its_reference(name):
    signature = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(kernels, name)) == signature == inspect.signature(getattr(ops, name))
    assert getattr(ops, name).reference is getattr(reference, name)
    assert getattr(kernels, name).__name__ == name


@pytest.mark.parametrize("name", reference.__all__)
def test_an_op_that_writes_to_an_argument_says_so(name):
    returns_nothing = inspect.signature(getattr(reference, name)).return_annotation is None
    assert name.endswith("_") or not returns_nothing
    assert getattr(reference, name).__doc__
