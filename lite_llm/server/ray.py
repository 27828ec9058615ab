"""Several replicas of one model behind one address, with Ray Serve: `lite-llm serve --replicas N`.

Ray Serve starts the replicas, asks for their health, replaces the dead, picks one for each request by `PrefixRouter`
and carries the answers; each replica is the whole server without its socket. Ray's own HTTP proxy neither tries a
request again when its replica dies nor ends a broken stream with an error, so this process listens itself: `Front`.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig
from starlette.types import Message

from lite_llm.config import EngineConfig
from lite_llm.errors import EnvironmentProblem
from lite_llm.server.app import Server, guarded, make_app
from lite_llm.server.bridge import Bridge
from lite_llm.server.front import Front
from lite_llm.server.metrics import Metrics
from lite_llm.server.options import ServeOptions, fetcher_from
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.routing import PrefixRouter
from lite_llm.server.run import answer, freeze, name_of
from lite_llm.text.decoders import Decoders

_HEALTH = 2.0  # seconds between two questions about a replica's health
_STUCK = 10.0  # seconds for it to answer; after three times it is replaced
_QUESTIONS = 64  # requests that a replica takes beyond its answers: they are short
_OBJECTS = 100 << 20  # bytes of Ray's store, which holds large bodies and answers for a moment


class Replica:
    """One LLM and its server, in a process of its own. If its engine ends, so does the process, and Ray starts another:
    then there is one way to fail."""

    async def __init__(
        self, model: str | None, engine: dict, fetch_from: Sequence[str], options: ServeOptions, started: int
    ):
        decoders = Decoders()  # its processes end with this one
        llm = RemoteLLM(model, fetcher=fetcher_from(fetch_from), decode=decoders.decode, **engine)
        self._bridge = Bridge(llm, options.max_queue)
        name = options.name or name_of(llm.name)
        self._server = Server(
            llm, self._bridge, Metrics(llm.kernels), name, started, options.max_body, options.timeout
        )  # fmt: skip
        self._app = make_app(self._server, None)  # the front has seen the key
        freeze()
        self._bridge.start(on_death=lambda: os._exit(1))

    async def check_health(self) -> None:
        if not self._bridge.ready:
            raise RuntimeError("the engine has stopped")

    async def answer(self, scope: dict[str, Any], body: bytes, prefixes: Sequence[bytes]) -> AsyncIterator[Message]:
        """What the app sends for a request, after one message that says that the request has arrived.

        `prefixes` are for the router. Closing the iterator is what a closed connection is elsewhere.
        """
        yield {"type": "taken"}
        parts, messages, closed = [body], asyncio.Queue(), asyncio.Event()

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop()}
            await closed.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(scope, receive, messages.put))
        work.add_done_callback(lambda done: messages.put_nowait(done.exception()))  # None, or what the app has logged
        try:
            while isinstance(message := await messages.get(), dict):
                yield message
        finally:
            closed.set()

    async def ask(self, path: str) -> tuple[str, int, bytes]:
        """The answer to a GET request: the replica's name, status, and body."""
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        found = [message async for message in self.answer(scope, b"", ())][1:]
        body = b"".join(message.get("body", b"") for message in found[1:])
        return serve.get_replica_context().replica_id.unique_id, found[0]["status"], body


def serve_replicas(
    model: str | None,
    engine: dict[str, Any],
    fetch_from: Sequence[str],
    replicas: int,
    listener: socket.socket,
    options: ServeOptions,
    say: Callable[[str], None],
) -> int:
    """`serve` with a number of replicas, each with a GPU of its own where there are any. `engine`: of `EngineConfig`.

    Ray runs on this machine, for as long as this does. EnvironmentProblem if GPUs are missing or no replica starts.
    """
    gpus = torch.cuda.device_count() if engine.get("device", "auto") != "cpu" else 0
    if gpus and gpus < replicas:
        raise EnvironmentProblem(f"{replicas} replicas; there are {gpus} GPUs", "pass fewer --replicas")
    inner = dataclasses.replace(options, host="127.0.0.1", api_key=None)
    most = EngineConfig(**engine).max_requests + options.max_queue + _QUESTIONS
    deployment = serve.deployment(
        Replica, num_replicas=replicas, ray_actor_options={"num_cpus": 1, "num_gpus": int(gpus > 0)},
        max_ongoing_requests=most, request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        health_check_period_s=_HEALTH, health_check_timeout_s=_STUCK, graceful_shutdown_timeout_s=_HEALTH,
        max_constructor_retry_count=1,
    )  # fmt: skip
    with _cluster(replicas, replicas if gpus else 0):
        try:
            app = deployment.bind(model, engine, fetch_from, inner, int(time.time()))
            handle = serve.run(app, name="lite_llm", route_prefix=None)
            _, _, models = handle.broadcast("ask", "/v1/models").results()[0]
        except RuntimeError as error:
            raise EnvironmentProblem(f"the replicas did not start: {_why(error)}") from None
        front = Front(handle, options.max_body)
        app = guarded(front, options.api_key) if options.api_key else front
        name = json.loads(models)["data"][0]["id"]
        return answer(app, front, f"{name}, {replicas} replicas", listener, options, say)


@contextlib.contextmanager
def _cluster(replicas: int, gpus: int) -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports to its makers otherwise
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        address="local", num_cpus=2 * replicas, num_gpus=gpus, include_dashboard=False, object_store_memory=_OBJECTS,
        log_to_driver=False, logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False))
        yield
    finally:
        ray.shutdown()


def _why(error: RuntimeError) -> str:
    """What a replica has raised, if Serve knows it: the last line of a traceback, without the class."""
    for found in serve.status().applications.values():
        for deployment in found.deployments.values():
            if lines := deployment.message.strip().splitlines():
                return lines[-1].partition(": ")[2] or lines[-1]
    return str(error)
