"""Runs the server until it is told to stop: SIGTERM or Ctrl-C lets what runs finish, the second one does not wait."""

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import uvicorn
from starlette.types import ASGIApp

from lite_llm.server.app import Server, make_app
from lite_llm.server.bridge import Bridge
from lite_llm.server.connections import Connection, for_this_machine, watch_files
from lite_llm.server.metrics import Metrics
from lite_llm.server.options import ServeOptions
from lite_llm.server.remote import RemoteLLM

_GOODBYE = 2.0  # seconds for clients to hear that their answers end


class Work(Protocol):
    """What is done for clients: `Bridge`, or something with its names."""

    taken: int  # answers that run or wait
    draining: bool  # set when no more are to be taken
    dead: Exception | None

    def start(self, on_death: Callable[[], None]) -> None: ...
    def end_all(self) -> None: ...
    async def close(self) -> None: ...


def serve(llm: RemoteLLM, listener: socket.socket, options: ServeOptions, say: Callable[[str], None]) -> int:
    """Answer requests until told to stop; returns the exit code. Must be called in the main thread.

    Raises what ended the engine, if it ended by itself.
    """
    bridge = Bridge(llm, options.max_queue)
    server = Server(
        llm, bridge, Metrics(llm.kernels), options.name or name_of(llm.name), int(time.time()), options.max_body,
        options.timeout,
    )  # fmt: skip
    app = make_app(server, options.api_key)
    torch.set_num_threads(1)  # only pictures are computed here, and on a CPU the engine needs the cores
    freeze()
    try:
        return answer(app, bridge, server.name, listener, options, say)
    finally:
        server.workers.shutdown(wait=False, cancel_futures=True)
        gc.unfreeze()  # Triton, which transformers imports for pictures, counts what the last collection cannot free


def answer(
    app: ASGIApp, work: Work, name: str, listener: socket.socket, options: ServeOptions, say: Callable[[str], None]
) -> int:
    """`serve` for what is opened already. `work`: what `app` does, so that it can be stopped."""
    http = _Quiet(
        uvicorn.Config(
            app if options.api_key else for_this_machine(app), http=Connection, lifespan="off", ws="none",
            log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(_GOODBYE)),
        )
    )  # fmt: skip
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        return runner.run(_serve(work, name, http, listener, options, say))


def freeze() -> None:
    """Of 200,000 objects of torch and transformers, which a collection looks through for 50 ms."""
    gc.collect()
    gc.freeze()


def name_of(model: str) -> str:
    """What clients call a model if nothing else is said: not where it lies on this machine."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


async def _serve(
    work: Work,
    name: str,
    http: uvicorn.Server,
    listener: socket.socket,
    options: ServeOptions,
    say: Callable[[str], None],
) -> int:
    stop, at_once = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    work.start(on_death=stop.set)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    watching = asyncio.ensure_future(watch_files(listener))
    host, port = listener.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}  model {name}  Ctrl-C stops")
    await asyncio.wait([serving, asyncio.ensure_future(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    work.draining = True
    if work.taken and not work.dead:
        say(f"{work.taken} answers may finish within {options.drain:g} s; Ctrl-C again does not wait")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(options.drain):
            while work.taken and not work.dead and not at_once.is_set():
                await asyncio.sleep(0.02)
    work.end_all()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE):
            while work.taken:
                await asyncio.sleep(0.02)
    watching.cancel()
    http.should_exit = True
    await serving
    await work.close()
    if work.dead:
        raise work.dead
    return 130 if at_once.is_set() else 0


class _Quiet(uvicorn.Server):
    """Leaves signals to `_serve`: uvicorn would close connections first and end with the signal, not with 0."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
