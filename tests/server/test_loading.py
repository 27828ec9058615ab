"""While the model is loaded: what clients hear, how the server takes over, how a failure ends it."""

import http.client
import io
import signal
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from lite_llm.cli import serve
from lite_llm.cli.screen import Screen
from lite_llm.errors import BadCheckpoint
from lite_llm.server.loading import Loading
from lite_llm.server.options import ServeOptions, listen
from tests.server.conftest import CHAT
from tests.server.test_process import Process


def test_clients_hear_how_far_it_is_and_a_failure_is_raised():
    said, heard = io.StringIO(), {}
    screen = Screen(io.StringIO(), said, False, False, False, bars=False)

    @contextmanager
    def load(fetcher, decode, bar):
        port = int(said.getvalue().split()[1])
        url = f"http://127.0.0.1:{port}"
        heard["health"] = httpx.get(url + "/health")
        heard["ready"] = httpx.get(url + "/health/ready")
        heard["start"] = httpx.get(url + "/v1/models")
        bar(1, 4)
        heard["weights"] = httpx.post(url + "/v1/chat/completions", json={"messages": CHAT})
        bar.stage("compiling", 3, 9)
        large = http.client.HTTPConnection("127.0.0.1", port)  # unlike httpx it does not forgive a broken pipe
        large.request("POST", "/v1/completions", b"x" * (8 << 20))
        answer = large.getresponse()
        heard["large"] = httpx.Response(answer.status, headers=answer.headers.items(), content=answer.read())
        raise BadCheckpoint("half a file")
        yield

    with pytest.raises(BadCheckpoint, match="half a file"):
        serve.run(serve.parse(["--port", "0"], "serve"), screen, load)
    assert heard.pop("health").json() == {"status": "ok"}
    assert [one.status_code for one in heard.values()] == [503] * 4
    assert all(one.headers["retry-after"] == "1" and one.headers["connection"] == "close" for one in heard.values())
    assert heard.pop("ready").json() == {"status": "not ready"}
    errors = {name: one.json()["error"] for name, one in heard.items()}
    assert {error["code"] for error in errors.values()} == {"model_loading"}
    assert errors["start"]["message"] == "the model is being loaded"
    assert errors["weights"]["message"] == "the model is being loaded: 25% of its weights are here"
    assert errors["large"]["message"] == "the model is being loaded: compiling, 3 of 9"
    with listen(ServeOptions(port=int(said.getvalue().split()[1]))):  # nobody holds the port any more
        pass


def test_from_the_moment_that_the_address_is_told_nobody_is_refused():
    with listen(ServeOptions(port=0)) as listener, socket.create_connection(listener.getsockname()[:2], timeout=5):
        pass


def test_who_has_connected_and_not_sent_yet_is_answered():
    with listen(ServeOptions(port=0)) as listener:
        address = listener.getsockname()
        with Loading(listener):
            first_answer(f"http://127.0.0.1:{address[1]}")
            slow = socket.create_connection(address)
            time.sleep(0.1)  # it is accepted
            timer = threading.Timer(0.3, slow.sendall, [b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"])
            timer.start()
        with slow:
            slow.settimeout(5)
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 503")
        late = socket.create_connection(address)  # nobody serves, but it is held
        late.settimeout(0.2)
        with late, pytest.raises(TimeoutError):
            late.recv(1)


@pytest.fixture
def starting():
    """A server that was just started, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = Process("--port", str(port))
    yield process, f"http://127.0.0.1:{port}"
    process.child.kill()
    process.end()


def first_answer(url: str) -> httpx.Response:
    end = time.monotonic() + 30
    while True:
        try:
            return httpx.get(url + "/v1/models", timeout=30)
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_server_takes_over_without_losing_a_request(starting):
    process, url = starting
    statuses = [first_answer(url).status_code]
    while statuses[-1] == 503:  # no connection is refused or dropped from now on
        statuses.append(httpx.get(url + "/v1/models", timeout=30).status_code)
    assert statuses[0] == 503 and statuses[-1] == 200
    process.child.send_signal(signal.SIGINT)
    assert process.end() == 0 and "Traceback" not in "".join(process.log)


def test_ctrl_c_while_the_thread_starts_ends_it(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    with listen(ServeOptions(port=0)) as listener:
        loading = Loading(listener)
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt), loading:
            pass
        monkeypatch.undo()
        loading._thread.join(10)
        assert not loading._thread.is_alive()


def test_ctrl_c_while_loading_ends_the_process(starting):
    process, url = starting
    assert first_answer(url).status_code == 503
    process.child.send_signal(signal.SIGINT)
    assert process.end() == 130 and "Traceback" not in "".join(process.log)
