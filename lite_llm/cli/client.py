"""A server of OpenAI's API, asked over HTTP with nothing but the standard library: it must start fast.

No proxy is used and no redirect followed: the key goes to the address that the user has named.
"""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

import lite_llm
from lite_llm.cli.serve import KEY
from lite_llm.errors import ContextExceeded, LiteLLMError, SourceProblem, UsageError
from lite_llm.outputs import InFlight

_DEADLINE = 5.0  # seconds for a server to take a connection, and for all answers but those of a model
_MOST_BYTES = 64 << 20
_MOST_LINE = 4 << 20
_MOST_TOLD = 1 << 16  # of an error
_SHOWN = 300  # characters of what a server says
_KINDS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_NO_JSON = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


class TryLater(SourceProblem):
    """The server is busy, and has said after how many seconds to ask again; `cause` is its word for the reason."""

    def __init__(self, message: str, hint: str, seconds: float, cause: str):
        super().__init__(message, hint)
        self.seconds, self.cause = seconds, cause


class Client:
    """Every method raises a LiteLLMError that says what the server has answered instead, or that it cannot be asked."""

    def __init__(self, url: str, api_key: str | None):
        url = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or parts.scheme not in _KINDS or parts.query or parts.fragment or not url.isprintable():
            raise UsageError(f"{url[:200]} is no http URL", "pass the server's address, as http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(f"{KEY} holds more than printable ASCII characters", "set it to the server's API key")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._kind, self._host, self._port, self._path = _KINDS[parts.scheme], host, port, parts.path.rstrip("/")
        self._headers = {"user-agent": f"lite_llm/{lite_llm.__version__}", "connection": "close"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def models(self) -> list[dict[str, Any]]:
        """What can be asked: `id` of each, and from some servers `max_model_len`, tokens of its context."""
        found = self._json("/v1/models")
        with self._understood():
            return [{"id": str(one["id"]), "max_model_len": one.get("max_model_len")} for one in found["data"]]

    def tokens(self, document: dict[str, Any]) -> list[int]:
        """Token ids of {"model": ..., "messages": ...}, from a server that has the route /tokenize."""
        found = self._json("/tokenize", json.dumps(document).encode())
        with self._understood():
            return list(found["tokens"])

    def in_flight(self) -> InFlight:
        """The requests in a server of ours."""
        found = self._json("/v1/requests")
        with self._understood():
            return InFlight.read(found)

    def post(self, path: str, body: bytes) -> "Exchange":
        """A request whose answer may take any time."""
        return Exchange(self, path, body, None)

    def connection(self) -> http.client.HTTPConnection:
        return self._kind(self._host, self._port, timeout=_DEADLINE)

    def send(self, connection: http.client.HTTPConnection, path: str, body: bytes | None) -> None:
        headers = self._headers | ({"content-type": "application/json"} if body is not None else {})
        connection.request("GET" if body is None else "POST", self._path + path, body, headers)

    def _json(self, path: str, body: bytes | None = None) -> Any:
        with Exchange(self, path, body, _DEADLINE) as exchange:
            found = exchange.read(_MOST_BYTES)
        with self._understood():
            return json.loads(found)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except _NO_JSON:
            hint = "pass the address of an OpenAI-compatible server, without a path"
            raise SourceProblem(f"{self.url} answers something else than was asked for", hint) from None

    def unreachable(self, error: Exception) -> SourceProblem:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return SourceProblem(f"{self.url} cannot be asked: {reason[:_SHOWN]}", "is the server running there?")

    def refusal(self, status: int, later: str | None, body: bytes) -> LiteLLMError:
        """The error that an HTTP status means. `later`: the header Retry-After."""
        message, code = _told(body)
        said = f"{self.url} answers {status}" + (f": {message}" if message else "")
        if status in (401, 403):
            return SourceProblem(said, f"set {KEY} to the server's API key")
        if status in (429, 503) and later is not None and later.isascii() and later.isdigit():
            return TryLater(said, "try again later", float(later[:6]), code or str(status))
        if code == ContextExceeded.code:
            return ContextExceeded(message)
        if status == 413:
            return UsageError(said, "send smaller pictures, or start the server with a larger --max-body")
        if status in (400, 415, 422):
            return UsageError(said)
        return SourceProblem(said, "is this the address of an OpenAI-compatible server?" if status < 500 else "")


class Exchange:
    """One request and its response. `cancel` may be called by another thread: whatever this one waits for then ends.

    `read` or `events` may be called once, in a `with` block that closes the connection.
    """

    def __init__(self, client: Client, path: str, body: bytes | None, deadline: float | None):
        """`deadline`: seconds without a byte; None: no end."""
        self._client, self._path, self._body, self._deadline = client, path, body, deadline
        self._connection = client.connection()
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._cancelled = False

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *_) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def cancel(self) -> None:
        self._cancelled = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it may be closed by now
                self._socket.shutdown(socket.SHUT_RDWR)

    def send(self) -> Message:
        """The headers of a response whose status is 200."""
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            self._socket.settimeout(self._deadline)
            if self._cancelled:
                raise OSError("cancelled")
            self._client.send(self._connection, self._path, self._body)
            self._response = response = self._connection.getresponse()
            if response.status == 200:
                return response.headers
            told = response.read(_MOST_TOLD)
        except (OSError, http.client.HTTPException) as error:
            raise self._client.unreachable(error) from None
        raise self._client.refusal(response.status, response.headers.get("retry-after"), told)

    def read(self, most: int) -> bytes:
        """Send, and read the response."""
        self.send()
        try:
            return self._response.read(most)
        except (OSError, http.client.HTTPException) as error:
            raise self._client.unreachable(error) from None

    def events(self) -> Iterator[dict[str, Any]]:
        """After `send`: the documents of a stream, until it is done or lost. SourceProblem for what is none, and for an
        error among them."""
        if not self._response.headers.get("content-type", "").startswith("text/event-stream"):
            raise SourceProblem(f"{self._client.url} does not stream its answer", "name a server that does")
        while True:
            try:
                line = self._response.readline(_MOST_LINE)
            except (OSError, http.client.HTTPException):
                return
            if not line:
                return
            if not line.startswith(b"data:"):
                continue
            if (data := line[5:].strip()) == b"[DONE]":
                return
            with self._client._understood():
                found = json.loads(data)
            if not isinstance(found, dict) or found.get("error"):
                raise SourceProblem(f"{self._client.url} has ended the answer: {_told(data)[0]}", "ask again")
            yield found


def _told(body: bytes) -> tuple[str, str]:
    """What an error's document says, on one line, and its code; OpenAI's form and those of others."""
    try:
        found = json.loads(body)
        error = found.get("error", found)
        if isinstance(error, dict):
            message, code = error.get("message") or error.get("detail") or "", error.get("code") or ""
        else:
            message, code = error, ""
    except _NO_JSON:
        message, code = body.decode("utf-8", "replace"), ""
    return " ".join(str(message).split())[:_SHOWN], str(code)[:80]
