"""Gate and up with SiLU-mul, of many tokens on Hopper: one program on each multiprocessor, four groups of warps in it.

One warp brings tokens, one brings weights, and two warp groups multiply, 64 tokens each. A tile is 128 tokens by some
rows of gate and as many of up. The second group is two blocks behind the first: while one stores what it has, the other
multiplies, and what the next tile needs is on its way already. The bits do not depend on how wide a tile is. Written in
Gluon, which Triton's interpreter cannot run.
"""

import functools

import torch
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
_store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

TOKENS = 128  # of a tile
COSTS = {128: 1.0, 112: 0.97, 96: 0.77, 64: 0.52}
"""How long a tile of so many rows of gate takes (an H200). What is no power of two has several accumulators."""

_COLUMNS = gl.constexpr(64)  # of the input at a time
_LATE = gl.constexpr(2)  # blocks that the second group is behind at first
_TOGETHER = 8  # tiles of tokens that go through a block of rows side by side
_REGISTERS = 232  # of a thread that multiplies; who brings has 24
_MOST_STAGES = 6


def serves(in_features: int, out_features: int, capability: int) -> bool:
    """Whether a GPU of this capability runs this shape: rows begin at multiples of 16 bytes. `out_features`: both."""
    return capability == 90 and in_features % 8 == 0 and out_features % 16 == 0 and min(in_features, out_features) > 0


def readable(x: Tensor, weight: Tensor) -> bool:
    """Whether they lie where the copy engine can read them."""
    return x.is_cuda and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


