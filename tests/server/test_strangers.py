"""Who needs no key to do harm: slow and endless heads, more connections than files, and other people's web pages."""

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from lite_llm.cli import main
from lite_llm.errors import EnvironmentProblem
from lite_llm.server import connections
from lite_llm.server.options import ServeOptions, listen
from tests.server.conftest import CHAT, PARIS, Running
from tests.server.test_connections import LONG, raw

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx: "
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(demo):
    with pytest.MonkeyPatch.context() as patch, Running(demo) as running:
        patch.setattr(connections, "_HEAD_DEADLINE", 0.3)
        yield running


def closed_after(start: float, connection: socket.socket, dripping: bytes = b"") -> float:
    """Seconds from `start` until the server has closed it, while each 0.05 s a part of something is sent."""
    connection.settimeout(0.05)
    while time.monotonic() - start < 5:
        try:
            if not connection.recv(1 << 16):
                break
        except TimeoutError:
            connection.sendall(dripping)
        except OSError:
            break
    return time.monotonic() - start


@pytest.mark.parametrize("begun, dripping", [(b"", b""), (HEAD, b""), (HEAD, b"x"), (HEALTH + HEAD, b"x")])
def test_a_head_that_does_not_end_ends_the_connection(impatient, begun, dripping):
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", impatient.port)) as slow:
        slow.sendall(begun)
        assert 0.25 < closed_after(start, slow, dripping) < 4
    impatient.settle()


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(impatient):
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", impatient.port)) as slow:
        slow.sendall(b"POST /health HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 405")
        assert 0.25 < closed_after(start, slow, b"x") < 4


def test_who_reads_nothing_is_left(monkeypatch):
    monkeypatch.setattr(connections, "_TAKE_DEADLINE", 0.3)
    heard, taken = [], []

    async def flood(scope, receive, send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):  # more than the kernel holds
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        heard.append((await receive())["type"])

    def ask(port: int) -> float:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as deaf:
            deaf.sendall(HEALTH)
            start = time.monotonic()
            while not heard and time.monotonic() - start < 5:
                time.sleep(0.01)
            spent = time.monotonic() - start
            taken.extend(iter(lambda: len(deaf.recv(1 << 20)), 0))
            return spent

    async def run() -> float:
        config = uvicorn.Config(flood, http=connections.Connection, lifespan="off", ws="none", log_config=None)
        server, listener = uvicorn.Server(config), listen(ServeOptions(port=0))
        listener.listen()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        spent = await asyncio.to_thread(ask, listener.getsockname()[1])
        server.should_exit = True
        await serving
        return spent

    assert 0.25 < asyncio.run(run()) < 4
    assert heard == ["http.disconnect"] and sum(taken) < 60 << 20


def test_whoever_is_answered_has_time(impatient):
    """An answer, and the pause between two requests, may take longer than a head."""
    with raw(impatient, **LONG | {"max_tokens": 1500}) as patient:
        answers, start = patient.makefile("rb"), time.monotonic()
        assert b"200" in answers.readline() and time.monotonic() - start > 0.4
        assert length_read(answers).endswith(b"}")
        time.sleep(0.4)
        patient.sendall(HEALTH)
        assert b"200" in answers.readline()
    impatient.settle()


def test_a_head_has_an_end(impatient, monkeypatch):
    monkeypatch.setattr(connections, "_HEAD_DEADLINE", 60.0)
    with socket.create_connection(("127.0.0.1", impatient.port)) as endless:
        endless.sendall(HEAD)
        start = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(100):
                endless.sendall(b"x" * 10_000)
                time.sleep(0.001)
        assert time.monotonic() - start < 30
    impatient.settle()


