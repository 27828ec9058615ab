"""RMS norm, plain or with the residual add fused in; layer norm. A program per row, in one block of registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import FLOATS, check, row_stride

MAX_WIDTH = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, x, weight, eps, add=False)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check("x", x, shape=residual.shape, dtype=residual.dtype, like=residual, contiguous=False)
    return _launch(residual, x, weight, eps, add=True)


def _launch(residual: Tensor, x: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    width = _width(x)
    check("weight", weight, shape=(width,), dtype=x.dtype, like=x)
    x_stride, residual_stride = row_stride("x", x), row_stride("residual", residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows := x.numel() // width:
        block, num_warps = _blocks(width)
        dependent = pdl(x.device)
        _rms_norm_kernel[(rows,)](
            residual, x, weight, out, width, residual_stride, x_stride, eps, add, block, dependent,
            num_warps=num_warps, launch_pdl=dependent,
        )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    width = _width(x)
    check("weight", weight, shape=(width,), dtype=x.dtype, like=x)
    check("bias", bias, shape=(width,), dtype=x.dtype, like=x)
    stride = row_stride("x", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows := x.numel() // width:
        block, num_warps = _blocks(width)
        dependent = pdl(x.device)
        _layer_norm_kernel[(rows,)](
            x, weight, bias, out, width, stride, eps, block, dependent, num_warps=num_warps, launch_pdl=dependent
        )
    return out


def _width(x: Tensor) -> int:
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: width {x.shape[-1]}; expected 1 to {MAX_WIDTH}")
    check("x", x, dtype=FLOATS, contiguous=False)
    return x.shape[-1]


def _blocks(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    residual, x, weight, out, width, residual_stride, x_stride, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: rows * width passes 2**31 at 500k tokens
    col = tl.arange(0, BLOCK)
    mask = col < width
    w = tl.load(weight + col, mask, other=0.0)
    wait(PDL)
    release(PDL)

    dtype = out.dtype.element_ty
    h = tl.load(x + row * x_stride + col, mask, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + row * residual_stride + col, mask, other=0.0).to(tl.float32)
        h = h.to(dtype).to(tl.float32)  # the norm sees the residual as it is stored
        tl.store(residual + row * residual_stride + col, h.to(dtype), mask)

    h *= tl.rsqrt(tl.sum(h * h) / width + eps)
    tl.store(out + row * width + col, (h.to(dtype).to(tl.float32) * w.to(tl.float32)).to(dtype), mask)


@triton.jit(do_not_specialize=["eps"])
def _layer_norm_kernel(x, weight, bias, out, width, stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < width
    w = tl.load(weight + col, mask, other=0.0)
    b = tl.load(bias + col, mask, other=0.0)
    wait(PDL)
    release(PDL)

    h = tl.load(x + row * stride + col, mask, other=0.0).to(tl.float32)
    # Sums of squares around the mean: far from it they would cancel. A mean rounded off would be all there is of equal
    # values, and 1 / sqrt(eps) times as much: div_rn is exact for them where / is not.
    count = tl.zeros([], tl.float32) + width  # a constant where the width is 1
    h = tl.where(mask, h - tl.div_rn(tl.sum(h), count), 0.0)
    h = h * tl.rsqrt(tl.sum(h * h) / width + eps) * w.to(tl.float32) + b.to(tl.float32)
    tl.store(out + row * width + col, h.to(out.dtype.element_ty), mask)


def aot_cases(capability: int) -> list[AotCase]:
    def case(dtype: str, width: int, add: bool) -> AotCase:
        block, num_warps = _blocks(width)
        return AotCase(
            name=f"rms_norm {dtype} {width}{' add' * add}",
            kernel=_rms_norm_kernel,
            signature=dict.fromkeys(("residual", "x", "weight", "out"), f"*{dtype}")
            | dict.fromkeys(("width", "residual_stride", "x_stride"), "i32")
            | {"eps": "fp32"},
            constexprs={"ADD": add, "BLOCK": block, "PDL": capability >= 90},
            attrs=dict.fromkeys(("width", "residual_stride", "x_stride"), 16),
            num_warps=num_warps,
        )

    def layer(dtype: str, width: int) -> AotCase:
        block, num_warps = _blocks(width)
        return AotCase(
            name=f"layer_norm {dtype} {width}",
            kernel=_layer_norm_kernel,
            signature=dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
            | {"width": "i32", "stride": "i32", "eps": "fp32"},
            constexprs={"BLOCK": block, "PDL": capability >= 90},
            attrs={"width": 16, "stride": 16},
            num_warps=num_warps,
        )

    layers = [layer("bf16", 1024), layer("bf16", MAX_WIDTH), layer("fp32", 1024)]
    return [*layers, case("bf16", 4096, True), case("bf16", MAX_WIDTH, True), case("fp32", 4096, False)]
