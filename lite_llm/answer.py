"""One answer on its way from token ids to text."""

import time
from collections import deque
from collections.abc import Sequence

from lite_llm.engine.engine import Engine
from lite_llm.engine.request import Request
from lite_llm.outputs import Choice, Delta, Output, Timings, Usage
from lite_llm.text import Detokenizer, StopMatcher, Tokenizer


class Answer:
    def __init__(self, name: str, index: int, request: Request, tokenizer: Tokenizer | None):
        self.name, self.index, self.request = name, index, request
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.stops = StopMatcher(request.params.stop)
        self.text: list[str] = []
        self.told = 0  # output tokens already turned into text
        self.finish_reason: str | None = None
        self.news: deque[Delta] | None = None  # for whom others may step in between; kept if it is there

    def advance(self, engine: Engine) -> Delta | None:
        """Turn new tokens into text; None if nothing happened. A stop string ends the request here."""
        request, reason = self.request, self.request.finish_reason
        fresh = request.ids[request.prompt_len + self.told :]
        if self.finish_reason is not None or (not fresh and reason is None):
            return None
        spoken = fresh[:-1] if reason == "stop" else fresh
        logprobs = tuple(request.logprobs[self.told : self.told + len(spoken)]) if request.logprobs else ()
        self.told += len(fresh)
        text = self.stops.add(self._text(spoken, last=reason is not None))
        if self.stops.stopped is not None:
            engine.abort(request, "stop")
            reason = "stop"
        elif reason is not None:
            text += self.stops.finish()
        self.finish_reason = reason
        self.text.append(text)
        delta = Delta(self.name, self.index, text, tuple(fresh), reason, logprobs)
        if self.news is not None:
            self.news.append(delta)
        return delta

    def _text(self, tokens: list[int], last: bool) -> str:
        if self.detokenizer is None:
            return ""
        return self.detokenizer.add(tokens) + (self.detokenizer.finish() if last else "")

    def choice(self) -> Choice:
        request = self.request
        stop: str | int | None = self.stops.stopped
        if stop is None and request.finish_reason == "stop":
            stop = request.ids[-1]
        return Choice(
            self.index, "".join(self.text), tuple(request.output), self.finish_reason or "", stop, request.params.seed,
            tuple(request.logprobs),
        )  # fmt: skip


def output_of(answers: Sequence[Answer]) -> Output:
    """What the answers to one prompt have come to so far."""
    requests = [answer.request for answer in answers]
    first, now = requests[0], time.monotonic()
    latency = (first.first_token or now) - first.arrived
    decoding = (first.ended or now) - first.arrived - latency
    rate = (first.output_len - 1) / decoding if first.output_len > 1 and decoding > 0 else 0.0
    spent = max(request.ended or now for request in requests) - first.arrived
    said = sum(request.output_len for request in requests)
    queued = (first.admitted or first.ended or now) - first.arrived
    return Output(
        id=answers[0].name,
        prompt_ids=tuple(first.ids[: first.prompt_len]),
        choices=tuple(answer.choice() for answer in answers),
        usage=Usage(first.prompt_len, first.prefix_hit, said, sum(request.stood for request in requests)),
        timings=Timings(latency, spent, rate, queued),
        params=first.params,
        prompt_logprobs=tuple(first.prompt_logprobs),
    )
