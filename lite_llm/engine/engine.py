"""The loop: plan, send, run, land. Token ids in, token ids out.

The GPU never waits for the CPU: a step is launched before the tokens of the one before it are read. They are read when
they land, up to `ahead` steps later; what a request said beyond its end is then dropped.
"""

import contextlib
import functools
import itertools
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lite_llm.batch import KVPool
from lite_llm.config import ModelConfig
from lite_llm.engine import runner
from lite_llm.engine.logprobs import gather, read
from lite_llm.engine.pace import Pace
from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.request import Request
from lite_llm.engine.runner import Piece, Runner, Shape
from lite_llm.engine.scheduler import Plan, Scheduler
from lite_llm.engine.slots import SlotPool
from lite_llm.engine.state import MAX_STOPS, DeviceState, words_of
from lite_llm.engine.vision import Encoder, check_pictures
from lite_llm.errors import UsageError
from lite_llm.ops import warm
from lite_llm.ops.reference.state import NO_TOKEN
from lite_llm.ops.warm import Say


@dataclass
class Flight:
    """A step on its way: whose tokens it brings, and where they will be."""

    places: list[tuple[Request, int]]  # requests that get a token, and its place; those of drafts are behind it
    line: int  # of the ring
    logprobs: Tensor | None  # numbers for `logprobs.read`, a row for each of `places`
    revealed: list[tuple[Request, int, Tensor]]  # of prompts: the same, of the tokens behind a position
    landed: torch.cuda.Event | None  # None: it ran when it was launched

    @property
    def is_here(self) -> bool:
        return self.landed is not None and self.landed.query()


