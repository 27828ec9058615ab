"""What Prometheus is told is what happened."""

import time

import httpx
import pytest
import torch

from lite_llm.engine.warm import counting
from lite_llm.server.job import Piece
from lite_llm.server.metrics import Metrics
from tests.server.conftest import CHAT, Running
from tests.server.test_connections import LONG, raw


def histogram(text: str, name: str) -> tuple[list[float], float, float]:
    """Its buckets, count and sum."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
    found = {key: float(value) for key, value in lines}
    buckets = [value for key, value in found.items() if key.startswith(f"lite_llm_{name}_seconds_bucket")]
    return buckets, found[f"lite_llm_{name}_seconds_count"], found[f"lite_llm_{name}_seconds_sum"]


def test_the_time_in_the_queue_and_the_gaps_between_tokens(demo):
    """Sixteen answers run at a time, so a seventeenth waits for as long as they take; a stream's gaps add up."""
    with Running(demo) as fresh:
        start = time.monotonic()
        holding = raw(fresh, **LONG | {"n": 16, "max_tokens": 100})
        fresh.until(lambda: len(demo.engine.scheduler.running) == 16)
        spoken, firsts = [], []
        wishes = {"messages": CHAT, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", fresh.url + "/v1/chat/completions", json=wishes, timeout=30) as stream:
            for line in stream.iter_lines():
                firsts += [time.monotonic() - start] * (not firsts)
                spoken += [time.monotonic()] * bool(line)
        holding.close()
        fresh.settle()
        text = httpx.get(fresh.url + "/metrics").text
    buckets, count, total = histogram(text, "queue_time")
    assert count == buckets[-1] == 2 and 0.5 * firsts[0] < total < 2 * firsts[0]
    buckets, count, total = histogram(text, "inter_token")
    assert count == 59 == buckets[-1] and buckets == sorted(buckets), "the answer that was not streamed has no gaps"
    assert total == pytest.approx(spoken[-1] - spoken[0], abs=0.1)


def test_kernels_that_are_new_after_ready_are_counted(demo):
    with Running(demo) as fresh:
        before = httpx.get(fresh.url + "/metrics").text
        fresh.kernels.compiled.append("attend")
        fresh.kernels.loaded += ["a", "b"]
        found = httpx.get(fresh.url + "/metrics").text
    for how, was, now in (("compiled", 0, 1), ("loaded", 0, 2)):
        assert f'lite_llm_compiles_total{{how="{how}"}} {was}.0' in before
        assert f'lite_llm_compiles_total{{how="{how}"}} {now}.0' in found


def test_tokens_that_came_together_are_no_time_apart():
    metrics, last = Metrics(counting(torch.device("cpu")).__enter__()), {}
    metrics.handed_on([Piece(0, tokens=[5, 6, 7]), Piece(1, tokens=[5]), Piece(2)], last)
    metrics.handed_on([Piece(1, tokens=[5, 6]), Piece(2, tokens=[5])], last)
    buckets, count, total = histogram(metrics.text(None, True).decode(), "inter_token")
    assert (buckets[0], count) == (4, 4) and 0 < total < 0.1, "two of the first, two of the second"
    last[0] -= 0.05
    metrics.handed_on([Piece(0, tokens=[5])], last)
    bounds = histogram(metrics.text(None, True).decode(), "inter_token")[0]
    assert bounds[6:8] == [4, 5], "between 30 and 60 ms"
