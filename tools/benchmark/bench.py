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
from tools.benchmark.sides import SERVERS, Limits, Model, Side, SideFailed, available
from tools.benchmark.work import Run, Work, batch, told

OURS, JUDGE = "lite_llm", "transformers"
AGAIN = "lite_llm, again"  # an opponent that is ourselves: what differs then is noise, or the benchmark is wrong

Say = Callable[[str], None]
"""Told what happens next, one short line."""
View = Callable[[], contextlib.AbstractContextManager[Callable[[dict], None]]]
"""A context that shows requests in flight, and what it is to be told."""
Works = Callable[[int], Work]
"""The work of a round: the same shape each time, other ids."""
NOTHING: Mapping = MappingProxyType({})
_FIRST = 12  # tokens of an answer of a gate before anything is timed
_NOISE = 5  # how many times less than the worst distance of a log-probability their root mean square may be
_SCORED = 1 << 15  # tokens of a work that are scored, prompts and answers; of longer works some requests


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


def absent(labels: Iterable[str], device: str) -> dict[str, str]:
    """Those that cannot run here, as is known without starting them, and why."""
    why = available(device)
    return {label: why[label] for label in labels if why.get(label)}


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
        prefix_cache: bool = False,
        http: bool = False,
    ):
        """`prefix_cache`: of our side, where a mode does not say otherwise. `http`: sides that have a server are asked
        there, ours too."""
        self.facts, self.record, self.roof, self.limits = facts, record, roof, limits
        self.rounds, self.say, self.view = rounds, say, view
        self.prefix_cache, self.http = prefix_cache, http
        self._open = contextlib.ExitStack()
        self.sides: dict[str, Side] = {}
        self.infos: dict[str, dict] = {}  # what each side says of itself

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def open(self, label: str, prefix_cache: bool = False, variant: str | None = None) -> Side:
        """Kept until the end. SideFailed if it cannot run here."""
        if label not in self.sides:
            self.sides[label] = self._open.enter_context(self.fresh(label, prefix_cache, variant))
            self.infos[label] = self.sides[label].info
        return self.sides[label]

    def fresh(self, label: str, prefix_cache: bool = False, variant: str | None = None) -> Side:
        side = OURS if label == AGAIN else label
        if why := available(self.facts.device)[side]:
            raise SideFailed(f"{side}: {why}", kind="missing")
        self.say(f"starting {label}")
        found = Side(
            side, model=self.facts.model, dtype=self.facts.dtype, device=self.facts.device, limits=self.limits,
            prefix_cache=prefix_cache, variant=variant, http=self.http and side in SERVERS,
        )  # fmt: skip
        if side == OURS and self.facts.device == "cpu":  # others get as many as we chose
            self.limits = replace(self.limits, threads=found.info["threads"])
        return found

    def note(self, label: str) -> str | None:
        """What a reader must know of this side, as it says itself."""
        return self.infos.get(label, {}).get("note")

    def runs(
        self, sides: dict[str, Side], works: Works, how: Mapping[str, Callable[[Side, Work], Run]] = NOTHING
    ) -> dict[str, list[Run]]:
        """Runs of every side by turns, the works of a round the same for all, fresh ones each round.

        Every other round begins with the last side, for what comes first may be faster. A side that fails is left
        out from there on, and so are its runs; ours may not. `how` runs a work in another way than `Side.run`.
        """
        name, found = works(0).name, {label: [] for label in sides}
        for turn in range(self.rounds + 1):
            for label in list(found)[:: 1 if turn % 2 else -1]:
                self.say(f"{name}: " + (f"round {turn} of {self.rounds}, {label}" if turn else f"warming {label}"))
                side, work, other = sides[label], works(turn), how.get(label)
                try:
                    if not turn:
                        side.warm(work)
                        continue
                    with self.watching(label) as watch:
                        found[label].append(other(side, work) if other else side.run(work, watch=watch))
                except SideFailed as error:
                    if label not in self.sides or label == OURS:
                        raise
                    self.say(f"left out {label}: {error}")
                    del found[label]
        return found

    def watching(self, label: str) -> contextlib.AbstractContextManager:
        """What a run tells its progress to: the view of the requests, for our side, if there is one."""
        return self.view() if self.view and label in (OURS, AGAIN) else contextlib.nullcontext()

    def gate(self, sides: dict[str, Side], batches: Sequence[int]) -> None:
        """Short answers of each side at these batch sizes, scored before anything is timed."""
        for label, side in sides.items():
            if label != JUDGE:
                prompt = max(min(24, (self.limits.context or 40) - 16), 1)
                works = [batch(self.facts.vocab, n, prompt, _FIRST, seed=n, banned=self.facts.banned) for n in batches]
                works = [replace(work, logprobs=side.name == OURS) for work in works]
                self._score({"name": "greedy tokens", "side": label}, [(work, side.run(work)) for work in works])

    def gate_first(self, sides: dict[str, Side], work: Work, about: dict) -> None:
        """Before a work is timed, our own answers to it and the log-probabilities that we report.

        Greedy tokens survive what moves all logits a little; these do not. What is timed asks for none.
        """
        work = told(work)
        for label, side in sides.items():
            if side.name == OURS:
                gate = {"name": f"log-probabilities, {work.name}", "side": label, "work": about}
                self._score(gate, [(work, side.run(work))])

    def judge(self, runs: dict[str, list[Run]], work: Work, about: dict) -> None:
        """Answers that were timed, the first round's, scored: a gate for each label, a side or a variant of ours.

        `about` is the "work" of their rows: of other rows these gates say nothing.
        """
        for label, mine in runs.items():
            if label != JUDGE:
                self._score({"name": f"greedy tokens, {work.name}", "side": label, "work": about}, [(work, mine[0])])

    def _score(self, gate: dict, answered: Sequence[tuple[Work, Run]]) -> None:
        """Of each work all requests, or the longest and some others: how far a token is below transformers' best, and
        how far its log-probability, if the work asks for it, is from transformers'."""
        self.say(f"{gate['name']}: are those of {gate['side']} right?")
        worst, apart = 0.0, []
        try:
            judge = self.open(JUDGE)
            for work, run in answered:
                pairs = list(zip(work.asks, run.answers, strict=True))
                pairs.sort(key=lambda pair: -len(pair[0].ids) - pair[0].new)
                tokens = sum(len(ask.ids) + ask.new for ask in work.asks)
                some = pairs[:4] + pairs[4 :: -(-tokens // _SCORED)]
                gaps, right = judge.score([(ask.ids, answer.tokens) for ask, answer in some])
                worst = max(worst, *map(max, gaps))
                if work.logprobs:
                    both = zip((answer.logprobs for _, answer in some), right, strict=True)
                    apart += [abs(a - b) for row in both for a, b in zip(*row, strict=True)]
        except SideFailed as error:
            self.record.add_gate(gate | {"wrong": f"nobody to judge: {error.message}"})
            return
        wrong, most = None, near(self.facts.dtype)
        if worst > most:
            wrong = f"a token is {worst:.3g} nats below transformers' best"
        elif apart and max(apart) > most:
            wrong = f"a token's log-probability is {max(apart):.3g} nats from transformers'"
        elif apart and stats.rms(apart) > most / _NOISE:
            wrong = f"log-probabilities are {stats.rms(apart):.3g} nats from transformers', root mean square"
        found = {"worst_logprob_nats": max(apart), "rms_logprob_nats": stats.rms(apart)} if apart else {}
        self.record.add_gate(gate | {"wrong": wrong, "worst_gap_nats": worst} | found)


def figure(values: Sequence[float], scale: float = 1.0, limit: Limit | None = None) -> dict:
    """Of one value per run, in seconds if there is a limit; `scale` is for the unit that is shown."""
    median, low, high = stats.median_and_interval([value * scale for value in values])
    low = max(low, 0.0)  # where few runs tell little of the noise, an interval may reach below
    return spread(median, low, high, limit.share(statistics.median(values)) if limit else None)


def compared(seconds: dict[str, Sequence[float]], others: Sequence[str], ours: str = OURS) -> list[dict]:
    """How many times as fast as each other side, over whole runs, pair by pair; see stats.SAME for `differs`."""
    found = []
    for label in others:
        ratio = stats.ratio_of(seconds[label], seconds[ours])
        interval = {"median": ratio.median, "low": max(ratio.low, 0.0), "high": ratio.high}
        differs = ratio.differs and abs(ratio.median - 1) > stats.SAME
        found.append({"side": label, "ratio": interval, "differs": differs})
    return found


def near(dtype: str) -> float:
    """How far below the best a greedy token may be, in nats, and how far off a log-probability: rounding moves them."""
    return 1e-3 if dtype == "float32" else 0.25


def takes(works: Iterable[Work]) -> tuple[int, int]:
    """The longest request of some works, and the slots that all requests of one of them take at most."""
    longest = slots = 0
    for work in works:
        lengths = [len(ask.ids) + ask.new for ask in work.asks]
        longest, slots = max(longest, *lengths), max(slots, sum(lengths))
    return longest, slots
