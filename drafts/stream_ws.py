"""DRAFT (never run): what lies between two attentions of decode, in one kernel whose weights never stop coming (Hopper).

out projection + residual -> norm, gate and up, SiLU -> down + residual -> the next layer's norm and QKV. Every
multiprocessor has one program. It asks for the tiles of all four weights in one sequence through one ring of shared
memory, whatever phase the tokens are in; between phases all programs wait for each other. So while results pass from
program to program the memory goes on filling the ring, and the ring covers some 4 us.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_tile = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

ROWS = 64  # outputs of a tile: what one warp group multiplies at a time


class Plan(NamedTuple):
    tokens: int  # the most it takes: 8, 16, 32 or 64
    columns: int = 128  # of a tile
    stages: int = 7  # tiles of weights in the ring
    inputs: int = 4  # tiles of inputs under way
    splits: tuple[int, int, int, int] = (4, 1, 4, 2)  # programs that share a block of outputs: out, gate_up, down, qkv
    flight: int = 4  # tiles under way at most
    regs: int = 128


@gluon.jit
def _ask(
    n, n0, n1, n2, n3, w_out, w_gate, w_down, w_qkv, ring, ready, me, G,
    S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, S3: gl.constexpr,
    K0: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, K3: gl.constexpr,
    FFN: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for this program's n-th tile, if there is one. n0 ... n3: the tiles up to the end of each phase.

    A phase deals units (a block of ROWS outputs, one of K parts of the input, S tiles) out in turn.
    """
    slot = n % STAGES
    mbarrier.expect(ready.index(slot), w_out.block_type.nbytes)
    if n < n0:
        unit = me + n // S0 * G
        at = unit % K0 * (S0 * COLUMNS) + n % S0 * COLUMNS
        load_tile(w_out, [unit // K0 * ROWS, at], ready.index(slot), ring.index(slot))
    elif n < n1:
        m = (n - n0) // 2
        unit = me + m // S1 * G
        at = unit % K1 * (S1 * COLUMNS) + m % S1 * COLUMNS
        load_tile(
            w_gate, [unit // K1 * ROWS + (n - n0) % 2 * FFN, at], ready.index(slot), ring.index(slot)
        )
    elif n < n2:
        m = n - n1
        unit = me + m // S2 * G
        at = unit % K2 * (S2 * COLUMNS) + m % S2 * COLUMNS
        load_tile(w_down, [unit // K2 * ROWS, at], ready.index(slot), ring.index(slot))
    else:
        m = n - n2
        unit = me + m // S3 * G
        at = unit % K3 * (S3 * COLUMNS) + m % S3 * COLUMNS
        load_tile(w_qkv, [unit // K3 * ROWS, at], ready.index(slot), ring.index(slot))


@gluon.jit
def _fetch_x(x, inputs, slot, column, end, tokens, IN: gl.constexpr, TOKENS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of the inputs on its way to shared memory, one group of copies."""
    LANES: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    IL: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, IL))
    col = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, IL))
    # Rows that are not there are the last one again: their results are not stored.
    at = x + gl.minimum(token, tokens - 1)[:, None] * IN + col[None, :]
    if column < end:
        copy_tile(inputs.index(slot), at)
    async_copy.commit_group()


@gluon.jit
def _all_here(arrivals, target):
    """Wait until all programs have come here; what they stored before is then visible."""
    barrier()
    gl.atomic_add(arrivals, 1, sem="release", scope="gpu")
    here = gl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
    while here < target:
        here = gl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
    barrier()


@gluon.jit
def _is_last(ticket, arrivals):
    barrier()
    last = gl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        gl.store(ticket, 0)
    return last


@gluon.jit
def _total(at, mask, step, SPLITS: gl.constexpr):
    acc = gl.load(at, mask, other=0.0, cache_modifier=".cg")
    for split in gl.static_range(1, SPLITS):
        acc += gl.load(at + split * step, mask, other=0.0, cache_modifier=".cg")
    return acc


@gluon.jit
def _rstd(squares, tokens, eps, WIDTH: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, BLOCKS: gl.constexpr):
    """1 / root mean square of each token, from the sums of squares of each block of features: [1, TOKENS]."""
    OL: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, OL))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, OL))
    mask = (block < WIDTH // ROWS)[:, None] & (token < tokens)[None, :]
    found = gl.load(squares + block[:, None] * TOKENS + token[None, :], mask, other=0.0, cache_modifier=".cg")
    return gl.rsqrt(gl.sum(found, 0) / WIDTH + eps)[None, :]


@gluon.jit
def _phase(
    n, x, scale, residual, normed, y, w_out, w_gate, w_down, w_qkv, bias, q, k_pool, v_pool, positions, slots, cos, sin,
    partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride, ring, inputs, ready, empty, n0, n1, n2, n3,
    PHASE: gl.constexpr, UNITS: gl.constexpr, STEPS: gl.constexpr, PARTS: gl.constexpr, IN: gl.constexpr,
    EVERY: gl.constexpr, WIDTH: gl.constexpr, FFN: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, S3: gl.constexpr,
    K0: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, K3: gl.constexpr,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, INPUTS: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """One matmul and what comes behind it; the number of tiles of weights that have been used by its end."""
    EACH: gl.constexpr = 2 if PHASE == 1 else 1
    dtype: gl.constexpr = w_out.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    OL: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    me, G = gl.program_id(0), gl.num_programs(0)
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, OL))
    there = token < tokens
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, OL))
    rstd = gl.full([1, TOKENS], 1.0, gl.float32, OL)
    if PHASE > 0:
        _all_here(arrivals, PHASE * G)
    if PHASE % 2 == 1:
        rstd = _rstd(squares + PHASE // 2 * (BLOCKS * TOKENS), tokens, eps, WIDTH, TOKENS, ROWS, BLOCKS)
    for unit in range(me, UNITS, G):
        block, split = unit // PARTS, unit % PARTS
        first, end = split * (STEPS * COLUMNS), (split + 1) * (STEPS * COLUMNS)
        for i in gl.static_range(INPUTS):
            _fetch_x(x, inputs, i, first + i * COLUMNS, end, tokens, IN, TOKENS, COLUMNS)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, SL)
        up = gl.zeros([ROWS, TOKENS], gl.float32, SL)
        for step in range(STEPS):
            async_copy.wait_group(INPUTS - 1)
            fence_async_shared()
            barrier()  # this tile of inputs is there for all warps
            b = inputs.index(step % INPUTS).permute((1, 0))
            mbarrier.wait(ready.index(n % STAGES), (n // STAGES) & 1)
            acc = warpgroup_mma(ring.index(n % STAGES), b, acc, is_async=True)
            if EACH == 2:
                mbarrier.wait(ready.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1)
                up = warpgroup_mma(ring.index((n + 1) % STAGES), b, up, is_async=True)
                acc, up = warpgroup_mma_wait(0, deps=(acc, up))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()  # all warps are done with these tiles
            for i in gl.static_range(EACH):
                mbarrier.arrive(empty.index((n + i) % STAGES), count=1)
            _fetch_x(x, inputs, step % INPUTS, first + (step + INPUTS) * COLUMNS, end, tokens, IN, TOKENS, COLUMNS)
            n += EACH
        async_copy.wait_group(0)

        row = block * ROWS + lane
        mask = (row >= 0)[:, None] & there[None, :]
        sums = gl.convert_layout(acc, OL)
        others = gl.convert_layout(up, OL) if EACH == 2 else sums
        at = partial + token[None, :] * EVERY + row[:, None]
        last = n >= 0
        if PARTS > 1 or PHASE == 3:
            gl.store(at + split * TOKENS * EVERY, sums, mask)
            if EACH == 2:
                gl.store(at + split * TOKENS * EVERY + FFN, others, mask)
            GROUP: gl.constexpr = HEAD_DIM // ROWS if PHASE == 3 else 1
            last = _is_last(tickets + block // GROUP, GROUP * PARTS)
        if last:
            if PHASE == 3:
                head = block // (HEAD_DIM // ROWS)
                _heads(q, k_pool, v_pool, bias, positions, slots, cos, sin, partial, rstd, head, tokens, k_stride,
                       v_stride, HEADS, KV_HEADS, HEAD_DIM, TOKENS, PARTS)  # fmt: skip
            else:
                if PARTS > 1:
                    sums = _total(at, mask, TOKENS * EVERY, PARTS)
                    others = _total(at + FFN, mask, TOKENS * EVERY, PARTS) if EACH == 2 else sums
                if PHASE == 1:
                    sums *= rstd
                    sums = sums / (1.0 + gl.exp(-sums)) * (others * rstd)
                    gl.store(y + token[None, :] * FFN + row[:, None], sums.to(dtype), mask)
                else:
                    to = token[None, :] * WIDTH + row[:, None]
                    h = (sums + gl.load(residual + to, mask, other=0.0, cache_modifier=".cg").to(gl.float32)).to(dtype)
                    gl.store(residual + to, h, mask)
                    wide = h.to(gl.float32)
                    gain = gl.load(scale + row).to(gl.float32)
                    gl.store(normed + to, (wide * gain[:, None]).to(dtype), mask)
                    gl.store(
                        squares + PHASE // 2 * (BLOCKS * TOKENS) + block * TOKENS + token,
                        gl.sum(gl.where(mask, wide * wide, 0.0), 0),
                    )
    return n


@gluon.jit(do_not_specialize=["eps", "tokens", "k_stride", "v_stride"], do_not_specialize_on_alignment=["positions", "slots"])
def _stream_kernel(
    seen, residual, normed, y, w_out, w_gate, w_down, w_qkv, norm, next_norm, bias,
    q, k_pool, v_pool, positions, slots, cos, sin, partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride,
    WIDTH: gl.constexpr, SEEN: gl.constexpr, FFN: gl.constexpr,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, LAST: gl.constexpr,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, INPUTS: gl.constexpr,
    K0: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, K3: gl.constexpr, BLOCKS: gl.constexpr, FLIGHT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = w_out.dtype
    ALL: gl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    S0: gl.constexpr = SEEN // (K0 * COLUMNS)
    S1: gl.constexpr = WIDTH // (K1 * COLUMNS)
    S2: gl.constexpr = FFN // (K2 * COLUMNS)
    S3: gl.constexpr = WIDTH // (K3 * COLUMNS)
    U0: gl.constexpr = WIDTH // ROWS * K0
    U1: gl.constexpr = FFN // ROWS * K1
    U2: gl.constexpr = WIDTH // ROWS * K2
    U3: gl.constexpr = 0 if LAST else ALL // ROWS * K3
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    OL: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, COLUMNS], dtype)
    me, G = gl.program_id(0), gl.num_programs(0)
    ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLUMNS], w_out.layout)
    inputs = gl.allocate_shared_memory(dtype, [INPUTS, TOKENS, COLUMNS], XS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    n0 = (U0 - me + G - 1) // G * S0
    n1 = n0 + (U1 - me + G - 1) // G * (2 * S1)
    n2 = n1 + (U2 - me + G - 1) // G * S2
    n3 = n2 + (U3 - me + G - 1) // G * S3
    if LAST:
        n3 = n2
    gl.warp_specialize(
        [
            (_work, (seen, residual, normed, y, w_out, w_gate, w_down, w_qkv, norm, next_norm, bias,
                q, k_pool, v_pool, positions, slots, cos, sin, partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride,
                ring, inputs, ready, empty, n0, n1, n2, n3,
                WIDTH, SEEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAST, TOKENS, ROWS, COLUMNS, STAGES, INPUTS, K0, K1, K2, K3, BLOCKS)),
            (_bring, (w_out, w_gate, w_down, w_qkv, ring, ready, empty, n0, n1, n2, n3,
                S0, S1, S2, S3, K0, K1, K2, K3, FFN, ROWS, COLUMNS, STAGES, FLIGHT)),
        ],
        [1], [40],
    )  # fmt: skip


@gluon.jit
def _bring(
    w_out, w_gate, w_down, w_qkv, ring, ready, empty, n0, n1, n2, n3,
    S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, S3: gl.constexpr,
    K0: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, K3: gl.constexpr,
    FFN: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, FLIGHT: gl.constexpr,
):  # fmt: skip
    """One warp asks for all weights in turn. It has few tiles under way: what waits in the memory's queues makes all others wait."""
    me, G = gl.program_id(0), gl.num_programs(0)
    for n in range(n3):
        mbarrier.wait(empty.index(n % STAGES), ((n // STAGES) & 1) ^ 1)
        if FLIGHT < STAGES:
            if n >= FLIGHT:
                mbarrier.wait(ready.index((n - FLIGHT) % STAGES), ((n - FLIGHT) // STAGES) & 1)
        _ask(n, n0, n1, n2, n3, w_out, w_gate, w_down, w_qkv, ring, ready, me, G,
             S0, S1, S2, S3, K0, K1, K2, K3, FFN, ROWS, COLUMNS, STAGES)  # fmt: skip


@gluon.jit
def _work(
    seen, residual, normed, y, w_out, w_gate, w_down, w_qkv, norm, next_norm, bias,
    q, k_pool, v_pool, positions, slots, cos, sin, partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride,
    ring, inputs, ready, empty, n0, n1, n2, n3,
    WIDTH: gl.constexpr, SEEN: gl.constexpr, FFN: gl.constexpr,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, LAST: gl.constexpr,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, INPUTS: gl.constexpr,
    K0: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, K3: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    ALL: gl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    S0: gl.constexpr = SEEN // (K0 * COLUMNS)
    S1: gl.constexpr = WIDTH // (K1 * COLUMNS)
    S2: gl.constexpr = FFN // (K2 * COLUMNS)
    S3: gl.constexpr = WIDTH // (K3 * COLUMNS)
    U0: gl.constexpr = WIDTH // ROWS * K0
    U1: gl.constexpr = FFN // ROWS * K1
    U2: gl.constexpr = WIDTH // ROWS * K2
    U3: gl.constexpr = 0 if LAST else ALL // ROWS * K3
    me, G = gl.program_id(0), gl.num_programs(0)
    gdc_wait()
    gdc_launch_dependents()

    n = 0  # tiles of weights so far
    n = _phase(
        n, seen, norm, residual, normed, y, w_out, w_gate, w_down, w_qkv, bias, q, k_pool, v_pool, positions, slots, cos, sin,
        partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride, ring, inputs, ready, empty, n0, n1, n2, n3,
        0, U0, S0, K0, SEEN, WIDTH, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, S0, S1, S2, S3, K0, K1, K2, K3,
        TOKENS, ROWS, COLUMNS, STAGES, INPUTS, BLOCKS,
    )  # fmt: skip
    n = _phase(
        n, normed, norm, residual, normed, y, w_out, w_gate, w_down, w_qkv, bias, q, k_pool, v_pool, positions, slots, cos, sin,
        partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride, ring, inputs, ready, empty, n0, n1, n2, n3,
        1, U1, S1, K1, WIDTH, 2 * FFN, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, S0, S1, S2, S3, K0, K1, K2, K3,
        TOKENS, ROWS, COLUMNS, STAGES, INPUTS, BLOCKS,
    )  # fmt: skip
    n = _phase(
        n, y, next_norm, residual, normed, y, w_out, w_gate, w_down, w_qkv, bias, q, k_pool, v_pool, positions, slots, cos, sin,
        partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride, ring, inputs, ready, empty, n0, n1, n2, n3,
        2, U2, S2, K2, FFN, WIDTH, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, S0, S1, S2, S3, K0, K1, K2, K3,
        TOKENS, ROWS, COLUMNS, STAGES, INPUTS, BLOCKS,
    )  # fmt: skip
    if not LAST:
        n = _phase(
            n, normed, norm, residual, normed, y, w_out, w_gate, w_down, w_qkv, bias, q, k_pool, v_pool, positions, slots, cos, sin,
            partial, squares, arrivals, tickets, eps, tokens, k_stride, v_stride, ring, inputs, ready, empty, n0, n1, n2, n3,
            3, U3, S3, K3, WIDTH, ALL, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, S0, S1, S2, S3, K0, K1, K2, K3,
            TOKENS, ROWS, COLUMNS, STAGES, INPUTS, BLOCKS,
        )  # fmt: skip
    # The last to leave sets the counters back; nobody waits for them any more.
    barrier()
    if gl.atomic_add(arrivals + 1, 1, sem="acq_rel", scope="gpu") == G - 1:
        gl.store(arrivals, 0)
        gl.store(arrivals + 1, 0)


@gluon.jit
def _heads(
    q, k_pool, v_pool, bias, positions, slots, cos, sin, partial, rstd, head, tokens, k_stride, v_stride,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Finish one head of all tokens: add up, turn, and store it where its kind goes."""
    ALL: gl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    HALF: gl.constexpr = HEAD_DIM // 2
    OL: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, OL))
    there = token < tokens
    i = gl.arange(0, HALF, gl.SliceLayout(1, OL))
    mask = there[None, :] & (i < HALF)[:, None]
    at = partial + token[None, :] * ALL + head * HEAD_DIM + i[:, None]
    a = _total(at, mask, TOKENS * ALL, SPLITS) * rstd
    b = _total(at + HALF, mask, TOKENS * ALL, SPLITS) * rstd
    if bias is not None:
        a += gl.load(bias + head * HEAD_DIM + i).to(gl.float32)[:, None]
        b += gl.load(bias + head * HEAD_DIM + HALF + i).to(gl.float32)[:, None]
    if head < HEADS + KV_HEADS:
        position = gl.load(positions + token, there, other=0).to(gl.int64)
        c = gl.load(cos + position[None, :] * HALF + i[:, None], mask, other=0.0)
        s = gl.load(sin + position[None, :] * HALF + i[:, None], mask, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    low, high = a.to(q.dtype.element_ty), b.to(q.dtype.element_ty)
    if head < HEADS:
        place = q + (token[None, :] * HEADS + head) * HEAD_DIM + i[:, None]
    else:
        slot = gl.load(slots + token, there, other=0).to(gl.int64)[None, :]
        if head < HEADS + KV_HEADS:
            place = k_pool + slot * k_stride + (head - HEADS) * HEAD_DIM + i[:, None]
        else:
            place = v_pool + slot * v_stride + (head - HEADS - KV_HEADS) * HEAD_DIM + i[:, None]
    gl.store(place, low, mask)
    gl.store(place + HALF, high, mask)


_kept: dict = {}


def buffers(device: torch.device, tokens: int, width: int, ffn: int, most: int) -> tuple[Tensor, ...]:
    """normed, y, partial sums, squares, arrivals, tickets: scratch that all launches share."""
    key = device, tokens, width, ffn, most
    if key not in _kept:
        blocks = triton.next_power_of_2(width // ROWS)
        half, full, ints = torch.bfloat16, torch.float32, torch.int32
        _kept[key] = (
            torch.empty(tokens, width, dtype=half, device=device), torch.empty(tokens, ffn, dtype=half, device=device),
            torch.empty(most, dtype=full, device=device), torch.zeros(2 * blocks * tokens, dtype=full, device=device),
            torch.zeros(2, dtype=ints, device=device), torch.zeros(4096, dtype=ints, device=device),
        )  # fmt: skip
    return _kept[key]


def boxes(t: Tensor, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [ROWS, columns], gl.NVMMASharedLayout.get_default_for([ROWS, columns], gl.bfloat16))


def stream_(
    residual: Tensor, seen: Tensor, w_out: Tensor, norm: Tensor, w_gate: Tensor, w_down: Tensor, eps: float, plan: Plan,
    following: tuple | None, programs: int,
) -> Tensor | None:
    """residual [tokens, width], seen [tokens, heads * head_dim]. following: (k_pool, v_pool, w_qkv, bias, norm, positions, slots, cos, sin)"""
    (tokens, width), ffn = residual.shape, len(w_gate) // 2
    k_pool, v_pool, w_qkv, bias, next_norm, positions, slots, cos, sin = following or (None,) * 9
    last = following is None
    heads, kv_heads, head_dim = (1, 1, 64) if last else (len(w_qkv) // k_pool.shape[2] - 2 * k_pool.shape[1], *k_pool.shape[1:])
    every = max(width, 2 * ffn, (heads + 2 * kv_heads) * head_dim)
    normed, y, partial, squares, arrivals, tickets = buffers(residual.device, plan.tokens, width, ffn, plan.tokens * every * max(plan.splits))
    q = None if last else residual.new_empty(tokens, heads, head_dim)
    k = plan.splits
    _stream_kernel[(programs,)](
        seen, residual, normed, y, boxes(w_out, plan.columns), boxes(w_gate, plan.columns), boxes(w_down, plan.columns),
        boxes(w_out if last else w_qkv, plan.columns), norm, norm if last else next_norm, bias,
        residual if last else q, residual if last else k_pool, residual if last else v_pool,
        arrivals if last else positions, arrivals if last else slots, squares if last else cos, squares if last else sin,
        partial, squares, arrivals, tickets, eps, tokens, 0 if last else k_pool.stride(0), 0 if last else v_pool.stride(0),
        WIDTH=width, SEEN=seen.shape[1], FFN=ffn, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, LAST=last,
        TOKENS=plan.tokens, ROWS=ROWS, COLUMNS=plan.columns, STAGES=plan.stages, INPUTS=plan.inputs,
        K0=k[0], K1=k[1], K2=k[2], K3=k[3], BLOCKS=triton.next_power_of_2(width // ROWS), FLIGHT=plan.flight,
        num_warps=4, maxnreg=plan.regs, launch_pdl=True,
    )  # fmt: skip
    return q
