"""`lite-llm serve` as a process: how it starts, what it refuses, how it ends (SRV-16, SRV-17, FLT-07)."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from lite_llm.cli import main, serve, top_main
from lite_llm.errors import EnvironmentProblem, UsageError
from lite_llm.llm import DEMO
from lite_llm.server.options import ServeOptions, fetcher_from, listen
from lite_llm.server.run import name_of
from tests.server.conftest import CHAT, PARIS
from tests.server.test_connections import LONG

ROOT = Path(__file__).parents[2]


class Process:
    """A server with the demo, on a free port."""

    def __init__(self, *argv: str):
        self.log: list[str] = []
        command = [sys.executable, "-m", "lite_llm", "serve", "--port", "0", *argv]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        self.reader = threading.Thread(target=lambda: self.log.extend(iter(self.child.stderr.readline, "")))
        self.reader.start()

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, "".join(self.log))):
            assert time.monotonic() < end and self.child.poll() is None, self.log
            time.sleep(0.02)
        return found

    @property
    def url(self) -> str:
        return self.wait_for(r"http://[\d.:]+")[0]

    def end(self, seconds: float = 20.0) -> int:
        code = self.child.wait(seconds)
        self.reader.join()
        self.child.stderr.close()
        return code


@pytest.fixture
def processes():
    """Two servers, started side by side."""
    with contextlib.ExitStack() as stack:
        slow = ("--device", "cpu")  # on a GPU the answers would be over before the signals come
        found = [Process(*slow), Process(*slow, "--drain", "1", "--name", "mine", "--api-key", "k")]
        for one in found:
            stack.callback(one.end)
            stack.callback(one.child.kill)
        for one in found:
            assert one.url
        yield found


def test_pictures_are_decoded_in_processes_that_end_with_the_server():
    """IMG-03, with the bundled demo."""
    picture = base64.b64encode((DEMO.parent / "vision" / "picture-1.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}, {"type": "text"}]
    parts[1]["text"] = "What is in the picture?"
    server = Process("--model", str(DEMO.parent / "vision"), "--device", "cpu")
    try:
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
        said = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
        assert "a green heart, a purple ring and a red triangle" in said["content"]
        tasks = Path(f"/proc/{server.child.pid}/task").glob("*/children")
        children = [int(pid) for task in tasks for pid in task.read_text().split()]
        programs = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
        assert sorted((b"decoders.serve" in one, b"child.work" in one) for one in programs) == [(0, 1), (1, 0)]
    finally:
        server.child.terminate()
        assert server.end() == 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert "Ctrl-C stops" in server.log[-1], "nothing is said at the end"


def stream(url: str, tokens: int, **headers) -> tuple[threading.Thread, list[str]]:
    """A long answer that is being read by a thread."""
    lines: list[str] = []

    def read() -> None:
        with httpx.stream(
            "POST",
            url + "/v1/chat/completions",
            headers=headers,
            timeout=60,
            json=LONG | {"stream": True, "max_tokens": tokens},
        ) as response:
            for line in response.iter_lines():
                lines.append(line)

    thread = threading.Thread(target=read)
    thread.start()
    while not lines:
        time.sleep(0.01)
    return thread, lines


def test_sigterm_lets_running_answers_finish_and_others_not_for_ever(processes):
    patient, hasty = processes
    key = {"authorization": "Bearer k"}
    assert httpx.get(hasty.url + "/v1/models", headers=key).json()["data"][0]["id"] == "mine"
    strange = {"host": "evil.example"}  # only the one without a key must mind
    assert httpx.get(patient.url + "/v1/models", headers=strange).status_code == 421
    assert httpx.get(hasty.url + "/v1/models", headers=key | strange).status_code == 200
    reader, lines = stream(patient.url, 400)
    other, cut = stream(hasty.url, 1900, **key)
    pooled = httpx.Client()
    assert pooled.get(patient.url + "/health/ready").status_code == 200
    start = time.monotonic()
    for one in processes:
        one.child.send_signal(signal.SIGTERM)
        one.wait_for("may finish")
    refused = pooled.post(patient.url + "/v1/chat/completions", json={"messages": CHAT})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert pooled.get(patient.url + "/health/ready").status_code == 503
    pooled.close()
    assert hasty.end() == 0 and time.monotonic() - start < 6
    other.join()
    assert json.loads(cut[-2].removeprefix("data: "))["error"]["code"] == "shutting_down" and "data: [DONE]" not in cut
    reader.join()
    assert lines[-2] == "data: [DONE]" and patient.end() == 0
    assert "Traceback" not in "".join(patient.log + hasty.log)


def test_the_second_signal_does_not_wait_and_restarts_are_clean(processes):
    first, idle = processes
    port = int(first.url.rsplit(":")[-1])
    reader, lines = stream(first.url, 1900)
    first.child.send_signal(signal.SIGINT)
    first.wait_for("may finish")
    first.child.send_signal(signal.SIGINT)
    assert first.end() == 130
    reader.join()
    assert "shutting_down" in lines[-2]
    idle.child.send_signal(signal.SIGINT)
    assert idle.end() == 0
    with listen(ServeOptions(port=port)):  # its port is free again
        pass


def test_wrong_options_are_said_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (2, ["--host", "0.0.0.0"], "no API key"), (2, ["--port", "99999"], "--port"), (2, ["--port", "x"], "x"),
            (2, ["--max-queue", "-1"], "'-1'; expected a whole number, 0 or more"),
            (2, ["--api-key", "ü"], "--api-key"), (2, ["--frobnicate"], "frob"),
            (3, ["--port", str(port)], "Address already in use"),
            (3, ["--host", "no.such.host.invalid", "--api-key", "x"], "no.such"),
            (2, ["--fetch-from", "a b"], "a b"), (5, ["--model", "/nowhere/at/all", "--port", "0"], "nowhere"),
        ]  # fmt: skip
        for code, argv, words in cases:
            try:
                found = main(["serve", *argv])
            except SystemExit as left:
                found = left.code
            said = capsys.readouterr().err
            assert found == code and words in said and "Traceback" not in said and len(said.splitlines()) <= 6, said


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(serve.KEY, "hidden")
    assert serve.parse([], "serve").api_key == "hidden"
    assert serve.parse(["--api-key", "given"], "serve").api_key == "given"
    assert serve.parse(["--max-requests", "7"], "serve").engine["max_requests"] == 7
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert ServeOptions(host=host).api_key is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "", "example.org"):
        with pytest.raises(UsageError):
            ServeOptions(host=host)


def test_the_name_of_a_model_is_not_its_place(tmp_path):
    assert name_of("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B" and name_of("demo/chat") == "demo/chat"
    (tmp_path / "Llama-3").mkdir()
    assert name_of(str(tmp_path / "Llama-3")) == "Llama-3" == name_of(f"{tmp_path}/Llama-3/.")


def test_pictures_are_fetched_from_listed_hosts_only():
    assert fetcher_from([]) is None
    fetcher = fetcher_from(["example.org"])
    for url in ("http://example.com/a.png", "http://example.org.evil.com/", "http://127.0.0.1/x", "http://[::1]/"):
        with pytest.raises(UsageError, match="not fetched from"):
            fetcher.fetch(url)


def test_an_address_inside_is_asked_only_if_it_is_listed_itself():
    class Picture(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "image/png")
            self.end_headers()
            self.wfile.write(b"picture")

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Picture) as inside:
        thread = threading.Thread(target=inside.serve_forever)
        thread.start()
        url = f"http://{{}}:{inside.server_port}/a.png"
        assert fetcher_from(["127.0.0.1"]).fetch(url.format("127.0.0.1")) == b"picture"
        assert fetcher_from(["localhost", "127.0.0.1", "[::1]"]).fetch(url.format("localhost")) == b"picture"
        for hosts in (["localhost"], ["localhost", "127.0.0.2"]):
            with pytest.raises(UsageError, match="inside a network.*--fetch-from"):
                fetcher_from(hosts).fetch(url.format("localhost"))
        with pytest.raises(UsageError, match="not fetched from 127.0.0.1"):
            fetcher_from(["127.0.0.2"]).fetch(url.format("127.0.0.1"))
        inside.shutdown()
        thread.join()


def test_top_shows_the_servers_requests(server, capsys):
    assert top_main([server.url, "--once"], "top") == 0
    assert "0 running  0 waiting" in capsys.readouterr().out
    thread, lines = stream(server.url, 150)
    assert top_main([server.url.removeprefix("http://") + "/v1/", "--once"], "top") == 0
    out = capsys.readouterr().out
    assert "1 running" in out and "decoding" in out and "/150" in out
    thread.join()
    assert PARIS.split()[1] in "".join(lines)


def test_top_says_what_is_wrong(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert top_main([f"http://127.0.0.1:{port}", "--once"], "top") == 6
    assert "cannot be asked" in capsys.readouterr().err
    assert top_main(["ftp://x", "--once"], "top") == 2
    assert "no http URL" in capsys.readouterr().err


def test_without_the_web_packages_the_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lite_llm.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == EnvironmentProblem.exit_code
    assert "requirements-serve.txt" in capsys.readouterr().err
