"""The engine in a process of its own: it answers as one in this process does, and whatever ends it is told."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import BadCheckpoint, EnvironmentProblem, UsageError
from lite_llm.llm import LLM
from lite_llm.server.link import Link
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.steady import News
from tests.server import inside
from tests.server.conftest import CHAT, PARIS, Running, opened
from tests.server.test_connections import LONG, raw
from tests.server.test_process import Process, stream


@pytest.fixture
def alone():
    """A server with an engine of its own, which may die of the test."""
    with opened(kind=RemoteLLM) as llm, Running(llm, stall=1.5) as running:
        yield running


def gone(pid: int) -> bool:
    """Whether a process has ended, if only its parent has yet to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def engines(parent: int) -> set[int]:
    """The processes of a server's engine."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    return {pid for pid in children if not gone(pid) and b"child.work" in Path(f"/proc/{pid}/cmdline").read_bytes()}


ASKED = [
    dict(), dict(n=3, temperature=1, seed=7), dict(logprobs=True, top_logprobs=3), dict(stop=["Par", "x"]),
    dict(max_tokens=3), dict(logit_bias={"5": 3}, presence_penalty=0.5, temperature=0.7, seed=1),
]  # fmt: skip


@pytest.mark.parametrize("wishes", ASKED)
def test_answers_are_those_of_an_engine_in_this_process(server, demo, wishes):
    def texts(events: str) -> list:
        """Of each choice its text, log probabilities and reason."""
        found: dict[int, list] = {}
        for event in events.split("\n\n")[:-2]:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                parts = found.setdefault(choice["index"], ["", [], None])
                parts[0] += choice["delta"].get("content") or ""
                parts[1] += (choice["logprobs"] or {}).get("content") or []
                parts[2] = choice["finish_reason"]
        return sorted(found.items())

    def near(found):
        """The same but for the last digits of log probabilities, which depend on what else a step computes."""
        if isinstance(found, dict):
            return {name: near(value) for name, value in found.items()}
        if isinstance(found, (list, tuple)):
            return [near(value) for value in found]
        return pytest.approx(found, abs=1e-5) if isinstance(found, float) else found

    with Running(demo) as here:
        for asked in (here, server):
            asked.chat()  # both have it in the cache now
        one, other = (asked.chat(**wishes).json() for asked in (here, server))
        assert one["choices"] == near(other["choices"]) and one["usage"] == other["usage"]
        whole = [
            (choice["message"]["content"], (choice["logprobs"] or {}).get("content", [])) for choice in one["choices"]
        ]
        one, other = (texts(asked.chat(stream=True, **wishes).text) for asked in (here, server))
        said = [[text, logprobs] for _, (text, logprobs, _) in one]
        assert [list(choice) for choice in one] == near(other) and said == near(whole)
        here.settle()


def test_what_the_engine_refuses_is_said_as_by_one_in_this_process(server, demo):
    with Running(demo) as here:
        for wishes in (
            dict(prompt=[5] * 3000),
            dict(prompt=["a", [5] * 3000]),
            dict(prompt="a", logit_bias={"99999": 1}),
        ):
            one, other = (asked.post("/v1/completions", **wishes) for asked in (here, server))
            assert one.status_code == other.status_code == 400 and one.json() == other.json()


def test_only_streams_are_told_of_every_token(demo):
    params = SamplingParams(max_tokens=5, ignore_eos=True)

    async def use(llm: RemoteLLM) -> tuple[list, list, BaseException]:
        rows, outputs, both = [], [], asyncio.Event()

        def told(news: News) -> None:
            rows.extend(news.rows)
            outputs.extend(news.outputs)
            if len(outputs) == 2:
                both.set()

        llm.start(told, lambda error: None)
        for name in ("stream", "whole"):
            llm.add_request(name, llm.read("a b"), params, "", None, streamed=name == "stream")
        await both.wait()
        await llm.ask(inside.check)
        with pytest.raises(ValueError) as caught:
            await llm.ask(inside.wrong)
        await llm.stop()
        return rows, outputs, caught.value

    with opened(kind=RemoteLLM) as llm:
        rows, outputs, wrong = asyncio.run(use(llm))
        (end,) = [row for row in rows if row[0] == "whole"]
        assert end[:2] + end[3:5] == ("whole", 0, outputs[0].token_ids[-1:], "length")
        told = [token for row in rows if row[0] == "stream" for token in row[3]]
        assert told == list(outputs[0].token_ids) and len(told) == 5 and len(rows) > 5
        assert len({output.text for output in outputs}) == 1 == len({row[2] for row in rows if row[4]})
        assert isinstance(wrong, ValueError) and "nonsense" in str(wrong)
    assert llm.process.returncode == 0


def test_a_step_that_raises_in_the_child_fails_its_requests_and_the_server_goes_on(alone):
    alone.inside(partial(inside.fail, steps=1, error=RuntimeError("secret internals")))
    answer = alone.chat()
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "step_failed" and "secret" not in answer.text
    alone.settle()
    assert alone.chat().json()["choices"][0]["message"]["content"] == PARIS
    alone.settle()


def test_a_lost_device_ends_the_server(alone):
    alone.inside(inside.lose_device)
    answer = alone.chat()
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
    assert alone.died.wait(5) and isinstance(alone.bridge.dead, EnvironmentProblem)
    assert "illegal memory access" in str(alone.bridge.dead) and alone.llm.process.wait(5) == 1
    assert alone.chat().status_code == 503
    assert httpx.get(alone.url + "/health/ready").status_code == 503


def test_steps_that_only_fail_end_the_server_and_say_where_it_happened(alone):
    alone.inside(inside.fail_for_good)
    assert alone.died.wait(5) and type(alone.bridge.dead) is RuntimeError  # its own class exists only there
    assert "Local: secret internals" in str(alone.bridge.dead) and alone.llm.process.wait(5) == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_whoever_is_connected_hears_that_the_child_was_killed(alone, streamed):
    connection = raw(alone, **LONG | {"stream": streamed})
    alone.until(lambda: alone.running == 1)
    time.sleep(0.05)
    alone.llm.process.send_signal(signal.SIGKILL)
    text = b""
    while b"engine_failed" not in text and (piece := connection.recv(1 << 20)):
        text += piece
    assert b"engine_failed" in text and b"[DONE]" not in text and (b" 200 " if streamed else b" 500 ") in text[:20]
    connection.close()
    assert alone.died.wait(5) and "SIGKILL" in str(alone.bridge.dead)
    assert httpx.get(alone.url + "/health/ready").status_code == 503 == alone.chat().status_code


def test_the_death_of_an_idle_child_is_noticed(alone):
    alone.llm.process.send_signal(signal.SIGSEGV)
    assert alone.died.wait(2) and "SIGSEGV" in str(alone.bridge.dead) and not alone.bridge.ready


def test_a_step_that_hangs_in_the_child_turns_readiness_off(alone):
    def ready() -> bool:
        return httpx.get(alone.url + "/health/ready").status_code == 200

    time.sleep(1.6)
    assert ready(), "an idle child says that it lives"
    alone.inside(partial(inside.hang, seconds=2.5))
    found: list = []
    client = threading.Thread(target=lambda: found.append(alone.chat()))
    client.start()
    alone.until(lambda: not ready(), 3)
    client.join()
    alone.until(ready, 2)
    assert found[0].json()["choices"][0]["message"]["content"] == PARIS
    alone.settle()


def test_a_long_step_delays_nobody_twice_and_signals_do_not_reach_the_child(alone):
    """An order that comes while the child steps is carried out after that step."""
    assert os.getsid(alone.llm.process.pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        alone.llm.process.send_signal(number)
    alone.inside(partial(inside.hang, seconds=0.5))
    holding = raw(alone, **LONG | {"stream": True})
    time.sleep(0.2)
    start = time.monotonic()
    assert alone.chat(max_tokens=1).status_code == 200 and time.monotonic() - start < 0.9
    holding.close()
    alone.settle()


def test_what_is_wrong_with_a_model_is_said_as_by_llm(tmp_path):
    for model, options, kind in (
        ("/nowhere/at/all", {}, BadCheckpoint), (tmp_path, {}, None), (None, {"frob": 1}, UsageError),
    ):  # fmt: skip
        said = []
        for one in (LLM, RemoteLLM):
            with pytest.raises(Exception) as caught:
                one(model, **options)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1] and (kind is None or said[0][0] is kind)
    with pytest.raises(RuntimeError, match="no such luck") as caught:
        RemoteLLM(make=inside.exploding)
    assert "in exploding" in caught.value.__notes__[0]
    with pytest.raises(EnvironmentProblem, match="exit code 7"):
        RemoteLLM(make=inside.vanishing)


def test_loading_is_told_and_can_be_interrupted():
    lines, bytes_, stages, before = [], [], [], engines(os.getpid())
    with RemoteLLM(
        say=lines.append, progress=lambda *two: bytes_.append(two), status=lambda *three: stages.append(three),
        device="cpu", kv_tokens=64,
    ) as llm:  # fmt: skip
        assert "MiB weights" in lines[0] and bytes_[-1][0] == bytes_[-1][1] > 1e6
        with pytest.raises(UsageError, match="text only"):
            llm.read(
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
            )
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            RemoteLLM(make=inside.sleeping)
        assert time.monotonic() - start < 4, "it ends by itself, not because it is killed"
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert engines(os.getpid()) == before


def test_the_command_ends_with_its_engine_and_says_why():
    server = Process("--device", "cpu")
    try:
        reader, lines = stream(server.url, 1900)
        (engine,) = engines(server.child.pid)
        os.kill(engine, signal.SIGKILL)
        assert server.end() == EnvironmentProblem.exit_code
        reader.join()
        assert "engine_failed" in lines[-2] and "SIGKILL" in server.log[-1] and "Traceback" not in "".join(server.log)
    finally:
        server.child.kill()


def test_a_killed_server_leaves_no_child():
    server = Process("--device", "cpu")
    try:
        holding = raw(SimpleNamespace(port=int(server.url.rsplit(":")[-1])), **LONG | {"stream": True})
        assert b" 200 " in holding.recv(100)
        (engine,) = engines(server.child.pid)
    finally:
        server.child.kill()
    end = time.monotonic() + 5
    while not gone(engine):
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.01)
    holding.close()
    server.end()


def test_a_link_keeps_what_is_not_taken_and_waits_only_beyond_its_bound():
    ours, theirs = (Link(end, 3 << 20) for end in socket.socketpair())
    big = bytes(1 << 20)
    start = time.monotonic()
    for i in range(3):
        ours.send((i, big))
    assert time.monotonic() - start < 1 and 2 << 20 < ours.unsent <= 3 << 20
    sender = threading.Thread(target=lambda: ours.send((3, big)))
    sender.start()
    sender.join(0.2)
    assert sender.is_alive(), "there is no room"
    found = []
    while len(found) < 4:
        found += theirs.receive(0.01)
        if not sender.is_alive():
            ours.receive(0)  # its owner comes by, as a child does before each step
    sender.join()
    assert [i for i, _ in found] == [0, 1, 2, 3] and not ours.unsent and found[3][1] == big
    ring = threading.Timer(0.1, theirs.ring)
    ring.start()
    start = time.monotonic()
    assert theirs.receive(5) == [] and time.monotonic() - start < 3
    ours.send("last")
    ours.close()
    assert theirs.receive(1) == ["last"]
    with pytest.raises(EOFError):
        theirs.receive(1)
    theirs.send("nobody hears it")
    theirs.close()
    theirs.ring()


def test_tokens_join_while_the_loop_is_busy_and_half_of_its_time_is_for_others(demo):
    async def use(llm: RemoteLLM) -> list[tuple[float, float, int]]:
        """When each round of handing out began and ended, and its tokens."""
        loop, rounds, waiting, end = asyncio.get_running_loop(), [], [], asyncio.Event()

        def hand_out() -> None:
            began = time.monotonic()
            time.sleep(0.1)  # so long that an engine of 15 ms a token still makes enough of them for the bound below
            rounds.append((began, time.monotonic(), sum(len(row[3]) for row in waiting)))
            waiting.clear()

        def told(news: News) -> None:
            if not waiting:
                loop.call_soon(hand_out)
            waiting.extend(news.rows)
            if news.outputs:
                loop.call_soon(end.set)

        llm.start(told, lambda error: None)
        params = SamplingParams(max_tokens=300, ignore_eos=True)
        llm.add_request("a", llm.read("a b"), params, "", None, streamed=True)
        await end.wait()
        await llm.stop()
        return rounds

    with opened(kind=RemoteLLM) as llm:
        rounds = asyncio.run(use(llm))
    assert sum(tokens for *_, tokens in rounds) == 300 and len(rounds) < 30
    assert all(after - ended > 0.095 for (_, ended, _), (after, *_) in pairwise(rounds))


def test_an_order_that_the_link_does_not_take_at_once_arrives_and_nobody_waits_for_it(alone):
    def order() -> Future:
        question = partial(inside.size, data=bytes(16 << 20))
        return asyncio.run_coroutine_threadsafe(alone.engine.ask(question), alone._loop)

    start = time.monotonic()
    assert order().result(10) == 16 << 20 and time.monotonic() - start < 3, "also by a child that says nothing"
    alone.inside(partial(inside.hang, seconds=1))
    with raw(alone, **LONG | {"stream": True}):
        time.sleep(0.2)
        found, start = order(), time.monotonic()
        assert httpx.get(alone.url + "/health").status_code == 200 and time.monotonic() - start < 0.7
        assert alone.engine._link.unsent and found.result(10) == 16 << 20 and not alone.engine._link.unsent
    alone.settle()


def test_kernels_that_the_child_compiles_are_counted(alone):
    assert 'compiles_total{how="compiled"} 0.0' in httpx.get(alone.url + "/metrics").text
    alone.inside(inside.compile_one)
    assert 'compiles_total{how="compiled"} 1.0' in httpx.get(alone.url + "/metrics").text


def test_pictures_need_no_engine_and_deadlines_are_the_same_in_all_processes(alone):
    assert alone.llm.read(CHAT).ids
    found = alone.chat(timeout=0.3, max_tokens=1900, ignore_eos=True, n=4).json()
    assert [choice["finish_details"] for choice in found["choices"]] == [{"type": "timeout"}] * 4
    alone.settle()
