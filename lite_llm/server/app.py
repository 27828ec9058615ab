"""The routes. Handlers know HTTP and documents; what answers is behind the bridge."""

import base64
import contextlib
import dataclasses
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import lite_llm
from lite_llm.errors import ContextExceeded, shown
from lite_llm.llm import LLM
from lite_llm.prompts import Encoded
from lite_llm.server import constraints, schema, tools
from lite_llm.server.answers import ChatForm, TextForm, Vocabulary
from lite_llm.server.bridge import Bridge
from lite_llm.server.description import ANSWERS, READS, description, refuses, takes
from lite_llm.server.messages import taken
from lite_llm.server.metrics import CONTENT_TYPE, Metrics
from lite_llm.server.refusals import GRAMMAR_STUCK, RETRY_AFTER, Refusal, refusal_of
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.reply import ClientGone, Reply, Task, off_loop, read_body, receipt_header
from lite_llm.text.fetch import Gone
from lite_llm.text.images import take_pictures
from lite_llm.text.tools import heeded

_OPEN = frozenset({"/", "/health", "/health/ready"})  # paths that need no key
_WORKERS = 4
_COMPLETION_TOKENS = 16  # OpenAI's default, for completions only


class Server:
    """What the handlers share. `name`: of the model, for clients."""

    def __init__(
        self, llm: LLM | RemoteLLM, bridge: Bridge, metrics: Metrics, name: str, started: int, most_bytes: int,
        most_seconds: float | None,
    ):  # fmt: skip
        """`started`: seconds since 1970. `most_bytes` of a body, `most_seconds` for an answer; None: any time."""
        self.bridge, self.metrics, self.name = bridge, metrics, name
        self.started, self.most_bytes, self._most_seconds = started, most_bytes, most_seconds
        self.workers = ThreadPoolExecutor(_WORKERS, "lite_llm-reader")
        # Of the LLM only what never changes: its steps belong to the bridge.
        self._prompt, self._tokenizer, self.context = llm.read, llm.tokenizer, llm.cfg.max_len
        self._vocab = llm.cfg.vocab
        self._modalities = ["text"] if llm.cfg.vision is None else ["text", "image"]
        self._vocabulary = Vocabulary(llm.tokenizer)
        self._toolbox = tools.Toolbox(llm.tokenizer)
        self._constraints = constraints.Constraints(llm)
        self._heeded = heeded(llm.tokenizer) if llm.tokenizer is not None else ()

    def read_chat(self, body: bytes, gone: Gone) -> Task:
        """`gone`: whether the client has left."""
        request = schema.read(schema.ChatRequest, body)
        ignored = schema.receipt(request)
        self._check_model(request.model)
        params, stream = schema.chat_sampling(request), schema.streaming(request)
        offered = self._toolbox.offered(request.tools, request.tool_choice)
        wanted = self._constraints.of_chat(request, offered)
        params = dataclasses.replace(params, grammar=wanted.grammar)
        prompt, unread = self._conversation(request.messages, offered, gone)
        ignored += unread + tools.ignored_of(request.tools, request.tool_choice) + constraints.ignored_of(request)
        form = ChatForm(self._vocabulary, self._toolbox.reader(offered, only_one=request.parallel_tool_calls is False))
        patience = schema.patience(request, self._most_seconds)
        fields = _fields("messages", wanted.field)
        salt, ids = request.cache_salt or "", request.return_token_ids is True
        return Task([prompt], params, stream, form, self.name, ignored, salt, patience, fields, ids)

    def read_completion(self, body: bytes, gone: Gone) -> Task:
        request = schema.read(schema.CompletionRequest, body)
        ignored = schema.receipt(request)
        self._check_model(request.model)
        most = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        stream, mute = schema.streaming(request), most == 0 and bool(request.echo)
        if mute and stream:
            raise Refusal(400, "echo without an answer (max_tokens = 0) is not streamed; leave stream out", "stream")
        params = schema.sampling(request, 1 if mute else most, request.logprobs)  # a prompt is scored with an answer
        wanted = self._constraints.of_answer(request)
        params = dataclasses.replace(params, grammar=wanted.grammar)
        ignored += constraints.ignored_of(request)
        if request.echo and request.logprobs is not None:
            if stream:
                raise Refusal(400, "echo with logprobs is not streamed; leave stream, echo or logprobs out", "stream")
            params = dataclasses.replace(params, prompt_logprobs=params.logprobs)
        given = schema.prompts_of(request.prompt)
        if len(given) * params.n > self.bridge.seats:  # said before work is put into each
            asked = f"{len(given):,} prompts with n = {params.n} make {len(given) * params.n:,} answers"
            raise Refusal(400, f"{asked}; at most {self.bridge.seats:,} are taken", "prompt")
        with _about("prompt"):
            prompts = [self._prompt(one, gone=gone) for one in given]
        echo = [""] * len(given)
        if request.echo:
            echo = [one if isinstance(one, str) else self._decode("prompt", one) for one in given]
        form = TextForm(self._vocabulary, [text for text in echo for _ in range(params.n)], mute)
        patience = schema.patience(request, self._most_seconds)
        fields = _fields("prompt", wanted.field)
        salt, ids = request.cache_salt or "", request.return_token_ids is True
        return Task(prompts, params, stream, form, self.name, ignored, salt, patience, fields, ids)

    def tokenize(self, body: bytes) -> tuple[dict[str, Any], list[str]]:
        """The document, and what of the request is ignored."""
        request = schema.read(schema.TokenizeRequest, body)
        ignored = schema.receipt(request)
        self._check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise Refusal(400, "expected one of prompt and messages", "prompt")
        if request.prompt is None:
            prompt, unread = self._conversation(request.messages, self._toolbox.offered(request.tools))
            ignored += unread + tools.ignored_of(request.tools)
            ignored += ["add_special_tokens"] * (request.add_special_tokens is not None)  # the template says which
            tokens = prompt.ids
        else:
            with _about("prompt"):
                tokens = self._prompt(request.prompt).ids
            if request.add_special_tokens is False:
                tokens = self._tokenizer.encode(request.prompt, bos=False)
            ignored += ["tools"] * bool(request.tools)
        return {"count": len(tokens), "max_model_len": self.context, "tokens": tokens}, ignored

    def detokenize(self, body: bytes) -> tuple[dict[str, Any], list[str]]:
        """As `tokenize`."""
        request = schema.read(schema.DetokenizeRequest, body)
        ignored = schema.receipt(request)
        self._check_model(request.model)
        return {"prompt": self._decode("tokens", request.tokens, request.skip_special_tokens is True)}, ignored

    def _conversation(
        self, messages: Any, offered: list[dict[str, Any]], gone: Gone | None = None
    ) -> tuple[Encoded, list[str]]:
        """A prompt, and what of the messages is ignored."""
        messages, ignored = taken(messages, self._heeded)
        with _about("messages"):
            take_pictures(messages, local=False)  # no client names files of this machine
            return self._prompt(tools.name_results(messages) if offered else messages, offered, gone), ignored

    def _decode(self, name: str, tokens: list[int], skip_special: bool = False) -> str:
        for token in tokens:
            if not 0 <= token < self._vocab:
                raise Refusal(400, f"{name} has token id {shown(token)}; expected 0 to {self._vocab - 1}", name)
        if self._tokenizer is None:
            raise Refusal(400, "this model has no tokenizer", name)
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refusal(404, f"there is no model {shown(name)}; this is {self.name}", "model", "model_not_found")

    def model(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.started, "owned_by": "lite_llm",
            "max_model_len": self.context, "input_modalities": self._modalities,
        }  # fmt: skip


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """What is wrong is refused with the place in this field, if it is known, or else with the field."""
    try:
        yield
    except Exception as error:
        refusal = refusal_of(error)
        if refusal.status == 400 and not (refusal.param or "").startswith(field):
            refusal.param = field
        raise refusal from None


