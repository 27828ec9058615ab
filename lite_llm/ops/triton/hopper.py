"""Attention of prompts on Hopper: one program on each multiprocessor; one of its warp groups brings, others multiply.

A tile is 64 (token, head) pairs per multiplying warp group, all of one request and one KV head. Its keys come in blocks
from the last to the first, so that only the first blocks need masks. A block whose slots are neighbours is one box for
the copy engine; any other is gathered slot by slot. Which tile comes next is found out while the one before it is
multiplied: the longest first, of as many KV heads at a time as L2 holds (both as FlashAttention-3 has it). Written in
Gluon, which Triton's interpreter cannot run.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.attention_tiles import HOPPER_HEAD_DIM
from lite_llm.ops.triton.decode import LOG2E
from lite_llm.ops.triton.gpu import processors
from lite_llm.ops.triton.hopper_multiply import fact, multiply, span_of
from lite_llm.ops.triton.launch import tickets

# Triton 3.6 and newer name these differently.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_REQUESTS = gl.constexpr(128)  # that the search for a tile looks at together
_LEVELS = gl.constexpr(16)
_IN_L2 = gl.constexpr(8 << 20)  # numbers of K, and as many of V, that L2 is to hold: 32 MB

# Constants, not fields of a tile: of those measured on an H200 (docs/results) these won. With 224 registers who brings
# spills, with 256 keys who multiplies; three stages do not fit.
_GROUPS = 2  # warp groups that multiply, 64 rows each
_KEYS = 128  # of a block
_STAGES = 2  # blocks of K, and of V, in shared memory
_REGISTERS = 216  # of a thread that multiplies; who brings has the rest


def readable(q: Tensor, k_pool: Tensor, v_pool: Tensor) -> bool:
    """Whether they lie where this kernel can read them: the steps of the copy engine and of cp.async are 16 bytes."""
    return q.is_cuda and all(t.data_ptr() % 16 == 0 for t in (q, k_pool, v_pool))


def attend_hopper(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, out: Tensor, table: Tensor, rows: Tensor, q_start: Tensor,
    kv_len: Tensor, decodes: int, scale: float, window: int | None, causal: bool,
) -> None:  # fmt: skip
    """Write the rows of `out` from `decodes` on: those of the other requests, and zeros where no request owns one.

    Arguments as of `attend`, already checked, and `readable`; bf16 or fp16, and HOPPER_HEAD_DIM.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, requests = k_pool.shape[1], len(rows) - decodes
    kind = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([_KEYS, head_dim], kind)
    boxes = [TensorDescriptor.from_tensor(p.flatten(1), [_KEYS, head_dim], layout) for p in (k_pool, v_pool)]
    _hopper_kernel[(processors(q.device),)](
        q, *boxes, k_pool, v_pool, out, table, rows, q_start, kv_len, tickets(2, q.device),
        table.stride(0), decodes, requests, tokens, scale, window or 0,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, WINDOWED=window is not None, CAUSAL=causal,
        GROUPS=_GROUPS, KEYS=_KEYS, STAGES=_STAGES, REGISTERS=_REGISTERS, num_warps=4,
    )  # fmt: skip


def aot_cases(capability: int) -> list[AotCase]:
    if capability != 90:
        return []
    kinds = (("bf16", 4, False, True), ("bf16", 4, True, True), ("bf16", 1, False, False), ("fp16", 7, False, True))
    return [_case(*kind) for kind in kinds]


