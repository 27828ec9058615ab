"""Flash-decoding: one new token per request over single-token slots, split over the keys (arXiv 2311.01282).

A request's keys are cut into segments whose size depends on its own length alone, and partial results are merged in
segment order, so its answer is the same to the last bit whatever shares the batch. How many segments one program takes
depends on the batch, and changes no bit.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton.aot import SHARED, AotCase

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a finite "no key yet": LOWEST - LOWEST is 0 where -inf - -inf is NaN

SEGMENT = 128
"""Keys in the smallest segment; the multiple of every BLOCK_N."""


class Tiles(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


def tiles(head_dim: int, itemsize: int, capability: int) -> Tiles:
    """Keys per tile, warps and pipeline stages; K and V tiles of all stages fit in 99 KB where that is the limit."""
    wide = triton.next_power_of_2(head_dim)
    if itemsize == 4:  # exact fp32 products run on the plain cores
        return Tiles(32, 4, 3) if wide <= 64 else Tiles(16, 8 if wide == 128 else 4, 2)
    large = SHARED.get(capability, 0) > 128 << 10
    if wide == 128 and not large:  # four warps spill there for some groups, with Triton 3.6 or 3.9
        return Tiles(64 if capability == 120 else 32, 8, 3)
    return Tiles(64 if wide <= 64 or large else 32, 4, 3)


def max_segments(kv_heads: int) -> int:
    """Segments of the longest request: a fact of the model, so that it never depends on the batch or the GPU."""
    return min(max(triton.next_power_of_2(256 // kv_heads), 16), 64)


def decode(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, out: Tensor, table: Tensor, rows: Tensor, kv_len: Tensor,
    decodes: int, scale: float, window: int | None,
) -> None:  # fmt: skip
    """Write rows [0, decodes) of `out`; request b owns row b. Layouts are as `attend` has checked them."""
    heads, head_dim = q.shape[1:]
    kv_heads = k_pool.shape[1]
    shape = tiles(head_dim, q.element_size(), capability(q.device))
    limit = max_segments(kv_heads)
    span = table.shape[1] if window is None else min(table.shape[1], window + shape.block_n)
    segments = min(max(triton.cdiv(span, SEGMENT), 1), limit)
    programs = min(triton.cdiv(4 * processors(q.device), decodes * kv_heads), segments)
    partial, stats, tickets = workspace(decodes, heads, kv_heads, segments, head_dim, q.device)
    _decode_kernel[(kv_heads, programs, decodes)](
        q, k_pool, v_pool, out, table, rows, kv_len, partial, stats, tickets,
        table.stride(0), segments, scale, window or 0,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, SEGMENT=SEGMENT, MAX_SEGMENTS=limit,
        WINDOWED=window is not None, BLOCK_N=shape.block_n, **padded(heads // kv_heads, head_dim),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def workspace(
    requests: int, heads: int, kv_heads: int, segments: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised outputs [requests, kv_heads, segments, group, head_dim], their (max, sum), and arrival tickets.

    Tickets are zero before and after every launch: the last program to arrive resets its own.
    """
    rows = requests * heads * segments
    partial = torch.empty(rows * head_dim, dtype=torch.float32, device=device)
    stats = torch.empty(rows * 2, dtype=torch.float32, device=device)
    return partial, stats, torch.zeros(requests * kv_heads, dtype=torch.int32, device=device)