def _fields(prompt: str, grammar: str | None) -> dict[str | None, str | None]:
    """Which field is meant where the engine names none, by the code of its refusal; without a code it is the prompt."""
    return {None: prompt, ContextExceeded.code: prompt, GRAMMAR_STUCK: grammar}


def make_app(server: Server, api_key: str | None) -> ASGIApp:
    """`api_key`: what clients must send as a bearer token on every route but health and the page; None: nothing."""
    app = FastAPI(
        title="lite_llm", version=lite_llm.__version__, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,  # it would name the address that the client says it has asked
    )  # fmt: skip
    page = resources.files("lite_llm.server").joinpath("page.html").read_bytes()
    bridge, most = server.bridge, server.most_bytes

    async def document(work: Callable[[bytes], tuple[dict[str, Any], list[str]]], request: Request) -> Response:
        body = await read_body(request.scope, request.receive, most)
        found, ignored = await off_loop(server.workers, work, body)
        return JSONResponse(found, headers=receipt_header(ignored))

    @app.post("/v1/chat/completions", openapi_extra=takes("ChatRequest"), responses=ANSWERS)
    async def chat() -> Reply:
        return Reply(bridge, server.workers, server.metrics, server.read_chat, most)

    @app.post("/v1/completions", openapi_extra=takes("CompletionRequest"), responses=ANSWERS)
    async def completions() -> Reply:
        return Reply(bridge, server.workers, server.metrics, server.read_completion, most)

    @app.post("/v1/embeddings", responses=refuses(400, 401, 503))
    async def embeddings() -> Response:
        raise Refusal(400, "this server generates text; it has no embeddings", code="unsupported")

    @app.get("/v1/models", responses=refuses(401, 503))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}", responses=refuses(401, 404, 503))
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise Refusal(404, f"there is no model {shown(name)}; this is {server.name}", "model", "model_not_found")
        return server.model()

    @app.get("/v1/requests", responses=refuses(401, 503))
    async def requests() -> dict[str, Any]:
        now = await bridge.in_flight()
        requests = [vars(one) for one in now.requests]
        return vars(now) | {"requests": requests, "map": vars(now.map), "model": server.name}

    @app.post("/tokenize", openapi_extra=takes("TokenizeRequest"), responses=READS)
    async def tokenize(request: Request) -> Response:
        return await document(server.tokenize, request)

    @app.post("/detokenize", openapi_extra=takes("DetokenizeRequest"), responses=READS)
    async def detokenize(request: Request) -> Response:
        return await document(server.detokenize, request)

    @app.head("/health", include_in_schema=False)  # load balancers ask so
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses=refuses(503))
    async def ready() -> Response:
        if bridge.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready"}, 503, {"retry-after": str(RETRY_AFTER)})

    @app.get("/metrics", response_class=PlainTextResponse, responses=refuses(401, 503))
    async def metrics() -> Response:
        now = None
        with contextlib.suppress(Refusal):
            now = await bridge.in_flight()
        return Response(server.metrics.text(now, bridge.ready), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": _policy(page)})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return description(app)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return response_of(refusal)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        words = {404: "there is no such path", 405: "this path does not take that method"}
        refusal = Refusal(error.status_code, words.get(error.status_code, "the request cannot be read"))
        response = response_of(refusal)
        response.headers.update(error.headers or {})  # a 405 says which methods there are
        return response

    @app.exception_handler(ClientGone)
    async def left(*_) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return response_of(refusal_of(error))

    all_routes = answering(app, {"/v1/chat/completions": chat, "/v1/completions": completions})
    return guarded(all_routes, api_key) if api_key else all_routes


def answering(app: ASGIApp, replies: Mapping[str, Callable[[], Awaitable[Reply]]]) -> ASGIApp:
    """Requests for answers go past FastAPI, which describes them: its ten layers double what a request costs, and a
    stream that is woken for its next event goes through all of them again. `replies`: its handlers, by path."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        handler = replies.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            return await app(scope, receive, send)
        reply = await handler()
        try:
            await reply(scope, receive, send)
        except Exception as error:
            if reply.begun:
                raise
            await response_of(refusal_of(error))(scope, receive, send)

    return answer


def guarded(app: ASGIApp, key: str) -> ASGIApp:
    """Nothing of a request is read before its key is known."""
    expected = key.encode()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            kind, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
            if not hmac.compare_digest(token.strip(), expected) or kind.lower() != b"bearer":
                refusal = Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
                return await response_of(refusal)(scope, receive, send)
        await app(scope, receive, send)

    return guard


def response_of(refusal: Refusal) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


def _policy(page: bytes) -> str:
    """The page runs its own script and nothing else, whatever a model writes into it."""

    def digest(tag: bytes) -> str:
        inner = page.split(b"<%s>" % tag, 1)[1].split(b"</%s>" % tag, 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(b'script')}; style-src {digest(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
