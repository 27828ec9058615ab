"""An engine in the server's own process, which tests can reach into."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from lite_llm.llm import LLM
from lite_llm.outputs import InFlight
from lite_llm.server.steady import News, Steady


class Stepped:
    """`RemoteLLM`'s names for an LLM that a thread steps."""

    def __init__(self, llm: LLM):
        self._steady = Steady(llm)
        self.max_requests, self.beat = self._steady.max_requests, time.monotonic()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self, told: Callable[[News], None], died: Callable[[Exception], None]) -> None:
        self._loop, self._told, self._died = asyncio.get_running_loop(), told, died
        self._thread.start()

    async def stop(self) -> None:
        self._closing = True
        self._orders.put(lambda: None)
        await asyncio.to_thread(self._thread.join, 5.0)

    def add_request(self, *given: Any) -> None:
        self._orders.put(partial(self._steady.add_request, *given))

    def forget(self, name: str) -> None:
        self._orders.put(partial(self._steady.forget, name))

    async def in_flight(self) -> InFlight:
        return await self.ask(Steady.in_flight)

    async def ask(self, question: Callable[[Steady], Any]) -> Any:
        answer: Future = Future()

        def order() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # who asked has given up
            try:
                answer.set_result(question(self._steady))
            except BaseException as error:
                answer.set_exception(error)

        self._orders.put(order)
        return await asyncio.wrap_future(answer)

    def _work(self) -> None:
        try:
            while not self._closing:
                with contextlib.suppress(queue.Empty):
                    self._orders.get(self._steady.idle, 1.0)()
                    while True:
                        self._orders.get(False)()
                if not self._steady.idle:
                    self._loop.call_soon_threadsafe(self._told, self._steady.step())
                self.beat = time.monotonic()
        except Exception as error:
            self._loop.call_soon_threadsafe(self._died, error)
