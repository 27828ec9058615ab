"""Text in, text out: a tokenizer in front of one engine. `generate`, `chat` and `stream` are loops around `step`."""

import gc
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy  # noqa: F401 -- before torch, which warns at length if it is missing
import torch

from lite_llm.answer import Answer, output_of
from lite_llm.config import EngineConfig, HFConfig
from lite_llm.engine.build import Blueprint
from lite_llm.engine.engine import Engine
from lite_llm.engine.memory import MemoryPlan
from lite_llm.engine.request import Request, SamplingParams, each
from lite_llm.engine.warm import Say, Warmth, prepare, warm_up
from lite_llm.errors import BadCheckpoint, UsageError, shown
from lite_llm.jsonfile import read_object
from lite_llm.models import registry, shapes
from lite_llm.outputs import Delta, InFlight, Output
from lite_llm.prompts import Encoded, Message, Prompt, Reader
from lite_llm.text import Tokenizer
from lite_llm.text.fetch import Fetcher, Gone
from lite_llm.text.grammar import GrammarCompiler
from lite_llm.text.images import Picture
from lite_llm.text.processor import Receipt
from lite_llm.weights.files import open_checkpoint
from lite_llm.weights.hub import Source
from lite_llm.weights.loading import load_weights
from lite_llm.weights.random import random_hf_tensors
from lite_llm.weights.rules import load

if TYPE_CHECKING:
    from lite_llm.text.images import Decode
    from lite_llm.text.images import Source as PictureSource

log = logging.getLogger("lite_llm")
DEMO = Path(__file__).parent / "demo" / "chat"


