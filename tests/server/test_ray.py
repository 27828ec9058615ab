"""`lite-llm serve --replicas`: the same API from two processes, who answers what, and what a killed one takes along."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lite_llm.cli import main, serve
from lite_llm.errors import EnvironmentProblem
from lite_llm.server.options import ServeOptions
from tests.server.conftest import CHAT, PARIS, Running
from tests.server.test_process import Process

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
CHATS = "/v1/chat/completions"
SYSTEM = "You are number {}. Answer in one short sentence, and say nothing that you are not sure about. "
ANSWERED = re.compile(r'lite_llm_requests_total\{replica="(\w+)",status="200"\} ([\d.]+)')


@pytest.fixture(scope="module")
def replicas() -> Iterator[Process]:
    process = Process("--replicas", "2", "--device", "cpu", "--max-body", str(1 << 20))
    try:
        process.wait_for("2 replicas", 120)
        yield process
    finally:
        process.child.terminate()
        process.end()


def processes_of(process: Process, name: str) -> set[int]:
    """Those below `process` whose command begins with `name`; they may have forked in between."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "stat").read_text().rpartition(")")[2].split()
            parents[int(place.name)] = int(words[1]), (place / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # it has ended
    found = set()
    for pid, (parent, command) in parents.items():
        while parent in parents and parent != process.child.pid:
            parent = parents[parent][0]
        if parent == process.child.pid and command.startswith(name):
            found.add(pid)
    return found


def post(url: str, path: str = CHATS, **fields) -> httpx.Response:
    return httpx.post(url + path, json=fields, timeout=60)


def until(true, seconds: float = 30.0) -> None:
    Running.until(true, seconds)


def same(one: httpx.Response, other: httpx.Response) -> bool:
    """But for names, times, and what was asked before."""
    own = r'"(id|created|cached_tokens)": ?("[^"]*"|\d+)'
    names = ("content-type", "x-ignored-fields", "retry-after", "www-authenticate")
    return (
        one.status_code == other.status_code
        and re.sub(own, "", one.text) == re.sub(own, "", other.text)
        and all(one.headers.get(name) == other.headers.get(name) for name in names)
    )


def test_replicas_answer_like_one_server(replicas, server):
    chats = [
        dict(max_tokens=20), dict(n=2, logprobs=True, seed=3), dict(surprise=1), dict(model="other"), dict(messages=[]),
        dict(temperature=-1),
    ]  # fmt: skip
    cases = [(CHATS, {"messages": CHAT} | fields) for fields in chats] + [
        ("/v1/completions", dict(prompt=["One", "Two"], echo=True)),
        ("/v1/completions", dict(prompt="One", logprobs=2)),
        ("/tokenize", dict(messages=CHAT)),
        ("/v1/embeddings", dict(input="x")),
        ("/nowhere", {}),
    ]
    for path, fields in cases:
        ours = post(replicas.url, path, **fields)
        assert same(ours, server.post(path, **fields)), (path, fields, ours.text)
    for path in ("/v1/models/demo/chat", "/v1/models/other", "/openapi.json", "/", "/health", CHATS):
        assert same(httpx.get(replicas.url + path), httpx.get(server.url + path)), path
    for body, kind in ((b"{", "application/json"), (b"{}", "text/plain"), (b" " * (2 << 20), "application/json")):
        ask = dict(content=body, headers={"content-type": kind})
        assert same(httpx.post(replicas.url + CHATS, **ask), httpx.post(server.url + CHATS, **ask))
    for path in (CHATS, "/v1/completions"):
        fields = dict(messages=CHAT) if path == CHATS else dict(prompt="One")
        fields |= dict(stream=True, stream_options={"include_usage": True}, max_tokens=30)
        ours, theirs = text_of(post(replicas.url, path, **fields).text), text_of(server.post(path, **fields).text)
        assert ours == theirs and ours[0] and ours[1] == "[DONE]"


def text_of(stream: str) -> tuple[str, str]:
    """What a stream says, and its last event."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    said = ""
    for one in events:
        for choice in json.loads(one).get("choices", ()) if one != "[DONE]" else ():
            said += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return said, events[-1]


def test_prompts_that_begin_alike_go_to_one_replica_and_others_are_spread(replicas):
    talks = [[{"role": "system", "content": SYSTEM.format(i) * 3}] for i in range(5)]
    shares = []
    for turn in range(3):
        for talk in talks:
            talk.append({"role": "user", "content": f"Question {turn}?"})
            found = post(replicas.url, messages=talk, max_tokens=8).json()
            talk.append(found["choices"][0]["message"])
            usage = found["usage"]
            shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    assert min(shares[len(talks) :]) > 0.5, shares
    scraped = httpx.get(replicas.url + "/metrics").text
    counts = dict(ANSWERED.findall(scraped))
    assert len(counts) == 2 and min(map(float, counts.values())) >= 2 * 3, scraped


def test_who_leaves_ends_the_request_and_the_requests_of_all_are_listed(replicas):
    def running() -> int:
        found = httpx.get(replicas.url + "/v1/requests").json()
        assert found["running"] + found["waiting"] == sum(one["state"] != "done" for one in found["requests"])
        return found["running"]

    until(lambda: running() == 0)
    with httpx.Client(timeout=60) as client:
        fields = dict(messages=CHAT, max_tokens=1900, ignore_eos=True, stream=True)
        streams = [
            client.send(client.build_request("POST", replicas.url + CHATS, json=fields), stream=True) for _ in "ab"
        ]
        assert running() == 2
        for stream in streams:
            stream.close()
    until(lambda: running() == 0, 3.0)


class Load(threading.Thread):
    """One request, and what became of it."""

    def __init__(self, url: str, index: int, streamed: bool):
        super().__init__()
        prompt = f"{index}: " + SYSTEM.format(index)
        self.fields = dict(prompt=prompt, max_tokens=150, ignore_eos=True, stream=streamed)
        self.url, self.index, self.streamed, self.lines, self.status = url, index, streamed, [], 0
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url + "/v1/completions", json=self.fields, timeout=100) as got:
            for line in got.iter_lines():
                self.lines.append(line)
            self.status = got.status_code


def test_of_a_killed_replica_only_streams_that_had_begun_are_lost(replicas, server):
    victim, other = processes_of(replicas, "ray::ServeReplica")
    streams = []
    for i in range(8, 14):  # each once it is known who has the one before, so that both replicas have some
        streams.append(one := Load(replicas.url, i, streamed=True))
        until(lambda one=one: len(one.lines) > 4)
    whole = [Load(replicas.url, i, streamed=False) for i in range(8)]
    until(lambda: httpx.get(replicas.url + "/v1/requests").json()["running"] >= 8)
    waiting = sum(one.is_alive() for one in whole)
    os.kill(victim, signal.SIGKILL)
    for one in whole + streams:
        one.join(100)
        assert not one.is_alive()
    broken = 0
    for one, alone in [(one, Load(server.url, one.index, streamed=False)) for one in whole + streams]:
        alone.join(100)
        right = json.loads(alone.lines[0])["choices"][0]["text"]
        if not one.streamed:
            assert one.status == 200 and json.loads(one.lines[0])["choices"][0]["text"] == right
            continue
        said, last = text_of("\n".join(line for line in one.lines if "error" not in line))
        if last == "[DONE]":
            assert said == right
        else:
            broken += 1
            error = json.loads(one.lines[-2].removeprefix("data: "))["error"]
            assert error["code"] == "replica_died" and "died" in error["message"] and right.startswith(said) and said
    assert waiting == 8 and 0 < broken < 6
    until(lambda: len(processes_of(replicas, "ray::ServeReplica") - {victim}) == 2, 60)
    until(lambda: httpx.get(replicas.url + "/health/ready").json() == {"status": "ok", "replicas": 2}, 60)
    assert other in processes_of(replicas, "ray::ServeReplica")
    assert "Traceback" not in "".join(replicas.log)

    # The new one works, and SIGTERM lets what runs finish.
    last = [Load(replicas.url, i, streamed=True) for i in range(14, 17)]
    until(lambda: all(len(one.lines) > 4 for one in last))
    below = processes_of(replicas, "")
    assert len(below) > 4
    replicas.child.send_signal(signal.SIGTERM)
    for one in last:
        one.join(60)
    assert replicas.end() == 0 and all("data: [DONE]" in one.lines for one in last)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_the_nearest_replica_is_chosen_unless_it_is_busy():
    from lite_llm.server.routing import Known, choose

    a, b = known = {0: Known(), 1: Known()}.values()
    known = {"a": a, "b": b}
    assert choose(known, ()) == "a"
    a.last = 1
    assert choose(known, ()) == "b"  # idle for longer
    a.load, a.prefixes = 1, dict.fromkeys([b"1", b"2"])
    assert choose(known, ()) == choose(known, [b"9"]) == "b"
    assert choose(known, [b"1", b"9"]) == "a"
    b.prefixes = dict.fromkeys([b"1", b"2", b"3"])
    assert choose(known, [b"1", b"2", b"3", b"4"]) == "b" and choose(known, [b"1", b"2"]) == "b"
    b.load = 5
    assert choose(known, [b"1", b"2", b"3", b"4"]) == "b"
    b.load = 7  # more than twice that of the other, and four
    assert choose(known, [b"1", b"2", b"3", b"4"]) == "a"


def test_prefixes_are_those_of_the_prompt_and_its_salt():
    from lite_llm.server.routing import prefixes_of

    def of(**fields) -> list[bytes]:
        return prefixes_of(json.dumps(fields).encode())

    long = SYSTEM.format(1) * 4
    talk = [{"role": "system", "content": long}]
    first = of(messages=talk, temperature=1)
    assert len(first) == len(set(first)) > 4 and first == of(seed=3, messages=talk)
    more = of(messages=[*talk, {"role": "user", "content": long}], stream=True)
    assert more[: len(first) - 1] == first[:-1] and len(more) > len(first)
    for other in (of(messages=talk, cache_salt="x"), of(messages=talk, tools=[{"type": "function"}]), of(prompt=long)):
        assert other and not set(first) & set(other)
    assert len(of(prompt=long * 1000)) == 256
    for body in (b"", b"[", b"[]", b'{"prompt": 1}', b'{"prompt": "short"}', b"[" * 200_000, b"\xff"):
        assert prefixes_of(body) == []


class Dead:
    """Handles of replicas of which each dies after what it says."""

    def __init__(self, *said: list[dict]):
        self.said, self.asked = list(said), 0
        self.answer = self

    def options(self, stream: bool) -> "Dead":
        return self

    def remote(self, *request) -> "Dead":
        self.asked += 1
        self.now = iter([{"type": "taken"}, *self.said.pop(0)])
        return self

    def __aiter__(self) -> "Dead":
        return self

    async def __anext__(self) -> dict:
        from ray.exceptions import ActorDiedError

        if (message := next(self.now, None)) is None:
            raise ActorDiedError
        return message

    def cancel(self) -> None:
        pass


def test_a_request_that_kills_replicas_is_given_up():
    from lite_llm.server.front import Front

    start = {"type": "http.response.start", "status": 200, "headers": []}
    part = {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True}

    def ask(*said: list[dict]) -> tuple[int, list[dict]]:
        handle, sent = Dead(*said), []

        async def receive() -> dict:
            if not handle.asked:
                return {"type": "http.request", "body": b"{}"}
            await asyncio.sleep(60)

        async def send(message: dict) -> None:
            sent.append(message)

        scope = dict.fromkeys(("http_version", "scheme", "query_string"), "")
        scope |= {"type": "http", "method": "POST", "path": CHATS, "headers": []}
        asyncio.run(Front(handle, 100)(scope, receive, send))
        return handle.asked, sent

    asked, sent = ask([], [start], [])
    assert asked == 3 and sent[0]["status"] == 500 and b"3 replicas have died" in sent[1]["body"]
    asked, sent = ask([start], [], [start, part | {"more_body": False}])  # dies after its end: nobody notices
    assert asked == 3 and sent == [start, part | {"more_body": False}]
    asked, sent = ask([start, part])
    assert asked == 1 and sent[:2] == [start, part] and b"has died" in sent[2]["body"] and not sent[2].get("more_body")


def test_a_replica_whose_engine_is_lost_ends_its_process(monkeypatch):
    from lite_llm.server import ray
    from tests.server import inside

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    body = json.dumps(dict(messages=CHAT, max_tokens=20)).encode()
    scope = {"type": "http", "method": "POST", "path": CHATS, "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]

    async def use() -> None:
        replica = ray.Replica.__new__(ray.Replica)
        await replica.__init__(None, dict(device="cpu", kv_tokens=512, max_requests=2), (), ServeOptions(), 0)
        taken, start, answer = [message async for message in replica.answer(scope, body, ())]
        assert taken == {"type": "taken"} and start["status"] == 200 and PARIS.encode() in answer["body"]
        await replica.check_health()
        await replica._bridge._llm.ask(inside.lose_device)
        _, start, _ = [message async for message in replica.answer(scope, body, ())]
        assert start["status"] == 500
        with pytest.raises(RuntimeError, match="engine has stopped"):
            await replica.check_health()
        await replica._bridge.close()
        replica._server.workers.shutdown()

    asyncio.run(use())
    assert ended == [1]


def test_wrong_options_and_a_missing_model_are_said_in_one_line(capsys):
    for argv, words in ((["--replicas", "0"], "--replicas: 0"), (["--replicas", "x"], "'x'")):
        with pytest.raises(SystemExit):
            serve.parse(argv, "serve")
        assert words in capsys.readouterr().err
    process = Process("--replicas", "2", "--device", "cpu", "--model", "/nowhere/at/all")
    assert process.end(60) == EnvironmentProblem.exit_code
    assert "replicas did not start: /nowhere/at/all does not exist" in process.log[-1] and len(process.log) == 1


def test_without_ray_the_requirements_are_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lite_llm.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--replicas", "2"]) == EnvironmentProblem.exit_code
    assert "requirements-ray.txt" in capsys.readouterr().err
