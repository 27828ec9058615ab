"""What a multiplying warp group of hopper.py does: scores, softmax and values of 64 rows of each tile.

The scores of a block are under way while the values of the block before it are added, and the softmax of one warp group
hides behind the matmuls of another: the groups issue theirs in turn.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lite_llm.ops.triton.partial import LOWEST


@gluon.jit
def span_of(
    first_row, count, offset, length, window,
    GROUP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, WINDOWED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A tile's blocks [start, stop), at least one; those in [edge, middle) need no mask."""
    first, last = length - 1, length - 1
    if CAUSAL:
        first = offset + first_row // GROUP
        last = offset + (gl.minimum(first_row + ROWS, count) - 1) // GROUP
    stop = gl.maximum((gl.maximum(last + 1, 0) + KEYS - 1) // KEYS, 1)
    start, edge = 0, 0
    if WINDOWED:
        start = gl.maximum(first - window + 1, 0) // KEYS
        edge = (gl.maximum(last - window + 1, 0) + KEYS - 1) // KEYS
    middle = gl.maximum(gl.maximum(first + 1, 0) // KEYS, start)
    return start, gl.minimum(gl.maximum(edge, start), middle), middle, stop


@gluon.jit
def fact(facts, tiles, i: gl.constexpr):
    """A fact about a tile, which stays until that is stored: those of tile n are noted behind the queries of n - 1,
    which wait until all scores of n - 2 have been asked for, so n - 3 is stored.
    """
    return gl.sum(facts.index(tiles % 4 * 16 + i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def multiply(
    out, window, scale, shared, me: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, WINDOWED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile, until there are no more. `scale` is for powers of 2."""
    queries, facts, k_ring, v_ring, gathered, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = shared
    dtype: gl.constexpr = k_ring.dtype
    GROUPS: gl.constexpr = queries.shape[0]
    ROWS: gl.constexpr = 64 * GROUPS
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, AL, 2)
    OL: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    blocks, tiles = 0, 0  # used so far
    mbarrier.wait(q_ready.index(0), 0)
    more = fact(facts, tiles, 0)
    while more >= 0:
        first_row, count = fact(facts, tiles, 2), fact(facts, tiles, 3)
        offset, length = fact(facts, tiles, 4), fact(facts, tiles, 5)
        start, edge, middle, stop = span_of(
            first_row, count, offset, length, window, GROUP, ROWS, KEYS, WINDOWED, CAUSAL
        )
        row = first_row + me * 64 + gl.arange(0, 64, gl.SliceLayout(1, SL))
        position = offset + row // GROUP if CAUSAL else gl.full([64], length - 1, gl.int32, gl.SliceLayout(1, SL))

        fence_async_shared()
        last = blocks + stop - start - 1
        _wait_for(blocks, k_ready, gathered, 0, STAGES)
        scores = _scores(shared, blocks, me)
        mbarrier.arrive(turn.index((me + 1) % GROUPS), count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(blocks % STAGES), count=1)
        if _masked(stop - 1, edge, middle, WINDOWED):
            scores = _mask(scores, (stop - 1) * KEYS, position, window, WINDOWED, SL)
        peak = gl.maximum(gl.max(scores, 1) * scale, LOWEST)
        weights = gl.exp2(scores * scale - peak[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(dtype), PL)
        if blocks < last:
            _wait_for(blocks + 1, k_ready, gathered, 0, STAGES)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, AL)
        for i in range(stop - 1 - start):
            n = stop - 2 - i
            p, peak, total, acc = _step(
                shared, blocks + i, last, n * KEYS, _masked(n, edge, middle, WINDOWED), position, window, scale,
                p, peak, total, acc, me, WINDOWED,
            )  # fmt: skip
        blocks += stop - 1 - start
        mbarrier.arrive(q_free.index(0), count=1)
        _wait_for(blocks, v_ready, gathered, STAGES, STAGES)
        acc = warpgroup_mma(p, v_ring.index(blocks % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(blocks % STAGES), count=1)
        blocks += 1

        total = gl.where(total == 0, 1.0, total)  # a row that sees no key gets zeros
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, AL))[:, None]
        result = gl.convert_layout(acc.to(dtype), OL)
        kv_head, first_token = fact(facts, tiles, 0), fact(facts, tiles, 1)
        first_row, count = fact(facts, tiles, 2), fact(facts, tiles, 3)
        to = first_row + me * 64 + gl.arange(0, 64, gl.SliceLayout(1, OL))
        col = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OL))
        head = (first_token + to // GROUP).to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + to % GROUP
        gl.store(out + head[:, None] * HEAD_DIM + col[None, :], result, (to < count)[:, None] & (col >= 0)[None, :])

        tiles += 1
        mbarrier.wait(q_ready.index(0), tiles & 1)
        more = fact(facts, tiles, 0)


@gluon.jit
def _wait_for(n, ready, gathered, of: gl.constexpr, STAGES: gl.constexpr):
    """Wait until block n is there. What was gathered was written as any store is: it is fenced off for the matmul."""
    mbarrier.wait(ready.index(n % STAGES), (n // STAGES) & 1)
    if gl.sum(gathered.index(of + n % STAGES).load(gl.BlockedLayout([1], [32], [4], [0])), 0) > 0:
        fence_async_shared()


@gluon.jit
def _scores(shared, n, me: gl.constexpr):
    """Issue the product of the queries and block n, which is there."""
    queries, facts, k_ring, v_ring, gathered, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = shared
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    mbarrier.wait(turn.index(me), (n & 1) ^ 1 if me == 0 else n & 1)
    none = gl.zeros([64, KEYS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
    keys = k_ring.index(n % STAGES).permute((1, 0))
    return warpgroup_mma(queries.index(me), keys, none, use_acc=False, is_async=True)


@gluon.jit
def _masked(n, edge, middle, WINDOWED: gl.constexpr):
    """Whether some row does not see all of block n."""
    return (n >= middle) | (n < edge) if WINDOWED else n >= middle


@gluon.jit
def _mask(scores, first_key, position, window, WINDOWED: gl.constexpr, SL: gl.constexpr):
    key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, SL))
    visible = key[None, :] <= position[:, None]
    if WINDOWED:
        visible &= key[None, :] > position[:, None] - window
    return gl.where(visible, scores, -float("inf"))


@gluon.jit
def _step(
    shared, n, last, first_key, masked, position, window, scale, p, peak, total, acc,
    me: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Add block n's values while block n + 1, whose keys begin at `first_key`, gets its weights."""
    queries, facts, k_ring, v_ring, gathered, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = shared
    GROUPS: gl.constexpr = queries.shape[0]
    STAGES: gl.constexpr = k_ring.shape[0]
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_ring.shape[1], 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_ring.shape[2], 16])
    scores = _scores(shared, n + 1, me)
    _wait_for(n, v_ready, gathered, STAGES, STAGES)
    acc = warpgroup_mma(p, v_ring.index(n % STAGES), acc, is_async=True)
    mbarrier.arrive(turn.index((me + 1) % GROUPS), count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_free.index((n + 1) % STAGES), count=1)
    if masked:  # a branch: assembled far better than a loop of its own for these blocks
        scores = _mask(scores, first_key, position, window, WINDOWED, SL)
    highest = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - highest[:, None])
    fade = gl.exp2(peak - highest)
    total = total * fade + gl.sum(weights, 1)
    # A branch, because the assembler would otherwise wait for the values before it computes the weights.
    if n + 1 < last:
        _wait_for(n + 2, k_ready, gathered, 0, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_free.index(n % STAGES), count=1)
    p = gl.convert_layout(weights.to(p.dtype), gl.DotOperandLayout(0, AL, 2))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, AL))[:, None]
    return p, highest, total, acc
