"""Answers that take too long: whoever heard nothing gets an error, whoever heard something keeps it (SCH-07)."""

import json
import time

import httpx
import pytest

from lite_llm.server import schema
from lite_llm.server.refusals import Refusal
from tests.server.conftest import CHAT, PARIS, Running
from tests.server.test_connections import LONG, raw

CUT = ("length", {"type": "timeout"})  # OpenAI's word for an answer that was cut, and what cut it


def ending(choice: dict) -> tuple[str, dict | None]:
    return choice["finish_reason"], choice.get("finish_details")


@pytest.fixture
def slow(demo, monkeypatch):
    """A server whose steps take 10 ms each; an answer of 1,900 tokens lasts for 20 seconds."""
    step = demo.engine.step

    def dawdling():
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(demo.engine, "step", dawdling)
    with Running(demo) as running:
        yield running
        running.settle(2.0)


def test_what_was_said_within_the_time_is_a_whole_answer(slow):
    start = time.monotonic()
    found = slow.chat(timeout=0.6, max_tokens=1900, ignore_eos=True, n=2)
    assert found.status_code == 200 and 0.6 <= time.monotonic() - start < 3
    document = found.json()
    assert [ending(choice) for choice in document["choices"]] == [CUT, CUT] and "x-ignored-fields" not in found.headers
    assert all(choice["message"]["content"].startswith(PARIS) for choice in document["choices"])
    assert 2 < document["usage"]["completion_tokens"] < 200
    slow.settle(1.0)
    assert 'lite_llm_answers_total{finish_reason="timeout"} 2.0' in httpx.get(slow.url + "/metrics").text


def test_a_stream_ends_as_streams_do_and_openais_client_understands(slow):
    wishes = dict(model="demo/chat", messages=CHAT, stream=True, stream_options={"include_usage": True})
    *chunks, usage = slow.openai.chat.completions.create(
        **wishes, extra_body={"timeout": 0.6, "ignore_eos": True, "max_tokens": 1900}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith(PARIS)
    last = [chunk.choices[0] for chunk in chunks if chunk.choices[0].finish_reason]
    assert [(one.finish_reason, one.finish_details) for one in last] == [CUT]
    assert 2 < usage.usage.completion_tokens < 100
    lines = slow.chat(stream=True, timeout=0.2, ignore_eos=True, max_tokens=1900).text.split("\n\n")
    assert lines[-2] == "data: [DONE]" and ending(json.loads(lines[-3][6:])["choices"][0]) == CUT
    assert "finish_details" not in "".join(lines[:-3])


@pytest.mark.parametrize("wishes", [dict(stream=True), dict(stream=False), dict(n=2)])
def test_who_waits_past_the_deadline_is_told_and_leaves_the_queue(slow, wishes):
    scheduler = slow.llm.engine.scheduler
    holding = [raw(slow, **LONG | {"n": 8}) for _ in range(2)]
    slow.until(lambda: len(scheduler.running) == 16)
    start = time.monotonic()
    refused = slow.chat(timeout=0.25, **wishes)
    assert 0.25 <= time.monotonic() - start < 2.0
    error = refused.json()["error"]
    assert refused.status_code == 503 and (error["code"], error["param"]) == ("timeout", "timeout")
    assert "0.25 s" in error["message"] and refused.headers["x-should-retry"] == "false"
    assert refused.headers["retry-after"] == "1"
    assert len(scheduler.running) == 16 and not scheduler.waiting
    slow.until(lambda: slow.bridge.taken == 16, 1.0)
    for connection in holding:
        connection.close()
    slow.settle(2.0)


def test_openais_client_does_not_ask_again(slow):
    import openai

    client = slow.openai.with_options(max_retries=2)
    with pytest.raises(openai.APIStatusError) as found:
        client.chat.completions.create(model="demo/chat", messages=CHAT, extra_body={"timeout": 1e-6})
    assert found.value.status_code == 503 and found.value.code == "timeout"
    slow.settle()
    assert 'lite_llm_requests_total{status="503"} 1.0' in httpx.get(slow.url + "/metrics").text


def test_a_prompt_that_is_still_being_read_ends_too(slow):
    """2,000 tokens, of which a step takes 256: 80 ms."""
    refused = slow.post("/v1/completions", prompt=[5] * 2000, max_tokens=4, timeout=0.04)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "timeout"
    slow.settle(1.0)


def test_several_prompts_have_one_deadline(slow):
    """What one of them said is not lost because others said nothing."""
    prompts = ["What is"] * 20  # 16 of them run together
    found = slow.post("/v1/completions", prompt=prompts, max_tokens=1900, ignore_eos=True, timeout=0.6).json()
    assert [ending(choice) for choice in found["choices"]] == [CUT] * 20
    assert [bool(choice["text"]) for choice in found["choices"]] == [True] * 16 + [False] * 4


def test_a_server_has_a_bound_of_its_own_and_the_smaller_one_counts(demo, monkeypatch):
    with Running(demo, timeout=0.5) as bounded:
        step = demo.engine.step
        monkeypatch.setattr(demo.engine, "step", lambda: time.sleep(0.01) or step())
        for wishes in ({}, {"timeout": 60}):
            start = time.monotonic()
            found = bounded.chat(max_tokens=1900, ignore_eos=True, **wishes).json()
            assert ending(found["choices"][0]) == CUT and time.monotonic() - start < 3
        bounded.settle(1.0)
        assert ending(bounded.chat(max_tokens=2).json()["choices"][0]) == ("length", None)
        bounded.settle()


@pytest.mark.parametrize("value", [0, -1, -0.5, "5", True, [1]])
def test_a_timeout_that_is_none_is_refused_by_name(server, value):
    for path, body in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": "x"})):
        error = server.post(f"/v1/{path}", timeout=value, **body)
        assert error.status_code == 400 and error.json()["error"]["param"] == "timeout"


def test_patience():
    def patience(own, most):
        return schema.patience(schema.Wishes(timeout=own), most)

    assert patience(None, None) is None and patience(3, None) == patience(None, 3.0) == patience(3, 9) == 3
    assert patience(9, 3.0) == 3
    with pytest.raises(Refusal):
        patience(0, 3.0)
