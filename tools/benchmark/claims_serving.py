"""Claims about who waits for whom: requests that arrive over time, and requests of unequal lengths. All on our engine.

A server of fixed batches needs no clock to wait by: it is idle or it runs a batch, so its waiting is arithmetic over
the arrivals and its batches are measured. Ours takes requests while it runs, and is measured by the wall clock.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tools.benchmark.bench import JUDGE, OURS, Works, figure
from tools.benchmark.claims_run import Arm, Stage, forgiving, ratios
from tools.benchmark.limits import work_limit
from tools.benchmark.modes import in_windows
from tools.benchmark.sides import Side
from tools.benchmark.table import number
from tools.benchmark.work import Answer, Arrivals, Ask, Lengths, Run, Work, fixed, many, poisson

ALONE = "request at a time"
_NEAR = 1.1  # of the least time that the arrivals allow
_SLOWER = 1.3  # a batch than one request: a guess
Serve = Callable[[Sequence[Ask]], tuple[float, list[float]]]
"""Seconds that a batch takes until all of it have ended, and until each has."""


# ---- Flover


@dataclass(frozen=True)
class Flover:
    """`gap` and `windows` and `poisson` are shares of the latency of one request alone; `claimed_gap` is in seconds."""

    requests: int
    prompt: int
    new: int
    gap: float
    claimed_gap: float
    windows: tuple[float, ...]
    poisson: tuple[float, ...]
    random_new: str  # Lengths
    rounds: int

    @property
    def most(self) -> int:
        return self.requests

    @property
    def longest(self) -> int:
        return self.prompt + self.new

    @property
    def slots(self) -> int:
        return self.requests * self.longest


class Batches:
    """What a fixed batch takes: measured once for each that occurs, and its prompts are as long as all others.

    Of one request it is known from the longest one: a shorter answer is its beginning.
    """

    def __init__(self, side: Side, alone: Run):
        self._side, self._alone = side, alone
        self._known: dict[tuple[int, ...], tuple[float, list[float]]] = {}
        self.compiles = 0

    def __call__(self, asks: Sequence[Ask]) -> tuple[float, list[float]]:
        """Seconds until all have ended, and until each has."""
        if len(asks) == 1:
            end = self._alone.answers[0].times[asks[0].new - 1]
            return end, [end]
        news = tuple(ask.new for ask in asks)
        if news not in self._known:
            run = self._side.run(Work(f"a batch of {len(asks)}", tuple(replace(ask, at=0.0) for ask in asks)))
            self.compiles += run.compiles
            self._known[news] = run.seconds, [answer.ended for answer in run.answers]
        return self._known[news]

    def expected(self, asks: Sequence[Ask], servers: Sequence[tuple[float, int]]) -> float:
        """Seconds of the batches that some servers (gather, most) will need and that were not measured yet."""
        missing: dict[tuple[int, ...], float] = {}

        def guess(group: Sequence[Ask]) -> tuple[float, list[float]]:
            end = _SLOWER * self._alone.answers[0].times[max(ask.new for ask in group) - 1]
            news = tuple(ask.new for ask in group)
            if len(group) > 1 and news not in self._known:
                missing[news] = end
            return end, [end] * len(group)

        for gather, most in servers:
            fixed_batches(asks, gather, most, guess)
        return sum(missing.values())


def fixed_batches(asks: Sequence[Ask], gather: float, most: int, serve: Serve) -> list[float]:
    """When each request ends if nobody joins a batch that runs.

    A batch starts when the server is free and its oldest request has waited for `gather` seconds, or when it is full.
    """
    ends, free = [0.0] * len(asks), 0.0
    left = sorted(range(len(asks)), key=lambda index: asks[index].at)
    while left:
        opens = max(free, asks[left[0]].at + gather)
        taken = [index for index in left if asks[index].at <= opens][:most]
        start = max(free, asks[taken[-1]].at) if len(taken) == most else opens
        seconds, each = serve([asks[index] for index in taken])
        for index, end in zip(taken, each, strict=True):
            ends[index] = start + end
        free, left = start + seconds, left[len(taken) :]
    return ends


def flover(stage: Stage, plan: Flover) -> None:
    facts = stage.bench.facts
    sides = stage.open([OURS, JUDGE])
    if OURS not in sides:
        return
    stage.gate({OURS: sides[OURS]}, [1, plan.requests])
    prompts = Lengths.parse(str(plan.prompt))

    def works(n: int, news: str, arrivals: Arrivals | None) -> Works:
        lengths = Lengths.parse(news)
        return lambda turn: many(facts.vocab, n, prompts, lengths, 1000 + turn, arrivals, facts.banned)

    one, side = works(1, str(plan.new), None), sides[OURS]
    side.warm(works(plan.requests, str(min(plan.new, 16)), None)(0))
    side.warm(one(0))
    runs = [side.run(one(1 + turn)) for turn in range(3)]
    latency = statistics.median(run.seconds for run in runs)
    stage.compare("one request alone", {OURS: runs}, one, [])
    gap = fixed(plan.gap * latency)
    scenarios = {
        f"a request every {plan.gap:g} latencies": works(plan.requests, str(plan.new), gap),
        f"a request every {plan.claimed_gap:g} s, as claimed": works(
            plan.requests, str(plan.new), fixed(plan.claimed_gap)
        ),
        f"random lengths, a request every {plan.gap:g} latencies": works(plan.requests, plan.random_new, gap),
    }
    for share in plan.poisson:
        name = f"Poisson, {share:g} latencies apart on average"
        scenarios[name] = works(plan.requests, str(plan.new), poisson(1 / (share * latency)))
    servers = {ALONE: (0.0, 1)}
    servers |= {f"windows of {share:g} latencies": (share * latency, plan.requests) for share in plan.windows}
    batches = Batches(side, runs[0])

    def expected(make: Works) -> float:
        asks = make(1).asks
        return max(ask.at for ask in asks) + _SLOWER * latency + batches.expected(asks, list(servers.values()))

    left = dict(scenarios)
    for name, make in scenarios.items():
        del left[name]
        if stage.fits(name, expected(make)):
            with forgiving(stage, name):
                reserve = sum(map(expected, left.values()))
                _scenario(stage, plan.rounds, side, name, make, batches, servers, reserve)


def _scenario(
    stage: Stage,
    rounds: int,
    side: Side,
    name: str,
    make: Works,
    batches: Batches,
    servers: dict[str, tuple[float, int]],
    reserve: float,
) -> None:
    known = batches.compiles
    runs = stage.turns({OURS: side.run}, make, rounds, reserve)[OURS]
    done = [make(1 + turn) for turn in range(len(runs))]
    ends = {OURS: [[answer.ended for answer in run.answers] for run in runs]}
    for label, (gather, most) in servers.items():
        stage.bench.say(f"{stage.claim.name}, {name}: {label}")
        ends[label] = [fixed_batches(work.asks, gather, most, batches) for work in done]
    seconds = {label: [max(mine) for mine in rows] for label, rows in ends.items()}
    tokens = [sum(ask.new for ask in work.asks) for work in done]
    found = {}
    for label, rows in ends.items():
        waits = [[end - a.at for end, a in zip(mine, w.asks, strict=True)] for mine, w in zip(rows, done, strict=True)]
        found[label] = {
            "seconds": figure(seconds[label]),
            "tokens_per_second": figure([t / s for t, s in zip(tokens, seconds[label], strict=True)]),
            "mean_latency_s": figure([statistics.fmean(mine) for mine in waits]),
            "tokens": tokens[0],
        }
    bench = stage.bench
    limit = work_limit(bench.facts.cfg, bench.facts.itemsize, done[0], bench.limits.max_requests, bench.roof)
    found[OURS] |= {"of_limit": limit.seconds / statistics.median(seconds[OURS]), "limit": limit.name}
    longest = max(ask.new for ask in done[0].asks)
    least = max(ask.at + batches([ask])[0] for ask in done[0].asks)
    stage.notes.append(f"{done[0].name}, one request alone {number(batches([Ask((0,), longest)])[0])} s")
    stage.notes.append(_tied(least, {label: mine[0] for label, mine in seconds.items()}))
    compiles = sum(run.compiles for run in runs) + batches.compiles - known
    stage.row(name, found, ratios(seconds, [(OURS, label) for label in servers]), len(done), compiles)


def _tied(least: float, seconds: dict[str, float]) -> str:
    """What the arrivals alone allow, and who gets there."""
    tied = [label for label, mine in seconds.items() if mine <= _NEAR * least]
    said = f"the arrivals and one latency after the last alone allow {least:.3g} s"
    if not tied:
        return f"{said}, and nobody is bound by them"
    if len(tied) == len(seconds):
        return f"{said}: bound by the arrivals, everything ties, and the ratios say nothing"
    return f"{said}: bound by the arrivals for {' and '.join(tied)}; any server that keeps up ties with that"


# ---- Energon


@dataclass(frozen=True)
class Energon:
    """`cases` are (batch size, new tokens, requests)."""

    lengths: str
    cases: tuple[tuple[int, int, int], ...]
    rounds: int

    @property
    def most(self) -> int:
        return max(size for size, _, _ in self.cases)

    @property
    def longest(self) -> int:
        return max(map(int, self.lengths.split("-"))) + max(new for _, new, _ in self.cases)

    @property
    def slots(self) -> int:
        return self.most * self.longest


FIFO, SORTED, PACKED = "FIFO, padded", "by length, padded", "FIFO, packed"


def padded(work: Work, size: int) -> Work:
    """Every `size` requests as long as the longest of them: tokens in front that mean nothing, and cost as much."""
    asks = []
    for first in range(0, len(work.asks), size):
        group = work.asks[first : first + size]
        width = max(len(ask.ids) for ask in group)
        asks += [replace(ask, ids=ask.ids[:1] * (width - len(ask.ids)) + ask.ids) for ask in group]
    return replace(work, asks=tuple(asks), name=f"{work.name} padded")


def by_length(work: Work) -> Work:
    """All of the queue in the order of lengths: no batching of fixed size can pad less."""
    return replace(work, asks=tuple(sorted(work.asks, key=lambda ask: len(ask.ids))))


def waste(lengths: str, size: int) -> float:
    """Padded tokens per real one of batches of `size` uniform lengths: what theory expects of FIFO."""
    low, high = map(int, lengths.split("-"))
    count = high - low + 1
    longest = sum(1 - (k / count) ** size for k in range(count)) + low - 1  # mean of the largest of `size`
    return longest / ((low + high) / 2)


def energon(stage: Stage, plan: Energon) -> None:
    facts = stage.bench.facts
    sides = stage.open([OURS, JUDGE])
    if OURS not in sides:
        return
    stage.gate({OURS: sides[OURS]}, sorted({size for size, _, _ in plan.cases}))
    for place, (size, new, requests) in enumerate(plan.cases):
        name = f"{requests} requests of {plan.lengths} ids, batches of {size}, {new} new"
        with forgiving(stage, name):
            make = lambda turn, n=requests, new=new: many(  # noqa: E731
                facts.vocab, n, Lengths.parse(plan.lengths), Lengths.parse(str(new)), 1000 + turn, banned=facts.banned
            )  # fmt: skip
            _case(stage, plan, sides[OURS], name, size, make, later=len(plan.cases) - 1 - place)


def _case(stage: Stage, plan: Energon, side: Side, name: str, size: int, make: Works, later: int) -> None:
    windows = in_windows(size)
    arms: dict[str, Arm] = {
        FIFO: lambda work: windows(side, padded(work, size)),
        SORTED: lambda work: _in_order(work, windows(side, padded(by_length(work), size))),
        PACKED: lambda work: windows(side, work),
        OURS: side.run,
    }
    few = replace(make(0), asks=make(0).asks[: max(len(make(0).asks) // 8, size)])
    stage.bench.say(f"{stage.claim.name}, {name}: warming")
    for arm in arms.values():
        arm(few)
    expected = sum(arm(few).seconds for arm in arms.values()) * len(make(0).asks) / len(few.asks)
    if not stage.fits(name, expected):
        return
    runs = stage.turns(arms, make, plan.rounds, expected * later)
    real = sum(len(ask.ids) for ask in make(1).asks)
    told = [sum(len(a.ids) for a in padded(work, size).asks) / real for work in (make(1), by_length(make(1)))]
    stage.notes.append(
        f"prompt tokens computed per real one: FIFO {told[0]:.2f} (theory {waste(plan.lengths, size):.2f}), "
        f"by length {told[1]:.2f}, packed 1"
    )
    pairs = [(label, FIFO) for label in (SORTED, PACKED, OURS)] + [(PACKED, SORTED)]
    stage.compare(name, runs, make, pairs)


def _in_order(work: Work, run: Run) -> Run:
    """Answers to a work in the order in which it was asked, not of `by_length`."""
    places = sorted(range(len(work.asks)), key=lambda index: len(work.asks[index].ids))
    answers: list[Answer | None] = [None] * len(places)
    for place, answer in zip(places, run.answers, strict=True):
        answers[place] = answer
    return replace(run, answers=tuple(answers))
