"""Attention over single-token slots: flash attention here and, for Hopper, in hopper.py; flash-decoding in decode.py.

All run on ragged batches without padding and read every length on the device, so a graph can replay them. Which serves
prompts, and with which tile, stands in a table (tuning.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.reference.attention import HEAD_DIMS, MAX_GROUP
from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.aot import SHARED, AotCase
from lite_llm.ops.triton.attention_tiles import Flash, flash_default
from lite_llm.ops.triton.decode import LOG2E, decode
from lite_llm.ops.triton.hopper import attend_hopper, readable
from lite_llm.ops.triton.launch import aside
from lite_llm.ops.triton.layout import FLOATS, check
from lite_llm.ops.triton.partial import LOWEST


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    rows: Tensor,
    q_start: Tensor | None,
    kv_len: Tensor,
    decodes: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    _check(q, k_pool, v_pool, table, rows, q_start, kv_len, decodes, scale, window, causal)
    out = torch.empty_like(q)
    # Decodes wait for memory, prompts for the tensor cores: each may run where the other leaves room.
    with aside(q.device, needed=0 < decodes < len(q)) as join:
        if len(q) > decodes:
            kernel = _choice(q, decodes, window).kernel
            prompts = attend_hopper if kernel == "hopper" and readable(q, k_pool, v_pool) else attend_flash
            prompts(q, k_pool, v_pool, out, table, rows, q_start, kv_len, decodes, scale, window, causal)
    if decodes:
        decode(q, k_pool, v_pool, out, table, rows, kv_len, decodes, scale, window)
    join()
    return out


def _choice(q: Tensor, decodes: int, window: int | None) -> tuning.Choice:
    """The table's, for the prompts among these tokens."""
    tokens, heads, head_dim = q.shape
    pairs = (tokens - decodes) * heads
    return tuning.choose_attend(q.device, head_dim, q.element_size(), window is not None, pairs, decodes > 0)


