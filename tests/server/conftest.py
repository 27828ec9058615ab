"""A real server on a socket, in a thread of this process; every test must leave its engine idle and its pool whole.

The engine is in a process of its own, as it is for users, but where a test has it do something else than usual.
"""

import asyncio
import contextlib
import random
import string
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import uvicorn

from lite_llm.llm import DEMO, LLM
from lite_llm.server.app import Server, make_app
from lite_llm.server.bridge import Bridge
from lite_llm.server.connections import Connection
from lite_llm.server.metrics import Metrics
from lite_llm.server.options import ServeOptions, listen
from lite_llm.server.remote import Kernels, RemoteLLM
from lite_llm.server.run import name_of
from tests.server.inside import check, counts, idle
from tests.server.stepped import Stepped

COPY = DEMO.parent / "copy"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
SYMBOLS = string.ascii_letters + string.digits + "+-"


class Running:
    """A server and how to reach it."""

    def __init__(
        self, llm: LLM | RemoteLLM, api_key: str | None = None, max_queue=64, max_body=1 << 20, stall=30.0, timeout=None
    ):  # fmt: skip
        self.llm, self.engine = llm, llm if isinstance(llm, RemoteLLM) else Stepped(llm)
        self.bridge = Bridge(self.engine, max_queue, stall)
        self.kernels = llm.kernels if isinstance(llm, RemoteLLM) else Kernels()
        self.server = Server(
            llm, self.bridge, Metrics(self.kernels), name_of(llm.name), 1_800_000_000, max_body, timeout
        )
        self.died = threading.Event()
        self._listener = listen(ServeOptions(port=0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            make_app(self.server, api_key), http=Connection, lifespan="off", ws="none", log_config=None
        )
        self._http = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.bridge.start(self.died.set)
        await self._http.serve(sockets=[self._listener])
        await self.bridge.close()
        self.server.workers.shutdown()

    def __enter__(self) -> "Running":
        self._thread.start()
        self.until(lambda: self._http.started)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self.bridge.end_all)
        self._http.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=30)

    def post(self, path: str, **fields) -> httpx.Response:
        return httpx.post(self.url + path, json=fields, timeout=30)

    def chat(self, **fields) -> httpx.Response:
        return self.post("/v1/chat/completions", **{"messages": CHAT, "max_tokens": 20, **fields})

    @staticmethod
    def until(true, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is left to do; then every slot must have its owner."""
        self.until(lambda: not self.bridge.taken and not self.bridge._jobs and self.inside(idle), seconds)
        self.inside(check)

    def inside(self, question):
        """What a function of `inside.py` says of the engine."""
        return asyncio.run_coroutine_threadsafe(self.engine.ask(question), self._loop).result(10)

    @property
    def running(self) -> int:
        return self.inside(counts)[0]

    @property
    def waiting(self) -> int:
        return self.inside(counts)[1]

    @property
    def made(self) -> int:
        """Tokens so far."""
        return self.inside(counts)[2]


@contextlib.contextmanager
def opened(model=None, kind=LLM, **options) -> Iterator[LLM | RemoteLLM]:
    """In this process, where tests can reach it, or as a `RemoteLLM`."""
    settings = dict(device="cpu", dtype="float32", kv_tokens=4096, max_requests=16, step_tokens=256) | options
    with kind(model, say=lambda text: None, **settings) as llm:
        yield llm


@pytest.fixture(scope="session")
def demo():
    """For servers that a test makes for itself; an LLM has one server at a time, for each steps it."""
    with opened() as llm:
        yield llm


@pytest.fixture(scope="session")
def copier():
    """Repeats the symbols of its prompt: every request carries its own right answer."""
    with opened(COPY, RemoteLLM, kv_tokens=1200, max_requests=32) as llm:
        yield llm


@pytest.fixture(scope="session")
def shared():
    with opened(kind=RemoteLLM) as llm, Running(llm) as running:
        yield running


@pytest.fixture
def server(shared):
    yield shared
    shared.settle()


def riddle(dice: random.Random) -> tuple[str, str]:
    """A prompt for the copy model, and its answer."""
    answer = "".join(dice.sample(SYMBOLS, dice.randint(1, 48)))
    return answer + "<sep>", answer
