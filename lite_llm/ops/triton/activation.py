"""Activations, gated or plain. One program per (row, block of columns)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import FLOATS, check, row_stride

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    check("gate_up", gate_up, dtype=FLOATS, contiguous=False)
    width, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"gate_up: width {gate_up.shape[-1]}; expected an even one, gate and up side by side")
    stride = row_stride("gate_up", gate_up)
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        # Rows first: only the first axis of a grid may pass 65,535.
        dependent = pdl(gate_up.device)
        _silu_mul_kernel[(out.numel() // width, triton.cdiv(width, _BLOCK))](
            gate_up, out, width, stride, _BLOCK, dependent, launch_pdl=dependent
        )
    return out


def gelu(x: Tensor, quick: bool = False) -> Tensor:
    check("x", x, dtype=FLOATS, contiguous=False)
    width, stride = x.shape[-1], row_stride("x", x)
    out = x.new_empty(x.shape)
    if out.numel():
        dependent = pdl(x.device)
        _gelu_kernel[(out.numel() // width, triton.cdiv(width, _BLOCK))](
            x, out, width, stride, quick, _BLOCK, dependent, launch_pdl=dependent
        )
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, width, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(gate_up + row * stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + col, mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)  # -inf gives NaN, as in torch
    tl.store(out + row * width + col, (act * up).to(dtype), mask)


@triton.jit
def _gelu_kernel(x, out, width, stride, QUICK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    h = tl.load(x + row * stride + col, mask, other=0.0).to(tl.float32)
    if QUICK:
        h = h / (1.0 + tl.exp(-1.702 * h))
    else:
        h = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
    tl.store(out + row * width + col, h.to(out.dtype.element_ty), mask)


def aot_cases(capability: int) -> list[AotCase]:
    def case(name: str, kernel: Any, source: str, dtype: str, **constants: bool) -> AotCase:
        return AotCase(
            name=f"{name} {dtype}",
            kernel=kernel,
            signature={source: f"*{dtype}", "out": f"*{dtype}", "width": "i32", "stride": "i32"},
            constexprs=constants | {"BLOCK": _BLOCK, "PDL": capability >= 90},
            attrs={"width": 16, "stride": 16},
        )

    dtypes = ("bf16", "fp32")
    return [
        *(case("silu_mul", _silu_mul_kernel, "gate_up", dtype) for dtype in dtypes),
        *(case("gelu", _gelu_kernel, "x", dtype, QUICK=False) for dtype in dtypes),
        *(case("gelu quick", _gelu_kernel, "x", dtype, QUICK=True) for dtype in dtypes),
    ]
