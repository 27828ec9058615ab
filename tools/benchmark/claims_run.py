"""What all claims share: time that is dealt out, sides that take turns until it is used up, and rows.

A run that has begun is never cut in the middle: what a run will take is known from a short one before it, and one that
does not fit is left out, with a line in the document that says so.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tools.benchmark import stats
from tools.benchmark.bench import JUDGE, Bench, Works, compared, figure, near
from tools.benchmark.claims_record import ClaimRow, Document
from tools.benchmark.claims_texts import Claim
from tools.benchmark.limits import work_limit
from tools.benchmark.sides import Side, SideFailed
from tools.benchmark.table import number
from tools.benchmark.work import Run, Work

COMPILED = "transformers-compile"
OPENING = {"cuda": 40.0, "cpu": 0.0}
"""Seconds to start the processes of a model and fill in its weights: a guess, for what cannot be tried first."""
SHORT = 8
"""Tokens of an answer that tells how long a whole one takes."""

Arm = Callable[[Work], Run]
"""One way to serve a work."""


class Clock:
    """Seconds dealt out by weight: what a claim leaves goes to the later ones, and what it overruns they lack."""

    def __init__(self, seconds: float, weights: dict[str, float], now: Callable[[], float] = time.monotonic):
        self._now, self._weights = now, dict(weights)
        self._end = self._until = now() + seconds

    def begin(self, name: str) -> float:
        """The seconds of this claim, which begin now; each claim begins once."""
        left, all_weights = max(self._end - self._now(), 0.0), sum(self._weights.values())
        mine = left * self._weights.pop(name) / all_weights
        self._until = self._now() + mine
        return mine

    def left(self) -> float:
        return self._until - self._now()


class Gates:
    """Where a Bench writes its gates: the document has those of several models."""

    def __init__(self, document: Document, model: str):
        self._document, self._model = document, model
        self.passed: set[tuple[str, int]] = set()  # side and batch size that were looked at

    def add_gate(self, gate: dict) -> None:
        self._document.add_gate(gate | {"model": self._model})


@dataclass
class Stage:
    """One claim on one model's processes."""

    claim: Claim
    bench: Bench
    gates: Gates
    clock: Clock
    document: Document
    command: str
    hardware: str
    notes: list[str] = field(default_factory=list)  # of the next row

    def leave_out(self, what: str, why: str) -> None:
        self.bench.say(f"left out {what}: {why}")
        self.document.leave_out(self.claim.name, what, why)

    def fits(self, what: str, seconds: float) -> bool:
        left = self.clock.left()
        if seconds > left:
            self.leave_out(what, f"about {number(seconds)} s, and {number(max(left, 0.0))} s of its time are left")
        return seconds <= left

    def open(self, labels: Sequence[str]) -> dict[str, Side]:
        """Those that can run here; of the others a line says why they are left out."""
        dead = [label for label, side in self.bench.sides.items() if not side.process.alive]
        for label in dead:
            del self.bench.sides[label]
        return self.start({label: lambda label=label: self.bench.open(label) for label in labels})

    def start(self, makers: dict[str, Callable[[], Side]]) -> dict[str, Side]:
        """Sides by name: all at once on a GPU; one by one on a CPU, where the first says how many threads there are."""
        found = {}
        with ThreadPoolExecutor(8 if self.bench.facts.device == "cuda" else 1) as pool:
            for label, made in {label: pool.submit(make) for label, make in makers.items()}.items():
                try:
                    found[label] = made.result()
                except SideFailed as error:
                    self.leave_out(label, error.message)
        return found

    def gate(self, sides: dict[str, Side], sizes: Sequence[int]) -> None:
        """Bench.gate, but each side and size once."""
        for label, side in sides.items():
            if new := [size for size in sizes if (label, size) not in self.gates.passed]:
                self.bench.gate({label: side}, new)
                self.gates.passed |= {(label, size) for size in new}

    def judge(self, label: str, work: Work, run: Run, asks: int = 4, tokens: int = 16) -> None:
        """A gate of the very tokens that were timed: the first of a few answers, scored by transformers."""
        pairs = list(zip(work.asks, run.answers, strict=True))[:asks]
        gaps, _ = self.bench.open(JUDGE).score([(ask.ids, answer.tokens[:tokens]) for ask, answer in pairs])
        worst, name = max(map(max, gaps)), f"tokens of {work.name}"
        wrong = f"a greedy token is {worst:.3g} nats below transformers' best"
        known = {"worst_gap_nats": worst, "wrong": wrong if worst > near(self.bench.facts.dtype) else None}
        self.gates.add_gate({"name": name, "side": label} | known)

    def turns(self, arms: dict[str, Arm], works: Works, rounds: int, reserve: float = 0.0) -> dict[str, list[Run]]:
        """Runs by turns, A B A B, of the same works: a first round, and more while there is time for them.

        `reserve` are seconds that later works of the claim need for a first round of theirs.
        """
        found: dict[str, list[Run]] = {label: [] for label in arms}
        expected = 0.0
        for turn in range(rounds):
            if turn and self.clock.left() < expected + reserve:
                self.notes.append(f"{turn} of {rounds} rounds: there was no time for more")
                break
            began, work = time.monotonic(), works(1 + turn)
            for label, arm in arms.items():
                self.bench.say(f"{self.claim.name}, {work.name}: round {turn + 1} of {rounds}, {label}")
                found[label].append(arm(work))
            expected = time.monotonic() - began
        return found

    def row(self, name: str, sides: dict[str, dict], ratios: list[dict], rounds: int, compiles: int) -> None:
        """Adds it with the notes that were made for it."""
        facts = self.bench.facts
        model = {"name": facts.name, "dtype": facts.dtype, "random_weights": facts.model.shape is not None}
        row = ClaimRow(
            self.claim.name, name, model, self.hardware, self.command, self.claim.original, list(self.claim.never),
            sides, ratios, rounds, self.notes, compiles,
        )  # fmt: skip
        self.notes = []
        if (row := self.document.add(row)).refused:
            self.bench.say(f"refused {name}: {row.refused}")

    def compare(self, name: str, runs: dict[str, list[Run]], works: Works, pairs: Sequence[tuple[str, str]]) -> None:
        """A row of sides that served the same works; a ratio of each pair of (how many times as fast, as this)."""
        seconds = {label: [run.seconds for run in mine] for label, mine in runs.items()}
        sides = {label: self.figures(mine, works) for label, mine in runs.items()}
        rounds = len(next(iter(runs.values())))
        compiles = sum(run.compiles for mine in runs.values() for run in mine)
        self.row(name, sides, ratios(seconds, pairs), rounds, compiles)

    def figures(self, runs: list[Run], works: Works) -> dict:
        """Of whole runs; the share of the limit is that of the work as it was asked, whatever a side made of it."""
        bench = self.bench
        limit = work_limit(bench.facts.cfg, bench.facts.itemsize, works(1), bench.limits.max_requests, bench.roof)
        seconds = [run.seconds for run in runs]
        found = {
            "seconds": figure(seconds),
            "tokens_per_second": figure([stats.tokens_per_second(run) for run in runs]),
            "requests_per_second": figure([len(run.answers) / run.seconds for run in runs]),
            "tokens": sum(len(answer.tokens) for answer in runs[0].answers),
            "of_limit": limit.seconds / statistics.median(seconds),
            "limit": limit.name,
        }
        if all(run.peak_bytes for run in runs):
            found["peak_bytes"] = max(run.peak_bytes for run in runs)
        return found


def ratios(seconds: dict[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    found = []
    for side, against in pairs:
        if side in seconds and against in seconds:
            (one,) = compared(seconds, [against], side)
            found.append({"side": side, "against": against, "ratio": one["ratio"], "differs": one["differs"]})
    return found


def shortened(work: Work, new: int) -> Work:
    """The same prompts with answers of at most so many tokens."""
    asks = tuple(replace(ask, new=min(ask.new, new)) for ask in work.asks)
    return replace(work, asks=asks, name=f"{work.name}, cut to {new}")


def expect(side: Side, short: Work, new: int) -> float:
    """Seconds of a work whose requests come together and make `new` tokens, from a short run, which warms the side."""
    run = side.run(short)
    return run.seconds + new * statistics.fmean(stats.per_token(run) or [0.0])


@contextlib.contextmanager
def forgiving(stage: Stage, what: str):
    """A side that fails in here costs what it was asked for, not the other claims."""
    try:
        yield
    except SideFailed as error:
        stage.notes = []
        stage.leave_out(what, error.message)
