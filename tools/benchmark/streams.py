"""A client of OpenAI's completions that counts tokens: one connection a request, sent when its time has come.

Servers answer in chunks; those that know vLLM's `return_token_ids` say which tokens a chunk has, so that nobody guesses
them from text. Bodies are made before the clock starts. Measured on a 4-core CPU machine against a server that says
fixed tokens: 128 streams of 60 tokens/s take 20 % of a core, 26 us a token; of faster ones several tokens are read
together, 12 us each, and 128 streams were followed up to 76,000 tokens/s.
"""

import asyncio
import json
from collections.abc import Callable

import httptools

from lite_llm.errors import LiteLLMError, shown
from tools.benchmark.sides import Arrivals
from tools.benchmark.work import Answer, Work

_EVENT = b"data: "


class StreamFailed(LiteLLMError):
    """A server did not answer as it was asked to."""

    code = "stream_failed"


async def answer(port: int, model: str, work: Work) -> tuple[float, tuple[Answer, ...]]:
    """Seconds until all requests are answered, and the answers in the order of `work.asks`. StreamFailed for the first
    that is not; the connections of the others are closed then."""
    bodies = [_request(port, model, work, index) for index in range(len(work.asks))]
    found: dict[int, Answer] = {}
    arrivals = Arrivals(work)

    async def one(index: int) -> None:
        sent = arrivals.now()
        try:
            stream = await _Stream.whole(port, bodies[index], arrivals.now)
        except StreamFailed as error:
            raise StreamFailed(f"request {index}: {error.message}") from None
        ended = (stream.times or [arrivals.now()])[-1]
        found[index] = Answer(tuple(stream.tokens), sent, tuple(stream.times), ended, tuple(stream.logprobs))

    try:
        async with asyncio.TaskGroup() as tasks:
            while arrivals:
                for index in arrivals.take():
                    tasks.create_task(one(index))
                if arrivals:
                    await asyncio.sleep(arrivals.wait())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return arrivals.now(), tuple(found[index] for index in range(len(work.asks)))


def _request(port: int, model: str, work: Work, index: int) -> bytes:
    """Everything that a server would otherwise choose by its own or the checkpoint's defaults is said."""
    ask = work.asks[index]
    wishes = {
        "model": model, "prompt": ask.ids, "max_tokens": ask.new, "ignore_eos": True, "stream": True,
        "return_token_ids": True, "seed": work.seed + index, "temperature": work.temperature,
        "top_k": work.top_k or -1, "top_p": work.top_p, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    if work.logprobs:
        wishes["logprobs"] = 0  # of the tokens themselves, and of no others
    body = json.dumps(wishes).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    return head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


class _Stream(asyncio.Protocol):
    """One request and what comes back: `tokens`, for each when it was read, and `logprobs` if it was asked for them;
    `done` raises StreamFailed."""

    def __init__(self, request: bytes, now: Callable[[], float]):
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.logprobs: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._now, self._body = request, now, b""
        self._parser = httptools.HttpResponseParser(self)

    @classmethod
    async def whole(cls, port: int, request: bytes, now: Callable[[], float]) -> "_Stream":
        """From the connection to the last token. StreamFailed if that does not come."""
        try:
            _, stream = await asyncio.get_running_loop().create_connection(lambda: cls(request, now), "127.0.0.1", port)
        except OSError as error:
            raise StreamFailed(f"the server cannot be reached: {error.strerror}") from None
        try:
            await stream.done
        finally:
            stream._transport.abort()
        return stream

    # ---- what asyncio says

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = self._now()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
            if self._parser.get_status_code() == 200:
                *events, self._body = self._body.split(b"\n\n")
                for event in events:
                    self._hear(event, now)
        except StreamFailed as error:
            self._end(error)
        except (httptools.HttpParserError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._end(StreamFailed(f"the server sent what cannot be read: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(StreamFailed(f"the connection ended after {len(self.tokens)} tokens"))

    # ---- what the parser says

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(StreamFailed(f"the server answered {status}: {_message(self._body)}"))

    def _hear(self, event: bytes, now: float) -> None:
        if not event.startswith(_EVENT):  # a comment
            return
        if event == b"data: [DONE]":
            return self._end(None)
        chunk = json.loads(event[len(_EVENT) :])
        if "error" in chunk:
            raise StreamFailed(f"the server ended it: {_message(event[len(_EVENT) :])}")
        for choice in chunk["choices"]:
            fresh, reason = choice.get("token_ids"), choice.get("finish_reason")
            if fresh is None and not self.tokens:
                raise StreamFailed("the server gives no token ids: it does not know return_token_ids; take a newer one")
            if fresh:
                self.tokens += fresh
                self.times += [now] * len(fresh)
            if told := choice.get("logprobs"):
                self.logprobs += told["token_logprobs"]
            if reason not in (None, "length"):
                raise StreamFailed(f"it ended as {reason!r} after {len(self.tokens)} tokens, not by length")

    def _end(self, failure: StreamFailed | None) -> None:
        """The first word counts."""
        if self.done.done():
            return
        if failure:
            self.done.set_exception(failure)
        else:
            self.done.set_result(None)


def _message(body: bytes) -> str:
    """Of an error in OpenAI's form, or whatever it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return shown(body.decode(errors="replace"))
