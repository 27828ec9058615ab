"""The opponents of a benchmark, each in a process of its own: `Side` is the client, worker.py the other end.

What a side answers is checked here, so that a figure never comes from too few tokens, or from ids that do not exist.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lite_llm.errors import LiteLLMError, UsageError
from tools.benchmark.work import Run, Work

_Nats = list[list[float]]
ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "lite_llm": "ours:Ours",
    "transformers": "theirs:Eager",
    "transformers-compile": "theirs:Compiled",
    "transformers-cb": "theirs:ContinuousBatching",
    "vllm": "vllm:VLLM",
}
"""Module and class behind each side."""

SERVERS = {"lite_llm": "served:Ours", "vllm": "vllm:Server"}
"""Module and class behind those that are asked over HTTP."""

DTYPES = ("float32", "bfloat16", "float16")
KINDS = {"bug": 1, "usage": 2, "missing": 3, "memory": 4, "model": 5, "source": 6}
"""Why a side gives no figure, and the exit code of that: "missing" cannot run here, "memory" does not fit."""


class SideFailed(LiteLLMError):
    """A side that gave no figure; `kind` is one of KINDS."""

    code = "side_failed"

    def __init__(self, message: str, hint: str = "", kind: str = "bug"):
        super().__init__(message, hint)
        self.kind, self.exit_code = kind, KINDS[kind]


class Missing(Exception):
    """In a worker: this side cannot run here, and why."""


@dataclass(frozen=True)
class Model:
    """A directory or hub id, or a shape with random weights; neither is the bundled demo."""

    path: str | None = None
    shape: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """None leaves a choice to the side."""

    max_requests: int = 64  # that advance together
    context: int | None = None  # longest prompt + answer
    kv_tokens: int | None = None
    step_tokens: int | None = None
    threads: int | None = None  # of the CPU


@dataclass(frozen=True)
class Opening:
    """What a worker is told when it starts."""

    side: str
    model: Model = field(default_factory=Model)
    dtype: str = "float32"
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
    prefix_cache: bool = False
    variant: str | None = None  # of lite_llm: "module:function", called first; gives options of EngineConfig
    http: bool = False  # ask a server of its own, instead of the engine in the worker
    began: float | None = None  # time.monotonic() when the process was started

    def __post_init__(self):
        if self.side not in CLASSES:
            raise UsageError(f"side {self.side!r} is not known; known: {', '.join(CLASSES)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype = {self.dtype!r}; expected {', '.join(DTYPES)}", "all sides must have the same")
        if self.variant is not None and self.side != "lite_llm":
            raise UsageError(f"{self.side} has no variants; variant = {self.variant!r} is for lite_llm")
        if self.http and (self.side not in SERVERS or self.variant is not None):
            what = self.side if self.variant is None else "a variant"
            raise UsageError(f"{what} has no server; asked over HTTP can be {', '.join(SERVERS)}")

    @classmethod
    def from_json(cls, fields: dict) -> "Opening":
        """Fields of `model` and `limits` may be missing. UsageError for one that is not known."""
        try:
            nested = {"model": Model(**fields.get("model", {})), "limits": Limits(**fields.get("limits", {}))}
            return cls(**(fields | nested))
        except TypeError as error:
            raise UsageError(f"a side cannot be opened with {fields}: {error}") from None


class Arrivals:
    """The asks of a work by index, in the order in which they are sent; the clock starts when this is made."""

    def __init__(self, work: Work):
        self._asks = work.asks
        self._left = deque(sorted(range(len(work.asks)), key=lambda index: work.asks[index].at))
        self.start = time.perf_counter()

    def __bool__(self) -> bool:
        """Whether anybody has yet to come."""
        return bool(self._left)

    def now(self) -> float:
        return time.perf_counter() - self.start

    def wait(self) -> float:
        """Seconds until the next one comes; 0 if somebody is due."""
        return max(self._asks[self._left[0]].at - self.now(), 0.0)

    def take(self, most: int | None = None) -> list[int]:
        """Those that have come and were not taken, at most so many."""
        now, taken = self.now(), []
        while self._left and len(taken) != most and self._asks[self._left[0]].at <= now:
            taken.append(self._left.popleft())
        return taken


class Meter:
    """While entered, counts what this process compiles or records, and what it takes of the device's memory.

    Graphs that torch.compile traces and CUDA graphs that anybody records; `compiles` and `peak_bytes` after the end.
    """

    def __init__(self, device: str):
        self._gpu = device != "cpu"
        self.compiles, self.peak_bytes = 0, None

    def __enter__(self) -> "Meter":
        self._traced, self._begin, meter = traced(), torch.cuda.CUDAGraph.capture_begin, self

        def capture_begin(graph, *args, **kwargs):
            meter.compiles += 1
            return meter._begin(graph, *args, **kwargs)

        torch.cuda.CUDAGraph.capture_begin = capture_begin
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_) -> None:
        torch.cuda.CUDAGraph.capture_begin = self._begin
        self.compiles += traced() - self._traced
        if self._gpu:
            self.peak_bytes = torch.cuda.max_memory_allocated()


def traced() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported for this: it takes a second
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def available(device: str = "cpu") -> dict[str, str | None]:
    """Each side, and why it cannot run on this machine; None if it can, as far as one sees without opening it."""
    found: dict[str, str | None] = dict.fromkeys(CLASSES)
    theirs = importlib.util.find_spec("transformers")
    if theirs is None:
        found |= dict.fromkeys([name for name in CLASSES if name.startswith("transformers")], "it is not installed")
    elif not Path(theirs.origin).with_name("generation").joinpath("continuous_batching").is_dir():
        found["transformers-cb"] = "this transformers has no continuous batching; 5.17 has it"
    elif device == "cpu" and importlib.util.find_spec("psutil") is None and _version("transformers") < (5, 23):
        found["transformers-cb"] = "on a CPU this transformers needs psutil, which is not installed"
    if importlib.util.find_spec("vllm") is None:
        found["vllm"] = "it is not installed"
    elif device == "cpu":
        found["vllm"] = "its package for GPUs does not run on a CPU"
    return found


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(package))[:2])


class Side:
    """One opponent, opened and ready. A context manager; at its end nothing of the worker is left.

    A command that fails raises SideFailed, and the worker goes on; one that hangs, or a worker that dies or says what
    is no answer, is ended with all its children first. Timeouts are seconds; None takes the one given here.
    """

    def __init__(self, name: str, *, timeout: float = 600.0, **fields):
        """`fields` are those of `Opening`, or dicts of theirs: model, dtype, device, limits, prefix_cache, variant,
        http."""
        plain = {key: value if isinstance(value, dict) else _plain(value) for key, value in fields.items()}
        model = plain.get("model", {})
        if model.get("path") and Path(model["path"]).expanduser().exists():  # the worker runs in another directory
            plain["model"] = model | {"path": str(Path(model["path"]).expanduser().resolve())}
        opening = Opening.from_json({"side": name, **plain})
        self.name, self.timeout = name, timeout
        self.process = Process(name, [sys.executable, "-m", "tools.benchmark.worker"])
        try:
            found = self._ask({"do": "open", **asdict(opening), "began": self.process.began}, None)
        except BaseException:
            self.process.kill()
            raise
        self.vocab: int = found["vocab"]
        self.special: frozenset[int] = frozenset(found["special"])
        self.ready_s: float = found["ready_s"]
        self.info: dict = found["info"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def warm(self, work: Work, timeout: float | None = None) -> None:
        """Run the work for nothing, so that `run` compiles nothing. To be called just before the runs of this work."""
        self._ask({"do": "warm", "work": work.to_json()}, timeout)

    def run(self, work: Work, timeout: float | None = None, watch: Callable[[dict], None] | None = None) -> Run:
        """`watch` is told what is in flight while it runs (fields of outputs.InFlight), if the side tells that."""
        message = {"do": "run", "work": work.to_json(), "watch": watch is not None}
        found = Run.from_json(self._ask(message, timeout, watch)["run"])
        if wrong := fault(work, found, self.vocab):
            raise SideFailed(f"{self.name}, {work.name}: {wrong}")
        return found

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[_Nats, _Nats]:
        """For pairs of (prompt, answer): how far below the best each token of the answer is, and its logprob."""
        asks = [{"prompt": list(prompt), "answer": list(answer)} for prompt, answer in pairs]
        found = self._ask({"do": "score", "asks": asks}, None)
        return found["gaps"], found["logprobs"]

    def close(self) -> None:
        """Twice is fine."""
        if self.process.alive:
            with contextlib.suppress(SideFailed):
                self._ask({"do": "close"}, 20.0)
        self.process.kill()

    def _ask(self, message: dict, timeout: float | None, watch: Callable[[dict], None] | None = None) -> dict:
        found = self.process.ask(message, self.timeout if timeout is None else timeout, watch)
        if not found["ok"]:
            kind = found.get("kind") if found.get("kind") in KINDS else "bug"
            hint = self.process.last_lines() if kind == "bug" else ""  # the others say all in their message
            raise SideFailed(f"{self.name}: {found.get('error', 'no reason given')}", hint, kind)
        return found


def _plain(value):
    return asdict(value) if isinstance(value, (Model, Limits)) else value


def fault(work: Work, run: Run, vocab: int) -> str | None:
    """What is wrong with an answer to a work, if anything is."""
    if len(run.answers) != len(work.asks):
        return f"{len(run.answers)} answers to {len(work.asks)} requests"
    for index, (ask, answer) in enumerate(zip(work.asks, run.answers, strict=True)):
        times, here = answer.times, f"request {index}"
        if len(answer.tokens) != ask.new:
            return f"{here} has {len(answer.tokens)} tokens; {ask.new} were asked for"
        if foreign := [token for token in answer.tokens if not 0 <= token < vocab]:
            return f"{here} has token id {foreign[0]}; the vocabulary has {vocab}"
        if len(times) not in (0, ask.new):
            return f"{here} has {len(times)} times for {ask.new} tokens"
        if len(answer.logprobs) != ask.new * work.logprobs:
            return f"{here} has {len(answer.logprobs)} log-probabilities; {ask.new * work.logprobs} were asked for"
        if not all(map(math.isfinite, answer.logprobs)):
            return f"{here} has a log-probability that is no number"
        if answer.sent < ask.at:
            return f"{here} was sent at {answer.sent:.4f} s, before {ask.at:g} s"
        known = [answer.sent, *times, answer.ended, run.seconds]
        if any(later < earlier - 1e-3 for earlier, later in zip(known[:-1], known[1:], strict=True)):
            return f"{here}: its times run backwards"
    return None


def _object(line: bytes) -> dict:
    """What a line says; nothing if it is no object."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


