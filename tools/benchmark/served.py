"""A server as a side: a process of its own that is asked over HTTP. `Served` starts, asks and ends one, whoever made
it; `Ours` is what `lite_llm serve` runs, and vllm.py has vLLM's.

The server says what it has to say in the worker's log, and is in the worker's process group: it ends with that.
"""

import asyncio
import contextlib
import http.client
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path

import lite_llm
from lite_llm.errors import LiteLLMError
from lite_llm.llm import DEMO
from lite_llm.text import Tokenizer
from lite_llm.weights.hub import Source
from tools.benchmark import streams
from tools.benchmark.sides import ROOT, Opening
from tools.benchmark.work import Run, Work
from tools.make_checkpoint import make_checkpoint

_READY = 580.0  # seconds to load and record graphs; a `Side` waits 600 for its worker
_LOOK = 0.1  # seconds between two looks at whether it is ready
_END = 10.0  # seconds to end
_SLOWDOWN = 2.0  # of `lite_llm serve`, where nothing else is said


class ServerEnded(LiteLLMError):
    """Its process ended by itself; why is in its log."""

    code = "server_ended"


class Served(ABC):
    def __init__(self, opening: Opening, info: dict):
        """`info` is what the record says of this side, beside that it is asked over HTTP."""
        _allow_files()
        self._made = tempfile.TemporaryDirectory()
        self._server: subprocess.Popen | None = None
        try:
            directory = checkpoint(opening, Path(self._made.name) / "model")
            self.vocab = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
            self.special = sorted(Tokenizer.load(directory).special_ids) if opening.model.shape is None else []
            self.info = info | {"note": "asked over HTTP, on one machine"}
            self._port = _free_port()
            self._server = subprocess.Popen(self.command(directory), cwd=ROOT, stdin=subprocess.DEVNULL)
            self._model = self._wait()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def command(self, directory: Path) -> list[str]:
        """What serves the checkpoint at `self._port` of 127.0.0.1, with OpenAI's routes."""

    def compiles(self) -> int | None:
        """Kernels that the server has compiled since it was ready; None where it does not tell."""
        return None

    def warm(self, work: Work) -> None:
        self.run(work)

    def run(self, work: Work, tell: object = None) -> Run:
        """`peak_bytes` is not known: the server has the memory."""
        before = self.compiles()
        try:
            seconds, answers = asyncio.run(streams.answer(self._port, self._model, work))
        except streams.StreamFailed:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its connections close before it is gone
                self._server.wait(1.0)
            self._check()
            raise
        return Run(seconds, answers, None if before is None else self.compiles() - before, None, {})

    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]:
        raise NotImplementedError("a server does not score; transformers does")

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(_END)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._made.cleanup()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. OSError where nobody answers, or not in time."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", path)
            found = connection.getresponse()
            return found.status, found.read()
        except http.client.HTTPException as error:
            raise OSError(f"no answer: {error}") from None
        finally:
            connection.close()

    def _wait(self) -> str:
        """Until the model is served: its name."""
        deadline = time.monotonic() + _READY
        while time.monotonic() < deadline:
            self._check()
            with contextlib.suppress(OSError):
                status, body = self.get("/v1/models")  # neither server has it before the engine is ready
                if status == 200:
                    return json.loads(body)["data"][0]["id"]
            time.sleep(_LOOK)
        raise LiteLLMError(f"its server was not ready after {_READY:g} s")

    def _check(self) -> None:
        code = self._server.poll()
        if code is not None:
            raise ServerEnded(f"its server ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}")


class Ours(Served):
    def __init__(self, opening: Opening):
        limits = {name: value for name, value in asdict(opening.limits).items() if value is not None}
        self._options = limits | {
            "device": opening.device, "dtype": opening.dtype, "prefix_cache": opening.prefix_cache,
            "max_slowdown": _SLOWDOWN,
        }  # fmt: skip
        threads = opening.limits.threads
        super().__init__(
            opening, {"lite_llm": lite_llm.__version__, "threads": threads, "options": dict(self._options)}
        )

    def command(self, directory: Path) -> list[str]:
        told = {"model": str(directory), "port": self._port, "options": self._options}
        return [sys.executable, "-m", "tools.benchmark.serve", json.dumps(told)]

    def compiles(self) -> int:
        status, body = self.get("/metrics")
        lines = [line for line in body.decode().splitlines() if line.startswith("lite_llm_compiles_total{")]
        if status != 200 or not lines:
            raise LiteLLMError(f"/metrics of our own server answered {status} without compiles_total")
        return sum(int(float(line.split()[-1])) for line in lines)


def checkpoint(opening: Opening, out: Path) -> Path:
    """Servers read files, so a shape's random weights are written to `out`: those that the others have."""
    model = opening.model
    if model.shape is None:
        return Source(str(model.path or DEMO)).directory()
    make_checkpoint(model.shape, out, opening.dtype, model.seed, 5 * 10**9, opening.device, all_ids=True)
    return out


def _free_port() -> int:
    """One that nobody has now; somebody may take it before the server does, which then ends and says so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _allow_files() -> None:
    """A connection is an open file, and there is one for each request that waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a system with another limit beside this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
