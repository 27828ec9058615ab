"""Flash-decoding: one new token per request over single-token slots, split over the keys (arXiv 2311.01282).

The tiles of all requests, end to end, are dealt out in equal runs to as many programs as the GPU holds at a time; or,
where that makes no program's part much longer, requests are dealt out whole, to each program one or two, and nothing is
shared. The lengths are on the device, so each program works out its part for itself, and one grid serves every batch of
that size.

A request's keys are cut into segments whose size depends on its own length alone. No segment is shared by two programs,
and results are added up in segment order, in whatever program that happens: so a request's answer is the same to the
last bit whatever shares the batch, as long as there are no more than MANY requests (in attention_tiles.py) or
always more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.attention_tiles import Decode, decode_default
from lite_llm.ops.triton.gpu import processors
from lite_llm.ops.triton.launch import AT_ONCE, LAST, pdl, prefetch, release, tickets, wait
from lite_llm.ops.triton.partial import add, keep, merge, nothing, put

LOG2E = tl.constexpr(1.4426950408889634)

SEGMENT = 64
"""Keys in the smallest segment, or one tile if that has more."""


SPLITTING = 256
"""Keys that a program reads, about, in the time that it takes to add up what programs share: 2 to 8 us on an H200."""


def max_segments(kv_heads: int) -> int:
    """Segments of the longest request: a fact of the model, so that it never depends on the batch or the GPU."""
    return min(max(triton.next_power_of_2(256 // kv_heads), 16), 64)


def decode(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, out: Tensor, table: Tensor, rows: Tensor, kv_len: Tensor,
    decodes: int, scale: float, window: int | None, shape: Decode | None = None,
) -> None:  # fmt: skip
    """Write rows [0, decodes) of `out`; request b owns row b. Layouts are as `attend` has checked them.

    `shape` is for tuning; without it the tile is that of the table.

    Requests should come longest first: the first and the last of them go together, where each program takes two.

    With PDL the kernel reads `table`, `rows` and `kv_len` while the one launched before it may still run: that one must
    not write them. Kernels before that one may, if it releases only behind its own wait, as `project_qkv_` does.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = k_pool.shape[1]
    if shape is None:
        shape = tuning.choose_decode(q.device, head_dim, q.element_size(), decodes)
    limit = max_segments(kv_heads)
    span = table.shape[1] if window is None else min(table.shape[1], window + shape.block_n)
    segments = min(max(triton.cdiv(span, SEGMENT), 1), limit)
    programs = min(max(shape.programs * processors(q.device) // kv_heads, 1), decodes * segments)
    programs = min(programs, triton.cdiv(decodes * max(triton.cdiv(span, shape.block_n), 1), shape.least))
    partial, stats = workspace(decodes, heads, segments, head_dim, q.device)
    dependent = pdl(q.device)
    _decode_kernel[(kv_heads, programs)](
        q, k_pool, v_pool, out, table, rows, kv_len, partial, stats, tickets(decodes * kv_heads, q.device),
        table.stride(0), decodes, segments, scale, window or 0, shape.least,
        KV_HEADS=kv_heads, **sizes(heads // kv_heads, head_dim), SEGMENT=SEGMENT, MAX_SEGMENTS=limit,
        WINDOWED=window is not None, BLOCK_N=shape.block_n, SPLITTING=SPLITTING, RELEASE=shape.release,
        ASKED=shape.asked, PDL=dependent, num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=dependent,
    )  # fmt: skip


def workspace(requests: int, heads: int, segments: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unnormalised outputs [requests, kv_heads, segments, group, head_dim] and their (max, sum)."""
    rows = requests * heads * segments
    partial = torch.empty(rows * head_dim, dtype=torch.float32, device=device)
    return partial, torch.empty(rows * 2, dtype=torch.float32, device=device)


def sizes(group: int, head_dim: int) -> dict[str, int]:
    """Query heads of a KV head and features of a head, and the powers of two that hold them."""
    wide_group, wide = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    return {"GROUP": group, "WIDE_GROUP": wide_group, "HEAD_DIM": head_dim, "WIDE": wide}


def aot_cases(capability: int) -> list[AotCase]:
    kinds = [(d, "bf16", g, w) for d in (16, 32, 64, 80, 96, 112, 128, 256) for g, w in ((4, False), (4, True))]
    kinds += [(d, "fp32", 4, True) for d in (16, 32, 64, 80, 96, 112, 128, 256)]
    kinds += [(128, "fp16", 4, False), (64, "bf16", 7, False)]
    kinds += [(128, "bf16", g, False) for g in (1, 2, 3, 5, 7, 8, 16)]
    usual = decode_default(64, 2, capability)
    kinds += [(64, "bf16", 4, False, usual._replace(release=r, asked=n)) for r, n in ((AT_ONCE, 0), (LAST, 8))]
    for _, dim, itemsize, _, (_, tile) in tuning.shipped("decode", capability):
        if tile and tile != decode_default(dim, itemsize, capability):
            kinds += [(dim, {2: "bf16", 4: "fp32"}[itemsize], g, w, tile) for g, w in ((4, False), (7, True))]
    return [_case(capability, *kind) for kind in kinds]


def _case(
    capability: int, head_dim: int, dtype: str, group: int, windowed: bool, tile: Decode | None = None
) -> AotCase:
    shape = tile or decode_default(head_dim, 4 if dtype == "fp32" else 2, capability)
    kinds = dict.fromkeys(("q", "k_pool", "v_pool", "out"), f"*{dtype}") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("table", "rows", "kv_len", "tickets"), "*i32") | {"partial": "*fp32", "stats": "*fp32"}
    kinds |= dict.fromkeys(("table_stride", "decodes", "segments", "window", "least"), "i32")
    constants = {"KV_HEADS": 8, "SEGMENT": SEGMENT, "MAX_SEGMENTS": max_segments(8), "WINDOWED": windowed}
    constants |= {"BLOCK_N": shape.block_n, "SPLITTING": SPLITTING, "RELEASE": shape.release, "ASKED": shape.asked}
    constants |= {"PDL": capability >= 90}
    constants |= sizes(group, head_dim)
    name = f"decode-{dtype}-d{head_dim}-g{group}" + "-window" * windowed
    name += f"-tile{tile.block_n}r{tile.release}a{tile.asked}" if tile else ""
    unaligned = dict.fromkeys(("table", "rows", "kv_len"), 1)
    return AotCase(
        name, _decode_kernel, kinds, constants, unaligned, shape.num_warps, shape.num_stages, SHARED[capability]
    )


@triton.jit(
    do_not_specialize=["table_stride", "decodes", "segments", "window", "least"],
    do_not_specialize_on_alignment=["table", "rows", "kv_len"],
)
def _decode_kernel(
    q, k_pool, v_pool, out, table, rows, kv_len, partial, stats, tickets,
    table_stride, decodes, segments, scale, window, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WIDE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITTING: tl.constexpr, RELEASE: tl.constexpr, ASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (h, p) takes run p of the tiles, or request p and its partner, for KV head h and its GROUP query heads.

    One loop goes through all tiles of the run, whichever request they are of, so that loads never pause between two
    requests. What a program has of a request that it begins is one sum; of another's, it keeps each segment.
    """
    if RELEASE == 0:
        release(PDL)
    kv_head = tl.program_id(0)
    share, request, base, left, step = _run(
        kv_len, decodes, least, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N, SPLITTING
    )
    if left == 0:
        wait(PDL)
        return
    length, mine = _whose(kv_len, rows, table, table_stride, request, decodes)
    _, origin, size, most = _cut(length, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
    tile = tl.cdiv(tl.maximum(tl.program_id(1) * share - base, 0), size) * size  # of the request, where the run begins
    k_pool += kv_head * HEAD_DIM
    v_pool += kv_head * HEAD_DIM
    if PDL and ASKED > 0:
        start = origin + tile * BLOCK_N
        end = tl.minimum(start + left * BLOCK_N, length)
        _ask(k_pool, v_pool, mine, start, end, KV_HEADS * HEAD_DIM, HEAD_DIM, ASKED * BLOCK_N)
    # What the next tile needs before its keys can be asked for is there when its turn comes: its slots, and where the
    # next request's stand. Loaded where they are used, they would stop the pipelining.
    key = tl.arange(0, BLOCK_N)
    slots = tl.load(mine + origin + tile * BLOCK_N + key, origin + tile * BLOCK_N + key < length, other=0)
    length_1, mine_1 = _whose(kv_len, rows, table, table_stride, request + step, decodes)
    wait(PDL)
    if RELEASE == 1:
        release(PDL)

    # GROUP query heads in 16 rows, the least that a tensor core takes.
    head = tl.arange(0, 16)
    col = tl.arange(0, WIDE)
    real = (head < GROUP)[:, None] & (col < HEAD_DIM)[None, :]
    within = kv_head * (GROUP * HEAD_DIM) + head[:, None] * HEAD_DIM + col[None, :]
    scale *= LOG2E
    first_request, first_tile = request, tile
    begun = tile == 0
    all_peak, all_total, all_acc = nothing(WIDE)  # of the segments so far, in their order
    peak, total, acc = nothing(WIDE)  # of this segment
    for _ in tl.range(left):
        first, origin, size, most = _cut(length, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        n = origin + tile * BLOCK_N
        visible = n + key < length
        if WINDOWED:
            visible &= n + key >= first
        at = slots.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + col[None, :]  # int64: a pool may pass 2**31
        mask = visible[:, None]
        if WIDE != HEAD_DIM:
            mask &= (col < HEAD_DIM)[None, :]
        owner = request.to(tl.int64) * KV_HEADS + kv_head
        ends = tile + 1 == most
        split = ends | ((tile + 1) % size == 0)

        next_length, next_mine = tl.where(ends, length_1, length), tl.where(ends, mine_1, mine)
        next_tile = tl.where(ends, 0, tile + 1)
        next_first = tl.maximum(next_length - window, 0) // BLOCK_N * BLOCK_N if WINDOWED else 0
        next_n = next_first + next_tile * BLOCK_N
        slots = tl.load(next_mine + next_n + key, next_n + key < next_length, other=0)
        after = request + tl.where(ends, 2 * step, step)
        length_1, mine_1 = _whose(kv_len, rows, table, table_stride, after, decodes)

        queries = tl.load(q + request.to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) + within, real, other=0.0)
        k = tl.load(k_pool + at, mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, -float("inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(peak - highest)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_pool + at, mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = highest
        if split:
            all_peak, all_total, all_acc = add(all_peak, all_total, all_acc, peak, total, acc)
            peak, total, acc = nothing(WIDE)
            if begun & ends:
                put(out + owner * (GROUP * HEAD_DIM), all_total, all_acc, GROUP, HEAD_DIM)
                all_peak, all_total, all_acc = nothing(WIDE)
            if begun == 0:
                keep(partial, stats, owner * segments + tile // size, all_peak, all_total, all_acc, GROUP, HEAD_DIM)
                all_peak, all_total, all_acc = nothing(WIDE)
            begun |= ends

        request += tl.where(ends, step, 0)
        tile, length, mine = next_tile, next_length, next_mine

    if RELEASE == 2:
        release(PDL)
    # Two requests may be shared with other programs: the last of the run, if it does not end here, and the first, if it
    # did not begin here.
    if begun & (tile > 0):
        _, _, size, _ = _cut(length, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        place = (request.to(tl.int64) * KV_HEADS + kv_head) * segments
        keep(partial, stats, place, all_peak, all_total, all_acc, GROUP, HEAD_DIM)
        _arrive(
            partial, stats, out, tickets, kv_len, request, kv_head, base + first_tile + left - tile, share, 0, tile,
            segments, window, KV_HEADS, GROUP, HEAD_DIM, WIDE, WIDE_GROUP, SEGMENT, MAX_SEGMENTS, WINDOWED, BLOCK_N,
        )  # fmt: skip
    if first_tile > 0:
        _arrive(
            partial, stats, out, tickets, kv_len, first_request, kv_head, base, share, first_tile, left,
            segments, window, KV_HEADS, GROUP, HEAD_DIM, WIDE, WIDE_GROUP, SEGMENT, MAX_SEGMENTS, WINDOWED, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _whose(kv_len, rows, table, table_stride, request, decodes):
    """A request's length and its row of the table; of the last one, where there are no more."""
    request = tl.minimum(request, decodes - 1)
    return tl.load(kv_len + request), table + tl.load(rows + request).to(tl.int64) * table_stride


@triton.jit
def _arrive(
    partial, stats, out, tickets, kv_len, request, kv_head, base, share, tile, left, segments, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WIDE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program has kept tiles of a request that it shares: from `tile` on as many as there are, `left` at most.

    Whoever is the last to come adds all up.
    """
    _, _, size, most = _cut(tl.load(kv_len + request), window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
    owner = request.to(tl.int64) * KV_HEADS + kv_head
    done, used = tl.cdiv(tl.minimum(most - tile, left), size), tl.cdiv(most, size)
    tl.debug_barrier()  # all threads have stored before one of them takes the ticket
    if tl.atomic_add(tickets + owner, done, sem="acq_rel", scope="gpu") + done == used:
        together = tl.cdiv((base // share + 1) * share - base, size)  # in the part that began the request
        merge(
            partial, stats, out + owner * (GROUP * HEAD_DIM), owner * segments, together, used,
            GROUP, HEAD_DIM, WIDE_GROUP, WIDE,
        )  # fmt: skip
        tl.store(tickets + owner, 0)


@triton.jit
def _cut(
    length, window, WINDOWED: tl.constexpr, SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The first key in sight of requests of these lengths, the first of their first tile, tiles per segment, and tiles.

    A request without keys has one tile, with nothing in it. Up to half of the segments are as short as may be, so that
    one request alone fills a GPU; then they grow to 8 * SEGMENT keys, then in number, then again in length.
    """
    first = length * 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    origin = first // BLOCK_N * BLOCK_N
    most = tl.maximum(tl.cdiv(length - origin, BLOCK_N), 1)
    size = tl.minimum(tl.cdiv(most, MAX_SEGMENTS // 2), 8 * SEGMENT // BLOCK_N)
    size = tl.maximum(tl.maximum(size, tl.cdiv(most, MAX_SEGMENTS)), SEGMENT // BLOCK_N)
    return first, origin, size, most


@triton.jit
def _tiles(
    kv_len, request, decodes, window,
    WINDOWED: tl.constexpr, SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles per segment, and tiles, of these requests; none where there is no such request."""
    there = (request >= 0) & (request < decodes)
    _, _, size, most = _cut(tl.load(kv_len + request, there, other=0), window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
    return size, tl.where(there, most, 0)


@triton.jit
def _partner(request):
    """Whom the program of this request takes too, if requests are dealt out whole."""
    return 2 * tl.num_programs(1) - 1 - request


@triton.jit
def _run(
    kv_len, decodes, least, window,
    WINDOWED: tl.constexpr, SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITTING: tl.constexpr,
):  # fmt: skip
    """Tiles in a share (fair, or `least`); of this program's run its first request, where that one's tiles begin, and
    how many the run has; and what makes a request's number that of the next one in the run.

    Tiles count through all requests. A program takes the segments whose first tile lies in its share.
    """
    some = tl.arange(0, 256)
    programs = tl.num_programs(1)
    all_tiles = 0
    for start in range(0, decodes, 256):
        _, most = _tiles(kv_len, start + some, decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        all_tiles += tl.sum(most)
    share = tl.maximum(tl.cdiv(all_tiles, programs), least)
    begin = tl.program_id(1) * share
    end = begin + share

    whole = decodes <= 2 * programs
    for start in range(0, tl.where(whole, tl.minimum(decodes, programs), 0), 256):
        first = start + some
        _, one = _tiles(kv_len, first, decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        _, two = _tiles(kv_len, _partner(first), decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        whole &= tl.max(tl.where(first < programs, one + two, 0)) <= share + SPLITTING // BLOCK_N

    if whole:
        begun = tl.program_id(1)
        base = begin  # of a whole request the first tile comes first
        step = _partner(begun) - begun
        _, one = _tiles(kv_len, begun, decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        _, two = _tiles(kv_len, _partner(begun), decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
        count = one + two
    else:
        begun = decodes
        step = 1
        base = 0
        count = 0
        before = 0
        for start in range(0, decodes, 256):
            size, most = _tiles(kv_len, start + some, decodes, window, WINDOWED, SEGMENT, MAX_SEGMENTS, BLOCK_N)
            at = before + tl.cumsum(most) - most
            low = tl.minimum(tl.cdiv(tl.maximum(begin - at, 0), size) * size, most)
            high = tl.minimum(tl.cdiv(tl.maximum(end - at, 0), size) * size, most)
            found = tl.min(tl.where(low < high, start + some, decodes))
            base += tl.sum(tl.where((start + some == found) & (begun == decodes), at, 0))
            begun = tl.minimum(begun, found)
            count += tl.sum(high - low)
            before += tl.sum(most)
    return share, begun, base, count, step


@triton.jit
def _ask(k_pool, v_pool, mine, n, end, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr):
    """Ask for the keys and values at [n, n + KEYS) to come to L2 (from `end` on for the slot of the pad)."""
    LINE: tl.constexpr = 1024 // k_pool.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_DIM + LINE - 1) // LINE
    key = n + tl.arange(0, KEYS)
    at = tl.load(mine + key, key < end, other=0).to(tl.int64) * STRIDE
    for line in tl.static_range(LINES):
        prefetch(k_pool + at + line * LINE)
        prefetch(v_pool + at + line * LINE)
