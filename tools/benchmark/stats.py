"""Numbers from what came back: medians with intervals over runs, and times over the requests of one run.

Times are in seconds, counted from when a request should have been sent: a side that takes requests late pays for it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lite_llm.errors import UsageError
from tools.benchmark.work import Run, Work

SAME = 0.03
"""Two processes of one program differ by as much, whatever the rounds: less is not called a difference."""
SCATTER = 0.1
"""How far from 1 an interval may reach where there is said to be no difference; beyond, runs tell too little."""

# The median of n values of a normal distribution lies within this many of their standard deviations of the true one
# 95 times in 100: simulated, a million draws each.
_REACH = {2: 9.0, 3: 2.55, 4: 1.64, 5: 1.36}


@dataclass(frozen=True)
class Ratio:
    """One side's figure over another's; `differs` if the interval leaves 1 out, None if there is no interval."""

    median: float
    low: float
    high: float
    differs: bool | None


def alike(ratio: Mapping[str, float]) -> str:
    """What is said of a ratio (median, low, high) that is not called a difference."""
    near = abs(ratio["median"] - 1) <= SAME and 1 - SCATTER <= ratio["low"] <= ratio["high"] <= 1 + SCATTER
    return "no difference" if near else "not told apart"


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return math.sqrt(statistics.fmean(value * value for value in values))


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and low and high that hold the true one 95 times in 100 or more.

    From six values on: order statistics, which suppose nothing of the noise (six to eight values: smallest and
    largest; nine to eleven: the second of either end, so that one outlier moves nothing). Fewer cannot reach 95 % that
    way: theirs suppose normal noise. One value says nothing of the noise: low and high are the value.
    """
    ordered = sorted(_finite(values))
    n, median = len(ordered), statistics.median(ordered)
    if n == 1:
        return median, median, median
    if n in _REACH:
        reach = _REACH[n] * statistics.stdev(ordered)
        return median, median - reach, median + reach
    # Of the 2**n equally likely ways to lie above or below the true median, 2.5 % may leave it out at either end.
    outside, lost = 1, 1
    while 40 * (lost + math.comb(n, outside)) <= 2**n:
        lost += math.comb(n, outside)
        outside += 1
    return median, ordered[outside - 1], ordered[n - outside]


def ratio_of(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a[i] / b[i] for figures of interleaved runs A B A B: what changes slowly (clocks, heat) meets both of a pair.

    Of a single pair nobody can tell whether they differ: nothing is known of the noise.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} runs and b {len(b)}; expected pairs")
    if not all(value > 0 for value in (*a, *b)):
        raise ValueError(f"a = {list(a)}, b = {list(b)}; expected figures above 0")
    median, low, high = median_and_interval([x / y for x, y in zip(a, b, strict=True)])
    return Ratio(median, low, high, differs=not low <= 1 <= high if len(a) > 1 else None)


def percentiles(values: Sequence[float], percents: Sequence[float] = (50, 90, 99)) -> tuple[float, ...]:
    """In the order of `percents`; between two values on a straight line, 0 the smallest and 100 the largest."""
    ordered = sorted(_finite(values))
    if not all(0 <= percent <= 100 for percent in percents):
        raise ValueError(f"percents = {percents}; expected numbers from 0 to 100")
    found = []
    for percent in percents:
        place = (len(ordered) - 1) * percent / 100
        below = ordered[math.floor(place)]
        found.append(below + (ordered[math.ceil(place)] - below) * (place % 1))
    return tuple(found)


def first_token(run: Run, work: Work) -> tuple[float, ...]:
    """Of every request, from `ask.at` to its first token; () of a side that tells only the end."""
    pairs = list(zip(work.asks, run.answers, strict=True))
    return tuple(answer.times[0] - ask.at for ask, answer in pairs if answer.times)


def per_token(run: Run) -> tuple[float, ...]:
    """Of every request, the mean time between tokens; requests of one token, or without times, have none."""
    return tuple(_between(answer.times) for answer in run.answers if len(answer.times) > 1)


def end_to_end(run: Run, work: Work) -> tuple[float, ...]:
    """Of every request, from `ask.at` to its end."""
    return tuple(answer.ended - ask.at for ask, answer in zip(work.asks, run.answers, strict=True))


def tokens_per_second(run: Run) -> float:
    """Tokens made, of all requests, by the seconds of the whole run."""
    return sum(len(answer.tokens) for answer in run.answers) / run.seconds


def goodput(run: Run, work: Work, ttft: float | None = None, tpot: float | None = None) -> float:
    """Requests per second whose first token came within `ttft` and the others, on average, every `tpot` seconds.

    None is no limit; a request of one token has no time between tokens and meets `tpot`.
    """
    for name, limit in (("ttft", ttft), ("tpot", tpot)):
        if limit is not None and not limit > 0:
            raise UsageError(f"{name} = {limit}; expected more than 0 seconds")
    met = 0
    for ask, answer in zip(work.asks, run.answers, strict=True):
        if not answer.times and (ttft is not None or tpot is not None):
            raise UsageError("this side tells no times of tokens; its goodput cannot be known", "ask for none")
        soon = ttft is None or answer.times[0] - ask.at <= ttft
        steady = tpot is None or len(answer.times) == 1 or _between(answer.times) <= tpot
        met += soon and steady
    return met / run.seconds


def _between(times: Sequence[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def _finite(values: Sequence[float]) -> Sequence[float]:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values = {list(values)}; expected at least one, all finite")
    return values
