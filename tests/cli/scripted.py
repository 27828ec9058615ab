"""A server that answers chats with what a test has written down, byte for byte."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = {"data": [{"id": "one"}, {"id": "two", "max_model_len": 512}]}
OK = {"content-type": "text/event-stream"}
GONE = object()
"""A piece of an answer: nothing more until the client has closed the connection."""


def chunk(text: str | None = None, reason: str | None = None, **more) -> bytes:
    delta = {} if text is None else {"content": text}
    return b"data: %s\n\n" % json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]} | more).encode()


def answer(*words: str) -> tuple[int, dict, list[bytes]]:
    return 200, OK, [*(chunk(word) for word in words), chunk(reason="stop"), b"data: [DONE]\n\n"]


def failure(status: int, message: str, code: str | None = None, **headers: str) -> tuple[int, dict, list[bytes]]:
    return status, headers, [json.dumps({"error": {"message": message, "code": code}}).encode()]


class Scripted:
    """`script` is what comes next, first in first out: (status, headers, pieces). `models` comes before what is usual
    for /v1/models; `asked` is what was sent."""

    def __init__(self):
        self.script, self.models, self.asked, self.headers = [], [], [], []
        self.left = threading.Event()  # a client has closed the connection

    def handle(self, handler: BaseHTTPRequestHandler, turn: tuple[int, dict, list]) -> None:
        status, headers, pieces = turn
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for piece in pieces:
                if piece is GONE:
                    handler.connection.settimeout(10)
                    if not handler.connection.recv(1):
                        self.left.set()
                else:
                    handler.wfile.write(piece)
                    handler.wfile.flush()


@contextlib.contextmanager
def scripted() -> Iterator[tuple[Scripted, str]]:
    """The server and its address."""
    state = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/v1/models"
            usual = (200, {}, [json.dumps(MODELS).encode()]) if known else failure(404, "no such path")
            state.headers.append(dict(self.headers))
            state.handle(self, state.models.pop(0) if state.models and known else usual)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/chat/completions":
                return state.handle(self, failure(404, "no such path"))
            state.asked.append(body)
            state.handle(self, state.script.pop(0))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield state, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
