"""Between the event loop and the engine: one thread hears the engine's process, or steps an LLM in this one.

The engine never waits for a client. What it says is left at the job, and the event loop is woken once for all jobs.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from lite_llm.errors import LiteLLMError
from lite_llm.llm import LLM
from lite_llm.outputs import InFlight, Output
from lite_llm.server.job import Job
from lite_llm.server.refusals import Refusal, grammar_stuck, refusal_of, stopping, too_late, unusable_numbers
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.steady import Row, Steady

log = logging.getLogger("lite_llm")

_IDLE_BEAT = 1.0  # seconds between two signs of life of an engine without work
_ANSWER = 2.0  # seconds for the engine to answer a question: longer than any step should take


class Bridge:
    """`start` and everything above "the engine's thread" belong to the event loop."""

    def __init__(self, llm: LLM | RemoteLLM, max_queue: int, stall: float = 30.0):
        """An `LLM` is stepped in this process, which its steps and HTTP share then. `max_queue`: answers that may wait
        beyond those that the engine runs together. `stall`: seconds without a sign of life after which the engine
        counts as stuck."""
        self._llm = llm if isinstance(llm, RemoteLLM) else Steady(llm)
        self.seats = self._llm.max_requests + max_queue
        self.taken = 0
        self.draining = False
        self.dead: Exception | None = None  # why the engine's thread ended by itself
        self._stall = stall
        self._beat = time.monotonic()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[str, tuple[Job, int]] = {}  # by the name of the engine's request; which prompt of the job
        self._closing = False
        self._lock = threading.Lock()  # over the next two
        self._fresh: set[Job] = set()  # that have something to say
        self._woken = False  # the event loop has yet to take them, or rests from those before
        self._thread = threading.Thread(target=self._work, name="lite_llm-engine", daemon=True)

    def start(self, on_death: Callable[[], None]) -> None:
        """`on_death` is called in the event loop if the engine can go on no more."""
        self._loop, self._on_death = asyncio.get_running_loop(), on_death
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the engine lives."""
        return not self.draining and self.dead is None and time.monotonic() - self._beat < self._stall

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
        self._order(functools.partial(self._add, job))
        if self.dead and not job.over:  # looked at after the order is there: the dying thread looks the other way round
            raise stopping()

    def cancel(self, job: Job) -> None:
        """End a job within one step; nothing happens if it is over."""
        if not job.over:
            self._order(functools.partial(self._end, job, stopping()))

    async def in_flight(self) -> InFlight:
        """Refusal (503) if the engine does not answer in time."""
        answer: Future[InFlight] = Future()

        def order() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # who asked has given up
            try:
                answer.set_result(self._llm.in_flight())
            except Exception as error:
                answer.set_exception(error)

        self._order(order)
        try:
            async with asyncio.timeout(_ANSWER):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            raise Refusal(503, "the engine does not answer", code="engine_busy") from None

    def end_all(self) -> None:
        """Tell every client that the server stops."""
        self._order(lambda: self._end_all(stopping()))

    async def close(self) -> None:
        """End the thread, after the step under way; gives up after five seconds."""
        self._closing = True
        self._order(lambda: None)
        await asyncio.to_thread(self._thread.join, 5.0)

    def _order(self, work: Callable[[], None]) -> None:
        """Something for the engine's thread."""
        self._orders.put(work)
        self._llm.ring()

    def _publish(self) -> None:
        """In the event loop. While it is busy with the clients of one step, the tokens of the next ones join."""
        with self._lock:
            jobs, self._fresh = self._fresh, set()
            self._woken = bool(jobs)
        if jobs:
            for job in jobs:
                job.wake()
            self._loop.call_soon(self._rest, self._loop.time())  # after all of them

    def _rest(self, began: float) -> None:
        """The loop hands out for half of its time at most, and meanwhile tokens join. The other half is for requests,
        for an engine with an empty place loses a token with each step until the next one is there."""
        self._loop.call_later(self._loop.time() - began, self._publish)

    # ---- the engine's thread

    def _work(self) -> None:
        try:
            while not self._closing:
                self._obey(wait=self._llm.idle)
                if not self._llm.idle:
                    self._step()
                self._beat = self._llm.beat
        except Exception as error:
            # What says by itself what to do is shown when the server ends; of anything else the place is wanted.
            log.error("the engine stops", exc_info=None if isinstance(error, LiteLLMError) else error)
            self.dead = error
            try:
                self._end_all(Refusal(500, "the engine has failed, and the server stops", code="engine_failed"))
                self._obey(wait=False)
            finally:
                self._loop.call_soon_threadsafe(self._on_death)

    def _obey(self, wait: bool) -> None:
        """Carry out what was ordered."""
        with contextlib.suppress(queue.Empty):
            self._orders.get(wait, _IDLE_BEAT)()
            while True:
                self._orders.get(False)()

    def _add(self, job: Job) -> None:
        if self.dead:
            job.end([], stopping())
            return self._announce({job})
        for place, (name, prompt) in enumerate(zip(job.names, job.prompts, strict=True)):
            self._jobs[name] = job, place
            self._llm.add_request(name, prompt, job.params, job.salt, job.deadline, job.streamed)

    def _step(self) -> None:
        news, jobs = self._llm.step(), self._jobs
        spoken: set[Job] = set()
        for row in news.rows:
            if found := jobs.get(row[0]):
                job, place = found
                self._hand_on(job, place * job.params.n + row[1], row)
                if job.streamed and not job.over:
                    spoken.add(job)
        for output in news.outputs:
            if found := jobs.get(output.id):
                self._complete(found[0], output)
        for name, error in news.refused:
            if found := jobs.get(name):
                self._end(found[0], refusal_of(error))
        self._announce(spoken)

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
        self._announce({job})

    def _end_all(self, failure: Refusal) -> None:
        for job in {job for job, _ in self._jobs.values()}:
            self._end(job, failure)

    def _announce(self, jobs: set[Job]) -> None:
        """Somebody has something to say to the clients of these."""
        with self._lock:
            self._fresh |= jobs
            wake = bool(self._fresh) and not self._woken
            self._woken = self._woken or wake
        if wake:
            self._loop.call_soon_threadsafe(self._publish)


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