class Engine:
    """Continuous batching over one model and one KV pool. Every client, offline or online, calls `step`."""

    def __init__(
        self,
        model: nn.Module,
        cfg: ModelConfig,
        kv: KVPool,
        *,
        max_requests: int,
        step_tokens: int,
        max_slowdown: float | None = None,
        prefix_cache: bool = True,
        usable_vocab: int | None = None,
        ahead: int = 0,
        graphs: bool = False,
        drafts: int = 0,
    ):
        """`cfg.max_len` is the context: no request grows longer. `usable_vocab`: ids from there on are padding.

        `ahead`: steps that may be under way when another is launched. `graphs`: pad steps to the shapes of
        `runner.shapes`, which `warm` then records. `max_slowdown` holds for these, once they are timed, and on a CPU,
        where steps are timed as they run. `drafts`: most tokens that a step verifies beyond each request's own.
        """
        self.model, self.cfg, self.kv, self.ahead = model, cfg, kv, ahead
        device = kv.k.device
        self.stream = _stream(device) if device.type == "cuda" else None
        if self.stream:
            torch.cuda.synchronize(device)
        slots = SlotPool(kv.k.shape[1])
        prefix = PrefixCache(slots.mark) if prefix_cache else NoPrefix()
        fixed = runner.shapes(max_requests, step_tokens) if graphs else []
        prompts = max(shape.prompts for shape in fixed) if graphs else max_requests
        self.max_slowdown, self.pace = max_slowdown, Pace()
        most, verifying = Shape(max_requests, prompts, step_tokens), runner.verifying(max_requests, drafts)
        with self._on_stream():
            widest = max(shape.requests for shape in (most, *verifying))
            self.state = DeviceState(max_requests, cfg.max_len, cfg.vocab, ahead + 2, device, widest)
            encoder = None
            if cfg.vision is not None:
                encoder = Encoder(model, cfg, most.decodes + most.tokens, device, kv.k.dtype)
            self.runner = Runner(model, kv, self.state, usable_vocab or cfg.vocab, fixed, most, encoder, verifying)
        self.scheduler = Scheduler(
            slots, max_requests, step_tokens, prefix, prompts, self._beside, self.runner.fill, drafts,
            spread=self.runner.large if graphs else None,
        )  # fmt: skip
        self.flights: deque[Flight] = deque()
        self.launched = 0

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running and not self.flights

    @torch.inference_mode()
    def warm(self, say: Say) -> None:
        """Compile every kernel and record every graph, so that no later step does. Without graphs nothing happens."""
        if self.runner.fixed and self.stream:
            with self._on_stream():
                with warm.ahead_of_time(self.kv.k.device, say):
                    self.runner.rehearse()
                self.runner.capture(say, timed=self.max_slowdown is not None)
                self.state.step.fill_(self._line)

    def finish(self) -> None:
        """Wait for the steps under way; their tokens are lost."""
        self.flights.clear()
        if self.stream:
            self.stream.synchronize()

    def add(self, request: Request) -> None:
        """Queue a request. ContextExceeded if it cannot fit; UsageError for token ids that the model does not have, or
        pictures that it does not take."""
        biased = request.params.logit_bias
        for name, ids in (("prompt", request.ids), ("logit_bias", biased), ("stop_token_ids", request.stop_ids)):
            # All at once first: a long prompt would hold up those that are being answered.
            if set(map(type, ids)) <= {int} and (not ids or min(ids) >= 0 and max(ids) < self.cfg.vocab):
                continue
            wrong = next(token for token in ids if type(token) is not int or not 0 <= token < self.cfg.vocab)
            raise UsageError(f"{name} has token id {wrong!r}; expected 0 to {self.cfg.vocab - 1}")
        if not request.ids:
            raise UsageError("the prompt is empty; expected at least one token")
        if len(request.stop_ids) > MAX_STOPS:
            raise UsageError(
                f"stop_token_ids holds {len(request.stop_ids)} with the model's own; expected at most {MAX_STOPS}"
            )
        if request.constraint is not None and len(request.constraint.allowed) != words_of(self.cfg.vocab):
            raise UsageError(
                "the grammar was made for a model with another vocabulary", "make it with this model's LLM"
            )
        check_pictures(self.cfg, request)
        request.max_len = min(request.max_len, self.cfg.max_len)
        self.scheduler.add(request)

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request at once and free its slots; nothing happens if it has ended."""
        self.scheduler.cancel(request, reason)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """End who is past its deadline, launch the next step, if anybody can advance, and land those that are due.

        Returns the requests that got a token or ended.
        """
        news = self.scheduler.expire(time.monotonic())
        plan = self.scheduler.plan()
        if plan:
            try:
                with self._on_stream():
                    self.flights.append(self._launch(plan))
            except BaseException:
                self.scheduler.fail(plan, "error")
                with self._on_stream():  # the device may have counted the step
                    self.state.step.fill_(self._line)
                raise
        if not plan:
            due = max(len(self.flights) - 1, 0)
        elif all(r.constraint is not None for r, _ in plan) or any(r.drafts for r, _ in plan):
            due = 0  # no step could be planned meanwhile, or only one for a part of them
        else:
            due = self.ahead
        while self.flights and (len(self.flights) > due or self.flights[0].is_here):
            flight = self.flights.popleft()
            try:
                news += self._land(flight)
            except BaseException:  # its tokens are lost, and with them the requests that should have got one
                for request, _ in flight.places:
                    self.scheduler.cancel(request, "error")
                raise
        return news

    def _beside(self, decodes: int) -> int:
        """Most tokens of prompts in a step in which so many requests decode."""
        if self.max_slowdown is not None and self.runner.seconds:
            return self.runner.beside(decodes, self.max_slowdown)
        if self.max_slowdown is not None and self.stream is None:
            return self.pace.beside(self.max_slowdown)
        return self.scheduler.step_tokens

    @property
    def _line(self) -> int:
        """Of the ring, where the last step writes; the device counts the same, and so never beyond int32."""
        return self.launched % len(self.state.ring)

    def _on_stream(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def _launch(self, plan: Plan) -> Flight:
        requests = [request for request, _ in plan]
        self.state.edit(requests)
        self.state.allow([request for request, n in plan if request.constraint is not None and n == request.pending])
        rows = [request.row for request in requests if request.decoding and not request.drafts]
        pieces = plan[len(rows) :]
        prompts = [_piece(request, n) for request, n in pieces]
        tokens = sum(n for _, n in pieces)
        samples = 1 + max(len(request.drafts) for request in requests)
        shape = self.runner.fit(len(rows), len(prompts), tokens, samples)
        adjusted = any(request.adjusted for request in requests)
        start = time.perf_counter()
        self.runner.send(shape, rows, prompts)
        self.runner.run(shape, adjusted, reveal=any(request.revealing for request, _ in pieces))
        if self.stream is None and samples == 1:
            self.pace.note(len(rows), tokens, time.perf_counter() - start)
        # Decodes come first in plan and batch; the prompts stand behind the pads of the decodes.
        places = itertools.chain(range(len(rows)), range(shape.decodes, shape.requests, shape.samples))
        sampled = [(r, place) for (r, n), place in zip(plan, places) if n == r.pending]
        logprobs = self._logprobs(sampled) if any(r.params.logprobs is not None for r, _ in sampled) else None
        revealed = self._revealed(pieces)
        landed = torch.cuda.Event() if self.stream else None
        if landed:
            landed.record()
        self.launched += 1
        self.scheduler.launched(plan)
        return Flight(sampled, self._line, logprobs, revealed, landed)

    def _land(self, flight: Flight) -> list[Request]:
        """Read a step's tokens and commit them."""
        if flight.landed:
            flight.landed.synchronize()
        line = self.state.ring[flight.line].tolist()
        requests = [request for request, _ in flight.places]
        tokens = [_own(line, request, place) if request.drafts else [line[place]] for request, place in flight.places]
        running = [request.finish_reason is None for request in requests]
        if flight.logprobs is not None:
            for request, (token, *_), numbers in zip(requests, tokens, flight.logprobs, strict=True):
                if request.finish_reason is None and request.params.logprobs is not None and token >= 0:
                    request.logprobs.append(read(token, numbers, request.params.logprobs))
        for request, first, numbers in flight.revealed:
            for position, row in enumerate(numbers, start=first + 1):
                # One that gave way in the middle of its prompt computes some tokens twice.
                if request.finish_reason is None and position == len(request.prompt_logprobs) + 1:
                    token, most = request.ids[position], request.params.prompt_logprobs
                    request.prompt_logprobs.append(read(token, row, most))
        self.scheduler.commit(requests, tokens)
        return [request for request, was in zip(requests, running, strict=True) if was]

    def _logprobs(self, sampled: list[tuple[Request, int]]) -> Tensor:
        most = max(r.params.logprobs or 0 for r, _ in sampled)
        pieces = {"rows": [r.row for r, _ in sampled], "places": [place for _, place in sampled]}
        t = self.state.upload({name: np.array(piece, dtype=np.int32) for name, piece in pieces.items()})
        return gather(self.runner.raw[t["places"].long()], self.state.last[t["rows"].long()], most)

    def _revealed(self, pieces: Plan) -> list[tuple[Request, int, Tensor]]:
        """What the tokens of prompts in a step tell of those behind them."""
        found, at = [], 0
        for request, n in pieces:
            if request.revealing:
                first, end = request.cached, min(request.cached + n, request.prompt_len - 1)
                ids = np.array(request.ids[first + 1 : end + 1], dtype=np.int32)
                logits = self.runner.revealed[at : at + end - first]
                tokens = self.state.upload({"ids": ids})["ids"]
                found.append((request, first, gather(logits, tokens, request.params.prompt_logprobs)))
            at += n
        return found


def _piece(request: Request, n: int) -> Piece:
    first, end = request.cached, request.cached + n
    parts = request.parts(first, end)
    tokens = request.ids[first:end] + request.drafts  # behind the last token, or there are none
    return Piece(request.row, first, tokens, request.slots[first:end], n == request.pending, parts)


def _own(line: list[int], request: Request, place: int) -> list[int]:
    """The token at `place`, and those of drafts that stood."""
    drafted = line[place + 1 : place + 1 + len(request.drafts)]
    return [line[place], *itertools.takewhile(lambda token: token != NO_TOKEN, drafted)]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a process: libraries keep a workspace for each stream, and our kernels tickets."""
    return torch.cuda.Stream(device)
