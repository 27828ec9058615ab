"""What clients hear while the model is loaded: the process lives, and everything else is 503.

Imports no torch, which takes as long as a small model: the address answers before it is there.
"""

import asyncio
import contextlib
import socket
import threading

import prometheus_client  # noqa: F401 -- needed later, as fastapi: what is missing is said before the model is loaded
import uvicorn
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lite_llm.server.connections import Connection
from lite_llm.server.refusals import loading

_TICK = 0.02  # seconds
_GOODBYE = 1.0  # seconds for connections that were accepted to bring their requests
_UPLOAD = 5.0  # seconds for a client to send what nobody will read: closed earlier, it might not see the answer


class Loading:
    """In this `with` block a thread answers at the address; connections that come later wait for who serves next.

    `progress` may be set at any time: how far the loading is, in words.
    """

    def __init__(self, listener: socket.socket):
        """`listener` stays open; the thread has its own handle on it."""
        self.progress = ""
        config = uvicorn.Config(
            self._answer, http=Connection, interface="asgi3", lifespan="off", ws="none", log_config=None,
            access_log=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._http, self._listener = uvicorn.Server(config), listener.dup()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lite_llm-loading")

    def __enter__(self) -> "Loading":
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C while it starts, and then nobody calls __exit__
            self._loaded.set()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._loaded.set()
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._http.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        serving = asyncio.ensure_future(self._http.serve(sockets=[self._listener]))
        while not (self._loaded.is_set() and self._http.started) and not serving.done():
            await asyncio.sleep(_TICK)
        # uvicorn alone would drop who has connected and not sent yet. Who comes from here on waits in the listener.
        for server in () if serving.done() else self._http.servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                while self._http.server_state.connections:
                    await asyncio.sleep(_TICK)
        self._http.should_exit = True
        await serving

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UPLOAD):
                while (await receive()).get("more_body"):
                    pass
        response = self._response(scope["path"])
        response.headers["connection"] = "close"  # the next request is for the one who serves then
        await response(scope, receive, send)

    def _response(self, path: str) -> Response:
        if path == "/health":
            return JSONResponse({"status": "ok"})
        refusal = loading(self.progress)
        if path == "/health/ready":
            return JSONResponse({"status": "not ready"}, 503, refusal.headers)
        return Response(refusal.body(), refusal.status, refusal.headers, "application/json")
