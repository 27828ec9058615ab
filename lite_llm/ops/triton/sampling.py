"""Penalties, and from logits to tokens in two launches over any vocabulary, with nothing for the CPU to decide.

`_scan_kernel`, one program per (row, 4096 tokens), finds the best token of its chunk: by logit for greedy rows, by
noisy logit for rows without a filter; those rows are done. For a row with top_k, top_p or min_p it lists the chunk's
candidates instead: its 32 to 64 largest logits, cut at some value. Above the highest of these cuts the lists of a
row miss nothing. `_pick_kernel`, one program per row, merges the chunks. It bisects for the exact cutoff among the
candidates, in registers; if that lies below the highest cut (a top_k of hundreds, a flat nucleus) it bisects over the
whole row, at two reads of the row per bit.

Cutoffs are bisected on int32 keys in the order of the floats, so ties and top_k are exact. Mass is summed in fp32 in an
order fixed by the vocabulary; it may differ from the reference by rounding, and so may the fate of a token at which the
mass of the more probable ones is within about 1e-6 of top_p (or that is within an ulp of min_p's threshold).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.reference.sampling import MIN_TEMPERATURE, PROMPT
from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.layout import INTS, check

MAX_VOCAB = 1 << 18
_BLOCK = 4096
_SPAN = 2048  # columns that `_pick_kernel` takes at a time when it reads a whole row
_CANDIDATES = 64  # per chunk: 64 chunks of the largest vocabulary make one block of registers of `_pick_kernel`

_PROMPT = tl.constexpr(PROMPT)
_COLDEST = tl.constexpr(MIN_TEMPERATURE)
_LOWEST = tl.constexpr(-(1 << 31))  # below the key of every float
_NOBODY = tl.constexpr((1 << 31) - 1)  # above every token id
_WORD = tl.constexpr(0xFFFFFFFF)


def penalize_(
    logits: Tensor, counts: Tensor, rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    count, vocab = _check_logits(logits)
    check("counts", counts, shape=(counts.shape[0], vocab), dtype=torch.int32, like=logits)
    check("rows", rows, shape=(count,), dtype=INTS, like=logits)
    for name, x in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        check(name, x, shape=(count,), dtype=torch.float32, like=logits)
    if count:
        grid = (count, triton.cdiv(vocab, _BLOCK))
        _penalize_kernel[grid](logits, counts, rows, repetition, presence, frequency, vocab, _BLOCK, num_warps=8)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    rows, vocab = _check_logits(logits)
    for name, x in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check(name, x, shape=(rows,), dtype=torch.float32, like=logits)
    check("top_k", top_k, shape=(rows,), dtype=torch.int32, like=logits)
    check("seeds", seeds, shape=(rows,), dtype=torch.int64, like=logits)
    check("positions", positions, shape=(rows,), dtype=torch.int64, like=logits)

    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block, chunks, padded = _blocks(vocab)
        bests = torch.empty(rows, 3, chunks, dtype=torch.float32, device=logits.device)
        marks = torch.empty(rows, 3, chunks, dtype=torch.int32, device=logits.device)
        ids = torch.empty(rows, chunks, _CANDIDATES, dtype=torch.int32, device=logits.device)
        settings = (logits, temperature, top_k, top_p, min_p, seeds, positions, bests, marks, ids)
        _scan_kernel[(rows, chunks)](*settings, vocab, chunks, block, _CANDIDATES, num_warps=_warps(block))
        span, num_warps = min(block, _SPAN), _pick_warps(padded)
        _pick_kernel[(rows,)](out, *settings, vocab, chunks, span, padded, _CANDIDATES, num_warps=num_warps)
    return out


def _check_logits(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"logits: shape {list(logits.shape)}; expected [rows, 1 to {MAX_VOCAB}]")
    check("logits", logits, dtype=torch.float32)
    return logits.shape[0], logits.shape[1]


def _blocks(vocab: int) -> tuple[int, int, int]:
    """Tokens per chunk, chunks, and the power of two that holds them."""
    block = min(triton.next_power_of_2(vocab), _BLOCK)
    chunks = triton.cdiv(vocab, block)
    return block, chunks, triton.next_power_of_2(chunks)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


def _pick_warps(padded_chunks: int) -> int:
    return 8 if padded_chunks * _CANDIDATES > 2048 else 4  # any other choice spills on sm_86


@triton.jit
def _penalize_kernel(logits, counts, rows, repetition, presence, frequency, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor, flat, each = tl.load(repetition + row), tl.load(presence + row), tl.load(frequency + row)
    if (factor != 1.0) | (flat != 0.0) | (each != 0.0):
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = col < vocab
        seen = tl.load(counts + tl.load(rows + row).to(tl.int64) * vocab + col, mask, other=0)
        x = tl.load(logits + row * vocab + col, mask, other=0.0)
        times = (seen & (_PROMPT - 1)).to(tl.float32)
        repeated = tl.where(x > 0, tl.math.div_rn(x, factor), x * factor)
        x = tl.where(seen > 0, repeated, x) - (tl.where(times > 0, flat, 0.0) + each * times)
        tl.store(logits + row * vocab + col, x, mask)


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
def _gumbel(seed, position, token):
    word = _philox(seed, token.to(tl.uint32), (position & _WORD).to(tl.uint32))
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: u is exact, and never 0 or 1
    return -tl.log(-tl.log(u))


@triton.jit
def _key(x):
    """An int32 for each float, in the same order; one for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # low + high may pass 2**31


