"""Many clients, clients that leave, clients without a key: nothing is lost, nothing stays behind (SRV-06 to SRV-11)."""

import asyncio
import json
import random
import socket
import time

import httpx
import pytest

from lite_llm.server import reply
from tests.server.conftest import CHAT, PARIS, Running, riddle
from tests.server.inside import idle

LONG = dict(messages=CHAT, max_tokens=1900, ignore_eos=True)


@pytest.fixture(scope="module")
def copying(copier):
    with Running(copier, max_queue=200) as running:
        yield running


async def spoken(client: httpx.AsyncClient, url: str, prompt: str, leave_after: float | None = None) -> str | None:
    """The streamed answer; None if the client left before its end, after so many events."""
    wishes = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "stream": True}
    text, events = "", 0
    async with client.stream("POST", f"{url}/v1/completions", json=wishes) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if leave_after is not None and events >= leave_after:
                return None
            if line == "data: [DONE]":
                return text
            if line:
                events += 1
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    raise AssertionError("the stream ended without [DONE]")


def all_of(*work):
    async def run():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(one(client) for one in work), return_exceptions=True)

    return asyncio.run(run())


def test_two_hundred_streams_each_with_its_own_right_answer(copying):
    """More than run together, in a pool that they do not fit: queue, preemption and prefix cache are all in use."""
    dice = random.Random(1)
    riddles = [riddle(dice) for _ in range(200)]
    answers = all_of(*(lambda client, p=prompt: spoken(client, copying.url, p) for prompt, _ in riddles))
    assert answers == [answer for _, answer in riddles]
    copying.settle()


def test_clients_that_leave_disturb_nobody_and_leave_nothing(copying):
    dice = random.Random(2)
    riddles = [(*riddle(dice), dice.choice([None, 0, 1, 5, 20])) for _ in range(150)]
    answers = all_of(
        *(lambda client, p=prompt, k=leave: spoken(client, copying.url, p, k) for prompt, _, leave in riddles)
    )
    for answer, (_, right, leave) in zip(answers, riddles, strict=True):
        assert answer == right or leave is not None and answer is None
    copying.settle(2.0)
    assert copying.bridge.taken == 0


