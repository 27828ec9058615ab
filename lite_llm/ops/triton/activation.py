"""Gated activations. One program per (row, block of columns)."""

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


def aot_cases(capability: int) -> list[AotCase]:
    return [
        AotCase(
            name=f"silu_mul {dtype}",
            kernel=_silu_mul_kernel,
            signature={"gate_up": f"*{dtype}", "out": f"*{dtype}", "width": "i32", "stride": "i32"},
            constexprs={"BLOCK": _BLOCK, "PDL": capability >= 90},
            attrs={"width": 16, "stride": 16},
        )
        for dtype in ("bf16", "fp32")
    ]
