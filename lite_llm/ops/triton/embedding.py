"""Embedding lookup. One program per (token, block of columns)."""

import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import FLOATS, INTS, check, row_stride

_BLOCK = 1024


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """An id outside the vocabulary gives zeros (the reference raises): a row that `sample` refused with -1 may be
    embedded once more before the CPU hears of it, and must not read wild memory.
    """
    check("tokens", tokens, dtype=INTS)
    check("weight", weight, dtype=FLOATS, like=tokens, contiguous=False)
    vocab, width = weight.shape
    stride = row_stride("weight", weight)
    out = weight.new_empty(*tokens.shape, width)
    if out.numel():
        dependent = pdl(tokens.device)
        _embed_kernel[(tokens.numel(), triton.cdiv(width, _BLOCK))](
            tokens, weight, out, vocab, width, stride, _BLOCK, dependent, launch_pdl=dependent
        )
    return out


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _embed_kernel(tokens, weight, out, vocab, width, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    token = tl.load(tokens + row).to(tl.int64)
    readable = tl.where((token >= 0) & (token < vocab), width, 0)
    x = tl.load(weight + token * stride + col, col < readable, other=0.0)
    tl.store(out + row * width + col, x, mask)


def aot_cases(capability: int) -> list[AotCase]:
    return [
        AotCase(
            name=f"embed {dtype}",
            kernel=_embed_kernel,
            signature={"tokens": "*i32", "weight": f"*{dtype}", "out": f"*{dtype}"}
            | dict.fromkeys(("vocab", "width", "stride"), "i32"),
            constexprs={"BLOCK": _BLOCK, "PDL": capability >= 90},
            attrs={"tokens": 4, "width": 16, "stride": 16},
        )
        for dtype in ("bf16", "fp32")
    ]
