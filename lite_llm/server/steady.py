"""An LLM as a server steps it: a step that fails ends requests, and only one that no other could do better raises.

Lives where the LLM lives: in the process of the engine (`child.py`), or for tests in the server's own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lite_llm.engine.request import SamplingParams, TokenLogprobs
from lite_llm.errors import EnvironmentProblem
from lite_llm.outputs import InFlight, Output
from lite_llm.prompts import Encoded

if TYPE_CHECKING:
    from lite_llm.llm import LLM

log = logging.getLogger("lite_llm")

_MOST_FAILURES = 8  # steps in a row that may raise

Row = tuple[str, int, str, Sequence[int], str | None, Sequence[TokenLogprobs]]
"""A `Delta` as it is handed on, 0.15 us to send: name, index, text, token ids, finish_reason, logprobs."""


@dataclass
class News:
    """What one step has said."""

    rows: list[Row] = field(default_factory=list)  # of streams all, of other answers those that end them
    outputs: list[Output] = field(default_factory=list)  # of requests that are complete, and forgotten here
    refused: list[tuple[str, Exception]] = field(default_factory=list)  # requests that cannot be answered, and why

    def __bool__(self) -> bool:
        return bool(self.rows or self.outputs or self.refused)


class Steady:
    """Belongs to the thread that steps the LLM."""

    def __init__(self, llm: "LLM"):
        self.llm = llm
        self.max_requests = llm.engine.scheduler.max_requests
        self._open: dict[str, int] = {}  # requests that are not complete: how many of their answers have not ended
        self._whole: set[str] = set()  # of these, those that are not streamed
        self._news = News()
        self._failures = 0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.llm.engine.idle and not self._news

    def add_request(
        self, name: str, prompt: Encoded, params: SamplingParams, salt: str, deadline: float | None, streamed: bool
    ) -> None:
        """Queue a prompt. What is wrong with it is said by the next step, as `refused`."""
        try:
            self.llm.add_request(prompt, params, id=name, salt=salt, deadline=deadline)
        except Exception as error:
            self._news.refused.append((name, error))
            return
        self._open[name] = params.n
        if not streamed:
            self._whole.add(name)

    def forget(self, name: str) -> None:
        """End a request at any moment; one that is complete, or unknown, is left alone."""
        if self._open.pop(name, None) is not None:
            self._whole.discard(name)
            self.llm.forget(name)

    def in_flight(self) -> InFlight:
        return self.llm.in_flight()

    def step(self) -> News:
        """Raises if no other step can do better. A request all of whose answers have ended is forgotten."""
        blamed, whole = True, self._whole
        try:
            deltas = self.llm.step()
            self._failures = 0
        except Exception as error:
            self._check(error)
            deltas = self.llm.unsaid()  # of whoever was in that step; others may hardly notice
            blamed = any(delta.finish_reason == "error" for delta in deltas)
        news, self._news = self._news, News()
        for delta in deltas:
            name, reason = delta.id, delta.finish_reason
            if reason is not None or name not in whole:
                news.rows.append((name, delta.index, delta.text, delta.token_ids, reason, delta.logprobs))
            if reason is not None:
                self._end(name, news)
        if not blamed:  # nobody was made responsible, and the next step may raise for the same reason
            for name in list(self._open):
                news.rows.append((name, 0, "", (), "error", ()))
                self.forget(name)
        return news

    def _end(self, name: str, news: News) -> None:
        """One answer of a request has ended."""
        self._open[name] -= 1
        if not self._open[name]:
            news.outputs.append(self.llm.result(name))
            self.forget(name)

    def _check(self, error: Exception) -> None:
        """Of a step. Raises if no other can do better."""
        log.error("a step failed", exc_info=error)
        self._failures += 1
        if device_is_lost():
            raise EnvironmentProblem(f"the GPU has failed: {error}", "start the server again") from error
        if self._failures > _MOST_FAILURES:
            raise error


def device_is_lost() -> bool:
    """Whether the GPU's context can do nothing any more, as after an illegal address; never on a CPU."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
