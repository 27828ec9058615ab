"""What listens for several replicas: it hands requests to them, and knows of an answer only how much has gone out.

A request whose replica dies before the first byte went to the client is given to another; what is broken later ends
with an error.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from lite_llm.server.answers import event
from lite_llm.server.app import response_of
from lite_llm.server.metrics import CONTENT_TYPE
from lite_llm.server.refusals import RETRY_AFTER, Refusal, refusal_of, stopping
from lite_llm.server.reply import ClientGone, left, read_bytes
from lite_llm.server.routing import prefixes_of

log = logging.getLogger("lite_llm")

_TRIES = 3  # replicas that one request may use up: more, and it is probably the request that kills them
_PATIENCE = 60.0  # seconds for a replica to take a request; while all are dead it waits for the first to be replaced
_ANSWER = 5.0  # seconds for all replicas to answer a question about themselves


class _Client:
    """What has gone out to one client, which decides what can still be said."""

    def __init__(self, send: Send):
        self._send, self._start = send, {}
        self.begun = self.over = False

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message  # goes out with the first part of the body
            return
        if not self.begun:
            self.begun = True
            await self._send(self._start)
        await self._send(message)
        self.over = not message.get("more_body")

    async def refuse(self, refusal: Refusal, scope: Scope, receive: Receive) -> None:
        with contextlib.suppress(ClientGone):
            if not self.begun:
                await response_of(refusal)(scope, receive, self.take)
            elif not self.over:  # only streams come in parts
                await self.take({"type": "http.response.body", "body": event(refusal.document())})


class Front:
    """The ASGI app that sends requests to replicas, and `Work` for the loop that runs it."""

    dead = None  # replicas that die are replaced

    def __init__(self, handle: DeploymentHandle, most_bytes: int):
        self.taken, self.draining = 0, False
        self._handle, self._most_bytes = handle, most_bytes
        self._relays: set[asyncio.Task] = set()
        self._own = {"/health/ready": self._ready, "/v1/requests": self._in_flight, "/metrics": self._metrics}

    def start(self, on_death: Callable[[], None]) -> None:
        """Replicas are there already."""

    def end_all(self) -> None:
        for relay in self._relays:
            relay.cancel()

    async def close(self) -> None:
        """Replicas are ended by who started them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(send)
        self.taken += 1
        try:
            if scope["method"] in ("GET", "HEAD") and scope["path"] in self._own:
                response = await self._own[scope["path"]]()
                await response(scope, receive, send)
            elif scope["path"] == "/health":
                await JSONResponse({"status": "ok"})(scope, receive, send)
            else:
                await self._forward(scope, receive, client)
        except ClientGone:
            pass
        except Exception as error:
            await client.refuse(refusal_of(error), scope, receive)
        finally:
            self.taken -= 1

    async def _forward(self, scope: Scope, receive: Receive, client: _Client) -> None:
        if self.draining:
            raise stopping()
        body = await read_bytes(scope, receive, self._most_bytes)
        names = ("type", "http_version", "method", "scheme", "path", "query_string", "headers")
        request = {name: scope[name] for name in names}
        answers = scope["path"] in ("/v1/chat/completions", "/v1/completions")
        prefixes = await asyncio.to_thread(prefixes_of, body) if answers else ()
        relay = asyncio.ensure_future(self._relay(client, request, body, prefixes))
        gone = asyncio.ensure_future(left(receive))
        gone.add_done_callback(lambda _: relay.cancel())
        self._relays.add(relay)
        try:
            await relay
        except asyncio.CancelledError:
            raise (ClientGone if gone.done() else stopping()) from None
        finally:
            gone.cancel()
            self._relays.discard(relay)

    async def _relay(self, client: _Client, *request: Any) -> None:
        """Hand a request on until a replica has answered it, or part of an answer is out. Refusal if that fails."""
        for _ in range(_TRIES):
            answer = self._handle.options(stream=True).answer.remote(*request)
            try:
                async with asyncio.timeout(_PATIENCE):
                    await anext(answer)
                async for message in answer:
                    await client.take(message)
                if client.over:
                    return
                raise RuntimeError("a replica has ended an answer without its end")
            except RayTaskError:  # an error of ours, not of the replica
                raise
            except (RayError, RayServeException) as error:
                if client.over:
                    return
                log.warning("a replica has failed: %s", str(error).partition("\n")[0])
                if client.begun:
                    raise Refusal(500, "the replica that computed this answer has died", code="replica_died") from None
            except TimeoutError:
                raise Refusal(503, "no replica is there to answer; try again later", code="no_replica") from None
            finally:
                if not client.over:
                    answer.cancel()
        raise Refusal(500, f"{_TRIES} replicas have died while they worked on this", code="replica_died")

    async def _ask(self, path: str) -> dict[str, bytes]:
        """What each replica answers that can; Refusal (503) if none can."""
        found: list[Any] = []
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            found = await self._handle.broadcast("ask", path).results_async(timeout_s=_ANSWER, return_exceptions=True)
        if said := {one[0]: one[2] for one in found if isinstance(one, tuple) and one[1] == 200}:
            return said
        raise Refusal(503, "no replica answers", code="no_replica")

    async def _ready(self) -> Response:
        """By what Ray's controller knows: a replica that hangs or has just died still counts until it was asked."""
        replicas = 0
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            async with asyncio.timeout(_ANSWER):
                replicas = await asyncio.to_thread(running_replicas)
        ready = replicas > 0 and not self.draining
        told = {"status": "ok" if ready else "not ready", "replicas": replicas}
        later = {} if ready else {"retry-after": str(RETRY_AFTER)}
        return JSONResponse(told, 200 if ready else 503, later)

    async def _in_flight(self) -> Response:
        """Those of all replicas; figures are sums."""
        found = [json.loads(body) for body in (await self._ask("/v1/requests")).values()]
        return JSONResponse(functools.reduce(together, found))

    async def _metrics(self) -> Response:
        return Response(labelled(await self._ask("/metrics")), media_type=CONTENT_TYPE)


def running_replicas() -> int:
    """Blocks until Ray's controller has answered."""
    found = serve.status().applications.values()
    return sum(one.replica_states.get("RUNNING", 0) for app in found for one in app.deployments.values())


def together(one: Any, other: Any) -> Any:
    """Two documents of the same shape as one: numbers are added, lists of them too, lists of requests joined."""
    if isinstance(one, dict):
        return {name: together(value, other[name]) for name, value in one.items()}
    if isinstance(one, list) and all(isinstance(item, int) for item in one + other):
        return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=0)]
    return one if isinstance(one, str) else one + other


def labelled(texts: Mapping[str, bytes]) -> bytes:
    """The figures of several servers as one document: each sample gets a label `replica`, the key of its text."""
    found: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            merged = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Found(list(found.values())))
    return generate_latest(registry)


class _Found(Collector):
    def __init__(self, metrics: list[Metric]):
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics
