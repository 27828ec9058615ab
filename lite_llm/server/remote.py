"""The LLM in a process of its own, so that it never waits for HTTP, for tokenizing, or for Python's one running thread.

A message is the name of a method and its arguments, for the other side to call: `RemoteLLM` sends orders to `Child` (in
`child.py`), which answers. Prompts are read on this side. The child ends with this process, however that ends.

Nothing here needs torch, which takes a second to import: the child imports it at the same time as this process does.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.config import ModelConfig
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import EnvironmentProblem
from lite_llm.outputs import InFlight
from lite_llm.prompts import Encoded, Prompt, Reader
from lite_llm.server.link import Link
from lite_llm.server.steady import News
from lite_llm.text import Tokenizer
from lite_llm.text.fetch import Fetcher, Gone
from lite_llm.text.grammar import GrammarCompiler

if TYPE_CHECKING:
    from lite_llm.engine.warm import Say
    from lite_llm.llm import LLM
    from lite_llm.server.child import Child
    from lite_llm.text.images import Decode

log = logging.getLogger("lite_llm")

BEAT = 1.0  # seconds between two signs of life of a child that has nothing to say
_END = 5.0  # seconds for the child to end


@dataclass
class Kernels:
    """Those that the child compiled, or loaded from the cache on disk, since it was ready; as of the last question."""

    compiled: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


class RemoteLLM:
    """What a server needs of an `LLM`. `read` may be called by any thread, orders by the event loop from `start` on. It
    hears the child too: a thread for that would fight it for Python's lock with every message.

    A context manager: at its end the child ends too.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        say: Callable[[str], None] = log.info,
        progress: Callable[[int, int], None] | None = None,
        status: "Say | None" = None,
        fetcher: Fetcher | None = None,
        decode: "Decode | None" = None,
        make: "Callable[..., LLM] | None" = None,
        **options,
    ):
        """As `LLM`, and raises what that would raise. `make`: what the child calls instead of it."""
        self._hearers = {"say": say, "progress": progress, "status": status}
        self._asked: deque[asyncio.Future] = deque()  # questions without an answer; the child answers in order
        self._dead: Exception | None = None
        self.cfg: ModelConfig | None = None
        self.kernels, self.beat = Kernels(), time.monotonic()
        self._launch()
        try:
            wanted = tuple(name for name, hearer in self._hearers.items() if hearer)
            self._link.send((make, model, options, wanted, logging.root.level if logging.root.handlers else None))
            Tokenizer.prepare(model).join()
            with contextlib.suppress(EOFError):
                while self.cfg is None and not self._dead:
                    self._listen(None)
            if self._dead or self.cfg is None:
                raise self._dead or self._ended()
            self.tokenizer = Tokenizer.load(self._folder)
            self._reader = Reader.of(self._folder, self.name, self.cfg, self.tokenizer, fetcher, decode)
        except BaseException:
            self.close()
            raise

    def _launch(self) -> None:
        # Ctrl-C is for this process alone, and so is a SIGTERM that a supervisor sends to all: running answers finish.
        code = "import signal, sys\nfor one in (signal.SIGINT, signal.SIGTERM): signal.signal(one, signal.SIG_IGN)\n"
        code += f"sys.path[:] = {[*map(str, sys.path)]!r}\n"  # where this process finds its modules
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                code += f"from lite_llm.server import child\nchild.work({theirs.fileno()})"
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise EnvironmentProblem(
                f"no process can be started for the engine ({error.strerror})", "see ulimit -n and ulimit -u"
            ) from None
        self._link = Link(ours)

    def __enter__(self) -> "RemoteLLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the child at once; answers in progress are lost. Calling it twice is fine."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_END)
        except subprocess.TimeoutExpired:  # it hangs
            self.process.kill()
            self.process.wait()
        self._link.close()

    def read(self, prompt: Prompt, tools: Sequence[Mapping[str, object]] = (), gone: Gone | None = None) -> Encoded:
        """As `LLM.read`; the child has no part in it."""
        return self._reader.read(prompt, tools, gone)

    def start(self, told: Callable[[News], None], died: Callable[[Exception], None]) -> None:
        """The running event loop will call `told` with what the child says, and `died` with what has ended it."""
        self._loop, self._told, self._died = asyncio.get_running_loop(), told, died
        self.beat = time.monotonic()
        self._next: asyncio.Handle = self._loop.call_soon(self._hear_child)

    async def stop(self) -> None:
        """Nobody is told of anything any more; `start` may be called again."""
        self._next.cancel()
        self._loop.remove_reader(self._link)
        self._loop.remove_writer(self._link)

    # ---- orders

    def add_request(
        self, name: str, prompt: Encoded, params: SamplingParams, salt: str, deadline: float | None, streamed: bool
    ) -> None:
        """As `Steady.add_request`. A moment of `time.monotonic` is the same in all processes of a machine."""
        given = name, prompt, params, salt, deadline, streamed
        if params.grammar is None:
            self._send(("add_request", given))
        else:  # a compiled one cannot be sent
            given = name, prompt, dataclasses.replace(params, grammar=None), salt, deadline, streamed
            self._send(("compile", (params.grammar.source, given)))

    def forget(self, name: str) -> None:
        self._send(("forget", (name,)))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """As `LLM.grammars`: what is wrong with a grammar is found on this side."""
        return GrammarCompiler(self.tokenizer, self.cfg.vocab, self._eos_ids)

    async def in_flight(self) -> InFlight:
        """Comes with the end of the step under way; never, if the child has died."""
        found, self.kernels.compiled, self.kernels.loaded = await self.ask(_seen)
        return found

    async def ask(self, question: Callable[["Child"], Any]) -> Any:
        """What `question`, a function with a name, says of the child. Raises what it raises."""
        answer = self._loop.create_future()
        self._asked.append(answer)
        self._send(("answer", (question,)))
        return await answer

    def _send(self, message: tuple[str, tuple]) -> None:
        self._link.send(message)
        if self._link.unsent:  # pictures, for one
            self._loop.add_writer(self._link, self._push)

    def _push(self) -> None:
        self._link.push()
        if not self._link.unsent:
            self._loop.remove_writer(self._link)

    # ---- what the child says

    def _hear_child(self) -> None:
        """In the loop, when there is something to read, be it the child's end; and when it has rested."""
        began = time.perf_counter()
        try:
            heard = self._listen(0)
        except EOFError:
            self._loop.remove_reader(self._link)
            # The link is closed before the process is gone, which with a GPU's memory may take seconds.
            ended = self._loop.run_in_executor(None, self._ended)
            ended.add_done_callback(lambda ended: self._died(ended.result()))
            return
        except Exception as error:
            self._dead = error
        if self._dead:
            self._loop.remove_reader(self._link)
            self._died(self._dead)
        elif heard:
            self._loop.remove_reader(self._link)
            self._next = self._loop.call_soon(self._rest, began)  # after all who were told
        else:
            self._loop.add_reader(self._link, self._hear_child)

    def _rest(self, began: float) -> None:
        """The loop hears and hands out for half of its time at most, and meanwhile messages wait, and are handed out
        together. The other half is for requests: an engine with an empty place loses a token with each step until the
        next one is there."""
        self._next = self._loop.call_later(time.perf_counter() - began, self._hear_child)

    def _listen(self, seconds: float | None) -> bool:
        """Whether the child has said anything. EOFError when it has ended, and everything was heard."""
        messages = self._link.receive(seconds)
        for name, given in messages:
            self.beat = time.monotonic()
            getattr(self, name)(*given)
        return bool(messages)

    def hear(self, hearer: str, *given: Any) -> None:
        self._hearers[hearer](*given)

    def loaded(self, folder: Path, name: str, cfg: ModelConfig, eos_ids: set[int], max_requests: int) -> None:
        self._folder, self.name, self.cfg, self._eos_ids, self.max_requests = folder, name, cfg, eos_ids, max_requests

    def tell(self, news: News) -> None:
        if news:
            self._told(news)

    def answered(self, answer: Any) -> None:
        asked = self._asked.popleft()
        if asked.done():
            return  # who asked has given up
        if isinstance(answer, Exception):
            asked.set_exception(answer)
        else:
            asked.set_result(answer)

    def failed(self, error: Exception) -> None:
        self._dead = error

    def _ended(self) -> Exception:
        """Of a child that has ended without a word."""
        try:
            code = self.process.wait(_END)
        except subprocess.TimeoutExpired:
            return EnvironmentProblem("the engine's process has closed its connection", "start the server again")
        known = {-number: number.name for number in signal.Signals}
        hint = "; SIGKILL often means that the machine ran out of memory" if code == -signal.SIGKILL else ""
        return EnvironmentProblem(
            f"the engine's process has ended ({known.get(code, f'exit code {code}')}{hint})", "start the server again"
        )


def _seen(child: "Child") -> tuple[InFlight, list[str], list[str]]:
    return child.in_flight(), [*child.kernels.compiled], [*child.kernels.loaded]
