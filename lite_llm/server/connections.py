"""Connections before anybody looks at a key: how long and how much one may say, and by which name it asks for us."""

import asyncio
import errno
import ipaddress
import logging
import resource
import socket

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lite_llm.errors import shown
from lite_llm.server.refusals import Refusal

log = logging.getLogger("lite_llm")

_HEAD_DEADLINE = 30.0  # seconds for a request's first line and headers, from the first moment or their first byte
_MOST_HEAD = 64 << 10  # bytes of them
_UNREAD_DEADLINE = 60.0  # seconds for a client to take most of what waits for it, once that is too much
_LOOK = 1.0  # seconds between two looks at whether a connection could be taken


class Connection(AutoHTTPProtocol):
    """uvicorn's, which by itself waits for ever for the end of a head, and for a client that reads nothing; and with
    httptools takes a head of any size."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_bytes = 0
        self._end: asyncio.TimerHandle | None = self.loop.call_later(_HEAD_DEADLINE, self._late)
        self._unread: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # a head has come; its request is at work
            self._head_bytes = 0
            self._forget_end()
            return
        if self._end is None:
            self._end = self.loop.call_later(_HEAD_DEADLINE, self._late)
        if self.cycle is None or not self.cycle.more_body:  # otherwise it is the rest of a body that was refused
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD:
                self.transport.close()

    def pause_writing(self) -> None:
        """Too much waits for the client. Watched here, for a deadline at each event costs as much as its JSON does."""
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD_DEADLINE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_end()
        self._forget_unread()
        super().connection_lost(exc)

    def _late(self) -> None:
        self._end = None
        self.transport.close()

    def _forget_end(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


async def watch_files(listener: socket.socket) -> None:
    """Say when no further connection can be taken, which uvloop does not; once each time. Never returns."""
    full = False
    while True:
        try:
            listener.dup().close()
            full = False
        except OSError as error:
            if not full and error.errno in (errno.EMFILE, errno.ENFILE):
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                log.error("connections are refused: all %d files are open; start with a higher ulimit -n", most)
                full = True
        await asyncio.sleep(_LOOK)


def for_this_machine(app: ASGIApp) -> ASGIApp:
    """For a server without a key, on a loopback address: it is asked by that address or as localhost, or not at all.

    Else the page of a stranger could use it from a browser here, by a name that its owner points at 127.0.0.1.
    """

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        strange = [host for host in hosts if not _is_of_this_machine(host)]
        if not strange:  # browsers always send one
            return await app(scope, receive, send)
        words = (
            f"host = {shown(strange[0])}; without an API key this server takes localhost and loopback addresses only"
        )
        refusal = Refusal(421, f"{words}; start it with --api-key to use another name", code="wrong_host")
        await Response(refusal.body(), refusal.status, media_type="application/json")(scope, receive, send)

    return guard


def _is_of_this_machine(host: str) -> bool:
    """`host`: as in the header, with or without a port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
