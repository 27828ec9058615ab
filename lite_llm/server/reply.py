"""From a request's bytes to an answer's: read, placed, generated, sent. Leaving the connection ends it at any point.

The status and the headers of a stream go out with its first token, so that whatever fails before has its own status.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lite_llm.engine.request import SamplingParams
from lite_llm.prompts import Encoded
from lite_llm.server.answers import Document, Form, event
from lite_llm.server.bridge import Bridge, Seat
from lite_llm.server.job import Job
from lite_llm.server.metrics import Metrics
from lite_llm.server.refusals import Refusal, refusal_of
from lite_llm.server.schema import StreamOptions
from lite_llm.text.fetch import Gone

_BODY_DEADLINE = 30.0  # seconds for a client to send its request
_GONE = 499  # for the metrics: the client left
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class Task:
    """A request that was read."""

    prompts: list[Encoded]
    params: SamplingParams
    stream: StreamOptions | None
    form: Form
    model: str
    ignored: list[str]
    salt: str
    timeout: float | None  # seconds from the arrival of the body
    fields: Mapping[str | None, str | None]  # as `Job` has them
    token_ids: bool  # whether choices say them


class ClientGone(Exception):
    """The connection was closed."""


class Reply(Response):
    """The response to a request for answers; everything happens when it is called."""

    def __init__(
        self,
        bridge: Bridge,
        workers: Executor,
        metrics: Metrics,
        read: Callable[[bytes, Gone], Task],
        most_bytes: int,
    ):
        """`read` runs in one of the `workers`, for it parses, renders and tokenizes, and fetches pictures."""
        self.status_code, self.background = 200, None
        self._bridge, self._workers, self._metrics, self._read = bridge, workers, metrics, read
        self._most_bytes = most_bytes
        self.begun = False  # a status has been sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, job = 200, None
        try:
            with self._bridge.seat() as seat:
                job = await self._answer(seat, scope, receive, send)
        except ClientGone:
            status = _GONE
        except Refusal as refusal:
            status = refusal.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.ended(status, job.outputs if job else ())

    async def _answer(self, seat: Seat, scope: Scope, receive: Receive, send: Send) -> Job:
        body = await read_body(scope, receive, self._most_bytes)
        arrived = time.monotonic()
        gone = asyncio.ensure_future(left(receive))
        try:
            task = await off_loop(self._workers, self._read, body, gone.done)
            return await self._generate(seat, task, arrived, gone, send)
        except Refusal:
            if gone.done():  # it was cancelled for that reason
                raise ClientGone from None
            raise
        finally:
            gone.cancel()

    async def _generate(self, seat: Seat, task: Task, arrived: float, gone: asyncio.Future, send: Send) -> Job:
        seat.widen(len(task.prompts) * task.params.n)
        deadline = None if task.timeout is None else arrived + task.timeout
        job = Job(
            f"{task.form.prefix}-{uuid.uuid4().hex}", task.prompts, task.params, task.stream is not None, task.salt,
            task.timeout, deadline, task.fields,
        )  # fmt: skip
        prompt_tokens = sum(len(prompt.ids) for prompt in task.prompts)
        document = Document(task.form, job.id, task.model, prompt_tokens, task.token_ids)
        gone.add_done_callback(lambda _: self._bridge.cancel(job))
        self._bridge.submit(job)
        try:
            pieces = await job.news()
            if gone.done():
                raise ClientGone
            headers = [(name.encode(), value.encode()) for name, value in receipt_header(task.ignored).items()]
            if task.stream is None:
                content = document.whole(job.outputs)
                headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
                await self._start(send, headers)
                await send(_body(content, more=False))
                return job
            await self._start(send, _STREAM + headers)
            last: dict[int, float] = {}
            usage, running = bool(task.stream.include_usage), bool(task.stream.continuous_usage_stats)
            try:
                while pieces:
                    self._metrics.handed_on(pieces, last)
                    if events := document.events(pieces, usage, running):
                        await send(_body(events))
                    pieces = await job.news()
                end = document.final_usage(job.outputs) if usage else b""
                await send(_body(end + b"data: [DONE]\n\n", more=False))
            except Refusal as refusal:  # too late for a status
                if gone.done():
                    raise ClientGone from None
                await send(_body(event(refusal.document()), more=False))
            return job
        finally:
            self._bridge.cancel(job)

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def off_loop(workers: Executor, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` makes of a body, in a worker thread. Raises nothing but refusals."""
    try:
        return await asyncio.get_running_loop().run_in_executor(workers, work, *arguments)
    except Exception as error:
        raise refusal_of(error) from None


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The JSON that a client sends. Refusal for another type, too much of it, or too slow a client."""
    kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
    # Only this type makes a browser ask before it sends: no page of a stranger can use a server on this machine.
    if kind != b"application/json":
        raise Refusal(415, "the content-type is not application/json; send that header with a JSON body")
    return await read_bytes(scope, receive, most)


async def read_bytes(scope: Scope, receive: Receive, most: int) -> bytes:
    """A body of any type. Refusal for too much of it, or too slow a client."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > most:
        raise too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_DEADLINE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise too_large(most)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {_BODY_DEADLINE:g} s") from None


def too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is too large; at most {most:,} bytes are taken", code="body_too_large")


async def left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def receipt_header(ignored: list[str]) -> dict[str, str]:
    """Names that a client made up, fit for a header; none without any."""
    return {"x-ignored-fields": ", ".join(ascii(name[:64])[1:-1] for name in ignored[:40])} if ignored else {}