def attend_flash(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, out: Tensor, table: Tensor, rows: Tensor, q_start: Tensor,
    kv_len: Tensor, decodes: int, scale: float, window: int | None, causal: bool, shape: Flash | None = None,
) -> None:  # fmt: skip
    """Write the rows of `out` from `decodes` on: those of the other requests, and zeros where no request owns one.

    Arguments as of `attend`, already checked. `shape` is for tuning; without it the tile is that of the table.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, requests = k_pool.shape[1], len(rows) - decodes
    group = heads // kv_heads
    if shape is None:
        shape = _choice(q, decodes, window).tile
    # Each request, and the pad rows behind the last, may leave one tile unfilled.
    most = (tokens - decodes) * group // shape.block_m + requests + 1
    _attend_kernel[(kv_heads, most)](
        q, k_pool, v_pool, out, table, rows, q_start, kv_len,
        table.stride(0), decodes, requests, tokens, scale, window or 0,
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, WIDE=triton.next_power_of_2(head_dim),
        WINDOWED=window is not None, CAUSAL=causal, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def _check(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, rows: Tensor, q_start: Tensor | None,
    kv_len: Tensor, decodes: int, scale: float, window: int | None, causal: bool,
) -> None:  # fmt: skip
    """A kernel reads whatever its pointers say, so anything it cannot read right is refused here, by name."""
    for name, t, dims in (("q", q, 3), ("k_pool", k_pool, 3), ("table", table, 2), ("rows", rows, 1)):
        if t.dim() != dims:
            raise ValueError(f"{name}: shape {list(t.shape)}; expected {dims} dims")
    (tokens, heads, head_dim), (slots, kv_heads, _), (requests,) = q.shape, k_pool.shape, rows.shape
    check("q", q, dtype=FLOATS)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        check(name, pool, (slots, kv_heads, head_dim), q.dtype, like=q)
    for name, t, size in (("rows", rows, requests), ("q_start", q_start, requests + 1), ("kv_len", kv_len, requests)):
        if t is not None:
            check(name, t, (size,), torch.int32, like=q)
    if q_start is None and not tokens == requests == decodes:
        raise ValueError(f"q_start: None; expected where all decode, not {decodes} of {requests} with {tokens} tokens")
    check("table", table, dtype=torch.int32, like=q, contiguous=False)
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ValueError(f"table: strides {list(table.stride())}; expected contiguous rows")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q: head_dim = {head_dim}; supported: {', '.join(map(str, HEAD_DIMS))}")
    if kv_heads == 0 or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise ValueError(f"q: {heads} heads for {kv_heads} KV heads; supported: 1 to {MAX_GROUP} for each")
    if not 0 <= decodes <= min(requests, tokens):
        raise ValueError(f"decodes: {decodes}; expected 0 to {min(requests, tokens)}")
    if window is not None and window < 1:
        raise ValueError(f"window: {window}; expected at least 1, or None")
    if not causal and window is not None:
        raise ValueError(f"window: {window}; expected None without causal")
    if not causal and decodes:
        raise ValueError(f"decodes: {decodes}; expected 0 without causal")
    if not scale > 0:
        raise ValueError(f"scale: {scale}; expected more than 0")


def aot_cases(capability: int) -> list[AotCase]:
    sizes = [(d, "bf16", 4, w) for d in HEAD_DIMS for w in (False, True)] + [(d, "fp32", 4, True) for d in HEAD_DIMS]
    sizes += [(128, "fp16", 4, False)] + [(128, "bf16", g, True) for g in (1, 2, 3, 5, 7, 8, 16)]
    sizes += [(d, "bf16", 1, False, False) for d in HEAD_DIMS] + [(d, "fp32", 1, False, False) for d in (64, 80)]
    for _, dim, itemsize, windowed, _, _, (_, tile) in tuning.shipped("attend", capability):
        if tile and tile != flash_default(dim, itemsize, windowed, capability):
            dtype = {2: "bf16", 4: "fp32"}[itemsize]
            sizes += [(dim, dtype, 4, windowed, True, tile)]
            sizes += [] if windowed else [(dim, dtype, 1, False, False, tile)]
    return [_case(capability, *size) for size in sizes]


def _case(
    capability: int, head_dim: int, dtype: str, group: int, windowed: bool, causal: bool = True,
    tile: Flash | None = None,
) -> AotCase:  # fmt: skip
    shape = tile or flash_default(head_dim, 4 if dtype == "fp32" else 2, windowed, capability)
    kinds = dict.fromkeys(("q", "k_pool", "v_pool", "out"), f"*{dtype}") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("table", "rows", "q_start", "kv_len"), "*i32")
    kinds |= dict.fromkeys(("table_stride", "decodes", "requests", "tokens", "window"), "i32")
    constants = {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "WIDE": triton.next_power_of_2(head_dim)}
    constants |= {"WINDOWED": windowed, "CAUSAL": causal, "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
    name = f"attend-{dtype}-d{head_dim}-g{group}" + "-window" * windowed + "-all" * (not causal)
    name += "-tile{}x{}w{}s{}".format(*tile) if tile else ""
    unaligned = dict.fromkeys(("table", "rows", "q_start", "kv_len"), 1)
    return AotCase(
        name, _attend_kernel, kinds, constants, unaligned, shape.num_warps, shape.num_stages, SHARED[capability]
    )


@triton.jit(
    do_not_specialize=["table_stride", "decodes", "requests", "tokens", "window"],
    do_not_specialize_on_alignment=["table", "rows", "q_start", "kv_len"],
)
def _attend_kernel(
    q, k_pool, v_pool, out, table, rows, q_start, kv_len,
    table_stride, decodes, requests, tokens, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WINDOWED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M (token, head) pairs of one request: the heads are those of one KV head, which share its keys.

    `requests` counts those after the first `decodes`; a last one without keys owns the pad rows and gives them zeros.
    """
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last tiles of a prompt see the most keys
    rows += decodes
    q_start += decodes
    kv_len += decodes

    # Request b's tiles begin at number (tokens before it) * GROUP // BLOCK_M + b, so no list of tiles is needed.
    request = -1
    some = tl.arange(0, 128)
    for first in range(0, requests + 1, 128):
        before = tl.load(q_start + first + some, first + some <= requests, other=tokens) - decodes
        begins = before * GROUP // BLOCK_M + first + some
        request += tl.sum(((begins <= tile) & (first + some <= requests)).to(tl.int32))
    begin = tl.load(q_start + request)
    end, length = tokens, 0
    if request < requests:
        end = tl.load(q_start + request + 1)
        length = tl.load(kv_len + request)
        table += tl.load(rows + request).to(tl.int64) * table_stride
    count = (end - begin) * GROUP
    first_row = (tile - (begin - decodes) * GROUP // BLOCK_M - request) * BLOCK_M
    if first_row >= count:
        return
    k_pool += kv_head * HEAD_DIM
    v_pool += kv_head * HEAD_DIM

    row = first_row + tl.arange(0, BLOCK_M)
    col = tl.arange(0, WIDE)
    real = (row < count)[:, None] & (col < HEAD_DIM)[None, :]
    head = (begin + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    at = head[:, None] * HEAD_DIM + col[None, :]
    queries = tl.load(q + at, real, other=0.0)
    position = length - (end - begin) + row // GROUP
    first_position = length - (end - begin) + first_row // GROUP
    last_position = length - (end - begin) + (tl.minimum(first_row + BLOCK_M, count) - 1) // GROUP
    if not CAUSAL:  # every row sees what the last one sees
        position = tl.full([BLOCK_M], length - 1, tl.int32)
        first_position = length - 1
        last_position = length - 1

    # Keys [start, edge) and [middle, stop) need masks, as some rows do not see them; keys [edge, middle) need none.
    start, edge, stop = 0, 0, last_position + 1
    middle = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        edge = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N, stop)
        middle = tl.maximum(edge, middle)

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    scale *= LOG2E
    # The next tile's slots travel in a loop variable: loaded where they are used, they would stop the pipelining.
    key = tl.arange(0, BLOCK_N)
    slots = tl.load(table + start + key, start + key < stop, other=0)
    if WINDOWED:
        for n in tl.range(start, edge, BLOCK_N):
            slots, peak, total, acc = _tile(
                queries, k_pool, v_pool, table, slots, peak, total, acc, position, n, stop, scale, window,
                KV_HEADS, HEAD_DIM, WIDE, True, True, BLOCK_N,
            )  # fmt: skip
    for n in tl.range(edge, middle, BLOCK_N):
        slots, peak, total, acc = _tile(
            queries, k_pool, v_pool, table, slots, peak, total, acc, position, n, stop, scale, window,
            KV_HEADS, HEAD_DIM, WIDE, False, WINDOWED, BLOCK_N,
        )  # fmt: skip
    for n in tl.range(middle, stop, BLOCK_N):
        slots, peak, total, acc = _tile(
            queries, k_pool, v_pool, table, slots, peak, total, acc, position, n, stop, scale, window,
            KV_HEADS, HEAD_DIM, WIDE, True, WINDOWED, BLOCK_N,
        )  # fmt: skip

    acc = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]  # a row that sees no key gets zeros
    tl.store(out + at, acc.to(out.dtype.element_ty), real)


