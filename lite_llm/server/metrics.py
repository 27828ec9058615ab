"""Figures for Prometheus. A request counts once, when it ends; a scrape asks for the engine's state."""

from collections.abc import Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lite_llm.outputs import InFlight, Output

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 60)
_NEXT = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """One server's; nothing is global."""

    def __init__(self):
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
        self._first = histogram("time_to_first_token", "From the engine's queue to the first token", _FIRST)
        self._next = histogram("time_per_output_token", "After the first token, the mean of each answer", _NEXT)
        self._whole = histogram("request_duration", "From the engine's queue to the last token", _WHOLE)
        self._running = gauge("running", "Answers that the engine advances")
        self._waiting = gauge("waiting", "Answers that wait for the engine")
        self._slots = Gauge("lite_llm_kv_slots", "Slots of the KV pool, by use", ["use"], registry=registry)
        self._ready = gauge("ready", "1 if requests are taken and the engine advances")

    def ended(self, status: int, outputs: Sequence[Output] = ()) -> None:
        self._requests.labels(status).inc()
        for output in outputs:
            self._prompt.inc(output.usage.prompt_tokens)
            self._cached.inc(output.usage.cached_tokens)
            self._completion.inc(output.usage.completion_tokens)
            self._first.observe(output.timings.first_token)
            self._whole.observe(output.timings.total)
            if output.timings.tokens_per_second:
                self._next.observe(1 / output.timings.tokens_per_second)
            for choice in output.choices:
                self._endings.labels(choice.finish_reason).inc()

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
