"""What changes logits before sampling: penalties, biases, no early stop, and constraints.

One program per (row, 4096 tokens).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.reference.sampling import PROMPT
from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import check

_BLOCK = 4096

_PROMPT = tl.constexpr(PROMPT)


def adjust_(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    counts: Tensor,
    bias: Tensor,
    biased: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    stop_ids: Tensor,
    min_len: Tensor,
    allowed: Tensor,
    constrained: Tensor,
) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits: shape {list(logits.shape)}; expected [rows, vocab]")
    check("logits", logits, dtype=torch.float32)
    count, vocab = logits.shape
    owners = len(counts)
    for name, x in (("rows", rows), ("positions", positions)):
        check(name, x, shape=(count,), dtype=torch.int32, like=logits)
    check("counts", counts, shape=(owners, vocab), dtype=torch.int32, like=logits)
    check("bias", bias, shape=(owners, vocab), dtype=torch.float32, like=logits)
    check("biased", biased, shape=(owners,), dtype=(torch.bool, torch.int32), like=logits)
    for name, x in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        check(name, x, shape=(owners,), dtype=torch.float32, like=logits)
    check("stop_ids", stop_ids, shape=(owners, stop_ids.shape[-1]), dtype=torch.int32, like=logits)
    check("min_len", min_len, shape=(owners,), dtype=torch.int32, like=logits)
    check("allowed", allowed, shape=(owners, triton.cdiv(vocab, 32)), dtype=torch.int32, like=logits)
    check("constrained", constrained, shape=(owners,), dtype=(torch.bool, torch.int32), like=logits)
    if logits.numel():
        dependent = pdl(logits.device)
        _adjust_kernel[(count, triton.cdiv(vocab, _BLOCK))](
            logits, rows, positions, counts, bias, biased, repetition, presence, frequency, stop_ids, min_len,
            allowed, constrained, owners - 1, vocab, stop_ids.shape[1], allowed.shape[1],
            _BLOCK, triton.next_power_of_2(stop_ids.shape[1]), dependent, num_warps=8, launch_pdl=dependent,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pad"], do_not_specialize_on_alignment=["rows", "positions"])
def _adjust_kernel(
    logits, rows, positions, counts, bias, biased, repetition, presence, frequency, stop_ids, min_len,
    allowed, constrained, pad, vocab, stops, words, BLOCK: tl.constexpr, STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    n, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    row = tl.load(rows + n).to(tl.int64)
    factor, flat, each = tl.load(repetition + row), tl.load(presence + row), tl.load(frequency + row)
    tilted = tl.load(biased + row) != 0
    early = (tl.load(positions + n) < tl.load(min_len + row)) & (row < pad)
    held = tl.load(constrained + row) != 0
    penalised = (factor != 1.0) | (flat != 0.0) | (each != 0.0)
    logits += n * vocab
    if (penalised | tilted | held) & (row < pad):
        col = start + tl.arange(0, BLOCK)
        mask = col < vocab
        x = tl.load(logits + col, mask, other=0.0)
        if penalised:
            seen = tl.load(counts + row * vocab + col, mask, other=0)
            times = (seen & (_PROMPT - 1)).to(tl.float32)
            repeated = tl.where(x > 0, tl.math.div_rn(x, factor), x * factor)
            x = tl.where(seen > 0, repeated, x) - (tl.where(times > 0, flat, 0.0) + each * times)
        if tilted:
            x += tl.load(bias + row * vocab + col, mask, other=0.0)
        if held:
            word = tl.load(allowed + row * words + col // 32, mask, other=0)
            x += tl.where(((word >> (col % 32)) & 1) != 0, 0.0, float("-inf"))
        tl.store(logits + col, x, mask)
    if early:
        tl.debug_barrier()  # behind the stores of the other threads
        place = tl.arange(0, STOPS)
        stop = tl.load(stop_ids + row * stops + place, place < stops, other=-1)
        mine = (stop >= start) & (stop < start + BLOCK) & (stop < vocab)
        tl.store(logits + stop, float("-inf"), mine)


def aot_cases(capability: int) -> list[AotCase]:
    floats = ("logits", "bias", "repetition", "presence", "frequency")
    ints = ("rows", "positions", "counts", "biased", "stop_ids", "min_len", "allowed", "constrained")
    return [
        AotCase(
            name="adjust",
            kernel=_adjust_kernel,
            signature=dict.fromkeys(floats, "*fp32")
            | dict.fromkeys(ints, "*i32")
            | dict.fromkeys(("pad", "vocab", "stops", "words"), "i32"),
            constexprs={"BLOCK": _BLOCK, "STOPS": 64, "PDL": capability >= 90},
            attrs=dict.fromkeys(("rows", "positions"), 4) | {"vocab": 16, "stops": 16},
            num_warps=8,
        )
    ]