def _case(dtype: str, group: int, windowed: bool, causal: bool) -> AotCase:
    kind = gl.bfloat16 if dtype == "bf16" else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([_KEYS, HOPPER_HEAD_DIM], kind)
    box = f"tensordesc<{dtype}[{_KEYS}, {HOPPER_HEAD_DIM}],{layout!r}>"
    kinds = dict.fromkeys(("q", "k_pool", "v_pool", "out"), f"*{dtype}") | {"k_boxes": box, "v_boxes": box}
    kinds |= dict.fromkeys(("table", "rows", "q_start", "kv_len", "counters"), "*i32") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("table_stride", "decodes", "requests", "tokens", "window"), "i32")
    constants = {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": HOPPER_HEAD_DIM, "WINDOWED": windowed, "CAUSAL": causal}
    constants |= {"GROUPS": _GROUPS, "KEYS": _KEYS, "STAGES": _STAGES, "REGISTERS": _REGISTERS}
    name = f"hopper-{dtype}-g{group}" + "-window" * windowed + "-all" * (not causal)
    unaligned = dict.fromkeys(("table", "rows", "q_start", "kv_len"), 1)
    return AotCase(name, _hopper_kernel, kinds, constants, unaligned, 4, 3, SHARED[90])


@gluon.jit(
    do_not_specialize=["table_stride", "decodes", "requests", "tokens", "window"],
    do_not_specialize_on_alignment=["table", "rows", "q_start", "kv_len"],
)
def _hopper_kernel(
    q, k_boxes, v_boxes, k_pool, v_pool, out, table, rows, q_start, kv_len, counters,
    table_stride, decodes, requests, tokens, scale, window,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOWED: gl.constexpr, CAUSAL: gl.constexpr,
    GROUPS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers by twos: `ready` is completed once by who brings, `free` once by each group that multiplies.

    Use n of a buffer of S stages is stage n % S, round n // S; it waits for `ready` of parity round & 1, and whoever
    fills it before waits for `free` of the other parity, which is passed at once in round 0.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    QL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], dtype)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [GROUPS, 64, HEAD_DIM], QL)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], k_boxes.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], k_boxes.layout)
    facts = gl.allocate_shared_memory(gl.int32, [64, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    gathered = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], BL)
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], BL)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BL)
    mbarrier.init(q_ready.index(0), count=1)
    mbarrier.init(q_free.index(0), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    shared = (queries, facts, k_ring, v_ring, gathered, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn)
    given = (q, k_boxes, v_boxes, k_pool, v_pool, table, rows + decodes, q_start + decodes, kv_len + decodes, counters)
    scale *= LOG2E
    # Who brings is first, because the kernel's arguments cost the first warp group no registers.
    gl.warp_specialize([
        (_bring, (given, table_stride, requests, tokens, window, shared, KV_HEADS, GROUP, WINDOWED, CAUSAL)),
        (multiply, (out, window, scale, shared, 0, KV_HEADS, GROUP, WINDOWED, CAUSAL)),
        (multiply, (out, window, scale, shared, 1, KV_HEADS, GROUP, WINDOWED, CAUSAL)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


@gluon.jit
def _requests(given, base, requests, tokens, VL: gl.constexpr):
    """First token, end and length of _REQUESTS requests; positions in one of _LEVELS equal parts of the longest.

    Behind the last request comes one without keys, which owns the pad rows.
    """
    q, k_boxes, v_boxes, k_pool, v_pool, table, rows, q_start, kv_len, counters = given
    lane = base + gl.arange(0, _REQUESTS, VL)
    begin = gl.load(q_start + lane, lane <= requests, other=tokens)
    end = gl.load(q_start + lane + 1, lane < requests, other=tokens)
    length = gl.load(kv_len + lane, lane < requests, other=0)
    return begin, end, length, gl.max(length, 0) // _LEVELS + 1


@gluon.jit
def _above(level, begin, end, length, span, GROUP: gl.constexpr, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
    """How many tiles of each request end at position level * span or behind it; all at level 0, none at _LEVELS."""
    tiles = ((end - begin) * GROUP + ROWS - 1) // ROWS
    if CAUSAL:
        beyond = gl.maximum(level * span - (length - (end - begin)), 0)
        below = gl.minimum(gl.maximum((beyond * GROUP + ROWS - 1) // ROWS - 1, 0), tiles)
    else:
        below = gl.where(length >= level * span, 0, tiles)
    return gl.where(level == 0, tiles, gl.where(level == _LEVELS, 0, tiles - below))


@gluon.jit
def _find(
    given, requests, tokens, window, facts, tiles, number, base, passed,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    WINDOWED: gl.constexpr, CAUSAL: gl.constexpr, VL: gl.constexpr,
):  # fmt: skip
    """Note the facts about tile `number`. Those that end at the highest level are first, of some KV heads at a time.

    Tiles of requests before `base` have numbers below `passed`. Returns the KV head, -1 if there is no such tile,
    and the new `base` and `passed`.
    """
    q, k_boxes, v_boxes, k_pool, v_pool, table, rows, q_start, kv_len, counters = given
    number -= passed
    begin, end, length, span = _requests(given, base, requests, tokens, VL)
    total = gl.sum(_above(0, begin, end, length, span, GROUP, ROWS, CAUSAL), 0)
    while (number >= total * KV_HEADS) & (base + _REQUESTS <= requests):
        base += _REQUESTS
        passed += total * KV_HEADS
        number -= total * KV_HEADS
        begin, end, length, span = _requests(given, base, requests, tokens, VL)
        total = gl.sum(_above(0, begin, end, length, span, GROUP, ROWS, CAUSAL), 0)
    kv_head = -1
    if number < total * KV_HEADS:
        heads, keys_together = KV_HEADS, gl.sum(length, 0)
        for _ in gl.static_range(5):
            if (heads % 2 == 0) & (keys_together > _IN_L2 // HEAD_DIM // heads):
                heads //= 2
        first_head = number // (total * heads) * heads
        unit = (number - first_head * total) // heads
        kv_head = first_head + (number - first_head * total) % heads
        level = 0  # the highest with so many tiles at it and above
        for i in gl.static_range(4):
            higher = level + (_LEVELS >> (i + 1))
            if gl.sum(_above(higher, begin, end, length, span, GROUP, ROWS, CAUSAL), 0) > unit:
                level = higher
        above = _above(level + 1, begin, end, length, span, GROUP, ROWS, CAUSAL)
        unit -= gl.sum(above, 0)
        here = _above(level, begin, end, length, span, GROUP, ROWS, CAUSAL) - above
        lane = gl.arange(0, _REQUESTS, VL)
        request, before = 0, 0  # the last one before which there are no more tiles of this level
        for i in gl.static_range(7):
            further = request + (_REQUESTS >> (i + 1))
            less = gl.sum(gl.where(lane < further, here, 0), 0)
            if less <= unit:
                request = further
                before = less
        request += base
        first_token = gl.load(q_start + request)
        next_token, keys, row = tokens, 0, 0
        if request < requests:
            next_token = gl.load(q_start + request + 1)
            keys = gl.load(kv_len + request)
            row = gl.load(rows + request)
        tile = ((next_token - first_token) * GROUP + ROWS - 1) // ROWS
        tile -= _above(level + 1, first_token, next_token, keys, span, GROUP, ROWS, CAUSAL) + 1 + unit - before
        count = (next_token - first_token) * GROUP
        first_row, offset = tile * ROWS, keys - (next_token - first_token)
        start, edge, middle, stop = span_of(first_row, count, offset, keys, window, GROUP, ROWS, KEYS, WINDOWED, CAUSAL)
        _put(facts, tiles, 1, first_token)
        _put(facts, tiles, 2, first_row)
        _put(facts, tiles, 3, count)
        _put(facts, tiles, 4, offset)
        _put(facts, tiles, 5, keys)
        _put(facts, tiles, 6, row)
        _put(facts, tiles, 7, start)
        _put(facts, tiles, 8, stop)
    _put(facts, tiles, 0, kv_head)
    _barrier()  # all see them
    return kv_head, base, passed


@gluon.jit
def _bring(
    given, table_stride, requests, tokens, window, shared,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, WINDOWED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Choose tiles, and bring their queries, keys and values."""
    q, k_boxes, v_boxes, k_pool, v_pool, table, rows, q_start, kv_len, counters = given
    queries, facts, k_ring, v_ring, gathered, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = shared
    GROUPS: gl.constexpr = queries.shape[0]
    ROWS: gl.constexpr = 64 * GROUPS
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    VL: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])  # every warp holds all: no warp waits for another
    IL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    col = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, IL))
    key = gl.arange(0, KEYS, VL)
    programs = gl.num_programs(0)
    blocks, tiles = 0, 0  # brought so far
    kv_head, base, passed = _find(
        given, requests, tokens, window, facts, 0, gl.program_id(0), gl.to_tensor(0), gl.to_tensor(0),
        KV_HEADS, GROUP, HEAD_DIM, ROWS, KEYS, WINDOWED, CAUSAL, VL,
    )  # fmt: skip
    while kv_head >= 0:
        first_token, first_row, count = fact(facts, tiles, 1), fact(facts, tiles, 2), fact(facts, tiles, 3)
        keys, start, stop = fact(facts, tiles, 5), fact(facts, tiles, 7), fact(facts, tiles, 8)
        its_slots = table + fact(facts, tiles, 6).to(gl.int64) * table_stride
        next_head = -1
        n = stop - 1
        slots = gl.load(its_slots + n * KEYS + key, n * KEYS + key < keys, other=0)
        while n >= start:
            stage, parity = blocks % STAGES, (blocks // STAGES) & 1
            now, first_key = slots, n * KEYS
            # The next block's slots are on their way while this one is fetched.
            slots = gl.load(its_slots + (first_key - KEYS + key), key >= KEYS - first_key, other=0)
            one = gl.max(now - key, 0)
            together = (one == gl.min(now - key, 0)).to(gl.int32)  # not behind the last key: 0 follows no slot
            mbarrier.wait(k_free.index(stage), parity ^ 1)
            _fetch(together, k_boxes, k_pool, now, one, first_key, keys, kv_head, k_ring.index(stage),
                   k_ready.index(stage), gathered.index(stage), KV_HEADS, IL)  # fmt: skip
            if n == stop - 1:
                mbarrier.wait(q_free.index(0), (tiles & 1) ^ 1)
                for g in gl.static_range(GROUPS):
                    row = first_row + g * 64 + gl.arange(0, 64, gl.SliceLayout(1, IL))
                    head = (first_token + row // GROUP).to(gl.int64) * (KV_HEADS * GROUP) + row % GROUP
                    at_q = (head + kv_head * GROUP)[:, None] * HEAD_DIM + col[None, :]
                    _gather(queries.index(g), q + at_q, (row < count)[:, None] & (col >= 0)[None, :])
                async_copy.mbarrier_arrive(q_ready.index(0))
                _barrier()  # all have put their part of the copies into the count
                mbarrier.arrive(q_ready.index(0), count=1)
            mbarrier.wait(v_free.index(stage), parity ^ 1)
            _fetch(together, v_boxes, v_pool, now, one, first_key, keys, kv_head, v_ring.index(stage),
                   v_ready.index(stage), gathered.index(STAGES + stage), KV_HEADS, IL)  # fmt: skip
            if n == gl.maximum(stop - 2, start):
                # Both stages are full: whoever multiplies has enough to do while the next tile is sought.
                number = programs + gl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
                next_head, base, passed = _find(
                    given, requests, tokens, window, facts, tiles + 1, number, base, passed,
                    KV_HEADS, GROUP, HEAD_DIM, ROWS, KEYS, WINDOWED, CAUSAL, VL,
                )  # fmt: skip
            blocks += 1
            n -= 1
        tiles += 1
        kv_head = next_head
    mbarrier.wait(q_free.index(0), (tiles & 1) ^ 1)
    mbarrier.arrive(q_ready.index(0), count=1)
    # Whoever ends last has seen all others past their last tile, and sets the counters back.
    if gl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _fetch(
    together, boxes, pool, slots, first_slot, first_key, stop, kv_head, tile, ready, gathered,
    KV_HEADS: gl.constexpr, IL: gl.constexpr,
):  # fmt: skip
    """A block of K or V into `tile`: as one box if its slots are neighbours, else row by row; zeros from `stop` on."""
    KEYS: gl.constexpr = tile.shape[0]
    HEAD_DIM: gl.constexpr = tile.shape[1]
    gathered.store(gl.full([1], together ^ 1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    if together:
        _barrier()  # the note is written
        mbarrier.expect(ready, boxes.block_type.nbytes)
        _load_box(boxes, [first_slot, kv_head * HEAD_DIM], ready, tile)
    else:
        key = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, IL))
        col = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, IL))
        at = gl.convert_layout(slots, gl.SliceLayout(1, IL)).to(gl.int64) * (KV_HEADS * HEAD_DIM)
        at = pool + kv_head * HEAD_DIM + at[:, None] + col[None, :]
        _gather(tile, at, (key < stop)[:, None] & (col >= 0)[None, :])
        async_copy.mbarrier_arrive(ready)
        _barrier()  # all have put their part of the copies into the count
        mbarrier.arrive(ready, count=1)


@gluon.jit
def _put(facts, tiles, i: gl.constexpr, value):
    facts.index(tiles % 4 * 16 + i).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