def test_heads_and_bodies_that_are_large_but_right_are_taken_one_after_another(impatient):
    head = b"\r\nx: " + b"y" * 30_000
    with socket.create_connection(("127.0.0.1", impatient.port)) as client:
        answers = client.makefile("rb")
        for _ in range(3):  # in two pieces each
            client.sendall(b"GET /health HTTP/1.1\r\nhost: a" + head)
            time.sleep(0.02)
            client.sendall(head + b"\r\n\r\n")
            assert b"200" in answers.readline() and length_read(answers)
        client.sendall(b"POST /health HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        assert b"405" in answers.readline() and length_read(answers)
        client.sendall(b"x" * 200_000)  # nobody reads it
        client.sendall(HEALTH)
        assert b"200" in answers.readline()


def length_read(answers) -> bytes:
    """The rest of an answer."""
    size = 0
    while line := answers.readline().strip():
        if line.startswith(b"content-length: "):
            size = int(line.split()[1])
    return answers.read(size)


@contextlib.contextmanager
def serving(app, loop: str) -> Iterator[tuple[uvicorn.Server, int]]:
    """An app behind our connections, on asyncio's loop or uvloop's, and its port. The system keeps some 400 KB."""
    config = uvicorn.Config(app, http=connections.Connection, lifespan="off", ws="none", log_config=None, loop=loop)
    config.timeout_keep_alive = 1
    http, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield http, listener.getsockname()[1]
    finally:
        http.should_exit = http.force_exit = True
        thread.join()
        listener.close()


async def bytes_of(scope, receive, send) -> None:
    """/whole/N: N bytes at once. /pieces/N: the last one when the others are taken. /broken/N: without the last one."""
    _, how, size = scope["path"].split("/")
    sizes = [int(size)] if how == "whole" else [int(size) - 1, 1]
    head = [(b"content-length", size.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    for i, size in enumerate(sizes[: 1 if how == "broken" else 2], 1):
        await send({"type": "http.response.body", "body": bytes(size), "more_body": i < len(sizes)})


def asking(port: int, path: str) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    return client


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how, sizes", [
    ("whole", [900_000]), ("pieces", [900_000]), ("broken", [900_000]),
    ("whole", range(300_000, 600_000, 30_000)),  # so that of some a little is left, which counts as sent
])  # fmt: skip
def test_an_answer_that_nobody_takes_is_not_kept(loop, how, sizes, monkeypatch):
    monkeypatch.setattr(connections, "_TAKE_DEADLINE", 0.2)
    with serving(bytes_of, loop) as (http, port), contextlib.ExitStack() as clients:
        for size in sizes:
            clients.enter_context(asking(port, f"/{how}/{size}"))
        Running.until(lambda: len(http.server_state.connections) == len(sizes))
        Running.until(lambda: not http.server_state.connections, 5.0)


@pytest.mark.parametrize("loop, path", [("asyncio", "/pieces/700000"), ("uvloop", "/whole/700000")])
def test_an_answer_that_is_taken_slowly_is_sent_whole(loop, path, monkeypatch):
    """The system asks for more only when a third of what it keeps is gone: later than the deadline."""
    monkeypatch.setattr(connections, "_TAKE_DEADLINE", 0.5)
    with serving(bytes_of, loop) as (_, port), asking(port, path) as slow:
        size = 0
        with contextlib.suppress(ConnectionResetError):
            while size < 700_000 and (part := slow.recv(1 << 14)):
                size += len(part)
                time.sleep(0.08)
        assert size > 700_000, "with its head"


def test_it_is_said_when_no_connection_can_be_taken(monkeypatch, caplog):
    monkeypatch.setattr(connections, "_LOOK", 0.01)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    async def watch() -> None:
        watching = asyncio.ensure_future(connections.watch_files(listener))
        await asyncio.sleep(0.05)
        assert not caplog.records
        for _ in range(2):
            try:
                while True:
                    taken.append(os.dup(listener.fileno()))
            except OSError:
                await asyncio.sleep(0.05)  # several looks
            while taken:
                os.close(taken.pop())
            await asyncio.sleep(0.05)
        watching.cancel()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        resource.setrlimit(resource.RLIMIT_NOFILE, (listener.fileno() + 20, before[1]))
        try:
            asyncio.run(watch())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("connections are refused" in one and "ulimit -n" in one for one in said)


@pytest.mark.parametrize("soft, hard, most, want", [
    (256, 1024, 65_536, 1024), (256, 1024, 700, 700), (800, 1024, 700, 800), (1024, 1024, 65_536, 1024),
])  # fmt: skip
def test_as_many_files_are_allowed_as_may_be(soft, hard, most, want):
    """In a process of its own, which cannot have its hard limit back."""
    program = f"""
import resource
from lite_llm.server import connections
connections._MOST_FILES = {most}
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
connections.allow_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"({want}, {hard})"


def test_serve_asks_for_files_first(capsys):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(512, before[1] - 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            assert main(["serve", "--port", str(busy.getsockname()[1])]) == EnvironmentProblem.exit_code
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "stop the other program" in capsys.readouterr().err


async def status(*hosts: str) -> tuple[int, str]:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode()) for host in hosts]}
    await connections.for_this_machine(app)(scope, None, send)
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent).decode()


def test_without_a_key_only_names_of_this_machine_are_heard():
    mine = ["localhost", "LocalHost:8000", "localhost.:80", "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"]
    for host in mine + ["[::1]"]:
        assert asyncio.run(status(host))[0] == 200, host
    assert asyncio.run(status())[0] == 200, "no browser leaves it out"
    theirs = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1:80",
              "[2001:db8::1]:80", "", ":80", "127.0.0.1@evil.example", "é"]  # fmt: skip
    for hosts in [(host,) for host in theirs] + [("localhost", "evil.example")]:
        code, said = asyncio.run(status(*hosts))
        assert code == 421 and "--api-key" in said and '"wrong_host"' in said, hosts


def test_no_address_is_made_of_a_host_that_the_client_names(server):
    for path in ("/v1/models/", "/health/", "/v1/chat/completions/"):
        answer = httpx.get(server.url + path, headers={"host": "evil.example"})
        assert answer.status_code == 404 and "location" not in answer.headers
    assert server.chat(messages=CHAT).json()["choices"][0]["message"]["content"] == PARIS
