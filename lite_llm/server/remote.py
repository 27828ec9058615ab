"""The LLM in a process of its own, so that it never waits for HTTP, for tokenizing, or for Python's one running thread.

A message is the name of a method and its arguments, for the other side to call: `RemoteLLM` sends orders to `Child` (in
`child.py`), which answers. Prompts are read on this side. The child ends with this process, however that ends.

Nothing here needs torch, which takes a second to import: the child imports it at the same time as this process does.
"""

import contextlib
import dataclasses
import logging
import signal
import socket
import subprocess
import sys
import time
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
    """What a server needs of an `LLM`, and of `Steady`. `read` may be called by any thread; orders and `step` by one.

    A context manager: at its end the child ends too.
    """

    idle = False  # `step` is also how the child's signs of life are heard

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
        self._news, self._answers = News(), []
        self._dead: Exception | None = None
        self.cfg: ModelConfig | None = None
        self.kernels, self.beat = Kernels(), time.monotonic()
        self._start()
        try:
            wanted = tuple(name for name, hearer in self._hearers.items() if hearer)
            self._link.send((make, model, options, wanted, logging.root.level if logging.root.handlers else None))
            Tokenizer.prepare(model).join()
            while self.cfg is None:
                self._listen(None)
                if self._dead:
                    raise self._dead
            self.tokenizer = Tokenizer.load(self._folder)
            self._reader = Reader.of(self._folder, self.name, self.cfg, self.tokenizer, fetcher, decode)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
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

    # ---- orders

    def add_request(
        self, name: str, prompt: Encoded, params: SamplingParams, salt: str, deadline: float | None, streamed: bool
    ) -> None:
        """As `Steady.add_request`. A moment of `time.monotonic` is the same in all processes of a machine."""
        given = name, prompt, params, salt, deadline, streamed
        if params.grammar is None:
            self._link.send(("add_request", given))
        else:  # a compiled one cannot be sent
            given = name, prompt, dataclasses.replace(params, grammar=None), salt, deadline, streamed
            self._link.send(("compile", (params.grammar.source, given)))

    def forget(self, name: str) -> None:
        self._link.send(("forget", (name,)))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """As `LLM.grammars`: what is wrong with a grammar is found on this side."""
        return GrammarCompiler(self.tokenizer, self.cfg.vocab, self._eos_ids)

    def in_flight(self) -> InFlight:
        """Waits for the end of the step under way."""
        found, self.kernels.compiled, self.kernels.loaded = self.ask(_seen)
        return found

    def ask(self, question: Callable[["Child"], Any]) -> Any:
        """What `question`, a function with a name, says of the child. Raises what it raises, or what ends the child."""
        self._link.send(("answer", (question,)))
        while not self._answers:
            if self._dead:
                raise self._dead
            self._listen(None)
        answer = self._answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ring(self) -> None:
        """From any thread: a `step` that waits returns."""
        self._link.ring()

    def step(self) -> News:
        """What the child has said since the last call; waits for it, but not for longer than `ring` or a second.

        Raises what has ended the child, once all that it said has been returned.
        """
        if not self._news:
            if self._dead:
                raise self._dead
            self._listen(BEAT)
        news, self._news = self._news, News()
        return news

    # ---- what the child says

    def _listen(self, seconds: float | None) -> None:
        try:
            for name, given in self._link.receive(seconds):
                self.beat = time.monotonic()
                getattr(self, name)(*given)
        except EOFError:
            self._dead = self._dead or self._ended()

    def hear(self, hearer: str, *given: Any) -> None:
        self._hearers[hearer](*given)

    def loaded(self, folder: Path, name: str, cfg: ModelConfig, eos_ids: set[int], max_requests: int) -> None:
        self._folder, self.name, self.cfg, self._eos_ids, self.max_requests = folder, name, cfg, eos_ids, max_requests

    def tell(self, news: News) -> None:
        self._news += news

    def answered(self, answer: Any) -> None:
        self._answers.append(answer)

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
