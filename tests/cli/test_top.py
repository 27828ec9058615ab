"""`lite-llm top` on a real terminal: keys that leave it, and what it leaves behind: nothing."""

import dataclasses
import json
import os
import signal
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lite_llm.cli.flight import FlightView
from tests.cli.test_flight import NOW, Engine, Tty, console, shown
from tests.cli.test_terminal import Terminal


@pytest.fixture
def server():
    """Says the same moment again and again."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(dataclasses.asdict(NOW)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        http.socket.close()
        thread.join()


def leave_by(key: str):
    return lambda terminal, server: terminal.send(key)


def leave_by_signal(number: int):
    return lambda terminal, server: os.kill(terminal.process.pid, number)


def lose_the_server(terminal, server) -> None:
    server.shutdown()
    server.socket.close()


@pytest.mark.parametrize("leave, code", [
    (leave_by("q"), 0), (leave_by("\x03"), 130), (leave_by("\x04"), 0), (leave_by_signal(signal.SIGTERM), 143),
    (leave_by_signal(signal.SIGHUP), 129), (lose_the_server, 6),
], ids=["q", "ctrl-c", "ctrl-d", "sigterm", "sighup", "no server"])  # fmt: skip
def test_every_way_out_leaves_the_terminal_as_it_was(server, tmp_path, leave, code):
    with Terminal("-m", "lite_llm", "top", f"http://127.0.0.1:{server.server_port}", home=tmp_path) as terminal:
        before = terminal.modes()
        terminal.wait("request-4.*q or Ctrl-C leaves")
        assert not terminal.modes()[3] & (termios.ECHO | termios.ICANON)
        terminal.send("xyz\r")
        terminal.wait("request-4.*request-4")  # goes on, and shows none of it
        leave(terminal, server)
        assert terminal.exit_code() == code
        assert terminal.modes() == before
        seen = terminal.seen.decode()
        left = Tty(seen).screen()
    assert "xyz" not in seen and "Traceback" not in seen and "\x1b[?25h" in seen, "the cursor is back"
    assert not any("request-" in line or "leaves" in line for line in left), left


def test_after_ctrl_z_keys_are_heard_again(server, tmp_path):
    with Terminal("-m", "lite_llm", "top", f"http://127.0.0.1:{server.server_port}", home=tmp_path) as terminal:
        modes = terminal.modes()
        terminal.wait("leaves")
        os.kill(terminal.process.pid, signal.SIGSTOP)
        termios.tcsetattr(terminal._master, termios.TCSANOW, modes)  # as a shell does
        os.kill(terminal.process.pid, signal.SIGCONT)
        end = time.monotonic() + 5
        while terminal.modes()[3] & termios.ECHO:
            assert time.monotonic() < end, "it echoes"
            time.sleep(0.01)
        terminal.send("q")
        assert terminal.exit_code() == 0 and terminal.modes() == modes


def test_a_hint_has_the_last_line_where_there_is_room():
    def lines(height: int) -> list[str]:
        at, engine = console(80, height), Engine()
        with FlightView(at, engine.clock, "q leaves") as view:
            view.update(engine)
            return at.file.screen()

    assert lines(20)[-1] == "q leaves" and lines(20)[:-1] == shown(Engine(), console(80, 20))
    assert len(lines(10)) <= 9 and lines(10)[-1] == "q leaves" and lines(9)[-1] != "q leaves"
