"""Runs the server until it is told to stop: SIGTERM or Ctrl-C lets what runs finish, the second one does not wait."""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import math
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lite_llm.engine.warm import counting
from lite_llm.errors import EnvironmentProblem, UsageError
from lite_llm.llm import LLM
from lite_llm.server.app import Server, make_app
from lite_llm.server.bridge import Bridge
from lite_llm.server.metrics import Metrics
from lite_llm.text.fetch import Fetcher, check_url, resolve

_GOODBYE = 2.0  # seconds for clients to hear that their answers end


@dataclass(frozen=True)
class ServeOptions:
    """UsageError for an address that everybody can reach, without a key, and for a timeout that is none."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = None
    name: str | None = None  # of the model, for clients; None: `name_of` it
    max_queue: int = 512  # answers that may wait
    max_body: int = 8 << 20  # bytes
    timeout: float | None = None  # seconds that an answer may take at most; None: any time
    drain: float = 30.0  # seconds for running answers to finish when the server is stopped

    def __post_init__(self):
        if self.api_key is None and not _is_local(self.host):
            raise UsageError(
                f"host = {self.host} can be reached from other machines, and there is no API key",
                "pass --api-key KEY or set LITE_LLM_API_KEY, or serve on 127.0.0.1",
            )
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise UsageError(f"timeout = {self.timeout}; expected a number of seconds above 0")


def listen(options: ServeOptions) -> socket.socket:
    """The address, taken before a model is loaded. EnvironmentProblem if that cannot be."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends at once only if it knows that this is TCP
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        hint = "stop the other program or pass --port" if error.errno == errno.EADDRINUSE else "pass another --host"
        raise EnvironmentProblem(f"{options.host} port {options.port}: {error.strerror}", hint) from None
    return listener


def fetcher_from(hosts: Sequence[str]) -> Fetcher | None:
    """Downloads pictures from these hosts alone, redirects included; None for no hosts. UsageError for a bad name."""
    listed = {check_url(f"http://{host}/")[1] for host in hosts}

    def only_listed(host: str, port: int, seconds: float) -> list[str]:
        if host not in listed:
            raise UsageError(f"pictures are not fetched from {host}", "send the picture itself, as a data URL")
        return resolve(host, port, seconds)

    return Fetcher(resolve=only_listed) if listed else None


def serve(llm: LLM, listener: socket.socket, options: ServeOptions, say: Callable[[str], None]) -> int:
    """Answer requests until told to stop; returns the exit code. Must be called in the main thread.

    Raises what ended the engine, if it ended by itself.
    """
    bridge = Bridge(llm, options.max_queue)
    with counting(llm.engine.kv.k.device) as kernels:
        name = options.name or name_of(llm.name)
        server = Server(
            llm, bridge, Metrics(kernels), name, int(time.time()), options.max_body, options.timeout
        )  # fmt: skip
        http = _Quiet(
            uvicorn.Config(
                make_app(server, options.api_key), lifespan="off", ws="none", log_config=None, access_log=False,
                server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(_GOODBYE)),
            )
        )  # fmt: skip
        gc.collect()
        gc.freeze()  # 200,000 objects of torch and transformers, which a collection looks through for 50 ms
        with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
            return runner.run(_serve(server, http, listener, options, say))


def name_of(model: str) -> str:
    """What clients call a model if nothing else is said: not where it lies on this machine."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


async def _serve(
    server: Server, http: uvicorn.Server, listener: socket.socket, options: ServeOptions, say: Callable[[str], None]
) -> int:
    bridge, stop = server.bridge, asyncio.Event()
    at_once = asyncio.Event()

    def told() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    bridge.start(on_death=stop.set)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}  model {server.name}  Ctrl-C stops")
    await asyncio.wait([serving, asyncio.ensure_future(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    bridge.draining = True
    if bridge.taken and not bridge.dead:
        say(f"{bridge.taken} answers may finish within {options.drain:g} s; Ctrl-C again does not wait")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(options.drain):
            while bridge.taken and not bridge.dead and not at_once.is_set():
                await asyncio.sleep(0.02)
    bridge.end_all()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE):
            while bridge.taken:
                await asyncio.sleep(0.02)
    http.should_exit = True
    await serving
    await bridge.close()
    server.workers.shutdown(wait=False, cancel_futures=True)
    if bridge.dead:
        raise bridge.dead
    return 130 if at_once.is_set() else 0


class _Quiet(uvicorn.Server):
    """Leaves signals to `_serve`: uvicorn would close connections first and end with the signal, not with 0."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