@functools.cache
def rows_of(tokens: int, outputs: int, programs: int) -> int:
    """Rows of gate in a tile: those with which the busiest program is done first."""

    def busiest(rows: int) -> float:
        return -(-(-(-tokens // TOKENS) * -(-outputs // rows)) // programs) * COSTS[rows]

    return min(COSTS, key=busiest)


def hopper_gated(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rows: int | None = None) -> Tensor:
    """`linear` with `gated` and without a bias, of any tokens: arguments as it has checked, `readable`, and of a shape
    that this GPU `serves`. `rows` of a tile: one of COSTS.
    """
    x = x if norm is None else rms_norm(x, norm, eps)
    (tokens, in_features), outputs, programs = x.shape, len(weight) // 2, processors(x.device)
    parts = _parts(rows or rows_of(tokens, outputs, programs))
    out, absent, dependent = x.new_empty(tokens, outputs), [None] * (3 - len(parts)), pdl(x.device)
    tiles, blocks = -(-tokens // TOKENS), -(-outputs // sum(parts))
    _hopper_gated_kernel[(min(programs, tiles * blocks),)](
        _boxes(x, TOKENS, _COLUMNS.value),
        *(_boxes(weight, part, _COLUMNS.value) for part in parts), *absent,
        *(_boxes(out, TOKENS // 2, part) for part in parts), *absent,
        outputs, tiles, blocks, -(-in_features // _COLUMNS.value),
        PARTS=parts, STAGES=_stages(parts), TOGETHER=_TOGETHER, REGISTERS=_REGISTERS, PDL=dependent,
        num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return out


def _parts(rows: int) -> tuple[int, ...]:
    """Powers of two that add up to it, the largest first: a matmul of tensor cores has twice as many rows as a part."""
    return tuple(part for part in (128, 64, 32, 16) if rows & part)


def _stages(parts: tuple[int, ...]) -> int:
    """Blocks that shared memory holds, beside a finished tile and the barriers."""
    rows, itemsize = sum(parts), 2
    left = SHARED[90] - 1024 - TOKENS * rows * itemsize
    return min(left // ((TOKENS + 2 * rows) * _COLUMNS.value * itemsize), _MOST_STAGES)


def _boxes(matrix: Tensor, high: int, across: int) -> TensorDescriptor:
    kind = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(matrix, [high, across], _layout(high, across, kind))


def _layout(high: int, across: int, kind: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([high, across], kind)


def aot_cases(capability: int) -> list[AotCase]:
    kinds = [("bf16", rows) for rows in COSTS] + [("fp16", 112)]
    return [_case(*kind) for kind in kinds] if capability == 90 else []


def _case(dtype: str, rows: int) -> AotCase:
    kind, parts = gl.bfloat16 if dtype == "bf16" else gl.float16, _parts(rows)

    def box(high: int, across: int) -> str:
        return f"tensordesc<{dtype}[{high},{across}],{_layout(high, across, kind)!r}>"

    kinds = {"x_boxes": box(TOKENS, _COLUMNS.value)} | dict.fromkeys(("outputs", "tiles", "blocks", "steps"), "i32")
    constants = {"PARTS": parts, "STAGES": _stages(parts), "TOGETHER": _TOGETHER, "REGISTERS": _REGISTERS, "PDL": True}
    for i in range(3):
        if i < len(parts):
            kinds |= {f"w{i}": box(parts[i], _COLUMNS.value), f"out{i}": box(TOKENS // 2, parts[i])}
        else:
            constants |= {f"w{i}": None, f"out{i}": None}
    return AotCase(f"hopper-gated-{dtype}-{rows}", _hopper_gated_kernel, kinds, constants, {}, 4, 3, SHARED[90])


@gluon.jit(do_not_specialize=["outputs", "tiles", "blocks", "steps"])
def _hopper_gated_kernel(
    x_boxes, w0, w1, w2, out0, out1, out2, outputs, tiles, blocks, steps,
    PARTS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Block n of a program's input is stage n % STAGES, round n // STAGES. It is `ready` when tokens and weights are
    there, and `free` when both groups have multiplied it; the other parity of `free` is passed at once in round 0.
    """
    weights, outs = (w0,), (out0,)
    if len(PARTS) > 1:
        weights, outs = (w0, w1), (out0, out1)
    if len(PARTS) > 2:
        weights, outs = (w0, w1, w2), (out0, out1, out2)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_boxes.dtype, [STAGES] + x_boxes.block_shape, x_boxes.layout)
    rings, done = (), ()
    for i in gl.static_range(len(PARTS)):
        rings = rings + (_ring(weights[i], STAGES),)
        done = done + (gl.allocate_shared_memory(x_boxes.dtype, [2] + outs[i].block_shape, outs[i].layout),)
    place = (tiles, blocks, steps)
    gl.warp_specialize([
        (_multiply, (outs, place, rings, x_ring, done, ready, free, 0, PARTS, TOGETHER)),
        (_multiply, (outs, place, rings, x_ring, done, ready, free, 1, PARTS, TOGETHER)),
        (_bring_tokens, (x_boxes, place, x_ring, ready, free, TOGETHER, PDL)),
        (_bring_weights, (weights, outputs, place, rings, ready, free, PARTS, TOGETHER)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip


@gluon.constexpr_function
def _before(parts, i):
    """Rows of the parts before the i-th."""
    return sum(parts[:i])


@gluon.jit
def _ring(boxes, STAGES: gl.constexpr):
    return gl.allocate_shared_memory(
        boxes.dtype, [STAGES, 2 * boxes.block_shape[0], boxes.block_shape[1]], boxes.layout
    )


@gluon.jit
def _place(number, tiles, blocks, TOGETHER: gl.constexpr):
    """Tile of tokens and block of rows: some tiles have all blocks, one after the other, before the next tiles do."""
    first = number // (TOGETHER * blocks) * TOGETHER
    some = gl.minimum(tiles - first, TOGETHER)
    within = number % (TOGETHER * blocks)
    return first + within % some, within // some


@gluon.jit
def _bring_tokens(boxes, place, ring, ready, free, TOGETHER: gl.constexpr, PDL: gl.constexpr):
    """Nothing else reads or writes what other kernels do, so nobody else waits for the kernel before this one."""
    tiles, blocks, steps = place
    STAGES: gl.constexpr = ready.shape[0]
    release(PDL)
    wait(PDL)
    n = gl.to_tensor(0)
    for number in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _place(number, tiles, blocks, TOGETHER)
        for k in range(steps):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), boxes.block_type.nbytes)
            _load_box(boxes, [tile * boxes.block_shape[0], k * _COLUMNS], ready.index(stage), ring.index(stage))
            n += 1


@gluon.jit
def _bring_weights(
    weights, outputs, place, rings, ready, free, PARTS: gl.constexpr, TOGETHER: gl.constexpr
):  # fmt: skip
    tiles, blocks, steps = place
    STAGES: gl.constexpr = ready.shape[0]
    ROWS: gl.constexpr = _before(PARTS, len(PARTS))
    n = gl.to_tensor(0)
    for number in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _place(number, tiles, blocks, TOGETHER)
        for k in range(steps):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), weights[0].block_type.nbytes // PARTS[0] * 2 * ROWS)
            for i in gl.static_range(len(PARTS)):
                row = block * ROWS + _before(PARTS, i)
                _bring_part(weights[i], row, outputs, k, ready.index(stage), rings[i].index(stage))
            n += 1


@gluon.jit
def _bring_part(boxes, row, outputs, k, ready, to):
    """Rows of gate, and behind them those of up."""
    HALF: gl.constexpr = boxes.block_shape[0]
    _load_box(boxes, [row, k * _COLUMNS], ready, to.slice(0, HALF, 0))
    _load_box(boxes, [row + outputs, k * _COLUMNS], ready, to.slice(HALF, HALF, 0))


@gluon.jit
def _multiply(
    outs, place, rings, x_ring, done, ready, free, me: gl.constexpr, PARTS: gl.constexpr, TOGETHER: gl.constexpr
):  # fmt: skip
    """64 tokens of each tile."""
    tiles, blocks, steps = place
    STAGES: gl.constexpr = ready.shape[0]
    ROWS: gl.constexpr = _before(PARTS, len(PARTS))
    TOKENS: gl.constexpr = x_ring.shape[1]
    HALF: gl.constexpr = TOKENS // 2
    n = gl.to_tensor(0)
    if (me == 1) & (steps > _LATE):
        mbarrier.wait(ready.index(_LATE), 0)
    for number in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _place(number, tiles, blocks, TOGETHER)
        sums = ()
        for i in gl.static_range(len(PARTS)):
            sums = sums + (_zeros(rings[i], HALF),)
        for k in range(steps):
            stage = n % STAGES
            mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
            x = x_ring.index(stage).slice(me * HALF, HALF, 0)
            under_way = ()
            for i in gl.static_range(len(PARTS)):
                w = rings[i].index(stage).permute((1, 0))
                under_way = under_way + (warpgroup_mma(x, w, sums[i], is_async=True),)
            sums = _waited(len(PARTS), under_way)  # for those of the block before
            if k > 0:
                mbarrier.arrive(free.index((n - 1) % STAGES), count=1)
            n += 1
        sums = _waited(0, sums)
        mbarrier.arrive(free.index((n - 1) % STAGES), count=1)
        tma.store_wait(0)  # what this group stored last is read
        _barrier()
        for i in gl.static_range(len(PARTS)):
            at = [tile * TOKENS + me * HALF, block * ROWS + _before(PARTS, i)]
            _store(sums[i], outs[i], at, done[i].index(me))
    tma.store_wait(0)


@gluon.jit
def _zeros(ring, HIGH: gl.constexpr):
    WIDE: gl.constexpr = ring.shape[1]
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
def _store(sums, boxes, at, to):
    HIGH: gl.constexpr = sums.shape[0]
    HALF: gl.constexpr = sums.shape[1] // 2
    gate, up = gl.split(gl.permute(gl.reshape(sums, [HIGH, 2, HALF]), (0, 2, 1)))
    to.store((gate / (1.0 + gl.exp(-gate)) * up).to(to.dtype))
    fence_async_shared()
    _barrier()
    _store_box(boxes, at, to)
