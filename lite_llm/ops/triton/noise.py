"""The random draw of `sample`: Gumbel noise from Philox, a function of (seed, position, token id) alone."""

import triton
import triton.language as tl

NOBODY = tl.constexpr((1 << 31) - 1)  # above every token id

_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _philox(seed, c0, c1):
    """First word of Philox4x32-10 at a 64-bit key and counter (c0, c1, 0, 0); c0 a uint32 block, c1 a uint32 scalar."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c1 = c0 * 0 + c1
    c2 = c0 * 0
    c3 = c0 * 0
    for turn in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ ((k0 + turn * 0x9E3779B9) & _WORD).to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ ((k1 + turn * 0xBB67AE85) & _WORD).to(tl.uint32)
        c1, c3 = (p1 & _WORD).to(tl.uint32), (p0 & _WORD).to(tl.uint32)
    return c0


@triton.jit
def gumbel(seed, position, token):
    word = _philox(seed, token.to(tl.uint32), position.to(tl.uint32))
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: u is exact, and never 0 or 1
    return -tl.log(-tl.log(u))


@triton.jit
def key(x):
    """An int32 for each float, in the same order; one for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def read(logits, token, t, end):
    return tl.math.div_rn(tl.load(logits + token, token < end, other=float("-inf")).to(tl.float32), t)


@triton.jit
def draw(logits, t, cutoff, seed, position, start, end, SPAN: tl.constexpr):
    """The largest noisy logit of the tokens from `start` to before `end` whose key is at least `cutoff`, and its token.

    SPAN at a time: the noise of more would take many registers.
    """
    lane = tl.arange(0, SPAN)
    best = tl.full([SPAN], float("-inf"), tl.float32)
    first = tl.full([SPAN], NOBODY, tl.int32)
    for at in range(start, end, SPAN):
        token = at + lane
        x = read(logits, token, t, end)
        score = tl.where(key(x) >= cutoff, x + gumbel(seed, position, token), float("-inf"))
        first = tl.where(score > best, token, first)
        best = tl.maximum(best, score)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, first, NOBODY), 0)
