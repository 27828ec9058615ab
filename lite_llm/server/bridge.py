"""Between requests and the engine: hands what the engine says to the jobs that it is about.

The engine never waits for a client: what it says is left at the job. Everything belongs to the event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import LiteLLMError
from lite_llm.outputs import InFlight, Output
from lite_llm.prompts import Encoded
from lite_llm.server.job import Job
from lite_llm.server.refusals import Refusal, grammar_stuck, refusal_of, stopping, too_late, unusable_numbers
from lite_llm.server.steady import News, Row

log = logging.getLogger("lite_llm")

_ANSWER = 2.0  # seconds for the engine to answer a question: longer than any step should take


class Engine(Protocol):
    """`RemoteLLM`, or something with its names. None of them waits for a step."""

    max_requests: int
    beat: float  # moment of `time.monotonic` of the last sign of life

    def start(self, told: Callable[[News], None], died: Callable[[Exception], None]) -> None: ...
    async def stop(self) -> None: ...
    def add_request(
        self, name: str, prompt: Encoded, params: SamplingParams, salt: str, deadline: float | None, streamed: bool
    ) -> None: ...
    def forget(self, name: str) -> None: ...
    async def in_flight(self) -> InFlight: ...


class Bridge:
    def __init__(self, llm: Engine, max_queue: int, stall: float = 30.0):
        """`max_queue`: answers that may wait beyond those that the engine runs together. `stall`: seconds without a
        sign of life after which the engine counts as stuck."""
        self._llm = llm
        self.seats = llm.max_requests + max_queue
        self.taken = 0
        self.draining = False
        self.dead: Exception | None = None  # what has ended the engine
        self._stall = stall
        self._jobs: dict[str, tuple[Job, int]] = {}  # by the name of the engine's request; which prompt of the job

    def start(self, on_death: Callable[[], None]) -> None:
        """`on_death` is called if the engine can go on no more."""
        self._on_death = on_death
        self._llm.start(self._hear, self._die)

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the engine lives."""
        return not self.draining and self.dead is None and time.monotonic() - self._llm.beat < self._stall

    @contextlib.contextmanager
    def seat(self) -> Iterator["Seat"]:
        """A place among the answers in work, given back at the end. Refusal if there is none, or none any more."""
        seat = Seat(self)
        seat.widen(1)
        try:
            yield seat
        finally:
            self.taken -= seat.size

    def submit(self, job: Job) -> None:
        if self.dead:
            raise stopping()
        for place, (name, prompt) in enumerate(zip(job.names, job.prompts, strict=True)):
            self._jobs[name] = job, place
            self._llm.add_request(name, prompt, job.params, job.salt, job.deadline, job.streamed)

    def cancel(self, job: Job) -> None:
        """End a job within one step; nothing happens if it is over."""
        self._end(job, stopping())

    async def in_flight(self) -> InFlight:
        """Refusal (503) if the engine does not answer in time."""
        try:
            async with asyncio.timeout(_ANSWER):
                return await self._llm.in_flight()
        except TimeoutError:
            raise Refusal(503, "the engine does not answer", code="engine_busy") from None

    def end_all(self, why: Refusal | None = None) -> None:
        """Tell every client that the server stops."""
        for job in {job for job, _ in self._jobs.values()}:
            self._end(job, why or stopping())

    async def close(self) -> None:
        """Hear the engine no more."""
        await self._llm.stop()

    # ---- what the engine says

    def _hear(self, news: News) -> None:
        """Of one step."""
        jobs = self._jobs
        for row in news.rows:
            if found := jobs.get(row[0]):
                job, place = found
                self._hand_on(job, place * job.params.n + row[1], row)
        for output in news.outputs:
            if found := jobs.get(output.id):
                self._complete(found[0], output)
        for name, error in news.refused:
            if found := jobs.get(name):
                self._end(found[0], refusal_of(error))

    def _die(self, error: Exception) -> None:
        # What says by itself what to do is shown when the server ends; of anything else the place is wanted.
        log.error("the engine stops", exc_info=None if isinstance(error, LiteLLMError) else error)
        self.dead = error
        self.end_all(Refusal(500, "the engine has failed, and the server stops", code="engine_failed"))
        self._on_death()

    def _hand_on(self, job: Job, at: int, row: Row) -> None:
        """Once for each token of each stream, so in few words. `at`: which choice of the job."""
        _, _, text, tokens, reason, logprobs = row
        if reason == "error":
            return self._end(job, unusable_numbers())
        if reason == "grammar":
            return self._end(job, grammar_stuck())
        if job.streamed:
            if reason == "timeout" and not job.told:  # nor will any other: they have one deadline
                return self._end(job, too_late(job.timeout))
            job.pieces.append((at, text, tokens, reason, logprobs))
            job.told = True
            job.wake()

    def _complete(self, job: Job, output: Output) -> None:
        """One prompt of a job has all its answers."""
        job.answered[output.id] = output
        if len(job.answered) < len(job.names):
            return
        outputs = job.answered.values()
        silent = not any(output.usage.completion_tokens for output in outputs)
        if silent and any(choice.finish_reason == "timeout" for output in outputs for choice in output.choices):
            return self._end(job, too_late(job.timeout))
        self._end(job, None)

    def _end(self, job: Job, failure: Refusal | None) -> None:
        """Of a job that is done, or at any moment; nothing happens if it has ended."""
        if job.names[0] not in self._jobs:
            return
        for name in job.names:
            if name not in job.answered:
                self._llm.forget(name)
            self._jobs.pop(name, None)
        job.end([] if failure else [job.answered[name] for name in job.names], failure)


class Seat:
    """Places for the answers of one HTTP request."""

    def __init__(self, bridge: Bridge):
        self._bridge, self.size = bridge, 0

    def widen(self, size: int) -> None:
        """To `size` answers. Refusal: 400 if they could never be there together, 429 if not now, 503 if no more."""
        bridge = self._bridge
        if bridge.draining or bridge.dead:
            raise stopping()
        if size > bridge.seats:
            raise Refusal(400, f"{size} answers in one request; at most {bridge.seats} are taken", "n")
        if bridge.taken + size - self.size > bridge.seats:
            raise Refusal(429, f"{bridge.taken} answers are running or waiting; try again later", code="queue_full")
        bridge.taken += size - self.size
        self.size = size
