"""Figures for Prometheus. A request counts once, when it ends; a scrape asks for the engine's state."""

import bisect
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from lite_llm.outputs import InFlight, Output
from lite_llm.server.job import Piece
from lite_llm.server.remote import Kernels

CONTENT_TYPE = CONTENT_TYPE_LATEST
_QUEUED = (0.001, 0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 60)
_NEXT = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """One server's; nothing is global."""

    def __init__(self, kernels: Kernels):
        """`kernels`: what was compiled or loaded since the server was ready."""
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lite_llm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"lite_llm_{name}_seconds", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lite_llm_{name}", text, registry=registry)

        self._requests = counter("requests", "HTTP requests for an answer, by status; 499: the client left", "status")
        self._endings = counter("answers", "Answers by the reason of their end", "finish_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._cached = counter("cached_tokens", "Tokens of prompts that needed no computing")
        self._completion = counter("completion_tokens", "Tokens of answers")
        queued = "From the engine's queue to the first step that works on it"
        self._queued = histogram("queue_time", queued, _QUEUED)
        self._first = histogram("time_to_first_token", "From the engine's queue to the first token", _FIRST)
        self._next = histogram("time_per_output_token", "After the first token, the mean of each answer", _NEXT)
        self._whole = histogram("request_duration", "From the engine's queue to the last token", _WHOLE)
        self._running = gauge("running", "Answers that the engine advances")
        self._waiting = gauge("waiting", "Answers that wait for the engine")
        self._slots = Gauge("lite_llm_kv_slots", "Slots of the KV pool, by use", ["use"], registry=registry)
        self._ready = gauge("ready", "1 if requests are taken and the engine advances")
        self._gaps = _Gaps()
        registry.register(self._gaps)
        registry.register(_Compiles(kernels))

    def ended(self, status: int, outputs: Sequence[Output] = ()) -> None:
        self._requests.labels(status).inc()
        for output in outputs:
            self._prompt.inc(output.usage.prompt_tokens)
            self._cached.inc(output.usage.cached_tokens)
            self._completion.inc(output.usage.completion_tokens)
            self._queued.observe(output.timings.queued)
            self._first.observe(output.timings.first_token)
            self._whole.observe(output.timings.total)
            if output.timings.tokens_per_second:
                self._next.observe(1 / output.timings.tokens_per_second)
            for choice in output.choices:
                self._endings.labels(choice.finish_reason).inc()

    def handed_on(self, pieces: Iterable[Piece], last: dict[int, float]) -> None:
        """Of a stream, now. `last`: for each choice when it was handed tokens before; kept by the caller."""
        now = time.monotonic()
        for piece in pieces:
            if piece.tokens:
                self._gaps.add(now - last[piece.index] if piece.index in last else None, len(piece.tokens))
                last[piece.index] = now

    def text(self, now: InFlight | None, ready: bool) -> bytes:
        """`now`: None if the engine does not answer; its gauges then stay as they were."""
        self._ready.set(ready)
        if now is not None:
            self._running.set(now.running)
            self._waiting.set(now.waiting)
            free = now.slots - now.slots_used - now.slots_cached
            for use, slots in (("used", now.slots_used), ("cached", now.slots_cached), ("free", free)):
                self._slots.labels(use).set(slots)
        return generate_latest(self.registry)


class _Gaps(Collector):
    """Seconds between neighbouring tokens of streams. Written once for each event, so in few words: 0.4 us."""

    def __init__(self):
        self._counts, self._sum = [0] * (len(_NEXT) + 1), 0.0

    def add(self, seconds: float | None, tokens: int) -> None:
        """`tokens` that came together, `seconds` after those before them; None: they are the first."""
        self._counts[0] += tokens - 1
        if seconds is not None:
            self._counts[bisect.bisect_left(_NEXT, seconds)] += 1
            self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*map(str, _NEXT), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(self._counts), strict=True))
        text = "Between two tokens of a stream, as they are handed to its connection; 0 if they go out together"
        yield HistogramMetricFamily("lite_llm_inter_token_seconds", text, buckets=buckets, sum_value=self._sum)


class _Compiles(Collector):
    def __init__(self, kernels: Kernels):
        self._kernels = kernels

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Kernels that were compiled, or loaded from the cache on disk, since the server was ready: a step waited"
        found = CounterMetricFamily("lite_llm_compiles", text, labels=["how"])
        found.add_metric(["compiled"], len(self._kernels.compiled))
        found.add_metric(["loaded"], len(self._kernels.loaded))
        yield found
