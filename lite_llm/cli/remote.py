"""A model in a server, with the methods of `LLM` that a chat needs. Answers are read by a thread, so that Ctrl-C ends
one at once, whatever it waits for: the connection, the queue, a token."""

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

from lite_llm.cli import transcript
from lite_llm.cli.client import Client, Exchange, TryLater
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import LiteLLMError, SourceProblem, UsageError
from lite_llm.outputs import Choice, Delta, InFlight, Output, Timings, Usage
from lite_llm.text.images import Picture

T = TypeVar("T")
_BEAT = 0.05  # seconds that a step waits for news at most
_PATIENCE = 600.0  # seconds in all for a server that says "later"
_WISHES = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known of a model that runs elsewhere."""

    max_len: int | None  # tokens of its context; None: its server does not say


@dataclass(frozen=True)
class Receipt:
    """What is known of a picture that goes to a server; as a string, one line for the user."""

    size: tuple[int, int]  # width, height
    png_bytes: int

    def __str__(self) -> str:
        return f"{self.size[0]} x {self.size[1]}, sent as {self.png_bytes / 1e6:.1f} MB of PNG"


class Remote:
    """`generation_config` is None: the defaults are the server's, and it does not tell them."""

    generation_config = None

    def __init__(
        self, client: Client, model: str | None, open_one: Callable[[str], Picture], say: Callable[[str], None]
    ):
        """Waits while the server says "later". `model`: None is the first that it has. `open_one` opens pictures by
        their sources, `say` gets notices.

        LiteLLMError for a server that cannot be used, or does not have the model.
        """
        self._client, self._open, self._say = client, open_one, say
        models = _patiently(client.models, time.sleep, say)
        found = next((one for one in models if model in (None, one["id"])), None)
        if found is None:
            there = ", ".join(one["id"] for one in models[:8]) or "none"
            raise UsageError(f"{client.url} has no model {model or 'at all'}", f"there are: {there}")
        self.name, context = found["id"], found["max_model_len"]
        self.cfg = Facts(context if type(context) is int and context > 0 else None)
        self._counts_as_it_goes = context is not None  # servers that tell it know this option too; OpenAI refuses it
        self._urls: WeakKeyDictionary[Picture, str] = WeakKeyDictionary()
        self._answers: dict[str, _Answer] = {}
        self._names = itertools.count(1)
        self._ignored: set[str] = set()
        told = f", context {context:,} tokens" if self.cfg.max_len else ""
        say(f"{client.url}  model {self.name}{told}")

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_) -> None:
        for name in list(self._answers):
            self.forget(name)

    @property
    def plan(self) -> NoReturn:
        raise UsageError("the model runs in a server: its memory plan and its limits are known only there")

    # ---- answers: see LLM

    def add_request(self, messages: Sequence[transcript.Message], params: SamplingParams) -> str:
        name = f"request-{next(self._names)}"
        self._answers[name] = _Answer(name, self._client, self._document(messages, params), params)
        return name

    def step(self) -> list[Delta]:
        """What came in the next moment. LiteLLMError if an answer has failed."""
        found = []
        for answer in self._answers.values():
            for news in answer.news():
                if isinstance(news, Delta):
                    found.append(news)
                elif isinstance(news, _Ignored):
                    self._tell(news.names)
                else:
                    self._say(news)
        return found

    def finished(self, name: str) -> bool:
        return self._answers[name].over

    def abort(self, name: str) -> None:
        self._answers[name].abort()

    def result(self, name: str) -> Output:
        return self._answers[name].output()

    def forget(self, name: str) -> None:
        if answer := self._answers.pop(name, None):
            answer.abort()

    def _document(self, messages: Sequence[transcript.Message], params: SamplingParams) -> dict[str, Any]:
        neutral = SamplingParams()
        wishes = {name: getattr(params, name) for name in _WISHES if getattr(params, name) != getattr(neutral, name)}
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if self._counts_as_it_goes else {})
        return self._conversation(messages) | wishes | {"stream": True, "stream_options": options}

    def _tell(self, names: set[str]) -> None:
        if fresh := sorted(names - self._ignored):
            self._ignored |= names
            self._say(f"the server ignores: {', '.join(fresh)}")

    # ---- prompts, pictures, the live view: see LLM

    def encode(self, messages: Sequence[transcript.Message]) -> list[int]:
        return self._client.tokens(self._conversation(messages))

    def open(self, source: "str | Picture") -> Picture:
        return source if isinstance(source, Picture) else self._open(source)

    def receipt(self, picture: Picture) -> Receipt:
        return Receipt(picture.size, len(self._url(picture)) * 3 // 4)

    def in_flight(self) -> InFlight:
        return self._client.in_flight()

    def _conversation(self, messages: Sequence[transcript.Message]) -> dict[str, Any]:
        return {"model": self.name, "messages": [transcript.in_openai_form(one, self._url) for one in messages]}

    def _url(self, picture: Picture) -> str:
        if picture not in self._urls:
            self._urls[picture] = transcript.data_url(picture)
        return self._urls[picture]


@dataclass(frozen=True)
class _Ignored:
    """Fields that the server has not honoured."""

    names: set[str]


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Answer:
    """One answer under way. Its thread fills it; everybody else reads it, and may `abort` it."""

    def __init__(self, name: str, client: Client, document: dict[str, Any], params: SamplingParams):
        self._name, self._client, self._params = name, client, params
        self._body = json.dumps(document).encode()
        self._news: queue.SimpleQueue[Delta | _Ignored | str | LiteLLMError] = queue.SimpleQueue()
        self._pieces: list[str] = []
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._queued = time.monotonic()
        self._first = self._last = 0.0  # when text came
        self._exchange: Exchange | None = None
        self._stopped = threading.Event()
        self.over = False
        threading.Thread(target=self._work, name="lite_llm-remote", daemon=True).start()

    def news(self) -> list[Delta | _Ignored | str]:
        """Waits a moment for the first. Raises what ended the answer, if it has failed."""
        found, wait = [], _BEAT
        while True:
            try:
                news = self._news.get(timeout=wait) if wait else self._news.get_nowait()
            except queue.Empty:
                return found
            if isinstance(news, LiteLLMError):
                self.over = True
                raise news
            self.over = self.over or isinstance(news, Delta) and news.finish_reason is not None
            found.append(news)
            wait = 0

    def abort(self) -> None:
        if not self.over:
            self._reason, self.over = "abort", True
            self._stopped.set()
            if self._exchange is not None:
                self._exchange.cancel()

    def output(self) -> Output:
        """What has come so far; tokens are counted by the server, or else by the pieces that it sent."""
        usage, now = self._usage, time.monotonic()
        count = usage.get("completion_tokens", len(self._pieces))
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        spent = self._last - self._first
        choice = Choice(0, "".join(self._pieces), (), self._reason or "", None, self._params.seed or 0)
        return Output(
            id=self._name, prompt_ids=(), choices=(choice,),
            usage=Usage(usage.get("prompt_tokens", 0), cached, count),
            timings=Timings(
                (self._first or now) - self._queued, now - self._queued, (count - 1) / spent if spent > 0 else 0.0, None
            ),
            params=self._params,
        )  # fmt: skip

    # ---- the thread

    def _work(self) -> None:
        try:
            _patiently(self._once, self._pause, self._news.put)
        except LiteLLMError as error:
            self._news.put(error)
        except _Stopped:
            pass
        except (KeyError, IndexError, TypeError, AttributeError):
            self._news.put(SourceProblem(f"{self._client.url} answers something else than was asked for"))

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopped

    def _once(self) -> None:
        self._exchange = self._client.post("/v1/chat/completions", self._body)
        self._pause(0)  # `abort` cancels only what it sees
        reason = None
        try:
            with self._exchange as exchange:
                if names := exchange.send().get("x-ignored-fields"):
                    self._news.put(_Ignored({name.strip() for name in names.split(",")}))
                for event in exchange.events():
                    self._pause(0)
                    self._usage = event.get("usage") or self._usage
                    for choice in event["choices"]:
                        reason = choice.get("finish_reason") or reason
                        self._add(choice["delta"].get("content") or "")
        except LiteLLMError:
            self._pause(0)  # cancelled by `abort`: no error
            raise
        if reason is None:  # the last piece says one
            self._pause(0)
            lost = f"the connection to {self._client.url} was lost in the middle of the answer"
            raise SourceProblem(lost, "ask again")
        self._reason = self._reason or reason
        self._news.put(Delta(self._name, 0, "", (), self._reason))

    def _add(self, text: str) -> None:
        if text:
            self._last = time.monotonic()
            self._first = self._first or self._last
            self._pieces.append(text)
            self._news.put(Delta(self._name, 0, text, ()))


def _patiently(ask: Callable[[], T], pause: Callable[[float], None], say: Callable[[str], None]) -> T:
    """`ask` again as long as the server says "later", and `say` so once for each reason."""
    told: set[str] = set()
    left = _PATIENCE
    while True:
        try:
            return ask()
        except TryLater as later:
            seconds = max(later.seconds, _BEAT)
            if seconds > left:
                raise
            if later.cause not in told:
                told.add(later.cause)
                say(f"{later.message}; asked again every {seconds:g} s until it answers (Ctrl-C stops)")
            left -= seconds
            pause(seconds)
