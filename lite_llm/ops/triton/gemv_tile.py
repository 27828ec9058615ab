"""What gemv.py computes with: tiles of weights and inputs, on their way from memory to a program's sums.

WARPS is 0 for the CUDA cores. For the tensor cores it is the number of warps, each of which has columns of its own.
"""

import triton
import triton.language as tl


@triton.jit
def _lanes(N: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Which of N rows each row of a tile for the tensor cores is; see `tile_at`."""
    return tl.arange(0, N * (COLUMNS // 32)) // (8 * WARPS) % (N // 8) * 8 + tl.arange(0, N * (COLUMNS // 32)) % 8


@triton.jit
def starts(
    first, EACH: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Pointers to N rows, `first` the one to row 0, in the shape that `tile_at` wants; EACH of them make one output."""
    if WARPS > 0:
        lane = (_lanes(N if N > 16 else 16, COLUMNS, WARPS) % N)[:, None]  # at least 16, if need be some of them twice
    else:
        lane = tl.arange(0, N)[None, :, None]
    return first + (lane // EACH + lane % EACH * STRIDE).to(tl.int64) * IN


@triton.jit
def numbered(tokens, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """The number of each token, in the shape that `tile_at` wants; tokens that are not there are the last one again."""
    lane = _lanes(TOKENS, COLUMNS, WARPS)[:, None] if WARPS > 0 else tl.arange(0, TOKENS)[:, None, None]
    return tl.minimum(lane, tokens - 1)


@triton.jit
def tile_at(at, start, IN: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, EVICT_FIRST: tl.constexpr):
    """COLUMNS columns at pointers to rows. For the CUDA cores (WARPS 0): [tokens or 1, rows or 1, COLUMNS].

    For the tensor cores: [parts * rows / 8 * WARPS * 8, 32]. In this order each warp has columns of its own, and a
    thread loads 16 bytes that are already where the tensor cores want them.
    """
    POLICY: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if WARPS > 0:
        PARTS: tl.constexpr = COLUMNS // (32 * WARPS)
        row = tl.arange(0, at.shape[0])
        part = row // (at.shape[0] // PARTS) + row // 8 % WARPS * PARTS
        col = part[:, None] * 32 + tl.arange(0, 32)[None, :]
    else:
        col = tl.arange(0, COLUMNS)[None, None, :]
    if IN % COLUMNS == 0:
        return tl.load(at + col + start, eviction_policy=POLICY)
    else:
        return tl.load(at + col + start, start + col < IN, other=0.0, eviction_policy=POLICY)


@triton.jit
def _halves(x):
    """Even and odd columns. One thread holds eight neighbours, so three times this moves nothing between threads."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def _add_2(sums, w, h):
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    sums += w0.to(tl.float32) * h0
    return sums + w1.to(tl.float32) * h1


@triton.jit
def _add_4(sums, w, h):
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    return _add_2(_add_2(sums, w0, h0), w1, h1)


@triton.jit
def _add_8(sums, w, h):
    """sums [tokens, rows, C] + the products of w [1, rows, 8 C] and h [tokens, 1, 8 C], each a fused multiply-add."""
    w0, w1 = _halves(w)
    h0, h1 = _halves(h)
    return _add_4(_add_4(sums, w0, h0), w1, h1)


@triton.jit
def _operand(t, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A tile as [warps, rows, columns], these in an order in which no thread gives away what it loaded.

    Both operands of a product have the same order, so it changes nothing.
    """
    ROWS: tl.constexpr = t.shape[0] // (COLUMNS // 32)
    t = tl.reshape(t, [COLUMNS // (32 * WARPS), ROWS // 8, WARPS, 8, 4, 2, 2, 2])
    t = tl.permute(t, [2, 1, 3, 0, 5, 6, 4, 7])
    return tl.reshape(t, [WARPS, ROWS, COLUMNS // WARPS])


@triton.jit
def _add(sums, squares, w, h, g, norm, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    wide = h.to(tl.float32)
    if WARPS == 0:
        if norm is not None:
            squares = _add_8(squares, wide, wide)
            wide *= g.to(tl.float32)
        return _add_8(sums, w, wide), squares
    else:
        if norm is not None:
            PARTS: tl.constexpr = COLUMNS // (32 * WARPS)
            squares += tl.sum(tl.sum(tl.reshape(wide * wide, [PARTS, h.shape[0] // PARTS, 4, 8]), 3), 0)
            h = (wide * g.to(tl.float32)).to(h.dtype)
        h = tl.permute(_operand(h, COLUMNS, WARPS), [0, 2, 1])
        return tl.dot(_operand(w, COLUMNS, WARPS), h, sums, input_precision="ieee"), squares


@triton.jit
def dots(
    x, rows, norm, eps, token, w, h, g,
    IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
):  # fmt: skip
    """Products [TOKENS, ROWS] of the normed inputs with weight rows; w, h and g are the first tiles of their kinds.

    The norm's scale is one factor per token, so it comes last, when the sum of squares is known.
    """
    WIDE: tl.constexpr = ROWS if ROWS > 16 else 16
    if WARPS > 0:
        sums = tl.zeros([WARPS, WIDE, TOKENS], tl.float32)
        squares = tl.zeros([TOKENS * WARPS, 4], tl.float32)
    else:
        sums = tl.zeros([TOKENS, ROWS, COLUMNS // 8], tl.float32)
        squares = tl.zeros([TOKENS, 1, COLUMNS // 8], tl.float32)
    for start in range(COLUMNS, IN, COLUMNS):
        next_w = tile_at(rows, start, IN, COLUMNS, WARPS, EVICT_FIRST)
        next_h = tile_at(x + token * IN, start, IN, COLUMNS, WARPS, False)
        next_g = next_h
        if norm is not None:
            next_g = scale_at(norm, token, start, IN, COLUMNS, WARPS)
        sums, squares = _add(sums, squares, w, h, g, norm, COLUMNS, WARPS)
        w, h, g = next_w, next_h, next_g
    sums, squares = _add(sums, squares, w, h, g, norm, COLUMNS, WARPS)
    if WARPS > 0:
        products = tl.sum(sums, 0)
        if WIDE > ROWS:
            products = tl.max(tl.reshape(products, [WIDE // ROWS, ROWS, TOKENS]), 0)  # all are the same
        products = tl.trans(products)
        square = tl.sum(tl.reshape(tl.sum(squares, 1), [TOKENS // 8, WARPS, 8]), 1)
        square = tl.reshape(square, [TOKENS, 1])
    else:
        products = tl.sum(sums, 2)
        square = tl.sum(squares, 2)
    if norm is not None:
        products *= tl.rsqrt(square / IN + eps)
    return products


@triton.jit
def scale_at(norm, token, start, IN: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A tile of the norm's weight: one row for all tokens, or for the tensor cores one beside each token's inputs."""
    if WARPS > 0:
        return tile_at(norm + token * 0, start, IN, COLUMNS, WARPS, False)
    else:
        return tile_at(norm + tl.zeros([1, 1, 1], tl.int32), start, IN, COLUMNS, WARPS, False)
