"""From logits to tokens in two launches over any vocabulary, with nothing for the CPU to decide.

`_scan_kernel`, one program per (row, 4096 tokens), finds the best token of its chunk: by logit for greedy rows, by
noisy logit for rows without a filter; `_pick_kernel`, one program per row, takes the best of these. For a row with
top_k, top_p or min_p the first finds the peak of every group of up to 64 tokens instead. From the peaks the second
takes a bar that a few hundred groups reach, so somewhat more tokens do, and lists every token that reaches it. Among
these, in registers, it searches the exact cutoff; if that lies below the bar (a top_k of many hundreds, a flat
nucleus) it bisects over the whole row, at two reads of the row per bit.

Cutoffs are searched on int32 keys in the order of the floats, so ties and top_k are exact. Mass is summed in fp32 in an
order fixed by the vocabulary; it may differ from the reference by rounding, and so may the fate of a token at which the
mass of the more probable ones is within about 1e-6 of top_p (or that is within an ulp of min_p's threshold).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lite_llm.ops.reference.sampling import MIN_TEMPERATURE
from lite_llm.ops.triton.aot import AotCase
from lite_llm.ops.triton.launch import pdl, release, wait
from lite_llm.ops.triton.layout import FLOATS, check
from lite_llm.ops.triton.noise import NOBODY, draw, gumbel, key, read

MAX_VOCAB = 1 << 18
_BLOCK = 4096
_GROUPS = 4096  # most groups of a row: `_pick_kernel` holds their peaks in registers
_SPAN = 1024  # tokens that loops over a row take at a time
_LISTED = 1024  # most tokens that it searches in registers

_COLDEST = tl.constexpr(MIN_TEMPERATURE)
_LOWEST = tl.constexpr(-(1 << 31))  # below the key of every float
_FINITE = tl.constexpr(-2139095040)  # the key of the lowest finite float
_FILTERED = tl.constexpr(-1)  # in the place of a token: the row has a filter
_FEWEST = tl.constexpr(256)  # groups that reach the bar, or as many as top_k wants ...
_MOST = tl.constexpr(512)  # ... up to this
_MARKS = tl.constexpr(8)  # that a search tries at once


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    usable: int,
) -> Tensor:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"logits: shape {list(logits.shape)}; expected [rows, 1 to {MAX_VOCAB}]")
    check("logits", logits, dtype=FLOATS)
    count, vocab = logits.shape
    if not 1 <= usable <= vocab:
        raise ValueError(f"usable: {usable}; expected 1 to {vocab}")
    for name, x in (("rows", rows), ("positions", positions)):
        check(name, x, shape=(count,), dtype=torch.int32, like=logits)
    owners = (len(temperature),)
    for name, x in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check(name, x, shape=owners, dtype=torch.float32, like=logits)
    check("top_k", top_k, shape=owners, dtype=torch.int32, like=logits)
    check("seeds", seeds, shape=owners, dtype=torch.int64, like=logits)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=logits.device)

    out = scratch(torch.int32)
    if count:
        block, chunks, group = _blocks(usable)
        groups = chunks * block // group
        bests, firsts, peaks = (
            scratch(torch.float32, 3, chunks),
            scratch(torch.int32, chunks),
            scratch(torch.float32, groups),
        )
        reached, ids, values = (
            scratch(torch.int32, groups),
            scratch(torch.int32, _LISTED),
            scratch(torch.float32, _LISTED),
        )
        settings = (logits, rows, positions, temperature, top_k, top_p, min_p, seeds, bests, firsts, peaks)
        dependent = pdl(logits.device)
        _scan_kernel[(count, chunks)](
            *settings,
            vocab,
            usable,
            chunks,
            block,
            min(block, _SPAN),
            group,
            dependent,
            num_warps=_warps(block),
            launch_pdl=dependent,
        )
        _pick_kernel[(count,)](
            out, *settings, reached, ids, values, vocab, usable, chunks, groups, *_pick_blocks(block, chunks, groups),
            group, dependent, num_warps=_pick_warps(block), launch_pdl=dependent,
        )  # fmt: skip
    return out


def _blocks(usable: int) -> tuple[int, int, int]:
    """Tokens per chunk, chunks, and tokens per group."""
    whole = max(triton.next_power_of_2(usable), 16)
    block = min(whole, _BLOCK)
    return block, triton.cdiv(usable, block), max(whole // _GROUPS, 1)


def _pick_blocks(block: int, chunks: int, groups: int) -> tuple[int, int, int, int]:
    """Tokens read at a time, the powers of two that hold the chunks and the groups, and the length of the list."""
    return (
        min(block, _SPAN),
        max(triton.next_power_of_2(chunks), 2),
        triton.next_power_of_2(groups),
        min(block, _LISTED),
    )


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


def _pick_warps(block: int) -> int:
    return 16 if block > _LISTED else 8


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # low + high may pass 2**31


@triton.jit
def _settings(row, temperature, top_k, top_p, min_p, usable):
    """(is greedy, temperature to divide by, top_k or 0, top_p, min_p, has a filter) of a row of the tables."""
    t = tl.load(temperature + row)
    k, p, floor = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    k = tl.where((k > 0) & (k < usable), k, 0)
    greedy = t == 0.0
    filtered = ((k > 0) | (p < 1.0) | (floor > 0.0)) & (t != 0.0)
    return greedy, tl.where(greedy, 1.0, tl.maximum(t, _COLDEST)), k, p, floor, filtered


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _scan_kernel(
    logits, rows, positions, temperature, top_k, top_p, min_p, seeds, bests, firsts, peaks, vocab, usable, chunks,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    n, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = chunk * BLOCK + tl.arange(0, BLOCK)
    # Padding is read, if not looked at: `usable` may be odd, and as a mask would make every load a narrow one.
    logits += n * vocab
    x = tl.load(logits + col, col < vocab, other=float("-inf")).to(tl.float32)
    release(PDL)
    row = tl.load(rows + n)
    greedy, t, k, p, _floor, filtered = _settings(row, temperature, top_k, top_p, min_p, usable)
    if (chunk + 1) * BLOCK > usable:
        x = tl.where(col < usable, x, float("-inf"))
    if not greedy:
        x = tl.math.div_rn(x, t)

    bests += n * 3 * chunks + chunk
    firsts += n * chunks + chunk
    heights = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)  # a NaN is passed over
    top = tl.max(heights, 0)
    odd = tl.sum(x * 0.0, 0)
    broken = odd != odd  # so NaN or an infinity is in it
    if broken:
        broken = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(bests, tl.where(broken, float("inf"), top))
    if filtered:
        tl.store(firsts, _FILTERED)
        tl.store(peaks + (n * chunks + chunk) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), heights)
        if (k == 0) & (p < 1.0):
            tl.store(bests + 2 * chunks, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top)), 0))
    else:
        if greedy:
            best = top
            first = tl.min(tl.where(x == top, col, NOBODY), 0)
        else:
            start, end = chunk * BLOCK, tl.minimum((chunk + 1) * BLOCK, usable)
            best, first = draw(logits, t, _LOWEST, tl.load(seeds + row), tl.load(positions + n), start, end, SPAN)
        tl.store(bests + chunks, best)
        tl.store(firsts, first)


@triton.jit
def _list(
    logits, peaks, reached, ids, values, k, t, ceiling, usable, groups,
    SPAN: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """List the tokens of a row that reach a bar: ids and scaled logits. Returns the bar (a key) and how many do; more
    than LISTED: too many do, and not all are listed. -inf never does."""
    group = tl.arange(0, GROUPS)
    keys = key(tl.load(peaks + group, group < groups, other=float("-inf")))
    lane = tl.arange(0, 2 * SPAN)
    want = tl.minimum(tl.maximum(k, _FEWEST), _MOST)
    bar = tl.full([], _FINITE, tl.int32)
    count = tl.sum((keys >= bar).to(tl.int32), 0)
    listed = tl.full([], LISTED + 1, tl.int32)
    while (listed > LISTED) & (want > 1):
        above = ceiling + 1
        while (count > want + want // 2) & (bar + 1 < above):
            middle = _middle(bar, above)
            found = tl.sum((keys >= middle).to(tl.int32), 0)
            enough = found >= want
            bar, above = tl.where(enough, middle, bar), tl.where(enough, above, middle)
            count = tl.where(enough, found, count)
        reaches = keys >= bar
        tl.store(reached + tl.cumsum(reaches.to(tl.int32), 0) - 1, group, reaches)
        tl.debug_barrier()  # what other threads of the program have stored is read

        listed = tl.where(count > LISTED, count, 0)
        end = tl.where(count > LISTED, 0, count * GROUP)
        for start in range(0, end, 2 * SPAN):
            at = start + lane
            token = tl.load(reached + at // GROUP, at < end, other=NOBODY // GROUP) * GROUP + at % GROUP
            x = read(logits, token, t, usable)
            hit = key(x) >= bar
            place = listed + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(ids + place, token, hit & (place < LISTED))
            tl.store(values + place, x, hit & (place < LISTED))
            listed += tl.sum(hit.to(tl.int32), 0)
        tl.debug_barrier()
        want //= 8  # the peaks may be few groups': a higher bar then
    return bar, listed


@triton.jit
def _largest(keys, weights, need, low, high):
    """The largest key such that keys from it on weigh at least `need`; keys from `low` on do, from `high` on do not."""
    nth = tl.arange(0, _MARKS) + 1
    while low + 1 < high:
        width = high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)
        marks = low + (tl.maximum(width // (_MARKS + 1), 1) * nth).to(tl.int32, bitcast=True)
        marks = tl.minimum(marks, high - 1)
        weight = tl.sum(tl.where(keys[:, None] >= marks[None, :], weights[:, None], 0.0), 0)
        enough = weight >= need
        low, high = tl.max(tl.where(enough, marks, low), 0), tl.min(tl.where(enough, high, marks), 0)
    return low


@triton.jit
def _mass(logits, t, top, floor_key, usable, SPAN: tl.constexpr):
    """exp(x - top) summed over the tokens of a whole row whose key is at least `floor_key`."""
    lane = tl.arange(0, SPAN)
    total = tl.zeros([SPAN], tl.float32)
    for start in range(0, usable, SPAN):
        x = read(logits, start + lane, t, usable)
        total += tl.where(key(x) >= floor_key, tl.exp(x - top), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _count(logits, t, floor_key, usable, SPAN: tl.constexpr):
    """Tokens of a whole row whose key is at least `floor_key`, which is above that of -inf."""
    lane = tl.arange(0, SPAN)
    total = tl.zeros([SPAN], tl.int32)
    for start in range(0, usable, SPAN):
        x = read(logits, start + lane, t, usable)
        total += (key(x) >= floor_key).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _filtered_draw(
    logits, ids, values, k, p, floor, t, top, total, bar, listed, seed, position, usable,
    SPAN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The token drawn from a row with a filter: from the list if the cutoff lies there, else from the whole row."""
    ceiling = key(top)
    place = tl.arange(0, LISTED)
    all_listed = listed <= LISTED
    exists = place < listed
    x = tl.load(values + place, exists, other=float("-inf"))
    keys = tl.where(exists, key(x), _LOWEST)
    mass = tl.where(exists, tl.exp(x - top), 0.0)
    everything = bar == _FINITE  # all but the tokens that are never drawn

    cut = tl.full([], _LOWEST, tl.int32)  # at least k keys are >= cut
    known = all_listed & ((k == 0) | (listed >= k) | everything)
    if known & (k > 0):
        if listed >= k:
            cut = _largest(keys, tl.where(exists, 1.0, 0.0), k.to(tl.float32), bar, ceiling + 1)
        total = tl.sum(tl.where(keys >= cut, mass, 0.0), 0)
    nucleus = cut
    if known & (p < 1.0) & (everything | (tl.sum(mass, 0) >= p * total)):
        nucleus = tl.minimum(_largest(keys, mass, p * total, tl.maximum(cut, bar), ceiling + 1), ceiling)
    least = tl.where(floor > 0.0, key(top + tl.log(tl.where(floor > 0.0, floor, 1.0))), _LOWEST)
    cutoff = tl.minimum(tl.maximum(nucleus, least), ceiling)

    if all_listed & (everything | (cutoff >= bar)) & (known | (p >= 1.0)):
        # Loaded again: held through the searches they would cost registers.
        token = tl.load(ids + place, exists, other=0)
        x = tl.load(values + place, exists, other=float("-inf"))
        score = tl.where(key(x) >= cutoff, x + gumbel(seed, position, token), float("-inf"))
        chosen = tl.min(tl.where(exists & (score == tl.max(score, 0)), token, NOBODY), 0)
    else:
        high = tl.where(all_listed, bar, ceiling + 1)  # fewer than k keys are >= high
        while (not known) & (k > 0) & (cut + 1 < high):
            middle = _middle(cut, high)
            found = _count(logits, t, middle, usable, SPAN)
            cut = tl.where(found >= k, middle, cut)
            high = tl.where(found == k, middle, tl.where(found > k, high, middle))
        nucleus = cut
        if p < 1.0:
            low = tl.maximum(cut, _FINITE) - 1  # tokens above `low` hold p, those above `nucleus` less
            nucleus = ceiling
            if k > 0:
                total = _mass(logits, t, top, cut, usable, SPAN)
            while low + 1 < nucleus:
                middle = _middle(low, nucleus)
                less = _mass(logits, t, top, middle + 1, usable, SPAN) < p * total
                low, nucleus = tl.where(less, low, middle), tl.where(less, middle, nucleus)
        cutoff = tl.minimum(tl.maximum(nucleus, least), ceiling)
        _best, chosen = draw(logits, t, cutoff, seed, position, 0, usable, SPAN)
    return chosen


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _pick_kernel(
    out, logits, rows, positions, temperature, top_k, top_p, min_p, seeds, bests, firsts, peaks, reached, ids, values,
    vocab, usable, chunks, groups, SPAN: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    LISTED: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    n = tl.program_id(0).to(tl.int64)
    bests += n * 3 * chunks
    chunk = tl.arange(0, CHUNKS)
    exists = chunk < chunks
    tops = tl.load(bests + chunk, exists, other=float("-inf"))
    scores = tl.load(bests + chunks + chunk, exists, other=float("-inf"))
    first = tl.load(firsts + n * chunks + chunk, exists, other=NOBODY)
    top = tl.max(tops, 0)
    if (top == float("inf")) | (top == float("-inf")):
        tl.store(out + n, -1)
    elif tl.min(first, 0) != _FILTERED:
        tl.store(out + n, tl.min(tl.where(scores == tl.max(scores, 0), first, NOBODY), 0))
    else:
        row = tl.load(rows + n)
        _greedy, t, k, p, floor, _filtered = _settings(row, temperature, top_k, top_p, min_p, usable)
        # Anything where top_k is set or top_p is not, and not used then.
        masses = tl.load(bests + 2 * chunks + chunk, exists, other=0.0)
        total = tl.sum(masses * tl.exp(tops - top), 0)
        logits += n * vocab
        ids += n * LISTED
        values += n * LISTED
        bar, listed = _list(
            logits, peaks + n * groups, reached + n * groups, ids, values, k, t, key(top), usable, groups,
            SPAN, GROUPS, LISTED, GROUP,
        )  # fmt: skip
        chosen = _filtered_draw(
            logits, ids, values, k, p, floor, t, top, total, bar, listed, tl.load(seeds + row),
            tl.load(positions + n), usable, SPAN, LISTED,
        )  # fmt: skip
        tl.store(out + n, chosen)


def aot_cases(capability: int) -> list[AotCase]:
    dependent = capability >= 90
    settings = dict.fromkeys(("temperature", "top_p", "min_p", "bests", "peaks"), "*fp32")
    settings |= dict.fromkeys(("rows", "positions", "top_k", "firsts"), "*i32") | {"seeds": "*i64"}
    settings |= dict.fromkeys(("vocab", "usable", "chunks"), "i32")
    attrs = {"rows": 4, "positions": 4, "vocab": 16}
    picks = {"out": "*i32", "reached": "*i32", "ids": "*i32", "values": "*fp32", "groups": "i32"}

    def scan(dtype: str, usable: int) -> AotCase:
        block, _, group = _blocks(usable)
        return AotCase(
            name=f"sample scan {dtype} {usable}",
            kernel=_scan_kernel,
            signature=settings | {"logits": f"*{dtype}"},
            constexprs={"BLOCK": block, "SPAN": min(block, _SPAN), "GROUP": group, "PDL": dependent},
            attrs=attrs,
            num_warps=_warps(block),
        )

    def pick(dtype: str, usable: int) -> AotCase:
        block, chunks, group = _blocks(usable)
        sizes = _pick_blocks(block, chunks, chunks * block // group)
        names = ("SPAN", "CHUNKS", "GROUPS", "LISTED")
        return AotCase(
            name=f"sample pick {dtype} {usable}",
            kernel=_pick_kernel,
            signature=settings | picks | {"logits": f"*{dtype}"},
            constexprs=dict(zip(names, sizes, strict=True)) | {"GROUP": group, "PDL": dependent},
            attrs=attrs,
            num_warps=_pick_warps(block),
        )

    sizes = [("bf16", 128_256), ("bf16", 151_665), ("fp32", 151_665), ("bf16", 32_000), ("fp32", 32)]
    return [make(*size) for make in (scan, pick) for size in sizes]
