"""What callers get back. Plain data."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lite_llm.engine.request import Request, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from lite_llm.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer; the last one of an answer has a `finish_reason`."""

    id: str
    index: int  # which of the n answers
    text: str  # may be empty: characters are held back until they cannot change
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"


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


@dataclass(frozen=True)
class Timings:
    """Seconds, from the moment the request was queued."""

    first_token: float
    total: float
    tokens_per_second: float  # of the first choice, after its first token; 0 for an answer of one token


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
class InFlight:
    """An engine at one moment: its requests, those that ended but are not forgotten included, and its pool."""

    requests: tuple[Progress, ...]  # one for each answer, in order of arrival
    running: int
    waiting: int
    slots_used: int  # by running requests
    slots_cached: int  # kept for later prompts, given up when somebody needs them
    slots: int  # of the pool
    tokens: int  # of all answers since the model was opened

    @classmethod
    def of(cls, requests: Iterable[tuple[str, int, Request]], scheduler: "Scheduler") -> "InFlight":
        now = time.monotonic()
        return cls(
            tuple(Progress.of(id, index, request, now) for id, index, request in requests),
            len(scheduler.running), len(scheduler.waiting),
            scheduler.taken, scheduler.prefix.evictable, scheduler.capacity, scheduler.made,
        )  # fmt: skip
