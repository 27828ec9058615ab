"""Steps that fail, hang, or fail for good: whoever is concerned is told, and nobody else notices (FLT-01, SRV-18)."""

import json
import threading

import httpx
import pytest

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import EnvironmentProblem
from lite_llm.server import bridge as bridges
from lite_llm.server import steady
from lite_llm.server.answers import Document
from tests.server.conftest import PARIS, Running, opened
from tests.server.test_connections import LONG, raw


@pytest.fixture
def frail(demo, monkeypatch):
    """A server, and how to have its engine do something else in its next steps."""
    step = demo.engine.step
    plan: list = []

    def stepping():
        return plan.pop(0)() if plan else step()

    monkeypatch.setattr(demo.engine, "step", stepping)
    with Running(demo) as running:
        running.plan, running.step = plan, step
        yield running


def failing():
    raise RuntimeError("secret internals")


def test_a_step_that_raises_fails_its_requests_and_the_server_goes_on(frail):
    frail.plan.append(failing)
    answer = frail.chat()
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    frail.settle()
    assert frail.chat().json()["choices"][0]["message"]["content"] == PARIS
    frail.settle()


def test_an_error_of_ours_is_a_500_before_the_status_and_a_broken_stream_after_it(frail, monkeypatch):
    def breaking(self, *given):
        raise RuntimeError("secret internals")

    with monkeypatch.context() as patch:
        patch.setattr(Document, "whole", breaking)
        patch.setattr(Document, "events", breaking)
        answer = frail.chat()
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
        assert "secret" not in answer.text
        with pytest.raises(httpx.RemoteProtocolError):
            frail.chat(stream=True)
    frail.settle()
    assert 'requests_total{status="500"} 2.0' in httpx.get(frail.url + "/metrics").text
    assert frail.chat().json()["choices"][0]["message"]["content"] == PARIS
    frail.settle()


def test_only_the_requests_of_the_failed_step_hear_of_it(frail, monkeypatch):
    """The engine ends those that were in the plan; another one, that waits, gets its whole answer."""
    scheduler, runner = frail.llm.engine.scheduler, frail.llm.engine.runner
    holding = raw(frail, **LONG | {"n": 16, "stream": True})
    frail.until(lambda: len(scheduler.running) == 16)
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(frail.chat()))
    waiting.start()
    frail.until(lambda: len(scheduler.waiting) == 1)
    run = runner.run
    fails = [failing]
    monkeypatch.setattr(runner, "run", lambda *given, **more: fails.pop()() if fails else run(*given, **more))
    waiting.join()
    assert found[0].status_code == 200 and found[0].json()["choices"][0]["message"]["content"] == PARIS
    text = b""
    while piece := holding.recv(1 << 20):
        text += piece
        if b"step_failed" in text:
            break
    assert b'"code":"step_failed"' in text and b"[DONE]" not in text
    holding.close()
    frail.settle()


def test_what_was_said_before_a_failed_step_is_not_lost(frail):
    """The tokens of a step that raises after it has landed some reach their client all the same."""

    def landing_then_failing():
        frail.step()
        raise RuntimeError("after the tokens were there")

    frail.plan += [frail.step, frail.step, frail.step, landing_then_failing]
    events = frail.chat(stream=True).text.split("\n\n")
    found = [json.loads(event.removeprefix("data: ")) for event in events if event]
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in found[:-1])
    assert text == "The capital of France" and found[-1]["error"]["code"] == "step_failed"
    frail.settle()


def test_an_engine_that_can_only_fail_ends_the_server(monkeypatch):
    with opened() as llm, Running(llm) as running:
        monkeypatch.setattr(steady, "device_is_lost", lambda: True)
        monkeypatch.setattr(llm.engine, "step", failing)
        answer = running.chat()
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert running.died.wait(5) and isinstance(running.bridge.dead, EnvironmentProblem)
        assert running.chat().status_code == 503
        assert httpx.get(running.url + "/health").status_code == 200
        assert httpx.get(running.url + "/health/ready").status_code == 503
        assert httpx.get(running.url + "/metrics").status_code == 200


def test_steps_that_fail_again_and_again_end_the_server_too(monkeypatch):
    with opened() as llm, Running(llm) as running:
        monkeypatch.setattr(type(llm.engine), "idle", property(lambda engine: False))
        monkeypatch.setattr(llm.engine, "step", failing)
        assert running.died.wait(5) and isinstance(running.bridge.dead, RuntimeError)


def test_a_step_that_hangs_turns_readiness_off(demo, monkeypatch):
    go, step = threading.Event(), demo.engine.step
    monkeypatch.setattr(bridges, "_ANSWER", 0.2)

    def hanging():
        go.wait(20)
        return step()

    with Running(demo, stall=0.3) as running:
        assert httpx.get(running.url + "/health/ready").status_code == 200
        monkeypatch.setattr(demo.engine, "step", hanging)
        found: list = []
        client = threading.Thread(target=lambda: found.append(running.chat()))
        client.start()
        running.until(lambda: httpx.get(running.url + "/health/ready").status_code == 503, 5)
        assert httpx.get(running.url + "/health").status_code == 200
        assert httpx.get(running.url + "/v1/requests").status_code == 503
        assert "lite_llm_ready 0.0" in httpx.get(running.url + "/metrics").text
        go.set()
        running.until(lambda: httpx.get(running.url + "/health/ready").status_code == 200, 5)
        client.join()
        assert found[0].json()["choices"][0]["message"]["content"] == PARIS
        running.settle()


def test_after_a_failed_step_everything_is_said_once(demo, monkeypatch):
    """What landed before it raised comes, what was said before does not come again, and nobody is left in the dark."""
    engine = steady.Steady(demo)
    prompt, params = demo.read("a b c"), SamplingParams(max_tokens=6, ignore_eos=True, n=2)
    engine.add_request("mine", prompt, params, "", None, streamed=True)
    engine.add_request("other", prompt, params, "", None, streamed=False)
    step, said = demo.engine.step, []
    said += engine.step().rows
    said += engine.step().rows

    def landing_then_failing():
        step()
        raise RuntimeError

    monkeypatch.setattr(demo.engine, "step", landing_then_failing)
    last = engine.step().rows
    assert [row[:2] for row in last] == [("mine", 0), ("mine", 1), ("mine", 0), ("other", 0)]
    assert [row[4] for row in last] == [None, None, "error", "error"]
    assert [sum(len(row[3]) for row in said + last if row[:2] == ("mine", i)) for i in range(2)] == [3, 3]
    assert not engine._open and engine.idle and not demo._streams
