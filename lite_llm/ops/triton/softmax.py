"""Softmax of whole rows. One program per row; three passes over it: the largest, the sum, the quotients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.layout import FLOATS, check, row_stride

_BLOCK = 4096


def softmax(x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"x: shape {list(x.shape)}; expected [rows, vocab]")
    check("x", x, dtype=FLOATS, contiguous=False)
    stride = row_stride("x", x)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        block, num_warps = _blocks(x.shape[1])
        _softmax_kernel[(x.shape[0],)](x, out, x.shape[1], stride, block, num_warps=num_warps)
    return out


def _blocks(vocab: int) -> tuple[int, int]:
    block = min(triton.next_power_of_2(vocab), _BLOCK)
    return block, min(max(block // 256, 1), 16)


@triton.jit
def _softmax_kernel(x, out, vocab, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    out += row * vocab
    lane = tl.arange(0, BLOCK)

    # One lane keeps the same columns of every block, so that a row is reduced across lanes once per pass.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        h = tl.load(x + start + lane, start + lane < vocab, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, h)
    top = tl.max(largest, 0)

    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        h = tl.load(x + start + lane, start + lane < vocab, other=float("-inf")).to(tl.float32)
        total += tl.where(start + lane < vocab, tl.exp(h - top), 0.0)  # NaN, +inf, or all -inf: NaN, as in torch
    scale = 1.0 / tl.sum(total, 0)

    for start in range(0, vocab, BLOCK):
        h = tl.load(x + start + lane, start + lane < vocab, other=float("-inf")).to(tl.float32)
        tl.store(out + start + lane, tl.exp(h - top) * scale, start + lane < vocab)


def aot_cases(capability: int) -> list[AotCase]:
    block, num_warps = _blocks(151_936)
    return [
        AotCase(
            name=f"softmax {dtype}",
            kernel=_softmax_kernel,
            signature={"x": f"*{dtype}", "out": "*fp32", "vocab": "i32", "stride": "i32"},
            constexprs={"BLOCK": block},
            attrs={"vocab": 16, "stride": 16},
            num_warps=num_warps,
        )
        for dtype in ("bf16", "fp32")
    ]