def padded(group: int, head_dim: int) -> dict[str, int]:
    """Powers of two that hold one key, one group, and a merge of 8k numbers."""
    wide, group = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    return {"WIDE": wide, "WIDE_GROUP": group, "MERGE": max(8192 // (wide * group), 2)}


@functools.cache
def capability(device: torch.device) -> int:
    """90 on the CPU, where the interpreter runs what a Hopper would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def aot_cases(capability: int) -> list[AotCase]:
    sizes = [(d, "bf16", g, w) for d in (16, 32, 64, 80, 96, 112, 128, 256) for g, w in ((4, False), (4, True))]
    sizes += [(d, "fp32", 4, True) for d in (16, 32, 64, 80, 96, 112, 128, 256)]
    sizes += [(128, "fp16", 4, False)] + [(128, "bf16", g, False) for g in (1, 2, 3, 5, 7, 8, 16)]
    return [_case(capability, *size) for size in sizes]


def _case(capability: int, head_dim: int, dtype: str, group: int, windowed: bool) -> AotCase:
    shape = tiles(head_dim, 4 if dtype == "fp32" else 2, capability)
    kinds = dict.fromkeys(("q", "k_pool", "v_pool", "out"), f"*{dtype}") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("table", "rows", "kv_len", "tickets"), "*i32") | {"partial": "*fp32", "stats": "*fp32"}
    kinds |= dict.fromkeys(("table_stride", "segments", "window"), "i32")
    constants = {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "SEGMENT": SEGMENT, "WINDOWED": windowed}
    constants |= {"MAX_SEGMENTS": max_segments(8), "BLOCK_N": shape.block_n} | padded(group, head_dim)
    name = f"decode-{dtype}-d{head_dim}-g{group}" + "-window" * windowed
    unaligned = dict.fromkeys(_UNALIGNED, 1)
    return AotCase(
        name, _decode_kernel, kinds, constants, unaligned, shape.num_warps, shape.num_stages, SHARED[capability]
    )


_UNALIGNED = ("table", "rows", "kv_len")


@triton.jit(
    do_not_specialize=["table_stride", "segments", "window"], do_not_specialize_on_alignment=["table", "rows", "kv_len"]
)
def _decode_kernel(
    q, k_pool, v_pool, out, table, rows, kv_len, partial, stats, tickets,
    table_stride, segments, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WIDE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, MERGE: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (h, p, b) takes the p-th run of segments of request b for KV head h and its GROUP query heads."""
    kv_head, program, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(kv_len + request)
    table += tl.load(rows + request).to(tl.int64) * table_stride

    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    origin = first // BLOCK_N * BLOCK_N
    size = tl.maximum(tl.cdiv(tl.cdiv(length - origin, MAX_SEGMENTS), BLOCK_N) * BLOCK_N, SEGMENT)
    used = tl.cdiv(length - origin, size)  # segments of this request
    share = tl.maximum(tl.cdiv(used, tl.num_programs(1)), 1)  # segments of one program
    active = tl.maximum(tl.cdiv(used, share), 1)  # programs with work; one of them if there are no keys
    if program >= active:
        return
    start = origin + program * share * size
    stop = tl.minimum(start + share * size, length)

    # GROUP query heads in 16 rows, the least that a tensor core takes.
    head = tl.arange(0, 16)
    col = tl.arange(0, WIDE)
    key = tl.arange(0, BLOCK_N)
    real = (head < GROUP)[:, None] & (col < HEAD_DIM)[None, :]
    at = ((request * KV_HEADS + kv_head) * GROUP + head)[:, None] * HEAD_DIM + col[None, :]
    queries = tl.load(q + at, real, other=0.0)
    k_pool += kv_head * HEAD_DIM
    v_pool += kv_head * HEAD_DIM
    row = (request * KV_HEADS + kv_head) * segments * GROUP  # of the workspace

    peak = tl.full([16], LOWEST, tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, WIDE], tl.float32)
    end = start + size  # of the segment
    # The next tile's slots travel in a loop variable: loaded where they are used, they would stop the pipelining.
    slots = tl.load(table + start + key, start + key < stop, other=0)
    for n in tl.range(start, stop, BLOCK_N):
        visible = n + key < stop
        if WINDOWED:
            visible &= n + key >= first
        offset = slots.to(tl.int64) * (KV_HEADS * HEAD_DIM)  # int64: slots * kv_heads * head_dim passes 2**31
        slots = tl.load(table + n + BLOCK_N + key, n + BLOCK_N + key < stop, other=0)
        at_keys = offset[:, None] + col[None, :]
        mask = visible[:, None]
        if WIDE != HEAD_DIM:
            mask &= (col < HEAD_DIM)[None, :]
        k = tl.load(k_pool + at_keys, mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(peak - highest)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_pool + at_keys, mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = highest
        if (n + BLOCK_N >= tl.minimum(end, stop)) & (used > 1):
            to = row + ((n - origin) // size) * GROUP + head
            tl.store(partial + to[:, None] * HEAD_DIM + col[None, :], acc, real)
            tl.store(stats + to * 2, peak, head < GROUP)
            tl.store(stats + to * 2 + 1, total, head < GROUP)
            peak = tl.full([16], LOWEST, tl.float32)
            total = tl.zeros([16], tl.float32)
            acc = tl.zeros([16, WIDE], tl.float32)
            end += size

    if used <= 1:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), real)
    else:
        tl.debug_barrier()  # all threads have stored before one of them takes the ticket
        ticket = tickets + request * KV_HEADS + kv_head
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == active - 1:
            _merge(
                partial, stats, out, row, (request * KV_HEADS + kv_head) * GROUP, used,
                GROUP, HEAD_DIM, WIDE, WIDE_GROUP, MAX_SEGMENTS, MERGE,
            )  # fmt: skip
            tl.store(ticket, 0)


@triton.jit
def _merge(
    partial, stats, out, row, out_row, used,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WIDE_GROUP: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Add up the segments of one request and KV head, in their order, and write the group's rows of `out`."""
    head = tl.arange(0, WIDE_GROUP)
    col = tl.arange(0, WIDE)
    segment = tl.arange(0, MAX_SEGMENTS)
    mine = (segment < used)[:, None] & (head < GROUP)[None, :]
    # .cg: other programs wrote these, and this processor's L1 may not know.
    peaks = tl.load(stats + (row + segment[:, None] * GROUP + head[None, :]) * 2, mine, LOWEST, cache_modifier=".cg")
    highest = tl.max(peaks, 0)

    total = tl.zeros([WIDE_GROUP], tl.float32)
    acc = tl.zeros([WIDE_GROUP, WIDE], tl.float32)
    some = tl.arange(0, MERGE)
    for first in tl.range(0, used, MERGE):
        here = (first + some < used)[:, None] & (head < GROUP)[None, :]
        at = row + (first + some)[:, None] * GROUP + head[None, :]
        peak = tl.load(stats + at * 2, here, LOWEST, cache_modifier=".cg")
        sums = tl.load(stats + at * 2 + 1, here, 0.0, cache_modifier=".cg")
        fade = tl.exp2(peak - highest[None, :])
        total += tl.sum(sums * fade, 0)
        real = here[:, :, None] & (col < HEAD_DIM)[None, None, :]
        terms = tl.load(partial + at[:, :, None] * HEAD_DIM + col[None, None, :], real, 0.0, cache_modifier=".cg")
        acc += tl.sum(terms * fade[:, :, None], 0)

    real = (head < GROUP)[:, None] & (col < HEAD_DIM)[None, :]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + (out_row + head)[:, None] * HEAD_DIM + col[None, :], acc.to(out.dtype.element_ty), real)
