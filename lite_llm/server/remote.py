"""The LLM in a process of its own, so that it never waits for HTTP, for tokenizing, or for Python's one running thread.

A message is a function and its arguments, for the other side to call: `RemoteLLM` sends methods of `_Child`, the child
those of `RemoteLLM`. Prompts are read on this side. The child steps while it has work and sends one message a step, of
those that say something. It ends with this process, however that ends.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.config import ModelConfig
from lite_llm.engine.constraint import Grammar
from lite_llm.engine.request import SamplingParams
from lite_llm.engine.warm import Say, counting
from lite_llm.errors import EnvironmentProblem
from lite_llm.llm import LLM
from lite_llm.outputs import InFlight, Output
from lite_llm.prompts import Encoded, Prompt, Reader
from lite_llm.server.link import Link, portable
from lite_llm.server.steady import News, Steady
from lite_llm.text import Tokenizer
from lite_llm.text.fetch import Fetcher, Gone
from lite_llm.text.grammar import GrammarCompiler
from lite_llm.text.grammar_sources import Source

if TYPE_CHECKING:
    from lite_llm.text.images import Decode

log = logging.getLogger("lite_llm")

_BEAT = 1.0  # seconds between two signs of life of a child that has nothing to say
_MOST_UNHEARD = 64 << 20
"""Bytes of answers that this side has not taken: seconds of a thousand streams. Then the child waits, for a server that
stands still for so long has nobody to hand more to."""
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
        status: Say | None = None,
        fetcher: Fetcher | None = None,
        decode: "Decode | None" = None,
        make: Callable[..., LLM] = LLM,
        **options,
    ):
        """As `LLM`, and raises what that would raise. `make`: what is called in the child instead of it."""
        self._hearers = {"say": say, "progress": progress, "status": status}
        self._news, self._answers = News(), []
        self._dead: Exception | None = None
        self.cfg: ModelConfig | None = None
        self.kernels, self.beat = Kernels(), time.monotonic()
        self._start()
        try:
            wanted = tuple(name for name, hearer in self._hearers.items() if hearer)
            self._link.send((make, model, options, wanted, logging.root.level if logging.root.handlers else None))
            Tokenizer.prepare()
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
                code += f"from lite_llm.server import remote\nremote.work({theirs.fileno()})"
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
            self._link.send((_Child.add_request, given))
        else:  # a compiled one cannot be sent
            given = name, prompt, dataclasses.replace(params, grammar=None), salt, deadline, streamed
            self._link.send((_Child.compile, (params.grammar.source, given)))

    def forget(self, name: str) -> None:
        self._link.send((_Child.forget, (name,)))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """As `LLM.grammars`: what is wrong with a grammar is found on this side."""
        return GrammarCompiler(self.tokenizer, self.cfg.vocab, self._eos_ids)

    def in_flight(self) -> InFlight:
        """Waits for the end of the step under way."""
        found, self.kernels.compiled, self.kernels.loaded = self.ask(_Child.seen)
        return found

    def ask(self, question: Callable[["_Child"], Any]) -> Any:
        """What `question`, a function with a name, says of the child. Raises what it raises, or what ends the child."""
        self._link.send((_Child.answer, (question,)))
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
            self._listen(_BEAT)
        news, self._news = self._news, News()
        return news

    # ---- what the child says

    def _listen(self, seconds: float | None) -> None:
        try:
            for function, given in self._link.receive(seconds):
                self.beat = time.monotonic()
                function(self, *given)
        except EOFError:
            self._dead = self._dead or self._ended()

    def _hear(self, hearer: str, *given: Any) -> None:
        self._hearers[hearer](*given)

    def _loaded(self, folder: Path, name: str, cfg: ModelConfig, eos_ids: set[int], max_requests: int) -> None:
        self._folder, self.name, self.cfg, self._eos_ids, self.max_requests = folder, name, cfg, eos_ids, max_requests

    def _tell(self, news: News) -> None:
        self._news += news

    def _answered(self, answer: Any) -> None:
        self._answers.append(answer)

    def _failed(self, error: Exception) -> None:
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


# ---- the child


def work(file: int) -> None:
    """What the child does: load, then step until its server is gone. `file`: the number of its end of the link."""
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    link = Link(socket.socket(fileno=file), _MOST_UNHEARD)
    try:
        with contextlib.suppress(EOFError):
            ((make, model, options, wanted, level),) = link.receive(None)
            if level is not None:
                logging.basicConfig(stream=sys.stderr, level=level, format="%(name)s: %(message)s")
            hearers = {name: _Hearer(link, name) for name in wanted}
            _Child(make(model, **hearers, **options), link).run()
    except Exception as error:
        link.send((RemoteLLM._failed, (portable(error),)))
        while link.unsent:
            link.receive(_BEAT)
        raise SystemExit(1) from None


def _end_with_the_server() -> None:
    """Standard input is a pipe on which nothing is ever said; it closes when the server is gone, even by SIGKILL."""
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os._exit(0)


@dataclass
class _Hearer:
    link: Link
    name: str

    def __call__(self, *given: Any) -> None:
        self.link.send((RemoteLLM._hear, (self.name, *given)))


def _without_grammar(output: Output) -> Output:
    """A compiled one cannot be sent."""
    if output.params.grammar is None:
        return output
    return dataclasses.replace(output, params=dataclasses.replace(output.params, grammar=None))


class _Child(Steady):
    def __init__(self, llm: LLM, link: Link):
        super().__init__(llm)
        self._link = link
        self._compiler = ThreadPoolExecutor(1, "lite_llm-grammar")
        self._compiling: set[str] = set()  # requests that wait for their grammar
        self._compiled: queue.SimpleQueue[tuple[Exception | Grammar, tuple]] = queue.SimpleQueue()

    def run(self) -> None:
        """EOFError when the server is gone."""
        with counting(self.llm.engine.kv.k.device) as self._kernels:
            gc.collect()
            gc.freeze()  # 200,000 objects of torch and transformers, which a collection looks through for 50 ms
            llm, link = self.llm, self._link
            link.send((RemoteLLM._loaded, (llm.folder, llm.name, llm.cfg, llm.eos_ids, self.max_requests)))
            heard = time.monotonic()
            while True:
                for order, given in link.receive(_BEAT if self.idle else 0):
                    order(self, *given)
                self._add_compiled()
                news = News() if self.idle else self.step()
                now = time.monotonic()
                news.refused = [(name, portable(error)) for name, error in news.refused]
                news.outputs = [_without_grammar(output) for output in news.outputs]
                if news or now - heard > _BEAT / 2:
                    link.send((RemoteLLM._tell, (news,)))
                    heard = now

    def compile(self, source: Source, given: tuple) -> None:
        """Add a request with a grammar once that is compiled: it takes up to 0.1 s, and no step shall wait for it."""
        self._compiling.add(given[0])
        self._compiler.submit(self._compile, source, given)

    def forget(self, name: str) -> None:
        self._compiling.discard(name)
        super().forget(name)

    def _compile(self, source: Source, given: tuple) -> None:
        try:
            found = self.llm.grammars.compiled(source)
        except Exception as error:
            found = error
        self._compiled.put((found, given))
        self._link.ring()

    def _add_compiled(self) -> None:
        while not self._compiled.empty():
            found, (name, prompt, params, *rest) = self._compiled.get()
            if name not in self._compiling:  # forgotten meanwhile
                continue
            self._compiling.remove(name)
            if isinstance(found, Exception):
                self._news.refused.append((name, found))
            else:
                self.add_request(name, prompt, dataclasses.replace(params, grammar=found), *rest)

    def seen(self) -> tuple[InFlight, list[str], list[str]]:
        return self.in_flight(), [*self._kernels.compiled], [*self._kernels.loaded]

    def answer(self, question: Callable[["_Child"], Any]) -> None:
        try:
            found = question(self)
        except Exception as error:
            found = portable(error)
        self._link.send((RemoteLLM._answered, (found,)))
