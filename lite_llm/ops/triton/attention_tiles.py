"""Tiles of attention: what one is, which a GPU can run, and the one to take where the table of the GPU has none.

How many keys a tile has is a fact of model and GPU, never of the batch, on which a request's bits would then depend;
the one exception is MANY. Apart from the kernels, because tuning.py reads tiles from tables and the kernels ask it for
theirs.
"""

from typing import NamedTuple

import triton

from lite_llm.ops.triton.aot import SHARED
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED

HOPPER_HEAD_DIM = 128
"""The only one that the Hopper kernel serves: at 64 the portable one was measured as fast."""

MANY = 128
"""Requests above which flash-decoding may use another tile: a program then has so many of them that small programs, and
more of them at a time, may be faster. The tile depends on this and on nothing else of the batch.
"""

_SIZES = {16, 32, 64, 128, 256}
_AHEAD = (90, 100)  # where matmuls read shared memory while they run, so that a stage more is held there


class Flash(NamedTuple):
    """Of the portable flash attention of prompts."""

    block_m: int  # rows: tokens times the heads of a group
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Decode(NamedTuple):
    """Of flash-decoding. No bit of an answer depends on `programs` or what follows it."""

    block_n: int  # keys; a power of two
    num_warps: int
    num_stages: int
    programs: int  # on each multiprocessor
    release: int = WAITED  # or AT_ONCE or LAST, which keeps the next kernel's weights from queueing before our keys
    asked: int = 2  # tiles, the first of its run, that a program prefetches before its wait; 0 or a power of two
    least: int = 1  # tiles in a program's share: work that is split no further needs less merging


def hopper_serves(head_dim: int, itemsize: int, capability: int) -> bool:
    """By what they are, never by how many, on which a request's bits would depend."""
    return capability == 90 and itemsize == 2 and head_dim == HOPPER_HEAD_DIM


def flash_default(head_dim: int, itemsize: int, windowed: bool, capability: int) -> Flash:
    """The largest that spills nothing."""
    wide = triton.next_power_of_2(head_dim)
    if itemsize == 4:  # exact fp32 products run on the plain cores
        return Flash(16, 16, 8 if wide == 128 else 4, 2 if wide == 256 else 1)
    if wide == 64:
        return Flash(128, 32 if capability == 100 else 64, 8, 3)
    if wide < 64:
        return Flash(128, 64, 8, 2)
    if wide == 128 and capability in (90, 100):
        return Flash(128, 64, 8, 3)
    if wide == 128:
        return Flash(64, 32, 8, 3) if windowed else Flash(128, 32, 8, 3)
    return Flash(128, 32, 8, 2) if capability == 90 else Flash(64, 32, 8, 2)


def decode_default(head_dim: int, itemsize: int, capability: int) -> Decode:
    """Of those that spill nothing, what keeps the most bytes on their way.

    K and V tiles of all stages fit in 99 KB where that is the limit.
    """
    wide, large = triton.next_power_of_2(head_dim), SHARED.get(capability, 0) > 128 << 10
    if itemsize == 4:  # exact fp32 products run on the plain cores
        if wide == 128:
            return Decode(16 if capability == 90 else 32, 4 if capability == 100 else 8, 2, 2)
        if wide == 256:
            return Decode(16, 8 if capability == 80 else 4, 2, 2)
        return Decode(32, 4, 3 if capability == 90 or (capability, wide) == (120, 32) else 2, 2)
    if wide == 256:
        return Decode(64 if large else 32, 8, 3, 1)
    if wide == 128:
        return Decode(32, 8, 3, 2) if capability == 120 else Decode(64, 4, 3, 2 if large else 1)
    if wide == 64:
        return Decode(128, 4, 2, 3 if large else 2)
    return Decode(64, 4 if (capability, wide) == (120, 32) else 2, 3, 3)


def flash_fits(tile: Flash, head_dim: int, itemsize: int, capability: int) -> bool:
    """Whether a GPU of this compute capability runs this tile from its shared memory, and about from its registers."""
    rows, keys, warps, stages = tile
    if not {rows, keys} <= _SIZES or warps not in (4, 8) or not 1 <= stages <= 8:
        return False
    wide = triton.next_power_of_2(head_dim)
    held = 144 if itemsize == 2 else 48  # sums and scores of a thread; the plain cores also hold their operands
    if rows * (wide + keys) > held * 32 * warps:
        return False
    block = 2 * keys * wide * itemsize  # of K and V
    if capability in _AHEAD and itemsize == 2:
        staged = stages * block
    else:
        staged = max(stages - 1, 1) * block + rows * keys * itemsize  # weights change hands on their way to V
    return rows * wide * itemsize + staged + _slots(keys) <= _shared(capability)


def decode_fits(tile: Decode, head_dim: int, itemsize: int, capability: int) -> bool:
    """As `flash_fits`."""
    if tile.block_n not in _SIZES or tile.num_warps not in (1, 2, 4, 8):
        return False
    if not 1 <= tile.num_stages <= 8 or not 1 <= tile.programs <= 32 or tile.least < 1:
        return False
    if tile.release not in (AT_ONCE, WAITED, LAST) or tile.asked not in (0, 1, 2, 4, 8, 16):
        return False
    wide = triton.next_power_of_2(head_dim)
    if tile.block_n * wide > 128 * 32 * tile.num_warps:
        return False
    block, queries = 2 * tile.block_n * wide * itemsize, 16 * wide * itemsize  # queries are staged too
    staged = max(tile.num_stages - 1, 1) * block + (tile.num_stages + 1) * queries
    return staged + _slots(tile.block_n) <= _shared(capability)


def _slots(keys: int) -> int:
    """Bytes for slots, barriers and sums across warps."""
    return 1024 + 8 * keys


def _shared(capability: int) -> int:
    return SHARED.get(capability, min(SHARED.values()))