def raw(server: Running, path: str = "/v1/chat/completions", **fields) -> socket.socket:
    """A connection on which a request was sent."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("wishes", [
    dict(stream=True), dict(stream=False), dict(n=8), dict(n=8, stream=True), dict(stream=True, temperature=2),
])  # fmt: skip
def test_leaving_ends_all_answers_at_once(server, wishes):
    connection = raw(server, **LONG | wishes)
    answers = wishes.get("n", 1)
    server.until(lambda: server.running == answers)
    before = server.made
    connection.close()
    server.until(lambda: not server.running, 1.0)
    assert server.made - before < 1000 * answers
    server.settle(1.0)


def test_leaving_while_waiting_and_before_anything_was_said(server):
    running = [raw(server, **LONG | {"n": 8}) for _ in range(2)]  # all rows of the engine
    server.until(lambda: server.running == 16)
    waiting = raw(server, **LONG)
    server.until(lambda: server.waiting == 1)
    waiting.close()
    server.until(lambda: not server.waiting, 2.0)
    assert server.running == 16
    for connection in running:
        connection.close()
    server.settle(2.0)
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    server.until(lambda: server.bridge.taken == 1)
    half.close()
    server.settle(1.0)


def test_a_client_that_does_not_read_holds_up_nobody(server):
    silent = [raw(server, **LONG | {"stream": True, "max_tokens": 200}) for _ in range(4)]
    server.until(lambda: server.running == 4)
    assert server.chat().json()["choices"][0]["message"]["content"] == PARIS
    server.until(lambda: server.inside(idle))
    for connection in silent:
        connection.close()


def test_beyond_the_queue_there_is_429(demo):
    with Running(demo, max_queue=4) as small:
        everything = raw(small, **LONG | {"n": 20})
        small.until(lambda: small.bridge.taken == 20)
        started = time.monotonic()
        refused = small.chat()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full" and time.monotonic() - started < 1
        everything.close()
        small.settle(2.0)
        assert small.chat(n=21).json()["error"]["param"] == "n"
        assert small.chat().status_code == 200
        small.settle()


def test_every_route_but_health_and_page_wants_the_key(demo):
    with Running(demo, api_key="secret-ü".encode("ascii", "replace").decode()) as closed:
        right = {"authorization": "Bearer secret-?"}
        for path in ("/health", "/health/ready", "/"):
            assert httpx.get(closed.url + path).status_code == 200
        routes = [
            "/v1/models",
            "/v1/requests",
            "/metrics",
            "/openapi.json",
            "/nope",
            "//health",
            "/health/",
            "/%2e/health",
        ]
        for path in routes:
            for headers in ({}, {"authorization": "secret-?"}, {"authorization": "Bearer secret-"},
                            {"authorization": "Bearer"}, {"authorization": "Basic secret-?"},
                            {"authorization": "Bearer secret-?x"}, {"x-api-key": "secret-?"},
                            {"host": "localhost/health"}):  # fmt: skip
                answer = httpx.get(closed.url + path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert "secret" not in answer.text and answer.headers["www-authenticate"] == "Bearer"
        twice = [("authorization", "Bearer secret-?"), ("authorization", "Bearer secret-?")]
        assert httpx.get(closed.url + "/v1/models", headers=twice).status_code == 401
        assert httpx.get(closed.url + "/v1/models", headers=right).status_code == 200
        assert httpx.get(closed.url + "/health", headers={"authorization": "Bearer no"}).status_code == 200
        assert httpx.post(closed.url + "/v1/chat/completions", content=b"x" * 10_000).status_code == 401


def test_metrics_equal_what_clients_counted(demo):
    with Running(demo) as fresh:
        usages = [fresh.chat(n=n).json()["usage"] for n in (1, 2)]
        list(fresh.openai.chat.completions.create(model="demo/chat", messages=CHAT, stream=True))
        assert fresh.chat(temperature=-1).status_code == 400
        connection = raw(fresh, **LONG | {"stream": True})
        connection.recv(100)
        live = httpx.get(fresh.url + "/metrics").text
        connection.close()
        fresh.settle(2.0)
        found = httpx.get(fresh.url + "/metrics").text
    assert "lite_llm_running 1.0" in live and "lite_llm_running 0.0" in found and "lite_llm_ready 1.0" in found
    completion = sum(usage["completion_tokens"] for usage in usages) + 9
    for line in (
        'lite_llm_requests_total{status="200"} 3.0', 'lite_llm_requests_total{status="400"} 1.0',
        'lite_llm_requests_total{status="499"} 1.0', 'lite_llm_answers_total{finish_reason="stop"} 4.0',
        f"lite_llm_completion_tokens_total {completion:.1f}", "lite_llm_time_to_first_token_seconds_count 3.0",
    ):  # fmt: skip
        assert line in found, line


def test_the_live_view_maps_the_slots(server):
    connection = raw(server, **LONG | {"stream": True})
    connection.recv(100)
    now = httpx.get(server.url + "/v1/requests").json()
    cells = now["map"]
    assert sum(cells["used"]) == now["slots_used"] > 0 and sum(cells["cached"]) == now["slots_cached"]
    assert len(cells["used"]) == len(cells["cached"]) == -(-now["slots"] // cells["size"]) <= 256
    assert all(u + c <= cells["size"] for u, c in zip(cells["used"], cells["cached"], strict=True))
    connection.close()


def test_the_live_view(server):
    connection = raw(server, **LONG | {"n": 3, "stream": True})
    connection.recv(100)
    now = httpx.get(server.url + "/v1/requests").json()
    assert now["running"] == 3 and now["model"] == "demo/chat" and now["slots_used"] > 0
    states = [(one["index"], one["state"]) for one in now["requests"]]
    assert states == [(0, "decoding"), (1, "decoding"), (2, "decoding")]
    assert all(one["id"].startswith("chatcmpl-") and one["wanted"] == 1900 for one in now["requests"])
    connection.close()


def test_small_answers_leave_at_once(server):
    """Not after the 40 ms that a kernel may wait for more to send, or for an acknowledgement."""
    with httpx.Client() as client:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            client.get(server.url + "/health")
            times.append(time.perf_counter() - start)
    assert sorted(times)[4] < 0.03, times


def test_who_sends_too_slowly_is_left(demo, monkeypatch):
    monkeypatch.setattr(reply, "_BODY_DEADLINE", 0.1)
    with Running(demo) as impatient:
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        with socket.create_connection(("127.0.0.1", impatient.port)) as half:
            half.sendall(head.encode())
            assert half.recv(1000).startswith(b"HTTP/1.1 408")
        impatient.settle()


def test_a_long_answer_comes_piece_by_piece(server):
    """Many of them, also where the engine is faster than what hands its tokens out."""
    times = []
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json=LONG | {"stream": True, "max_tokens": 150}
    ) as found:
        times += [time.monotonic() for line in found.iter_lines() if line]
    assert len(times) > 40 and max(b - a for a, b in zip(times, times[1:], strict=False)) < 0.5
