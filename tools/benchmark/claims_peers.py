"""Claims of whole answers: against transformers, eager and compiled, and against ourselves with one thing less."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tools.benchmark.bench import JUDGE, OURS, Facts
from tools.benchmark.claims_run import COMPILED, OPENING, SHORT, Stage, expect, forgiving, shortened
from tools.benchmark.ladder import RUNGS
from tools.benchmark.modes import in_windows
from tools.benchmark.sides import Side
from tools.benchmark.table import number
from tools.benchmark.work import Ask, Lengths, Work, batch, many

_DECODED = 4  # tokens that a compiled side makes in its warm-up


@dataclass(frozen=True)
class Shape:
    """`batch` requests at once; the first of `news` whose runs fit into the time."""

    batch: int
    prompt: str  # Lengths
    news: tuple[int, ...]
    rounds: int

    def work(self, facts: Facts, new: int, turn: int) -> Work:
        prompts, news = Lengths.parse(self.prompt), Lengths.parse(str(new))
        return many(facts.vocab, self.batch, prompts, news, 1000 + turn, banned=facts.banned)

    def name(self, new: int) -> str:
        return f"batch {self.batch}, prompts of {self.prompt} ids, {new} new tokens"

    @property
    def longest(self) -> int:
        return longest(self.prompt) + max(self.news) + self.spread

    @property
    def spread(self) -> int:
        """By how many tokens the longest prompts of two works may differ."""
        lengths = _numbers(self.prompt)
        return max(lengths) - min(lengths)

    def every_length(self, facts: Facts, new: int) -> Work:
        """Answers in which a cache meets each length that it has in any work of `new` tokens: the shortest prompts."""
        prompts, news = Lengths.parse(str(min(_numbers(self.prompt)))), Lengths.parse(str(new + self.spread))
        return many(facts.vocab, self.batch, prompts, news, 1000, banned=facts.banned)


@dataclass(frozen=True)
class Versus:
    """`shapes` in the order of their worth; the first `compiled` of them are also run against compiled transformers."""

    shapes: tuple[Shape, ...]
    compiled: int

    @property
    def most(self) -> int:
        return max(shape.batch for shape in self.shapes)

    @property
    def longest(self) -> int:
        return max(shape.longest for shape in self.shapes)

    @property
    def slots(self) -> int:
        return max(shape.batch * shape.longest for shape in self.shapes)


def versus(stage: Stage, plan: Versus) -> None:
    facts = stage.bench.facts
    early = plan.compiled == 1  # with more of them there may be no memory for a third model beside large batches
    tracing = 25.0 + 2.0 * facts.cfg.num_layers if facts.device == "cuda" else 0.0  # a guess: nobody can try it first
    labels = [OURS, JUDGE]
    if early and stage.clock.left() > OPENING[facts.device] + tracing:
        labels.append(COMPILED)
    sides = stage.open(labels)
    if OURS not in sides or JUDGE not in sides:
        return
    stage.gate({OURS: sides[OURS]}, sorted({1, plan.shapes[0].batch}))
    measured: list[tuple[Shape, int]] = []
    for place, shape in enumerate(plan.shapes):
        with forgiving(stage, shape.name(shape.news[0])):
            spare = tracing if place == 0 and COMPILED in sides else 0.0
            if new := _eager(stage, sides, shape, spare, plan.shapes[place + 1 :]):
                measured.append((shape, new))
        if place == 0 and measured and COMPILED in sides:  # before the time goes into the others
            _compiled(stage, sides, *measured[0], tracing)
    if not plan.compiled or COMPILED in labels or not measured:
        return
    if stage.fits(COMPILED, OPENING[facts.device] + tracing):
        sides |= stage.open([COMPILED])
        for shape, new in measured[: plan.compiled] if COMPILED in sides else []:
            _compiled(stage, sides, shape, new, tracing)


def _eager(stage: Stage, sides: dict[str, Side], shape: Shape, spare: float, later: Sequence[Shape]) -> int | None:
    """The answer's length that was measured; `spare` seconds are kept if an answer of any length fits beside them.

    transformers' warm-up makes whole answers: its libraries plan their kernels anew for each length of the cache, which
    takes several times as long as a step.
    """
    facts, ours, theirs = stage.bench.facts, sides[OURS], sides[JUDGE]
    first = shape.work(facts, shape.news[0], 0)
    stage.bench.say(f"{stage.claim.name}, {first.name}: how long will it take?")
    ours.warm(first)
    mine = ours.run(first).seconds
    theirs.warm(shortened(first, SHORT))  # what only a process's first steps do
    unmet = long_prompts(first, SHORT)  # its lengths were not met yet, and then they were
    others = expect(theirs, unmet, shape.news[0]), expect(theirs, unmet, shape.news[0])

    def seconds(new: int) -> float:
        return mine + sum(others) * new / shape.news[0]

    left = stage.clock.left()
    spare = spare if seconds(shape.news[-1]) + spare <= left else 0.0
    new = next((new for new in shape.news if seconds(new) + spare <= left), None)
    for longer in shape.news[: shape.news.index(new) if new else None]:
        kept = f", {spare:.0f} s of them for {COMPILED}" if spare else ""
        why = f"about {number(seconds(longer))} s, and {number(max(left, 0.0))} s of its time are left{kept}"
        stage.leave_out(shape.name(longer), why)
    if new is None:
        return None
    works = lambda turn: shape.work(facts, new, turn)  # noqa: E731
    stage.bench.say(f"{stage.claim.name}, {works(0).name}: warming {JUDGE}")
    theirs.warm(shape.every_length(facts, new))
    reserve = spare + sum(seconds(after.news[-1]) for after in later)
    runs = stage.turns({OURS: ours.run, JUDGE: theirs.run}, works, shape.rounds, reserve)
    stage.judge(OURS, works(1), runs[OURS][0])
    stage.compare(shape.name(new), runs, works, [(OURS, JUDGE)])
    return new


def _compiled(stage: Stage, sides: dict[str, Side], shape: Shape, new: int, tracing: float) -> None:
    """Against transformers compiled: its warm-up has the same cache and so the same graphs, and a few steps."""
    facts, theirs = stage.bench.facts, sides[COMPILED]
    name = f"{shape.name(new)}, {theirs.info.get('note', 'compiled')}"
    if not stage.fits(name, tracing):
        return
    with forgiving(stage, name):
        works = lambda turn: shape.work(facts, new, turn)  # noqa: E731
        stage.bench.say(f"{stage.claim.name}, {works(0).name}: warming {COMPILED}")
        theirs.warm(long_prompts(works(0), _DECODED), timeout=max(stage.clock.left(), 1.0))
        sides[OURS].warm(shortened(works(0), _DECODED))
        expected = expect(theirs, long_prompts(works(0), _DECODED), new)
        if not stage.fits(name, expected):
            return
        runs = stage.turns({OURS: sides[OURS].run, COMPILED: theirs.run}, works, 3)
        for label, mine in runs.items():
            stage.judge(label, works(1), mine[0])
        stage.compare(name, runs, works, [(OURS, COMPILED)])


def long_prompts(work: Work, new: int) -> Work:
    """As many tokens in all, but only the last `new` of them to be made."""
    asks = tuple(Ask(ask.ids + ask.ids[:1] * max(ask.new - new, 0), min(ask.new, new)) for ask in work.asks)
    return replace(work, asks=asks, name=f"{work.name}, all but {new} given")


@dataclass(frozen=True)
class Ladder:
    batch: int
    prompt: str
    new: int
    rounds: int

    @property
    def most(self) -> int:
        return self.batch

    @property
    def longest(self) -> int:
        return longest(self.prompt) + 2 * self.new

    @property
    def slots(self) -> int:
        return self.batch * self.longest


def ladder(stage: Stage, plan: Ladder) -> None:
    """All rungs are open at once and take turns; only one of them runs at any time."""
    facts, bench = stage.bench.facts, stage.bench
    rungs = {rung.name: rung for rung in RUNGS if facts.device == "cuda" or not rung.gpu}
    prompts, one, mixed = (Lengths.parse(text) for text in (plan.prompt, str(plan.new), _around(plan.new)))
    common = batch(facts.vocab, 1, max(longest(plan.prompt) * 7 // 8, 1), 1, 1, facts.banned).asks[0].ids

    def drawn(size: int, news: Lengths) -> Callable[[int], Work]:
        return lambda turn: many(facts.vocab, size, prompts, news, 1000 + turn, banned=facts.banned)

    def prefixed(turn: int) -> Work:
        own = batch(facts.vocab, plan.batch, longest(plan.prompt) - len(common), plan.new, 1000 + turn, facts.banned)
        asks = tuple(Ask(common + ask.ids, ask.new) for ask in own.asks)
        return replace(own, asks=asks, name=f"{own.name} after {len(common)} common")

    works = {"plain": drawn(plan.batch, one), "mixed": drawn(4 * plan.batch, mixed), "prefixed": prefixed}
    names = {
        "plain": f"batch {plan.batch}, prompts of {plan.prompt} ids, {plan.new} new tokens",
        "mixed": f"{4 * plan.batch} requests, {plan.batch} at a time, {_around(plan.new)} new tokens",
        "prefixed": f"batch {plan.batch}, the first {len(common)} of {longest(plan.prompt)} ids the same, "
        f"{plan.new} new tokens",
    }
    with contextlib.ExitStack() as opened:
        apart = [rung for rung in rungs.values() if rung.variant]
        stage.open([JUDGE])
        sides = stage.start(
            {"as it is": lambda: opened.enter_context(bench.fresh(OURS))}
            | {r.name: lambda r=r: opened.enter_context(bench.fresh(OURS, variant=r.variant)) for r in apart}
        )
        if "as it is" not in sides:
            return
        sides |= {rung.name: sides["as it is"] for rung in rungs.values() if rung.name != "as it is" and rung.windows}
        stage.gate(sides, [plan.batch])
        for kind, make in works.items():
            mine = [rung for rung in rungs.values() if rung.work == kind and rung.name in sides]
            labels = dict.fromkeys(["as it is", *(rung.name for rung in mine)])
            arms = {label: sides[label].run for label in labels}
            for rung in mine:
                if rung.windows:
                    arms[rung.name] = lambda work, side=sides[rung.name]: in_windows(plan.batch)(side, work)
            if len(arms) < 2:  # nothing of it can be taken away here
                continue
            with forgiving(stage, names[kind]):
                for label in labels:
                    bench.say(f"{stage.claim.name}, {names[kind]}: warming {label}")
                    for turn in range(plan.rounds + 1):  # without graphs kernels are compiled as lengths are met
                        arms[label](make(turn))
                runs = stage.turns(arms, make, plan.rounds)
                cut, stage.notes = stage.notes, []
                for rung in mine:
                    if rung.against in runs:
                        pair = {label: runs[label] for label in (rung.against, rung.name)}
                        stage.notes = [rung.says, *cut]
                        stage.compare(f"{rung.name}: {names[kind]}", pair, make, [(rung.against, rung.name)])


def longest(lengths: str) -> int:
    return max(_numbers(lengths))


def _numbers(lengths: str) -> list[int]:
    return [int(part) for part in lengths.replace("-", ",").split(",")]


def _around(new: int) -> str:
    return f"{max(new // 8, 1)}-{2 * new}"
