"""lite_llm as a side: its step API, requests added when their time has come."""

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

import lite_llm
from lite_llm import LLM, SamplingParams, UsageError
from lite_llm.cli.flight import FRAME, SHARE
from lite_llm.ops import warm
from tools.benchmark.sides import Arrivals, Meter, Opening
from tools.benchmark.work import Answer, Run, Work

_FORGET = 64
"""Requests that end before any is forgotten: how they went is asked for once, and a step looks at every one."""


class Ours:
    def __init__(self, opening: Opening):
        """UsageError if the variant cannot be called or does not give options."""
        options = {name: value for name, value in asdict(opening.limits).items() if value is not None}
        options |= {"device": opening.device, "dtype": opening.dtype, "prefix_cache": opening.prefix_cache}
        if opening.variant is not None:
            options |= _variant(opening.variant)
        model = opening.model
        made = {"shape": model.shape, "random_weights": True, "seed": model.seed} if model.shape else {}
        self.llm = LLM(model.path, **made, **options)
        self.device, self.vocab = opening.device, self.llm.cfg.vocab
        self.special = sorted(self.llm.tokenizer.special_ids) if self.llm.tokenizer else []
        engine = self.llm.engine
        self.info = {
            "lite_llm": lite_llm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "attention": "lite_llm.ops.triton" if opening.device != "cpu" else "lite_llm.ops.reference",
            "kv_tokens": engine.scheduler.capacity, "context": self.llm.cfg.max_len, "variant": opening.variant,
            "options": options,
        }  # fmt: skip

    def warm(self, work: Work) -> None:
        self.run(work)

    def run(self, work: Work, tell: Callable[[dict], None] | None = None) -> Run:
        kernels = warm.counting() if self.device != "cpu" else contextlib.nullcontext()
        with Meter(self.device) as meter, kernels as counter:
            served = _Served(self.llm, work, _Frames(tell) if tell else None)
            try:
                served.serve()
            finally:
                served.forget(0)
        compiles = meter.compiles + (counter.count if counter else 0)
        return Run(served.seconds, served.answers(), compiles, meter.peak_bytes, served.notes)

    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]:
        raise NotImplementedError("lite_llm does not score; transformers does")

    def close(self) -> None:
        self.llm.close()


def _variant(name: str) -> dict:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"variant = {name!r}; expected module:function, but {error}") from None
    if not isinstance(options := found(), dict):
        raise UsageError(f"variant {name!r} gave a {type(options).__name__}; expected a dict of options")
    return options


@dataclass
class _Flight:
    index: int  # in the work
    sent: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: tuple[float, ...] = ()


class _Frames:
    """Tells the requests in flight as often as they can be seen, and for one part in a hundred of the time at most."""

    def __init__(self, tell: Callable[[dict], None]):
        self.tell, self.due = tell, 0.0

    def update(self, llm: LLM) -> None:
        start = time.perf_counter()
        if start >= self.due:
            self.tell(asdict(llm.in_flight()))
            end = time.perf_counter()
            self.due = max(start + FRAME, end + (end - start) * (1 / SHARE - 1))


class _Served:
    """One run of a work."""

    def __init__(self, llm: LLM, work: Work, frames: "_Frames | None"):
        self.llm, self.work, self.frames = llm, work, frames
        self.running: dict[str, _Flight] = {}  # by the engine's name
        self.ended: dict[str, _Flight] = {}  # and not yet forgotten
        self.done: dict[int, _Flight] = {}
        self.notes = {"preemptions": 0, "cached_tokens": 0, "slots_peak": 0, "steps": 0}
        self.seconds = 0.0

    def serve(self) -> None:
        scheduler = self.llm.engine.scheduler
        arrivals = Arrivals(self.work)
        while arrivals or self.running:
            for index in arrivals.take():
                sent = arrivals.now()
                self.running[self._add(index)] = _Flight(index, sent)
            if not self.running:
                time.sleep(arrivals.wait())
                continue
            deltas = self.llm.step()
            now = arrivals.now()
            self.notes["steps"] += 1
            self.notes["slots_peak"] = max(self.notes["slots_peak"], scheduler.taken)
            for delta in deltas:
                flight = self.running[delta.id]
                flight.tokens += delta.token_ids
                flight.times += [now] * len(delta.token_ids)
                if delta.finish_reason:
                    if delta.finish_reason != "length":
                        raise RuntimeError(f"request {flight.index} ended as {delta.finish_reason!r}, not by length")
                    self.ended[delta.id] = self.running.pop(delta.id)
            if self.frames:
                self.frames.update(self.llm)
            if len(self.ended) >= _FORGET and self.running:
                self.forget(_FORGET)
        self.seconds = arrivals.now()

    def _add(self, index: int) -> str:
        ask, work = self.work.asks[index], self.work
        wish = SamplingParams(
            max_tokens=ask.new, ignore_eos=True, seed=work.seed + index, temperature=work.temperature,
            top_k=work.top_k, top_p=work.top_p, min_p=0.0, repetition_penalty=1.0,
            logprobs=0 if work.logprobs else None,
        )  # fmt: skip
        return self.llm.add_request(list(ask.ids), wish)

    def forget(self, least: int) -> None:
        """Of the requests that ended, if they are so many; after a failure, of all."""
        if len(self.ended) >= least:
            for progress in self.llm.in_flight().requests:
                if progress.id in self.ended:
                    self.notes["preemptions"] += progress.preemptions
                    self.notes["cached_tokens"] += progress.cached
            for name, flight in self.ended.items():
                self.done[flight.index] = flight
                if self.work.logprobs:  # read here, so that works without them do nothing more
                    flight.logprobs = tuple(one.logprob for one in self.llm.result(name).choices[0].logprobs)
                self.llm.forget(name)
            self.ended = {}
        if not least:
            for name in self.running:
                self.llm.forget(name)

    def answers(self) -> tuple[Answer, ...]:
        flights = [self.done[index] for index in range(len(self.work.asks))]
        return tuple(Answer(tuple(f.tokens), f.sent, tuple(f.times), f.times[-1], f.logprobs) for f in flights)
