"""What all modes share: the model's facts, sides that take turns, gates, and rows with their limits."""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from lite_llm.config import HFConfig, ModelConfig
from lite_llm.engine.roofline import Ceilings
from lite_llm.llm import DEMO
from lite_llm.models import registry, shapes
from lite_llm.text import Tokenizer
from lite_llm.weights.hub import Source
from tools.benchmark import stats
from tools.benchmark.limits import Limit
from tools.benchmark.record import Record, spread
from tools.benchmark.sides import Limits, Model, Side, SideFailed, available
from tools.benchmark.work import Run, Work, batch

OURS, JUDGE = "lite_llm", "transformers"
AGAIN = "lite_llm, again"  # an opponent that is ourselves: what differs then is noise, or the benchmark is wrong

Say = Callable[[str], None]
"""Told what happens next, one short line."""
View = Callable[[], contextlib.AbstractContextManager[Callable[[dict], None]]]
"""A context that shows requests in flight, and what it is to be told."""
Works = Callable[[int], Work]
"""The work of a round: the same shape each time, other ids."""
NOTHING: Mapping = MappingProxyType({})


@dataclass(frozen=True)
class Facts:
    """The model as arguments name it."""

    model: Model
    name: str
    cfg: ModelConfig
    dtype: str
    device: str
    directory: str | None = None  # of the checkpoint
    vocab: int = 0  # ids that prompts are drawn from, without the banned ones
    banned: frozenset[int] = frozenset()

    @classmethod
    def find(cls, path: str | None, shape: str | None, seed: int, dtype: str, device: str) -> "Facts":
        """Reads config.json alone. A LiteLLMError for what does not exist or is not supported."""
        if shape:
            cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
            return cls(Model(None, shape, seed), shape, cfg, dtype, device, None, cfg.vocab)
        source = Source(path or str(DEMO))
        cfg = registry.parse(HFConfig.load(source.description()))
        directory, tokenizer = source.directory(), Tokenizer.load(source.description())
        vocab, banned = min(tokenizer.vocab_size, cfg.vocab), frozenset(tokenizer.special_ids)
        name = source.name if path else "demo/chat"
        return cls(Model(path), name, cfg, dtype, device, str(directory), vocab, banned)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


class Bench:
    """Sides are opened once and stay: they take turns at every work, A B A B, on a machine that does nothing else."""

    def __init__(
        self,
        facts: Facts,
        record: Record,
        roof: Ceilings,
        limits: Limits,
        rounds: int,
        say: Say,
        view: View | None = None,
    ):
        self.facts, self.record, self.roof, self.limits = facts, record, roof, limits
        self.rounds, self.say, self.view = rounds, say, view
        self._open = contextlib.ExitStack()
        self.sides: dict[str, Side] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def open(self, label: str, prefix_cache: bool = False, variant: str | None = None) -> Side:
        """Kept until the end. SideFailed if it cannot run here."""
        if label not in self.sides:
            self.sides[label] = self._open.enter_context(self.fresh(label, prefix_cache, variant))
        return self.sides[label]

    def fresh(self, label: str, prefix_cache: bool = False, variant: str | None = None) -> Side:
        side = OURS if label == AGAIN else label
        if why := available(self.facts.device)[side]:
            raise SideFailed(f"{side}: {why}", kind="missing")
        self.say(f"starting {label}")
        found = Side(
            side, model=self.facts.model, dtype=self.facts.dtype, device=self.facts.device, limits=self.limits,
            prefix_cache=prefix_cache, variant=variant,
        )  # fmt: skip
        if side == OURS and self.facts.device == "cpu":  # others get as many as we chose
            self.limits = replace(self.limits, threads=found.info["threads"])
        return found

    def runs(
        self, sides: dict[str, Side], works: Works, how: Mapping[str, Callable[[Side, Work], Run]] = NOTHING
    ) -> dict[str, list[Run]]:
        """Runs of every side by turns, the works of a round the same for all, fresh ones each round.

        `how` runs a work in another way than `Side.run`, for sides that it names.
        """
        for label, side in sides.items():
            self.say(f"{works(0).name}: warming {label}")
            side.warm(works(0))
        found: dict[str, list[Run]] = {label: [] for label in sides}
        for turn in range(self.rounds):
            for label, side in sides.items():
                self.say(f"{works(0).name}: round {turn + 1} of {self.rounds}, {label}")
                work, other = works(1 + turn), how.get(label)
                with self.watching(label) as watch:
                    found[label].append(other(side, work) if other else side.run(work, watch=watch))
        return found

    def watching(self, label: str) -> contextlib.AbstractContextManager:
        """What a run tells its progress to: the view of the requests, for our side, if there is one."""
        return self.view() if self.view and label in (OURS, AGAIN) else contextlib.nullcontext()

    def gate(self, ours: dict[str, Side], batches: Sequence[int]) -> None:
        """Greedy tokens of each side, scored by transformers: a gate for each in the record."""
        try:
            judge = self.open(JUDGE)
        except SideFailed as error:
            for label in ours:
                self.record.add_gate({"name": "greedy tokens", "side": label, "wrong": f"nobody to judge: {error}"})
            return
        for label, side in ours.items():
            if label == JUDGE:
                continue
            self.say(f"are {label}'s tokens right?")
            worst = max(self.worst_gap(side, judge, size) for size in batches)
            wrong = (
                None
                if worst <= near(self.facts.dtype)
                else f"a greedy token is {worst:.3g} nats below transformers' best"
            )
            self.record.add_gate({"name": "greedy tokens", "side": label, "wrong": wrong, "worst_gap_nats": worst})

    def worst_gap(self, side: Side, judge: Side, size: int) -> float:
        prompt = max(min(24, (self.limits.context or 40) - 16), 1)
        work = batch(self.facts.vocab, size, prompt, 12, seed=size, banned=self.facts.banned)
        answers = side.run(work).answers
        gaps = judge.score([(ask.ids, answer.tokens) for ask, answer in zip(work.asks, answers, strict=True)])
        return max(max(row) for row in gaps)


def figure(values: Sequence[float], scale: float = 1.0, limit: Limit | None = None) -> dict:
    """Of one value per run, in seconds if there is a limit; `scale` is for the unit that is shown."""
    median, low, high = stats.median_and_interval([value * scale for value in values])
    low = max(low, 0.0)  # where few runs tell little of the noise, an interval may reach below
    return spread(median, low, high, limit.share(statistics.median(values)) if limit else None)


def compared(seconds: dict[str, Sequence[float]], others: Sequence[str], ours: str = OURS) -> list[dict]:
    """How many times as fast as each other side, over whole runs, pair by pair."""
    found = []
    for label in others:
        ratio = stats.ratio_of(seconds[label], seconds[ours])
        interval = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
        found.append({"side": label, "ratio": interval, "differs": ratio.differs})
    return found


def near(dtype: str) -> float:
    """How far below the best a greedy token may be, in nats: that much rounding moves logits."""
    return 1e-3 if dtype == "float32" else 0.25


def takes(works: Iterable[Work]) -> tuple[int, int]:
    """The longest request of some works, and the slots that all requests of one of them take at most."""
    longest = slots = 0
    for work in works:
        lengths = [len(ask.ids) + ask.new for ask in work.asks]
        longest, slots = max(longest, *lengths), max(slots, sum(lengths))
    return longest, slots
