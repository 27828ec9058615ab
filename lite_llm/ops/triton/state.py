"""The state of decoding on the device, read before a step's model and written after its sampling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.reference.state import NO_TOKEN
from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import check, row_stride

_BLOCK = 128  # requests per program of `_decode_inputs_kernel`
_TOKENS = 32  # and tokens of `_advance_kernel`, which holds the stop tokens of each one's request

_NO_TOKEN = tl.constexpr(NO_TOKEN)


def decode_inputs_(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_len: Tensor,
    rows: Tensor,
    last: Tensor,
    length: Tensor,
    ended: Tensor,
    table: Tensor,
    step: Tensor,
    depth: int,
) -> None:
    check("rows", rows, dtype=torch.int32)
    for name, x in (("tokens", tokens), ("positions", positions), ("slots", slots), ("kv_len", kv_len)):
        if x.dim() != 1 or len(x) < len(rows):
            raise ValueError(f"{name}: shape {list(x.shape)}; expected [{len(rows)} or more]")
        check(name, x, dtype=torch.int32, like=rows)
    for name, x in (("last", last), ("length", length), ("ended", ended)):
        check(name, x, shape=last.shape, dtype=torch.int32, like=rows)
    check("table", table, shape=(len(last), table.shape[-1]), dtype=torch.int32, like=rows)
    check("step", step, shape=(1,), dtype=torch.int32, like=rows)
    if depth < 1:
        raise ValueError(f"depth: {depth}; expected at least 1")
    dependent = pdl(rows.device)
    grid = (max(triton.cdiv(len(rows), _BLOCK), 1),)  # without decodes a step counts all the same
    _decode_inputs_kernel[grid](
        tokens, positions, slots, kv_len, rows, last, length, ended, table, step, depth, len(rows), table.shape[1],
        _BLOCK, dependent, launch_pdl=dependent,
    )  # fmt: skip


def advance_(
    rows: Tensor,
    positions: Tensor,
    chosen: Tensor,
    computed: Tensor,
    last: Tensor,
    length: Tensor,
    ended: Tensor,
    stop_ids: Tensor,
    min_len: Tensor,
    max_len: Tensor,
    counting: Tensor,
    counts: Tensor,
    ring: Tensor,
    step: Tensor,
    samples: int,
) -> None:
    check("rows", rows, dtype=torch.int32)
    if samples < 1 or len(rows) % samples:
        raise ValueError(f"samples: {samples} of {len(rows)} rows; expected a divisor, at least 1")
    for name, x in (("positions", positions), ("chosen", chosen), ("computed", computed)):
        check(name, x, shape=(len(rows),), dtype=torch.int32, like=rows)
    owners = (("last", last), ("length", length), ("ended", ended), ("min_len", min_len), ("max_len", max_len))
    for name, x in owners:
        check(name, x, shape=last.shape, dtype=torch.int32, like=rows)
    check("stop_ids", stop_ids, shape=(len(last), stop_ids.shape[-1]), dtype=torch.int32, like=rows)
    check("counting", counting, shape=last.shape, dtype=(torch.bool, torch.int32), like=rows)
    check("counts", counts, shape=(len(last), counts.shape[-1]), dtype=torch.int32, like=rows)
    if ring.dim() != 2 or ring.shape[1] < len(rows):
        raise ValueError(f"ring: shape {list(ring.shape)}; expected [steps, {len(rows)} or more]")
    pinned = ring.is_pinned()  # the device maps it
    check("ring", ring, dtype=torch.int32, like=None if pinned else rows, contiguous=False)
    check("step", step, shape=(1,), dtype=torch.int32, like=rows)
    if len(rows):
        dependent = pdl(rows.device)
        requests, block = len(rows) // samples, _requests(samples)
        _advance_kernel[(triton.cdiv(requests, block),)](
            rows, positions, chosen, computed, last, length, ended, stop_ids, min_len, max_len, counting, counts, ring,
            step, requests, len(last) - 1, stop_ids.shape[1], counts.shape[1], row_stride("ring", ring),
            samples, block, triton.next_power_of_2(stop_ids.shape[1]), dependent, launch_pdl=dependent,
        )  # fmt: skip


def _requests(samples: int) -> int:
    """Of a program of `_advance_kernel`; a power of two."""
    return max(_TOKENS // triton.next_power_of_2(samples), 1)


@triton.jit(do_not_specialize=["depth", "count"], do_not_specialize_on_alignment=["rows"])
def _decode_inputs_kernel(
    tokens, positions, slots, kv_len, rows, last, length, ended, table, step, depth, count, table_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < count
    row = tl.load(rows + b, mask, other=0)
    live = mask & (tl.load(ended + row, mask, other=1) == 0)
    p = tl.load(length + row, live, other=0)
    tl.store(tokens + b, tl.load(last + row, live, other=0), mask)
    tl.store(positions + b, p, mask)
    tl.store(slots + b, tl.load(table + row.to(tl.int64) * table_stride + p, live, other=0), mask)
    tl.store(kv_len + b, tl.where(live, p + 1, 0), mask)
    if tl.program_id(0) == 0:
        tl.store(step, (tl.load(step) + 1) % depth)


@triton.jit(
    do_not_specialize=["count", "pad"],
    do_not_specialize_on_alignment=["rows", "positions", "chosen", "computed", "ring"],
)
def _advance_kernel(
    rows, positions, chosen, computed, last, length, ended, stop_ids, min_len, max_len, counting, counts, ring, step,
    count, pad, stops, vocab, ring_stride,
    SAMPLES: tl.constexpr, REQUESTS: tl.constexpr, STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has REQUESTS requests, with SAMPLES tokens each."""
    wait(PDL)
    release(PDL)
    request = tl.program_id(0) * REQUESTS + tl.arange(0, REQUESTS)
    mask = request < count
    row = tl.load(rows + request * SAMPLES, mask, other=pad)
    live = (row < pad) & (tl.load(ended + row, mask, other=1) == 0)
    at = tl.load(step).to(tl.int64) * ring_stride
    place = tl.arange(0, STOPS)
    listed = live[:, None] & (place < stops)[None, :]
    stop = tl.load(stop_ids + row[:, None] * stops + place[None, :], listed, other=-1)
    least = tl.load(min_len + row, live, other=0)
    most = tl.load(max_len + row, live, other=0)
    counts_here = tl.load(counting + row, live, other=0) != 0

    for i in tl.static_range(SAMPLES):
        n = request * SAMPLES + i
        token = tl.load(chosen + n, mask, other=-1)
        p = tl.load(positions + n, mask, other=0)
        if i > 0:
            stands = tl.load(computed + n, live, other=-1) == tl.load(chosen + n - 1, live, other=-1)
            live = live & stands & (tl.load(rows + n, live, other=pad) < pad)
            tl.debug_barrier()  # other threads may have stored what the token before changed
        tl.store(ring + at + n, tl.where(live, token, _NO_TOKEN), mask)
        stopped = tl.max((stop == token[:, None]).to(tl.int32), 1) > 0
        ends = (token < 0) | (stopped & (p >= least)) | (p + 1 >= most)
        tl.store(last + row, token, live)
        tl.store(length + row, p, live)
        tl.store(ended + row, ends.to(tl.int32), live)
        counted = live & (token >= 0) & counts_here
        cell = counts + row.to(tl.int64) * vocab + token
        tl.store(cell, tl.load(cell, counted, other=0) + 1, counted)
        live = live & (ends == 0)