@triton.jit
def _tile(
    queries, k_pool, v_pool, table, slots, peak, total, acc, position, n, stop, scale, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over the keys at [n, n + BLOCK_N); also loads the slots of the tile after it."""
    key = n + tl.arange(0, BLOCK_N)
    col = tl.arange(0, WIDE)
    offset = slots.to(tl.int64) * (KV_HEADS * HEAD_DIM)  # int64: slots * kv_heads * head_dim passes 2**31
    slots = tl.load(table + key + BLOCK_N, key + BLOCK_N < stop, other=0)
    at = offset[:, None] + col[None, :]
    k = _load(k_pool + at, (key < stop)[:, None], (col < HEAD_DIM)[None, :], MASKED, WIDE != HEAD_DIM)
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOWED:
            visible &= key[None, :] > position[:, None] - window
        scores = tl.where(visible, scores, -float("inf"))
    highest = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    fade = tl.exp2(peak - highest)
    total = total * fade + tl.sum(weights, 1)
    v = _load(v_pool + at, (key < stop)[:, None], (col < HEAD_DIM)[None, :], MASKED, WIDE != HEAD_DIM)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return slots, highest, total, acc


@triton.jit
def _load(at, keys, cols, MASK_KEYS: tl.constexpr, MASK_COLS: tl.constexpr):
    """A tile of K or V. Masked, never multiplied by a mask: what lies in a slot of another request may be NaN."""
    if MASK_KEYS and MASK_COLS:
        return tl.load(at, keys & cols, other=0.0)
    elif MASK_KEYS:
        return tl.load(at, keys, other=0.0)
    elif MASK_COLS:
        return tl.load(at, cols, other=0.0)
    else:
        return tl.load(at)
