"""Sharding and storage are separate choices: two ranks make one layer, whichever way it is split and stored."""

from dataclasses import dataclass

import pytest
import torch

from lite_llm.errors import BadCheckpoint
from lite_llm.layers import LayerFactory
from lite_llm.parallel import Group
from lite_llm.quant import Dense

FORMATS = [Dense()]
PARTS = {"q": 32, "k": 16, "v": 16}
WIDTH = 24


@dataclass(frozen=True)
class FakeGroup(Group):
    def all_reduce_(self, x):
        return x  # the test adds the ranks up itself


def checkpoint(parts, bias):
    return {
        part: {"weight": torch.randn(n, WIDTH)} | ({"bias": torch.randn(n)} if bias else {})
        for part, n in parts.items()
    }


def build(parts, stored, split, rank=0, size=1, fmt=FORMATS[0]):
    bias = any("bias" in tensors for tensors in stored.values())
    make = LayerFactory(torch.float32, fmt=fmt, tp=FakeGroup(rank, size))
    layer = make.linear(WIDTH, parts if len(parts) > 1 else parts[""], split=split, bias=bias)
    for part, tensors in stored.items():
        for name, tensor in tensors.items():
            layer.load(name, tensor, part)
    return layer


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: type(fmt).__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_split_the_outputs_make_one_layer(fmt, bias, size):
    stored, x = checkpoint(PARTS, bias), torch.randn(3, WIDTH)
    whole = torch.cat([x @ t["weight"].T + t.get("bias", torch.zeros(())) for t in stored.values()], dim=1)
    widths = [n // size for n in PARTS.values()]
    shares = [build(PARTS, stored, "out", r, size, fmt)(x).split(widths, dim=1) for r in range(size)]
    joined = torch.cat([share[i] for i in range(len(PARTS)) for share in shares], dim=1)
    torch.testing.assert_close(joined, whole)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: type(fmt).__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_split_the_inputs_add_up_to_one_layer(fmt, bias, size):
    stored, x = checkpoint({"": 40}, bias), torch.randn(3, WIDTH)
    whole = x @ stored[""]["weight"].T + stored[""].get("bias", torch.zeros(()))
    cut = x.split(WIDTH // size, dim=1)
    total = sum(build({"": 40}, stored, "in", r, size, fmt).add_(torch.ones(3, 40), cut[r]) for r in range(size))
    torch.testing.assert_close(total, whole + size)


@pytest.mark.parametrize("split, size", [("out", 1), ("out", 2), ("in", 1), ("in", 2)])
def test_loading_counts_the_elements_it_fills(split, size):
    parts = PARTS if split == "out" else {"": 40}
    layer = build(parts, stored := checkpoint(parts, bias=True), split, 0, size)
    filled = sum(layer.load(name, t, part) for part, tensors in stored.items() for name, t in tensors.items())
    assert filled == sum(parameter.numel() for parameter in layer.parameters())
    assert not any(parameter.isnan().any() for parameter in layer.parameters())


def test_parts_stand_in_the_order_of_the_layer_not_of_the_file():
    stored, x = checkpoint(PARTS, bias=True), torch.randn(3, WIDTH)
    backwards = dict(reversed(stored.items()))
    assert torch.equal(build(PARTS, stored, "out")(x), build(PARTS, backwards, "out")(x))


def test_the_dtype_of_the_model_wins():
    layer = LayerFactory(torch.bfloat16).linear(4, 2, split="out", bias=True)
    assert layer.load("weight", torch.ones(2, 4)) == 8 and layer.load("bias", torch.ones(2, dtype=torch.float16)) == 2
    assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("name, shape", [("weight", (16, 32)), ("weight", (WIDTH,)), ("bias", (8,)), ("bias", (1, 16))])
def test_a_tensor_of_another_shape_is_refused(name, shape):
    layer = LayerFactory(torch.float32).linear(WIDTH, PARTS, split="out", bias=True)
    with pytest.raises(BadCheckpoint, match="the checkpoint has shape"):
        layer.load(name, torch.randn(shape), "k")


@pytest.mark.parametrize("split", ["out", "in"])
def test_sizes_that_do_not_divide_over_the_ranks_are_refused(split):
    with pytest.raises(ValueError, match="does not divide over 5 ranks"):
        LayerFactory(torch.float32, tp=Group(0, 5)).linear(WIDTH, 32, split=split)


def test_no_rows_give_no_rows():
    stored = checkpoint(PARTS, bias=True)
    assert build(PARTS, stored, "out")(torch.randn(0, WIDTH)).shape == (0, 64)
