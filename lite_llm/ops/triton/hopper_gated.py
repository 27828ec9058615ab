"""Gate and up with SiLU-mul, of many tokens on Hopper: one program on each multiprocessor, four groups of warps in it.

One warp brings tokens, one brings weights, and two warp groups multiply, 64 tokens each. A tile is 128 tokens by 128
rows of gate and as many of up; where such tiles would leave a last round half empty, its rows are dealt out in narrower
ones. The second group is two blocks behind the first: while one stores what it has, the other multiplies, and what the
next tile needs is on its way already. No bit depends on how rows are dealt out. Written in Gluon, which Triton's
interpreter cannot run.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.gpu import processors
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.norm import rms_norm

# Triton 3.6 and newer name these differently.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

TOKENS, ROWS = 128, 128  # of a tile; rows of gate
NARROW = {96: 0.77, 80: 0.68, 64: 0.52, 48: 0.46, 32: 0.36}
"""How long tiles of fewer rows take, by the time of one of ROWS (an H200). What is no power of two is two matmuls."""

_COLUMNS = gl.constexpr(64)  # of the input at a time
_STAGES = 4  # blocks that shared memory holds, beside a finished tile and the barriers
_LATE = gl.constexpr(2)  # blocks that the second group is behind at first
_TOGETHER = 8  # tiles of tokens that go through a block of rows side by side
_REGISTERS = 232  # of a thread that multiplies; who brings has 24


def serves(in_features: int, out_features: int, capability: int) -> bool:
    """Whether a GPU of this capability runs this shape: rows begin at multiples of 16 bytes. `out_features`: both."""
    return capability == 90 and in_features % 8 == 0 and out_features % 16 == 0 and min(in_features, out_features) > 0


def readable(x: Tensor, weight: Tensor) -> bool:
    """Whether they lie where the copy engine can read them."""
    return x.is_cuda and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


class Deal(NamedTuple):
    """How rows of gate are dealt out: in blocks of ROWS, and the rest in blocks of `rows`."""

    wide: int  # blocks
    narrow: int
    rows: int

    def time(self, tiles: int, programs: int) -> float:
        """Of the busiest of so many programs, by that of one tile of ROWS, if each block is `tiles` tiles and they go
        round. How many a program has changes from the first program to the last in two places at most.
        """
        first, every = tiles * self.wide, tiles * (self.wide + self.narrow)
        starts = (0, first % programs, every % programs)
        counts = ((triton.cdiv(first - p, programs), triton.cdiv(every - p, programs)) for p in starts)
        return max(wide + (both - wide) * NARROW[self.rows] for wide, both in counts)


@functools.cache
def deal(tiles: int, outputs: int, programs: int) -> Deal:
    """With which the busiest program is done first, and of these the one with most wide blocks."""
    blocks = triton.cdiv(outputs, ROWS)
    found = [Deal(blocks, 0, max(NARROW))]
    for rounds in range(tiles * blocks // programs + 1):
        wide = rounds * programs // tiles
        left = outputs - wide * ROWS
        found += [Deal(wide, triton.cdiv(left, rows), rows) for rows in NARROW if left > 0]
    return min(found, key=lambda deal: (deal.time(tiles, programs), -deal.wide))


def hopper_gated(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, how: Deal | None = None) -> Tensor:
    """`linear` with `gated` and without a bias, of any tokens: arguments as it has checked, `readable`, and of a shape
    that this GPU `serves`.
    """
    x = x if norm is None else rms_norm(x, norm, eps)
    (tokens, in_features), outputs, programs = x.shape, len(weight) // 2, processors(x.device)
    tiles = triton.cdiv(tokens, TOKENS)
    wide, narrow, rows = how or deal(tiles, outputs, programs)
    parts = _parts(rows)
    out, absent, dependent = x.new_empty(tokens, outputs), [None] * (2 - len(parts)), pdl(x.device)
    _hopper_gated_kernel[(min(programs, tiles * (wide + narrow)),)](
        _boxes(x, TOKENS, _COLUMNS.value),
        *(_boxes(weight, part, _COLUMNS.value) for part in (ROWS, *parts)), *absent,
        *(_boxes(out, TOKENS // 2, part) for part in (ROWS, *parts)), *absent,
        outputs, tiles, wide, narrow, triton.cdiv(in_features, _COLUMNS.value),
        PARTS=parts, STAGES=_STAGES, TOGETHER=_TOGETHER, REGISTERS=_REGISTERS, PDL=dependent,
        num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return out


def _parts(rows: int) -> tuple[int, ...]:
    """Powers of two that add up to it, the largest first: a matmul of tensor cores has twice as many rows as a part."""
    return tuple(part for part in (64, 32, 16) if rows & part)


def _boxes(matrix: Tensor, high: int, across: int) -> TensorDescriptor:
    kind = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(matrix, [high, across], _layout(high, across, kind))


def _layout(high: int, across: int, kind: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([high, across], kind)


def aot_cases(capability: int) -> list[AotCase]:
    kinds = [("bf16", rows) for rows in NARROW] + [("fp16", 80)]
    return [_case(*kind) for kind in kinds] if capability == 90 else []


def _case(dtype: str, rows: int) -> AotCase:
    kind, parts = gl.bfloat16 if dtype == "bf16" else gl.float16, _parts(rows)

    def box(high: int, across: int) -> str:
        return f"tensordesc<{dtype}[{high},{across}],{_layout(high, across, kind)!r}>"

    counts = ("outputs", "tiles", "wide", "narrow", "steps")
    kinds = {"x_boxes": box(TOKENS, _COLUMNS.value)} | dict.fromkeys(counts, "i32")
    for name, part in zip(("", "0", "1"), (ROWS, *parts)):
        kinds |= {f"w{name}_boxes": box(part, _COLUMNS.value), f"out{name}_boxes": box(TOKENS // 2, part)}
    constants = {"PARTS": parts, "STAGES": _STAGES, "TOGETHER": _TOGETHER, "REGISTERS": _REGISTERS, "PDL": True}
    if len(parts) == 1:
        constants |= {"w1_boxes": None, "out1_boxes": None}
    return AotCase(f"hopper-gated-{dtype}-{rows}", _hopper_gated_kernel, kinds, constants, {}, 4, 3, SHARED[90])


@gluon.jit(do_not_specialize=["outputs", "tiles", "wide", "narrow", "steps"])
def _hopper_gated_kernel(
    x_boxes, w_boxes, w0_boxes, w1_boxes, out_boxes, out0_boxes, out1_boxes, outputs, tiles, wide, narrow, steps,
    PARTS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Block n of a program's input is stage n % STAGES, round n // STAGES. It is `ready` when tokens and weights are
    there, and `free` when both groups have multiplied it; the other parity of `free` is passed at once in round 0.
    """
    WIDE: gl.constexpr = (w_boxes.block_shape[0],)
    weights, outs = (w0_boxes,), (out0_boxes,)
    if len(PARTS) > 1:
        weights, outs = (w0_boxes, w1_boxes), (out0_boxes, out1_boxes)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_boxes.dtype, [STAGES] + x_boxes.block_shape, x_boxes.layout)
    w_ring = gl.allocate_shared_memory(
        x_boxes.dtype, [STAGES, 2 * w_boxes.block_shape[0], w_boxes.block_shape[1]], w_boxes.layout
    )
    done = gl.allocate_shared_memory(x_boxes.dtype, [2] + out_boxes.block_shape, out_boxes.layout)
    place = (tiles, wide, narrow, steps)
    shared = (x_ring, w_ring, done, ready, free)
    gl.warp_specialize([
        (_multiply, ((out_boxes,), outs, place, shared, 0, WIDE, PARTS, TOGETHER)),
        (_multiply, ((out_boxes,), outs, place, shared, 1, WIDE, PARTS, TOGETHER)),
        (_bring_tokens, (x_boxes, place, shared, TOGETHER, PDL)),
        (_bring_weights, ((w_boxes,), weights, outputs, place, shared, WIDE, PARTS, TOGETHER)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip


@gluon.constexpr_function
def _before(parts, i):
    """Rows of the parts before the i-th."""
    return sum(parts[:i])


@gluon.jit
def _place(number, tiles, blocks, TOGETHER: gl.constexpr):
    """Tile of tokens and block of rows: some tiles have all blocks, one after the other, before the next tiles do."""
    first = number // (TOGETHER * blocks) * TOGETHER
    some = gl.minimum(tiles - first, TOGETHER)
    within = number % (TOGETHER * blocks)
    return first + within % some, within // some


@gluon.jit
def _bring_tokens(boxes, place, shared, TOGETHER: gl.constexpr, PDL: gl.constexpr):
    """Nothing else reads or writes what other kernels do, so nobody else waits for the kernel before this one."""
    x_ring, w_ring, done, ready, free = shared
    tiles, wide, narrow, steps = place
    STAGES: gl.constexpr = ready.shape[0]
    release(PDL)
    wait(PDL)
    n = gl.to_tensor(0)
    for number in range(gl.program_id(0), tiles * (wide + narrow), gl.num_programs(0)):
        before, blocks = 0, wide
        if number >= tiles * wide:
            before, blocks = tiles * wide, narrow
        tile, block = _place(number - before, tiles, blocks, TOGETHER)
        for k in range(steps):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), boxes.block_type.nbytes)
            _load_box(boxes, [tile * boxes.block_shape[0], k * _COLUMNS], ready.index(stage), x_ring.index(stage))
            n += 1


@gluon.jit
def _bring_weights(
    wides, narrows, outputs, place, shared, WIDE: gl.constexpr, PARTS: gl.constexpr, TOGETHER: gl.constexpr
):  # fmt: skip
    tiles, wide, narrow, steps = place
    number = gl.program_id(0)
    n = gl.to_tensor(0)
    while number < tiles * wide:
        tile, block = _place(number, tiles, wide, TOGETHER)
        n = _bring_block(wides, block * WIDE[0], outputs, steps, shared, n, WIDE)
        number += gl.num_programs(0)
    while number < tiles * (wide + narrow):
        tile, block = _place(number - tiles * wide, tiles, narrow, TOGETHER)
        row = wide * WIDE[0] + block * _before(PARTS, len(PARTS))
        n = _bring_block(narrows, row, outputs, steps, shared, n, PARTS)
        number += gl.num_programs(0)


@gluon.jit
def _bring_block(weights, row, outputs, steps, shared, n, PARTS: gl.constexpr):
    x_ring, w_ring, done, ready, free = shared
    STAGES: gl.constexpr = ready.shape[0]
    BYTES: gl.constexpr = weights[0].block_type.nbytes // PARTS[0] * 2 * _before(PARTS, len(PARTS))
    for k in range(steps):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        for i in gl.static_range(len(PARTS)):
            to = w_ring.index(stage).slice(2 * _before(PARTS, i), 2 * PARTS[i], 0)
            _bring_part(weights[i], row + _before(PARTS, i), outputs, k, ready.index(stage), to, PARTS[i])
        n += 1
    return n


@gluon.jit
def _bring_part(boxes, row, outputs, k, ready, to, ROWS: gl.constexpr):
    """Rows of gate, and behind them those of up."""
    _load_box(boxes, [row, k * _COLUMNS], ready, to.slice(0, ROWS, 0))
    _load_box(boxes, [row + outputs, k * _COLUMNS], ready, to.slice(ROWS, ROWS, 0))


@gluon.jit
def _multiply(
    wides, narrows, place, shared, me: gl.constexpr,
    WIDE: gl.constexpr, PARTS: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """64 tokens of each tile."""
    x_ring, w_ring, done, ready, free = shared
    tiles, wide, narrow, steps = place
    number = gl.program_id(0)
    n = gl.to_tensor(0)
    if (me == 1) & (steps > _LATE):
        mbarrier.wait(ready.index(_LATE), 0)
    while number < tiles * wide:
        tile, block = _place(number, tiles, wide, TOGETHER)
        n = _multiply_block(wides, tile, block * WIDE[0], steps, shared, n, me, WIDE)
        number += gl.num_programs(0)
    while number < tiles * (wide + narrow):
        tile, block = _place(number - tiles * wide, tiles, narrow, TOGETHER)
        row = wide * WIDE[0] + block * _before(PARTS, len(PARTS))
        n = _multiply_block(narrows, tile, row, steps, shared, n, me, PARTS)
        number += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit
def _multiply_block(outs, tile, row, steps, shared, n, me: gl.constexpr, PARTS: gl.constexpr):
    x_ring, w_ring, done, ready, free = shared
    STAGES: gl.constexpr = ready.shape[0]
    HALF: gl.constexpr = x_ring.shape[1] // 2
    sums = ()
    for i in gl.static_range(len(PARTS)):
        sums = sums + (_zeros(HALF, 2 * PARTS[i]),)
    for k in range(steps):
        stage = n % STAGES
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        x = x_ring.index(stage).slice(me * HALF, HALF, 0)
        under_way = ()
        for i in gl.static_range(len(PARTS)):
            w = w_ring.index(stage).slice(2 * _before(PARTS, i), 2 * PARTS[i], 0)
            under_way = under_way + (warpgroup_mma(x, w.permute((1, 0)), sums[i], is_async=True),)
        sums = _waited(len(PARTS), under_way)  # for those of the block before
        if k > 0:
            mbarrier.arrive(free.index((n - 1) % STAGES), count=1)
        n += 1
    sums = _waited(0, sums)
    mbarrier.arrive(free.index((n - 1) % STAGES), count=1)
    tma.store_wait(0)  # what this group stored last is read
    _barrier()
    for i in gl.static_range(len(PARTS)):
        at = [tile * 2 * HALF + me * HALF, row + _before(PARTS, i)]
        _store(sums[i], outs[i], at, done.index(me), i)
    return n


@gluon.jit
def _zeros(HIGH: gl.constexpr, WIDE: gl.constexpr):
    return gl.zeros([HIGH, WIDE], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16]))


@gluon.jit
def _waited(outstanding: gl.constexpr, sums):
    """A tuple of those sums, when at most so many matmuls are under way; one alone comes without a tuple."""
    found = warpgroup_mma_wait(outstanding, deps=sums)
    if len(sums) == 1:
        return (found,)
    else:
        return found


@gluon.jit
def _store(sums, boxes, at, done, i: gl.constexpr):
    """The i-th part: a finished tile's memory is that of one wide part, or two halves of it for narrow ones."""
    HIGH: gl.constexpr = sums.shape[0]
    HALF: gl.constexpr = sums.shape[1] // 2
    SIZE: gl.constexpr = done.shape[0] * done.shape[1]
    gate, up = gl.split(gl.permute(gl.reshape(sums, [HIGH, 2, HALF]), (0, 2, 1)))
    to = _view(done, boxes.dtype, [SIZE // HALF, HALF], boxes.layout).slice(i * (SIZE // 2 // HALF), HIGH, 0)
    to.store((gate / (1.0 + gl.exp(-gate)) * up).to(boxes.dtype))
    fence_async_shared()
    _barrier()
    _store_box(boxes, at, to)