class LLM:
    """A loaded model. As a context manager it frees its memory at the end.

    with LLM("path/or/hub-id") as llm:
        print(llm.chat([{"role": "user", "content": "Hi"}]).text)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        shape: str | None = None,
        random_weights: bool = False,
        seed: int = 0,
        say: Callable[[str], None] = log.info,
        progress: Callable[[int, int], None] | None = None,
        status: Say | None = None,
        fetcher: Fetcher | None = None,
        decode: "Decode | None" = None,
        pictures: bool = False,
        **options,
    ):
        """Plan, load and get ready.

        `model` is a directory in Hugging Face format or a hub id; none at all is the bundled demo. `shape` names a
        known model's sizes instead (see `lite_llm.models.shapes`), with `random_weights` drawn from `seed` and no
        tokenizer. `options` are the fields of `EngineConfig`. `say` gets the memory plan and notices, one line each;
        `progress` gets (bytes loaded, bytes in all), and `status` what is done after loading, how many of it are done
        and how many there are: on a GPU kernels are compiled and CUDA graphs recorded, so that no answer waits for
        either. `fetcher` downloads pictures named by URL; without one URLs are refused. `decode` decodes pictures:
        `Decoders.decode` does it in other processes, which hostile files may end; None: in this one. `pictures` says
        that there will be some: a checkpoint that takes none is refused before its weights are read.
        Raises a LiteLLMError that says what is wrong and what to do.
        """
        config = EngineConfig.of(options)
        if shape is not None:
            if model is not None or not random_weights:
                raise UsageError(f"shape = {shape!r} has no files", "pass random_weights=True and no model")
            facts = shapes.shape_config(shape)
            self._start(HFConfig(facts, config.ignore_config), config, say)
            self.name, self.tokenizer, self.folder = shape, None, None
            self.generation_config: dict[str, object] = {}
            self._reader = Reader(shape, self.cfg)
            rules = registry.find(self.cfg.architecture)[0].RULES
            tensors = random_hf_tensors(facts, seed, self._blueprint.dtype, self._blueprint.device)
            self._ready(lambda net: load(net, rules, tensors), status)
            return
        if random_weights:
            raise UsageError("random_weights needs a shape", "pass shape=..., or leave random_weights out")
        source = Source(str(model or DEMO))
        bundled = Path(source.name).parent == DEMO.parent
        self.name = f"demo/{Path(source.name).name}" if bundled else source.name
        here = source.description()
        hf = HFConfig.load(here, config.ignore_config)
        self._start(hf, config, say)
        self.tokenizer = Tokenizer.load(here)
        if self.tokenizer.notice:
            say(self.tokenizer.notice)
        if self.tokenizer.vocab_size > self.cfg.vocab:
            raise BadCheckpoint(
                f"{here}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.cfg.vocab}",
                "tokenizer and weights belong to different models",
            )
        self.generation_config = _generation_config(here / "generation_config.json")
        self.eos_ids |= self.tokenizer.eos_ids | set(_ids(self.generation_config.get("eos_token_id")))
        for key in ("eos_token_id", "text_config.eos_token_id"):
            self.eos_ids |= set(_ids(hf.get(object, key, None)))
        self.folder = here
        self._reader = Reader.of(here, self.name, self.cfg, self.tokenizer, fetcher, decode)
        if pictures:
            self._reader.check_vision()
        checkpoint = open_checkpoint(source.directory())
        rules = registry.find(self.cfg.architecture)[0].RULES
        self._ready(lambda net: load_weights(net, checkpoint, rules, progress), status)

    def _start(self, hf: HFConfig, config: EngineConfig, say: Callable[[str], None]) -> None:
        self._blueprint = Blueprint(registry.parse(hf), config)
        prepare(self._blueprint.device)
        self.plan, self.cfg = self._blueprint.plan, self._blueprint.cfg
        self.eos_ids: set[int] = set()
        self._streams: dict[str, list[Answer]] = {}
        self._answers: dict[Request, Answer] = {}  # the same
        self._unsaid: list[Delta] = []
        self._names = itertools.count(1)
        say(str(self.plan))

    def _ready(self, fill: Callable[[torch.nn.Module], None], status: Say | None) -> None:
        self.eos_ids = {token for token in self.eos_ids if 0 <= token < self.cfg.vocab}
        self._engine = self._blueprint.build(fill, self.tokenizer.vocab_size if self.tokenizer else None)
        self._engine.warm(status or (lambda *_: None))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's and the pool's memory. Answers in progress are lost; calling it twice is fine."""
        if self._engine is not None:
            self._engine.finish()
        self._engine, self._streams, self._answers = None, {}, {}
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("this LLM is closed", "make another one")
        return self._engine

    # ---- whole answers

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Output | list[Output]:
        """Answer one prompt (an Output) or a list of them (a list, in order), all batched together.

        A prompt is text, taken as it is with the tokenizer's BOS, or token ids. `params` is one for all or one each.
        Those of a list that may say most begin first.
        """
        if not isinstance(prompts, Sequence | Encoded) or isinstance(prompts, bytes):
            raise UsageError(
                f"the prompt is a {type(prompts).__name__}; expected text, token ids, or a list of prompts"
            )
        if isinstance(prompts, str | Encoded) or (prompts and isinstance(prompts[0], int)):
            return self._answer([prompts], [each(params, 1)[0]])[0]
        return self._answer(prompts, each(params, len(prompts)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Output | list[Output]:
        """Answer one conversation (an Output) or a list of them (a list), through the checkpoint's chat template.

        A message's content is a string or a list of parts: {"type": "text", "text": ...}, and for pictures OpenAI's
        {"type": "image_url", "image_url": {"url": ...}} or {"type": "image", "image": what `open` takes}.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise UsageError(
                f"chat takes a list of messages, not a {type(messages).__name__}",
                'pass [{"role": "user", "content": "..."}], or use generate for plain text',
            )
        if not messages or isinstance(messages[0], Mapping):
            return self._answer([messages], [each(params, 1)[0]])[0]
        return self._answer(messages, each(params, len(messages)))

    def _answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Output]:
        """Who may say most goes first: all are waited for, and at the end a step for few answers reads all weights."""
        names, outputs, left = dict[int, str](), dict[str, Output](), set[str]()

        def step() -> None:
            """What has ended is put together, and forgotten, while the next step is computed."""
            for delta in self.step():
                if delta.finish_reason is not None and delta.id in left and self.finished(delta.id):
                    outputs[delta.id] = self.result(delta.id)
                    left.remove(delta.id)
                    self.forget(delta.id)

        try:
            for index in sorted(range(len(prompts)), key=lambda i: -(params[i].max_tokens or math.inf)):
                names[index] = self.add_request(prompts[index], params[index])
                left.add(names[index])
                if self.engine.scheduler.fills_a_step:
                    step()  # while the others are read
            for name in names.values():
                while name in left and not self.finished(name):
                    step()
            return [outputs.get(names[index]) or self.result(names[index]) for index in range(len(prompts))]
        except UsageError:  # of a prompt, when those before it may have begun
            for name in names.values():
                self.abort(name)
            while len(self._streams) == len(left) and not self.engine.idle:
                self.step()
            raise
        finally:
            for name in names.values():
                self.forget(name)

    # ---- as it comes

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer to a prompt or conversation, piece by piece. Leaving the loop early ends the request."""
        name = self.add_request(prompt, params)
        for answer in self._find(name):
            answer.news = deque()
        try:
            while True:  # others may step between two pieces, so what is queued comes first
                while news := next((answer.news for answer in self._find(name) if answer.news), None):
                    yield news.popleft()
                if self.finished(name):
                    return
                self.step()
        finally:
            self.forget(name)

    # ---- the step API

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, id: str | None = None, salt: str = "",
        deadline: float | None = None,
    ) -> str:  # fmt: skip
        """Queue a prompt; returns its id. UsageError for a bad prompt, ContextExceeded for one that is too long.

        Prefixes are shared only with requests of the same `salt`: users who get one each cannot tell by the time that
        an answer takes what others have asked. Answers that are not complete at the `deadline`, a moment of
        `time.monotonic`, end within one step with the reason "timeout"; what they have said stays.
        """
        if deadline is not None and not (type(deadline) in (int, float) and deadline >= 0):
            raise UsageError(f"deadline = {shown(deadline)}; expected a moment, such as time.monotonic() + 5")
        if not isinstance(salt, str):
            raise UsageError(f"salt is a {type(salt).__name__}; expected text")
        asked, params = self.read(prompt), (params or SamplingParams()).resolved(self.generation_config)
        name = id if id is not None else f"request-{next(self._names)}"
        if name in self._streams:
            raise UsageError(f"request id {name!r} is in use", "choose another, or leave it out")
        stops = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_ids)
        limit = self.cfg.max_len if params.max_tokens is None else len(asked.ids) + params.max_tokens
        streams: list[Answer] = []
        try:
            for index in range(params.n):
                own = params.of_answer(index)
                request = Request(list(asked.ids), own, stops, limit, asked.pictures, salt, deadline)
                self.engine.add(request)
                streams.append(Answer(name, index, request, self.tokenizer))
        except UsageError:
            for stream in streams:
                self.engine.abort(stream.request)
            raise
        self._streams[name] = streams
        self._answers |= {stream.request: stream for stream in streams}
        return name

    def step(self) -> list[Delta]:
        """Advance everything that is queued by one step; returns what is new, answers that ended included."""
        try:
            spoken = self.engine.step()
        except BaseException:  # a failed step ends its requests, and their answers must hear of it
            self._hear(list(self._answers))
            raise
        self._hear(spoken)
        return self.unsaid()

    def _hear(self, requests: Iterable[Request]) -> None:
        """Turn what these have got into text."""
        news = [self._answers[request].advance(self.engine) for request in requests]
        self._unsaid += [delta for delta in news if delta is not None]

    def unsaid(self) -> list[Delta]:
        """What a `step` that raised could not return; the next one would."""
        news, self._unsaid = self._unsaid, []
        return news

    def abort(self, id: str) -> None:
        """End a request at any moment; what it has said so far stays in its `result`. Unknown ids are ignored."""
        for stream in self._streams.get(id, ()):
            self.engine.abort(stream.request)
            stream.advance(self.engine)

    def finished(self, id: str) -> bool:
        """Whether all answers to a request have ended. UsageError for an unknown id."""
        return all(stream.finish_reason is not None for stream in self._find(id))

    def result(self, id: str) -> Output:
        """What a request has given so far; complete once it is `finished`."""
        return output_of(self._find(id))

    def forget(self, id: str) -> None:
        """Drop a request, ending it if need be."""
        if self._engine is not None:
            self.abort(id)
        for stream in self._streams.pop(id, ()):
            del self._answers[stream.request]

    def in_flight(self) -> InFlight:
        """Every request that is not forgotten, and the use of the pool, as they are now.

        Costs a few us a request, and 0.3 ms for the map of a pool of a million slots.
        """
        streams = [stream for streams in self._streams.values() for stream in streams]
        return InFlight.of(((stream.name, stream.index, stream.request) for stream in streams), self.engine.scheduler)

    # ---- prompts

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt: text with BOS, a conversation through the chat template, ids as they are."""
        return self._reader.ids(prompt)

    def read(self, prompt: Prompt, tools: Sequence[Mapping[str, object]] = (), gone: Gone | None = None) -> Encoded:
        """A prompt with all work done that needs no engine, its pictures opened and cut to size; from any thread.

        `tools`: what the model is told it may call, in OpenAI's form; for conversations. UsageError if the chat
        template takes none. Once `gone` says that nobody waits any more, no download goes on.
        """
        return self._reader.read(prompt, tools, gone)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Makes what answers must be, for `SamplingParams.grammar`; from any thread."""
        if self.tokenizer is None:
            raise UsageError(f"{self.name} has no tokenizer, without which there are no grammars")
        return GrammarCompiler(self.tokenizer, self.cfg.vocab, self.eos_ids)

    def open(self, source: "PictureSource | Picture") -> Picture:
        """A picture for a message: a path, bytes, a data URL, a PIL image, and where `fetcher` was given, a URL.

        Held by the caller, it is neither decoded nor cut to size again. UsageError for what is no picture.
        """
        return self._reader.open(source)

    def receipt(self, picture: "PictureSource | Picture") -> Receipt:
        """Of what `open` takes: what was sent, what the model sees of it, what that costs; `str` makes a line of it."""
        return self._reader.receipt(self.open(picture), self.plan.kv_token)

    def _find(self, id: str) -> list["Answer"]:
        if id not in self._streams:
            raise UsageError(f"there is no request {id!r}")
        return self._streams[id]


