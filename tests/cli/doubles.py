"""An LLM that recites: the interface of lite_llm.llm.LLM, without a model. One token is one character or `piece`."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import ContextExceeded, UsageError
from lite_llm.outputs import Choice, Delta, Output, Timings, Usage


class FakeLLM:
    """Answers with what `script` makes of the messages; a token is a word of it. `hook(n)` runs in step n."""

    name = "fake/model"
    plan = "a plan"

    def __init__(
        self,
        script: Callable[[Sequence[dict]], str] | str,
        *,
        context: int = 1000,
        delay: float = 0.0,
        hook: Callable[[int], None] = lambda n: None,
        generation_config: dict[str, object] | None = None,
    ):
        self.script, self.delay, self.hook = script, delay, hook
        self.cfg = SimpleNamespace(max_len=context)
        self.generation_config = generation_config or {}
        self.live: dict[str, _Answer] = {}
        self.asked: list[tuple[list[dict], SamplingParams]] = []
        self._names = itertools.count(1)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_) -> None:
        pass

    def open(self, source):
        raise UsageError("fake/model takes text only", "load a vision model, or send no pictures")

    def encode(self, messages) -> list[int]:
        return list(range(sum(len(message["content"].split()) + 2 for message in messages)))

    def add_request(self, messages, params: SamplingParams | None = None) -> str:
        prompt = len(self.encode(messages))
        if prompt >= self.cfg.max_len:
            raise ContextExceeded(f"the prompt has {prompt} tokens; {self.cfg.max_len} fit", "shorten it")
        params = (params or SamplingParams()).resolved(self.generation_config)
        self.asked.append(([dict(message) for message in messages], params))
        text = self.script if isinstance(self.script, str) else self.script(messages)
        name = f"request-{next(self._names)}"
        self.live[name] = _Answer(name, prompt, params, text, self.cfg.max_len)
        return name

    def step(self) -> list[Delta]:
        time.sleep(self.delay)
        deltas = []
        for answer in self.live.values():
            if answer.reason is None:
                self.hook(len(answer.said) + 1)
                deltas.append(answer.advance())
        return deltas

    def abort(self, name: str) -> None:
        if name in self.live and self.live[name].reason is None:
            self.live[name].reason = "abort"

    def finished(self, name: str) -> bool:
        return self.live[name].reason is not None

    def result(self, name: str) -> Output:
        return self.live[name].output()

    def forget(self, name: str) -> None:
        self.live.pop(name, None)


class _Answer:
    def __init__(self, name: str, prompt: int, params: SamplingParams, text: str, context: int):
        self.name, self.prompt, self.params = name, prompt, params
        self.words: Iterator[str] = iter(_words(text))
        self.room = min(context - prompt, params.max_tokens or context)
        self.said: list[str] = []
        self.reason: str | None = None

    def advance(self) -> Delta:
        word = next(self.words, None)
        if word is None:
            self.reason = "stop"
            return Delta(self.name, 0, "", (0,), "stop")
        self.said.append(word)
        if len(self.said) >= self.room:
            self.reason = "length"
        return Delta(self.name, 0, word, (1,), self.reason)

    def output(self) -> Output:
        choice = Choice(0, "".join(self.said), (1,) * len(self.said), self.reason or "", None, self.params.seed)
        usage = Usage(self.prompt, 0, len(self.said))
        return Output(self.name, (0,) * self.prompt, (choice,), usage, Timings(0.01, 0.1, 50.0, 0.0), self.params)


def _words(text: str) -> list[str]:
    pieces = text.split(" ")
    return [piece + (" " if index < len(pieces) - 1 else "") for index, piece in enumerate(pieces)] if text else []