@triton.jit
def _settings(row, temperature, top_k, top_p, min_p, vocab):
    """(is greedy, temperature to divide by, top_k or 0, top_p, min_p, has a filter) of a row."""
    t = tl.load(temperature + row)
    k, p, floor = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    k = tl.where((k > 0) & (k < vocab), k, 0)
    greedy = t == 0.0
    filtered = ((k > 0) | (p < 1.0) | (floor > 0.0)) & (t != 0.0)
    return greedy, tl.where(greedy, 1.0, tl.maximum(t, _COLDEST)), k, p, floor, filtered


@triton.jit
def _scan_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, positions, bests, marks, ids, vocab, chunks,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    greedy, t, _k, _p, _floor, filtered = _settings(row, temperature, top_k, top_p, min_p, vocab)
    col = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = col < vocab
    x = tl.math.div_rn(tl.load(logits + row * vocab + col, mask, other=float("-inf")), t)
    bad = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0) > 0
    x = tl.where(x != x, float("-inf"), x)
    top = tl.max(x, 0)

    bests += row * 3 * chunks + chunk
    marks += row * 3 * chunks + chunk
    tl.store(bests, tl.where(bad, float("inf"), top))
    if filtered:
        e = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
        tl.store(bests + 2 * chunks, tl.sum(e, 0))

        # At or above `high` there are at most CANDIDATES tokens, at or above `low` more: close in on the cut.
        keys = tl.where(mask, _key(x), _LOWEST)
        size = tl.sum(mask.to(tl.int32), 0)
        low = tl.full([], _LOWEST, tl.int32)
        count = tl.where(size <= CANDIDATES, size, 0)
        high = tl.where(size <= CANDIDATES, _LOWEST, _key(top) + 1)
        while (count < CANDIDATES // 2) & (low + 1 < high):
            middle = _middle(low, high)
            found = tl.sum((keys >= middle).to(tl.int32), 0)
            fits = found <= CANDIDATES
            low, high = tl.where(fits, low, middle), tl.where(fits, middle, high)
            count = tl.where(fits, found, count)
        tl.store(marks + chunks, high)
        tl.store(marks + 2 * chunks, count)
        listed = mask & (keys >= high)
        place = tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(ids + (row * chunks + chunk) * CANDIDATES + place, col, listed)
    else:
        if not greedy:
            x += _gumbel(tl.load(seeds + row), tl.load(positions + row), col)
        best = tl.max(tl.where(mask, x, float("-inf")), 0)
        tl.store(bests + chunks, best)
        tl.store(marks, tl.min(tl.where(mask & (x == best), col, _NOBODY), 0))


@triton.jit
def _mass(logits, t, top, floor_key, vocab, BLOCK: tl.constexpr):
    """exp(x - top) summed over the tokens of a whole row whose key is at least `floor_key`."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.math.div_rn(tl.load(logits + start + lane, start + lane < vocab, other=float("-inf")), t)
        total += tl.where(_key(x) >= floor_key, tl.exp(x - top), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _count(logits, t, floor_key, vocab, BLOCK: tl.constexpr):
    """Tokens of a whole row whose key is at least `floor_key`, which is above that of -inf."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x = tl.math.div_rn(tl.load(logits + start + lane, start + lane < vocab, other=float("-inf")), t)
        total += ((start + lane < vocab) & (_key(x) >= floor_key)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _draw(logits, t, cutoff, seed, position, vocab, BLOCK: tl.constexpr):
    """The token of the largest noisy logit of a whole row, of those whose key is at least `cutoff`."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.full([BLOCK], _NOBODY, tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + lane
        x = tl.math.div_rn(tl.load(logits + token, token < vocab, other=float("-inf")), t)
        score = tl.where(_key(x) >= cutoff, x + _gumbel(seed, position, token), float("-inf"))
        first = tl.where(score > best, token, first)
        best = tl.maximum(best, score)
    return tl.min(tl.where(best == tl.max(best, 0), first, _NOBODY), 0)


@triton.jit
def _pick_kernel(
    out, logits, temperature, top_k, top_p, min_p, seeds, positions, bests, marks, ids, vocab, chunks,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _greedy, t, k, p, floor, filtered = _settings(row, temperature, top_k, top_p, min_p, vocab)
    logits += row * vocab
    bests += row * 3 * chunks
    marks += row * 3 * chunks
    ids += row * chunks * CANDIDATES
    chunk = tl.arange(0, CHUNKS)
    exists = chunk < chunks
    tops = tl.load(bests + chunk, exists, other=float("-inf"))
    top = tl.max(tops, 0)
    ceiling = _key(top)

    if (top == float("inf")) | (top == float("-inf")):
        tl.store(out + row, -1)
    elif not filtered:
        scores = tl.load(bests + chunks + chunk, exists, other=float("-inf"))
        firsts = tl.load(marks + chunk, exists, other=_NOBODY)
        tl.store(out + row, tl.min(tl.where(scores == tl.max(scores, 0), firsts, _NOBODY), 0).to(tl.int64))
    else:
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        total = tl.sum(tl.load(bests + 2 * chunks + chunk, exists, other=0.0) * tl.exp(tops - top), 0)
        # The lists hold every token whose key is at least `complete`.
        complete = tl.max(tl.load(marks + chunks + chunk, exists, other=_LOWEST), 0)
        place = tl.arange(0, CHUNKS * CANDIDATES)
        holder = place // CANDIDATES
        counts = tl.load(marks + 2 * chunks + holder, holder < chunks, other=0)
        listed = place % CANDIDATES < counts
        token = tl.load(ids + place, listed, other=0)
        x = tl.math.div_rn(tl.load(logits + token, listed, other=float("-inf")), t)
        listed = listed & (_key(x) >= complete)
        keys = tl.where(listed, _key(x), _LOWEST)
        mass = tl.where(listed, tl.exp(x - top), 0.0)

        cut = tl.full([], _LOWEST, tl.int32)
        known = (k == 0) | (tl.sum(listed.to(tl.int32), 0) >= k)
        if known & (k > 0):  # at least k keys are >= cut, fewer than k are >= high
            cut = complete
            high = ceiling + 1
            while cut + 1 < high:
                middle = _middle(cut, high)
                found = tl.sum((keys >= middle).to(tl.int32), 0)
                cut = tl.where(found >= k, middle, cut)
                high = tl.where(found == k, middle, tl.where(found > k, high, middle))
            total = tl.sum(tl.where(keys >= cut, mass, 0.0), 0)
        nucleus = cut
        if known & (p < 1.0) & (tl.sum(mass, 0) >= p * total):  # tokens above `low` hold p, those above `nucleus` less
            low = tl.maximum(tl.maximum(cut, complete), _LOWEST + 1) - 1
            nucleus = ceiling
            while low + 1 < nucleus:
                middle = _middle(low, nucleus)
                less = tl.sum(tl.where(keys > middle, mass, 0.0), 0) < p * total
                low, nucleus = tl.where(less, low, middle), tl.where(less, middle, nucleus)
        least = tl.where(floor > 0.0, _key(top + tl.log(tl.where(floor > 0.0, floor, 1.0))), _LOWEST)
        cutoff = tl.minimum(tl.maximum(nucleus, least), ceiling)

        if (cutoff >= complete) & (known | (p >= 1.0)):
            score = tl.where(listed & (keys >= cutoff), x + _gumbel(seed, position, token), float("-inf"))
            chosen = tl.min(tl.where(score == tl.max(score, 0), token, _NOBODY), 0)
        else:  # the same, over the whole row
            high = complete
            while (k > 0) & (cut + 1 < high):
                middle = _middle(cut, high)
                found = _count(logits, t, middle, vocab, BLOCK)
                cut = tl.where(found >= k, middle, cut)
                high = tl.where(found == k, middle, tl.where(found > k, high, middle))
            nucleus = cut
            if p < 1.0:
                low = tl.maximum(cut, _LOWEST + 1) - 1
                nucleus = ceiling
                if k > 0:
                    total = _mass(logits, t, top, cut, vocab, BLOCK)
                while low + 1 < nucleus:
                    middle = _middle(low, nucleus)
                    less = _mass(logits, t, top, middle + 1, vocab, BLOCK) < p * total
                    low, nucleus = tl.where(less, low, middle), tl.where(less, middle, nucleus)
            cutoff = tl.minimum(tl.maximum(nucleus, least), ceiling)

            chosen = _draw(logits, t, cutoff, seed, position, vocab, BLOCK)
        tl.store(out + row, chosen.to(tl.int64))


def aot_cases(capability: int) -> list[AotCase]:
    vocab = 151_936
    sizes = {"vocab": 16}
    settings = dict.fromkeys(("temperature", "top_p", "min_p"), "*fp32") | {"top_k": "*i32"}
    settings |= {"seeds": "*i64", "positions": "*i64"}
    scratch = {"bests": "*fp32", "marks": "*i32", "ids": "*i32"}
    block, _, _ = _blocks(vocab)
    shared = {"logits": "*fp32", "vocab": "i32", "chunks": "i32"} | settings | scratch
    return [
        AotCase(
            name="penalize",
            kernel=_penalize_kernel,
            signature=dict.fromkeys(("logits", "repetition", "presence", "frequency"), "*fp32")
            | {"counts": "*i32", "rows": "*i64", "vocab": "i32"},
            constexprs={"BLOCK": _BLOCK},
            attrs=sizes,
            num_warps=8,
        ),
        AotCase(
            name="sample scan",
            kernel=_scan_kernel,
            signature=shared,
            constexprs={"BLOCK": block, "CANDIDATES": _CANDIDATES},
            attrs=sizes,
            num_warps=_warps(block),
        ),
        *(
            AotCase(
                name=f"sample pick {size}",
                kernel=_pick_kernel,
                signature=shared | {"out": "*i64"},
                constexprs={"BLOCK": _SPAN, "CHUNKS": _blocks(size)[2], "CANDIDATES": _CANDIDATES},
                attrs=sizes,
                num_warps=_pick_warps(_blocks(size)[2]),
            )
            for size in (32_000, 128_256, vocab)
        ),
    ]