def aot_cases(capability: int) -> list[AotCase]:
    dependent = capability >= 90
    inputs = ("tokens", "positions", "slots", "kv_len", "rows", "last", "length", "ended", "table", "step")
    lists = ("rows", "positions", "chosen", "computed", "ring")
    tables = ("last", "length", "ended", "stop_ids", "min_len", "max_len", "counting", "counts", "step")
    advance = [
        AotCase(
            name="advance" + f"-{samples}-samples" * (samples > 1),
            kernel=_advance_kernel,
            signature=dict.fromkeys((*lists, *tables), "*i32")
            | dict.fromkeys(("count", "pad", "stops", "vocab", "ring_stride"), "i32"),
            constexprs={"SAMPLES": samples, "REQUESTS": _requests(samples), "STOPS": 64, "PDL": dependent},
            attrs=dict.fromkeys(lists, 4) | {"vocab": 16},
        )
        for samples in (1, 2, 8, 16)
    ]
    decode_inputs = AotCase(
        name="decode_inputs",
        kernel=_decode_inputs_kernel,
        signature=dict.fromkeys(inputs, "*i32") | dict.fromkeys(("depth", "count", "table_stride"), "i32"),
        constexprs={"BLOCK": _BLOCK, "PDL": dependent},
        attrs={"rows": 4},
    )
    return [decode_inputs, *advance]
