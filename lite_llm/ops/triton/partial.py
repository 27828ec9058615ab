"""Sums over some of a request's keys: highest score, sum of weights, weighted values; kept in memory, and added up.

The parts of flash-decoding (decode.py) that programs share through memory.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # a finite "no key yet": LOWEST - LOWEST is 0 where -inf - -inf is NaN


@triton.jit
def nothing(WIDE: tl.constexpr):
    """Highest score, sum of weights and weighted values, of no keys."""
    return tl.full([16], LOWEST, tl.float32), tl.zeros([16], tl.float32), tl.zeros([16, WIDE], tl.float32)


@triton.jit
def add(peak, total, acc, more_peak, more_total, more_acc):
    """The sums of some keys and of those behind them.

    By fma, or the compiler would choose which product to round, here and there another, and the bits would depend on
    who adds.
    """
    highest = tl.maximum(peak, more_peak)
    fade, other = tl.exp2(peak - highest), tl.exp2(more_peak - highest)
    total = tl.fma(total, fade, more_total * other)
    acc = tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), more_acc * other[:, None])
    return highest, total, acc


@triton.jit
def keep(partial, stats, place, peak, total, acc, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the sums of a segment's GROUP heads, for the program that will add up all of the request."""
    head = tl.arange(0, acc.shape[0])
    col = tl.arange(0, acc.shape[1])
    at = place * GROUP + head
    tl.store(partial + at[:, None] * HEAD_DIM + col[None, :], acc, (head < GROUP)[:, None] & (col < HEAD_DIM)[None, :])
    tl.store(stats + at * 2, peak, head < GROUP)
    tl.store(stats + at * 2 + 1, total, head < GROUP)


@triton.jit
def _kept(
    partial, stats, place, some, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What `keep` kept, or nothing. .cg: other programs wrote it, and this processor's L1 may not know."""
    head = tl.arange(0, WIDE_GROUP)
    col = tl.arange(0, WIDE)
    at = place * GROUP + head
    mine = head < tl.where(some, GROUP, 0)
    peak = tl.load(stats + at * 2, mine, LOWEST, cache_modifier=".cg")
    total = tl.load(stats + at * 2 + 1, mine, 0.0, cache_modifier=".cg")
    cells = mine[:, None] & (col < HEAD_DIM)[None, :]
    acc = tl.load(partial + at[:, None] * HEAD_DIM + col[None, :], cells, 0.0, cache_modifier=".cg")
    return peak, total, acc


@triton.jit
def put(out, total, acc, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the answer of GROUP heads: weighted values over the sum of weights, or zeros of no keys."""
    head = tl.arange(0, acc.shape[0])
    col = tl.arange(0, acc.shape[1])
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    real = (head < GROUP)[:, None] & (col < HEAD_DIM)[None, :]
    tl.store(out + head[:, None] * HEAD_DIM + col[None, :], acc.to(out.dtype.element_ty), real)


@triton.jit
def merge(
    partial, stats, out, place, together, used,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE_GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add up the segments of one request and KV head in their order; the first `together` are one sum already."""
    ASKED: tl.constexpr = max(min(4096 // (WIDE_GROUP * WIDE), WIDE // 8), 2)  # segments on their way at a time
    peak, total, acc = _kept(partial, stats, place, used > 0, GROUP, HEAD_DIM, WIDE_GROUP, WIDE)
    for first in tl.range(together, used, ASKED, num_stages=1):
        for i in tl.static_range(ASKED):
            one = first + i
            more = _kept(partial, stats, place + one, one < used, GROUP, HEAD_DIM, WIDE_GROUP, WIDE)
            peak, total, acc = add(peak, total, acc, more[0], more[1], more[2])
    put(out, total, acc, GROUP, HEAD_DIM)
