"""The process of the engine: loads a model and steps it while it has work, for `remote.py` on the server's side.

It sends one message a step, of those that say something.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lite_llm.engine.constraint import Grammar
from lite_llm.outputs import Output
from lite_llm.server.link import Link, portable
from lite_llm.server.remote import BEAT
from lite_llm.server.steady import News, Steady
from lite_llm.text import Tokenizer
from lite_llm.text.grammar_sources import Source

if TYPE_CHECKING:
    from lite_llm.llm import LLM

_MOST_UNHEARD = 64 << 20
"""Bytes of answers that the server has not taken: seconds of a thousand streams. Then the child waits, for a server
that stands still for so long has nobody to hand more to."""


def work(file: int) -> None:
    """What the child does: load, then step until its server is gone. `file`: the number of its end of the link."""
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    link = Link(socket.socket(fileno=file), _MOST_UNHEARD)
    try:
        with contextlib.suppress(EOFError):
            ((make, model, options, wanted, level),) = link.receive(None)
            if level is not None:
                logging.basicConfig(stream=sys.stderr, level=level, format="%(name)s: %(message)s")
            Tokenizer.prepare(model)
            from lite_llm.llm import LLM  # torch: here, so that the server hears which package is missing

            hearers = {name: _Hearer(link, name) for name in wanted}
            Child((make or LLM)(model, **hearers, **options), link).run()
    except Exception as error:
        link.send(("failed", (portable(error),)))
        while link.unsent:
            link.receive(BEAT)
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
        self.link.send(("hear", (self.name, *given)))


def _without_grammar(output: Output) -> Output:
    """A compiled one cannot be sent."""
    if output.params.grammar is None:
        return output
    return dataclasses.replace(output, params=dataclasses.replace(output.params, grammar=None))


class Child(Steady):
    def __init__(self, llm: "LLM", link: Link):
        super().__init__(llm)
        self._link = link
        self._compiler = ThreadPoolExecutor(1, "lite_llm-grammar")
        self._compiling: set[str] = set()  # requests that wait for their grammar
        self._compiled: queue.SimpleQueue[tuple[Exception | Grammar, tuple]] = queue.SimpleQueue()

    def run(self) -> None:
        """EOFError when the server is gone."""
        from lite_llm.engine.warm import counting  # torch

        with counting(self.llm.engine.kv.k.device) as self.kernels:
            gc.collect()
            gc.freeze()  # 200,000 objects of torch and transformers, which a collection looks through for 50 ms
            llm, link = self.llm, self._link
            link.send(("loaded", (llm.folder, llm.name, llm.cfg, llm.eos_ids, self.max_requests)))
            heard = time.monotonic()
            while True:
                for order, given in link.receive(BEAT if self.idle else 0):
                    getattr(self, order)(*given)
                self._add_compiled()
                news = News() if self.idle else self.step()
                now = time.monotonic()
                news.refused = [(name, portable(error)) for name, error in news.refused]
                news.outputs = [_without_grammar(output) for output in news.outputs]
                if news or now - heard > BEAT / 2:
                    link.send(("tell", (news,)))
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

    def answer(self, question: Callable[["Child"], Any]) -> None:
        try:
            found = question(self)
        except Exception as error:
            found = portable(error)
        self._link.send(("answered", (found,)))