class Process:
    """A process that answers each line of JSON with one; what it writes to its stderr is kept for messages."""

    def __init__(self, name: str, command: list[str]):
        self.name, self._rest = name, b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )  # fmt: skip
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def id(self) -> int:
        return self._process.pid

    def ask(self, message: dict, timeout: float, watch: Callable[[dict], None] | None = None) -> dict:
        """The answer, which has "ok"; `watch` gets what was told as "progress" before it. SideFailed, and nothing is
        left of the process, if there is none in time.
        """
        deadline = time.monotonic() + timeout
        try:
            line = self._exchange(json.dumps(message).encode() + b"\n", deadline)
            while "progress" in (found := _object(line)):
                if watch:
                    watch(found["progress"])
                line = self._exchange(b"", deadline)
        except TimeoutError:
            raise self._failed(f"no answer to {message['do']!r} after {timeout:g} s") from None
        except (BrokenPipeError, EOFError):
            raise self._failed(f"its process ended during {message['do']!r} {self._end()}", died=True) from None
        except BaseException:  # an answer that comes later would be taken for that to another question
            self.kill()
            raise
        if "ok" not in found:
            raise self._failed(f"it answered {message['do']!r} with {line[:80]!r}, which is no answer")
        return found

    def last_lines(self, most: int = 20) -> str:
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - 8000, 0))
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return "its log ends with\n" + "\n".join(lines[-most:]) if lines else ""

    def kill(self) -> None:
        """End the process and all its children at once; twice is fine."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: macOS, of a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _failed(self, what: str, died: bool = False) -> SideFailed:
        out_of_memory = died and self._process.returncode == -signal.SIGKILL
        self.kill()
        return SideFailed(f"{self.name}: {what}", self.last_lines(), "memory" if out_of_memory else "bug")

    def _end(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "with its pipe, not by itself"
        if code == -signal.SIGKILL:
            return "by signal 9: somebody killed it, the system perhaps for its memory"
        return f"by signal {-code}" if code < 0 else f"with exit code {code}"

    def _exchange(self, line: bytes, deadline: float) -> bytes:
        left, stdin, stdout = memoryview(line), self._process.stdin, self._process.stdout
        if stdin.closed:
            raise EOFError
        with selectors.DefaultSelector() as ready:
            if left:
                ready.register(stdin, selectors.EVENT_WRITE)
            ready.register(stdout, selectors.EVENT_READ)
            chunks = [self._rest]
            while b"\n" not in chunks[-1]:
                if (wait := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                events = ready.select(min(wait, 0.5))
                if not events and not self.alive:  # a child of its may hold the pipes open
                    raise EOFError
                for key, _ in events:
                    if key.fileobj is stdin:
                        left = left[os.write(stdin.fileno(), left) :]
                        if not left:
                            ready.unregister(stdin)
                    elif chunk := os.read(stdout.fileno(), 1 << 20):
                        chunks.append(chunk)
                    else:
                        raise EOFError
        line, _, self._rest = b"".join(chunks).partition(b"\n")
        return line
