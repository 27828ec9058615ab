"""One answer on its way from token ids to text."""

from collections import deque

from lite_llm.engine.engine import Engine
from lite_llm.engine.request import Request
from lite_llm.outputs import Choice, Delta
from lite_llm.text import Detokenizer, StopMatcher, Tokenizer


class Answer:
    def __init__(self, name: str, index: int, request: Request, tokenizer: Tokenizer | None):
        self.name, self.index, self.request = name, index, request
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.stops = StopMatcher(request.params.stop)
        self.text: list[str] = []
        self.told = 0  # output tokens already turned into text
        self.finish_reason: str | None = None
        self.news: deque[Delta] = deque()

    def advance(self, engine: Engine) -> Delta | None:
        """Turn new tokens into text; None if nothing happened. A stop string ends the request here."""
        request = self.request
        fresh = request.ids[request.prompt_len + self.told :]
        if self.finish_reason is not None or (not fresh and request.finish_reason is None):
            return None
        ended = request.finish_reason is not None
        spoken = fresh[:-1] if ended and request.finish_reason == "stop" and fresh else fresh
        logprobs = tuple(request.logprobs[self.told : self.told + len(spoken)]) if request.logprobs else ()
        self.told += len(fresh)
        text = self.stops.add(self._text(spoken, last=ended))
        if self.stops.stopped is not None:
            engine.abort(request, "stop")
        elif ended:
            text += self.stops.finish()
        self.finish_reason = "stop" if self.stops.stopped is not None else request.finish_reason
        self.text.append(text)
        self.news.append(Delta(self.name, self.index, text, tuple(fresh), self.finish_reason, logprobs))
        return self.news[-1]

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