def plan(model: str | Path | None = None, **options) -> MemoryPlan:
    """What `LLM(model, **options)` would take, from the config alone; raises what that would raise."""
    return _blueprint(model, options)[0].plan


def warm(model: str | Path | None = None, *, status: Say | None = None, **options) -> Warmth:
    """Compile what `LLM(model, **options)` will run and leave it in the cache on disk; reads no weights.

    Takes the GPU memory that the model would take, for as long as it runs. `status` is that of `LLM`.
    """
    blueprint, here = _blueprint(model, options)
    return warm_up(blueprint, Tokenizer.load(here).vocab_size, status or (lambda *_: None))


def _blueprint(model: str | Path | None, options: dict[str, object]) -> tuple[Blueprint, Path]:
    config = EngineConfig.of(options)
    here = Source(str(model or DEMO)).description()
    return Blueprint(registry.parse(HFConfig.load(here, config.ignore_config)), config), here


def _generation_config(path: Path) -> dict[str, object]:
    """The checkpoint's defaults for sampling; {} if it has none. BadCheckpoint if they are out of range."""
    defaults = read_object(path) if path.exists() else {}
    try:
        SamplingParams().resolved(defaults)
    except UsageError as error:
        raise BadCheckpoint(f"{path}: {error}", "correct the file") from None
    return defaults


def _ids(value: object) -> list[int]:
    """A token id, a list of them, or nothing, as configs write it."""
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]
