"""What callers get back. Plain data."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lite_llm.engine.request import Request, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from lite_llm.engine.scheduler import Scheduler
    from lite_llm.engine.slots import SlotPool

CELLS = 256
"""Most cells of a map of the pool: 0.3 ms for a million slots, 2 KB as JSON."""


class Delta(NamedTuple):
    """What one step added to one answer; the last one of an answer has a `finish_reason`."""

    id: str
    index: int  # which of the n answers
    text: str  # may be empty: characters are held back until they cannot change
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "timeout", "abort", "grammar" or "error"
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens but a final stop token, if they were asked for


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    token_ids: tuple[int, ...]  # a final stop token included
    finish_reason: str
    stop: str | int | None  # the stop string or stop token that ended it
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int | None  # of these, how many needed no computing; None: a server did not say
    completion_tokens: int  # of all choices
    drafted_tokens: int = 0  # of these, how many had been guessed: they took no step of their own


@dataclass(frozen=True)
class Timings:
    """Seconds, from the moment the request was queued."""

    first_token: float
    total: float
    tokens_per_second: float  # of the first choice, after its first token; 0 for an answer of one token
    queued: float | None  # until the first step that worked on it, or its end without one; None: a server did not say


@dataclass(frozen=True)
class Output:
    """The answers to one prompt. `text`, `token_ids` and `finish_reason` are those of the first choice."""

    id: str
    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    params: SamplingParams  # as used: defaults filled in
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens but the first

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class Progress:
    """How far one answer is. Counts are tokens; times are seconds since the request was queued."""

    id: str
    index: int  # which of the n answers
    state: str  # "waiting", "prompt", "decoding" or "done"
    prompt: int
    prompt_done: int  # of these, computed, cached, or launched to be; 0 again after a preemption
    cached: int  # of these, how many needed no computing at first
    output: int
    wanted: int  # most that `output` can become
    slots: int  # that it holds; those of a shared prefix count for each of its users
    preemptions: int
    first_token: float | None  # None: not yet
    age: float  # of an answer that has ended: when it did
    finish_reason: str | None

    @classmethod
    def of(cls, id: str, index: int, request: Request, now: float) -> "Progress":
        state, prompt, output = request.state, request.prompt_len, request.output_len
        computed = min(request.cached, prompt) if state != "done" or not output else prompt
        return cls(
            id, index, state, prompt, computed, request.prefix_hit, output, request.max_len - prompt,
            len(request.slots), request.preemptions,
            None if request.first_token is None else request.first_token - request.arrived,
            (request.ended or now) - request.arrived, request.finish_reason,
        )  # fmt: skip


@dataclass(frozen=True)
class SlotMap:
    """What the pool's slots are used for, in the order of memory: of each cell of neighbouring slots, how many."""

    size: int  # slots of a cell; the last one may have fewer
    used: tuple[int, ...]  # by running requests
    cached: tuple[int, ...]  # kept for later prompts; the rest of a cell is free

    @classmethod
    def of(cls, pool: "SlotPool") -> "SlotMap":
        size = -(-(pool.total - 1) // CELLS)
        used, cached = pool.cells(size)
        return cls(size, tuple(used), tuple(cached))


@dataclass(frozen=True)
class InFlight:
    """An engine at one moment: its requests, those that ended but are not forgotten included, and its pool."""

    requests: tuple[Progress, ...]  # one for each answer, in order of arrival
    running: int
    waiting: int
    slots_used: int  # by running requests
    slots_cached: int  # kept for later prompts, given up when somebody needs them
    slots: int  # of the pool
    tokens: int  # of all answers since the model was opened
    map: SlotMap

    @classmethod
    def of(cls, requests: Iterable[tuple[str, int, Request]], scheduler: "Scheduler") -> "InFlight":
        now = time.monotonic()
        return cls(
            tuple(Progress.of(id, index, request, now) for id, index, request in requests),
            len(scheduler.running), len(scheduler.waiting),
            scheduler.taken, scheduler.prefix.evictable, scheduler.capacity, scheduler.made,
            SlotMap.of(scheduler.slots),
        )  # fmt: skip

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "InFlight":
        """One that went through JSON; further fields are ignored. KeyError, TypeError or ValueError if it is none."""
        cells, slots = told["map"], int(told["slots"])
        size, used, cached = int(cells["size"]), tuple(map(int, cells["used"])), tuple(map(int, cells["cached"]))
        if slots < 1 or size < 1 or not len(used) == len(cached) == -(-slots // size):
            raise ValueError("the map has another size than the pool")
        counts = (int(told[name]) for name in ("running", "waiting", "slots_used", "slots_cached"))
        requests = tuple(Progress(**one) for one in told["requests"])
        return cls(requests, *counts, slots, int(told["tokens"]), SlotMap(size, used, cached))
