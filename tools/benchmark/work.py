"""What a benchmark asks of a side, and what comes back; the same on both ends of a worker's pipe.

Makers draw everything from one seeded generator, lengths and ids first: the same seed asks the same prompts, whatever
the arrivals, and fewer requests are the first ones of more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from lite_llm.errors import UsageError, shown

_LINE = '{"at": seconds, "prompt": tokens or [ids], "new": tokens}'
_LISTS = ("tokens", "times", "logprobs")  # of an Answer
_LENGTHS = 'expected "128", "10-30", "64,128" or "lognormal:MEDIAN:SIGMA"'


@dataclass(frozen=True)
class Ask:
    """One request: a prompt and how many tokens to make after it."""

    ids: tuple[int, ...]
    new: int  # exactly as many: stop ids are ignored by every side
    at: float = 0.0  # seconds after the start of the run at which it is sent

    def __post_init__(self):
        if not self.ids:
            raise UsageError("ids = (); expected at least one prompt token")
        _whole("new", self.new)
        _number("at", self.at)


@dataclass(frozen=True)
class Work:
    """The requests of one run and how their tokens are chosen; 0 and 1.0 are "off", so greedy unless said."""

    name: str
    asks: tuple[Ask, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False  # of the answers' tokens, for a gate: no work that is timed asks for them

    def to_json(self) -> dict:
        asks = [{"ids": list(ask.ids), "new": ask.new, "at": ask.at} for ask in self.asks]
        return vars(self) | {"asks": asks}

    @classmethod
    def from_json(cls, d: dict) -> Work:
        asks = tuple(Ask(tuple(ask["ids"]), ask["new"], ask["at"]) for ask in d["asks"])
        return cls(**(d | {"asks": asks}))


@dataclass(frozen=True)
class Answer:
    """What came back for one ask; all times are seconds after the start of the run."""

    tokens: tuple[int, ...]
    sent: float  # when it was handed over, never before `ask.at`
    times: tuple[float, ...]  # one per token: when the client knew it; () if the side tells only the end
    ended: float
    logprobs: tuple[float, ...] = ()  # one per token, in nats, if the work asks for them


@dataclass(frozen=True)
class Run:
    """One side's answer to one Work."""

    seconds: float  # from the start to the last token
    answers: tuple[Answer, ...]  # in the order of work.asks
    compiles: int | None  # kernels compiled or graphs traced inside the run; None: this side cannot tell
    peak_bytes: int | None  # of the device
    notes: dict  # JSON values under string keys

    def to_json(self) -> dict:
        answers = [vars(a) | {name: list(getattr(a, name)) for name in _LISTS} for a in self.answers]
        return vars(self) | {"answers": answers}

    @classmethod
    def from_json(cls, d: dict) -> Run:
        answers = tuple(Answer(**(a | {name: tuple(a[name]) for name in _LISTS})) for a in d["answers"])
        return cls(**(d | {"answers": answers}))


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens; `parse` reads it from the command line."""

    text: str
    draw: Callable[[Random], int]

    @classmethod
    def parse(cls, text: str, most: int | None = None) -> Lengths:
        """From "128", "10-30" (uniform, ends included), "64,128" (uniform) or "lognormal:200:0.8" (median, sigma).

        Lognormal lengths above `most`, by default 16 medians, become `most`; nothing else may ask for more.
        """
        if match := re.fullmatch(r"lognormal:(\d{1,9}):(\d{1,3}(?:\.\d+)?)", text, re.ASCII):
            median, sigma = int(match[1]), float(match[2])
            cut = 16 * median if most is None else most
            low, high = median, median

            def draw(rng: Random) -> int:
                return int(min(max(round(median * math.exp(min(rng.gauss(0.0, sigma), 50.0))), 1), cut))

        elif match := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text, re.ASCII):
            low, high = int(match[1]), int(match[2])

            def draw(rng: Random) -> int:
                return rng.randint(low, high)

        elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
            choices = [int(part) for part in text.split(",")]
            low, high = min(choices), max(choices)

            def draw(rng: Random) -> int:
                return rng.choice(choices)

        else:
            raise UsageError(f"lengths = {shown(text)}; {_LENGTHS}")
        if not 1 <= low <= high or most is not None and high > most:
            limit = "" if most is None else f" and at most {most}"
            raise UsageError(f"lengths = {shown(text)}; expected whole numbers of at least 1{limit}, the smaller first")
        return cls(text, draw)


@dataclass(frozen=True)
class Arrivals:
    """When requests are sent: `times(n, rng)` gives n seconds in rising order, the first 0: no run starts idle."""

    name: str
    times: Callable[[int, Random], list[float]]


def fixed(gap: float) -> Arrivals:
    """One request every `gap` seconds."""
    _number("gap", gap)
    return Arrivals(f"every {gap:g} s", lambda n, rng: [i * gap for i in range(n)])


def burst(size: int, gap: float) -> Arrivals:
    """`size` requests at once, every `gap` seconds."""
    _whole("size", size)
    _number("gap", gap)
    return Arrivals(f"bursts of {size} every {gap:g} s", lambda n, rng: [i // size * gap for i in range(n)])


def poisson(rate: float) -> Arrivals:
    """`rate` requests a second on average, independent of each other."""
    _number("rate", rate)
    if rate == 0:
        raise UsageError("rate = 0; expected more than 0 requests a second")

    def times(n: int, rng: Random) -> list[float]:
        at = [0.0]
        while len(at) < n:
            at.append(at[-1] + rng.expovariate(rate))
        return at[:n]

    return Arrivals(f"poisson {rate:g}/s", times)


def batch(vocab: int, batch: int, prompt: int, new: int, seed: int, banned: frozenset[int] = frozenset()) -> Work:
    """`batch` different prompts of `prompt` tokens, all at once; no prompt holds an id of `banned`."""
    for name, value in (("batch", batch), ("prompt", prompt), ("new", new)):
        _whole(name, value)
    ids, rng = _allowed(vocab, banned), Random(seed)
    asks = tuple(Ask(tuple(rng.choices(ids, k=prompt)), new) for _ in range(batch))
    return Work(f"b{batch} in{prompt} out{new}", asks, seed=seed)


def told(work: Work) -> Work:
    """The same with the log-probabilities of all tokens; all requests come at once."""
    return replace(work, asks=tuple(Ask(ask.ids, ask.new) for ask in work.asks), logprobs=True)


def many(
    vocab: int,
    n: int,
    prompts: Lengths,
    news: Lengths,
    seed: int,
    arrivals: Arrivals | None = None,
    banned: frozenset[int] = frozenset(),
) -> Work:
    """`n` requests of drawn lengths, all at once unless `arrivals` says when."""
    _whole("n", n)
    ids, rng = _allowed(vocab, banned), Random(seed)
    drawn = [(tuple(rng.choices(ids, k=prompts.draw(rng))), news.draw(rng)) for _ in range(n)]
    at = [0.0] * n if arrivals is None else arrivals.times(n, rng)
    asks = tuple(Ask(prompt, new, when) for (prompt, new), when in zip(drawn, at, strict=True))
    name = f"n{n} in{prompts.text} out{news.text}"
    return Work(name if arrivals is None else f"{name} {arrivals.name}", asks, seed=seed)


def trace(path: Path | str, vocab: int, seed: int, banned: frozenset[int] = frozenset()) -> Work:
    """The requests of a JSONL file, sorted by time: {"at": seconds, "prompt": tokens or [ids], "new": tokens}."""
    path, ids, rng = Path(path), _allowed(vocab, banned), Random(seed)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"the trace {path} cannot be read ({reason})", f"expected a file of lines {_LINE}") from None
    asks = [_traced(line, f"{path}:{i}", vocab, ids, rng) for i, line in enumerate(lines, 1) if line.strip()]
    if not asks:
        raise UsageError(f"the trace {path} has no requests", f"expected lines {_LINE}")
    asks.sort(key=lambda ask: ask.at)
    return Work(f"trace {path.name} n{len(asks)}", tuple(asks), seed=seed)


def _traced(line: str, where: str, vocab: int, ids: list[int], rng: Random) -> Ask:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: {shown(line)} is no JSON; expected {_LINE}") from None
    if not isinstance(entry, dict) or entry.keys() != {"at", "prompt", "new"}:
        raise UsageError(f"{where}: {shown(line)}; expected {_LINE}")
    prompt = entry["prompt"]
    try:
        if isinstance(prompt, list):
            if not all(type(i) is int and 0 <= i < vocab for i in prompt):
                raise UsageError(f"prompt = {shown(prompt)}; expected ids from 0 to {vocab - 1}")
            return Ask(tuple(prompt), entry["new"], entry["at"])
        _whole("prompt", prompt)
        return Ask(tuple(rng.choices(ids, k=prompt)), entry["new"], entry["at"])
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}") from None


def _allowed(vocab: int, banned: frozenset[int]) -> list[int]:
    _whole("vocab", vocab)
    ids = [i for i in range(vocab) if i not in banned]
    if not ids:
        raise UsageError(f"vocab = {vocab}; every id is banned, expected at least one that is not")
    return ids


def _whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} = {shown(value)}; expected a whole number of at least 1")


def _number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise UsageError(f"{name} = {shown(value)}; expected a number of at least 0")
