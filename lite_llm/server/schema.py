"""What a client may send: OpenAI's fields, some of our own, and what becomes of each: honoured, ignored, refused.

The models say types only; ranges are those of `SamplingParams`. Ignored fields are listed in the response header
`x-ignored-fields`; refused is what would change the answer if it were honoured.
"""

import json
import sys
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError, shown
from lite_llm.server.refusals import Refusal, refusal_of

T = TypeVar("T", bound=BaseModel)

_MOST_BRACKETS = 100_000
"""In a body, those in texts included. A million lists in 5 MB hold up every thread of Python for a second."""

_NO_TOOLS = "only chats take tools"
_NO_FUNCTIONS = "it is the old name of tools and tool_choice; send those"
_NO_GRAMMAR = "it is no name for it here; send response_format or structured_outputs"
_NO_TEMPLATE = "the chat template is the checkpoint's, and requests cannot change it"
REFUSED = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_FUNCTIONS,
    "function_call": _NO_FUNCTIONS,
    **dict.fromkeys(("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice"), _NO_GRAMMAR),
    **dict.fromkeys(("guided_grammar", "regex", "ebnf"), _NO_GRAMMAR),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), _NO_TEMPLATE),
    "audio": "answers are text",
    "modalities": "answers are text",
    "web_search_options": "this server searches nothing",
    "suffix": "the model continues a text and fills no gap in one",
    "best_of": "answers are not ranked; use n",
    "use_beam_search": "there is no beam search",
    "prompt_embeds": "prompts are text or token ids",
}
_MEANS_NOTHING = {  # values that ask for what happens anyway
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
}
_STOPS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
    ]
}
_MESSAGES = {"type": "array", "items": {"type": "object"}, "minItems": 1}
_TOOLS = {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_CHOICE = {
    "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]
}  # fmt: skip
_OBJECT = {"anyOf": [{"type": "object"}, {"type": "null"}]}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Wishes(_Strict):
    """What both kinds of completion take. A field that is null counts as left out."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = Field(None, json_schema_extra=_STOPS)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None  # as vLLM has it: choices say `token_ids`
    timeout: float | None = None  # seconds
    cache_salt: str | None = None  # prefixes are shared only with requests of the same one
    n: int | None = None
    response_format: Any = Field(None, json_schema_extra=_OBJECT)
    structured_outputs: Any = Field(None, json_schema_extra=_OBJECT)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Wishes):
    messages: Any = Field(json_schema_extra=_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = Field(None, json_schema_extra=_TOOLS)
    tool_choice: Any = Field(None, json_schema_extra=_CHOICE)
    parallel_tool_calls: bool | None = None  # false: an answer ends with its first call


class CompletionRequest(Wishes):
    prompt: Any = Field(json_schema_extra=_PROMPTS)
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(_Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Any = Field(None, json_schema_extra=_MESSAGES)
    tools: Any = Field(None, json_schema_extra=_TOOLS)
    add_special_tokens: bool | None = None  # false: no BOS before a prompt


class DetokenizeRequest(_Strict):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = None


def read(kind: type[T], body: bytes) -> T:
    """A request from its JSON. Refusal, naming the field, for anything else."""
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise Refusal(400, f"the body has more than {_MOST_BRACKETS:,} opening brackets")
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        python, digits = "sys.set_int_max_str_digits" in str(error), sys.get_int_max_str_digits()
        reason = f"a number has more than {digits:,} digits" if python else str(error)
        raise Refusal(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise Refusal(400, f"the body is {shown(found)}; expected a JSON object")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        name = str(wrong["loc"][0])
        if wrong["type"] == "missing":
            raise Refusal(400, f"{name} is missing", name) from None
        raise Refusal(400, f"{name}: {wrong['msg']}, not {shown(wrong['input'])}", name) from None


def receipt(request: BaseModel) -> list[str]:
    """The fields that are ignored. Refusal for one that must not be."""
    extra = request.model_extra or {}
    for name, reason in REFUSED.items():
        value = extra.get(name)
        if value not in (None, [], {}, "", False) and value not in _MEANS_NOTHING.get(name, ()):
            raise Refusal(400, f"{name} = {shown(value)}: {reason}", name, "unsupported")
    names = [name for name, value in extra.items() if name not in REFUSED and value is not None]
    if isinstance(request, Wishes) and request.stream_options is not None:
        names += [f"stream_options.{name}" for name in request.stream_options.model_extra or ()]
    return names


def sampling(wishes: Wishes, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """Refusal, naming the field, for a value out of range."""
    names = (
        "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "ignore_eos", "n",
    )  # fmt: skip
    given = {name: getattr(wishes, name) for name in names if getattr(wishes, name) is not None}
    if wishes.top_k == -1:  # as vLLM has it
        given["top_k"] = 0
    if wishes.stop is not None:
        given["stop"] = wishes.stop if isinstance(wishes.stop, str) else _list("stop", wishes.stop)
    if wishes.logit_bias:
        given["logit_bias"] = {_token(name): bias for name, bias in wishes.logit_bias.items()}
    try:
        return SamplingParams(
            **given, max_tokens=max_tokens, logprobs=logprobs, stop_token_ids=tuple(wishes.stop_token_ids or ())
        )
    except UsageError as error:
        raise refusal_of(error) from None


def streaming(wishes: Wishes) -> StreamOptions | None:
    """How to stream; None: not at all."""
    if wishes.stream:
        return wishes.stream_options or StreamOptions()
    if wishes.stream_options is not None:
        raise Refusal(400, "stream_options is only allowed with stream = true", "stream_options")
    return None


def patience(wishes: Wishes, most: float | None) -> float | None:
    """Seconds that a request may take, at most `most`; None: any time."""
    if wishes.timeout is not None and wishes.timeout <= 0:
        raise Refusal(400, f"timeout = {shown(wishes.timeout)}; expected a number of seconds above 0", "timeout")
    return min((limit for limit in (wishes.timeout, most) if limit is not None), default=None)


def chat_sampling(request: ChatRequest) -> SamplingParams:
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    if request.max_tokens not in (None, getattr(request, name)):
        raise Refusal(400, "max_tokens and max_completion_tokens differ; send one of them", "max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise Refusal(400, "top_logprobs is only allowed with logprobs = true", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    try:
        return sampling(request, getattr(request, name), logprobs)
    except Refusal as refusal:
        names = {"max_tokens": name, "logprobs": "top_logprobs"}
        own = names.get(refusal.param, refusal.param)
        raise Refusal(400, refusal.message.replace(str(refusal.param), str(own), 1), own) from None


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a completion: one, or a list of them, as text or as token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return [value]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in value):
            return value
    raise Refusal(400, f"prompt = {shown(value)}; expected a text, token ids, or a list of either", "prompt")


def _list(name: str, value: Any) -> tuple:
    if not isinstance(value, list):
        raise Refusal(400, f"{name} = {shown(value)}; expected a string or a list of strings", name)
    return tuple(value)


def _token(name: str) -> int:
    try:
        return int(name) if len(name) < 20 and name.isascii() else -1
    except ValueError:
        raise Refusal(400, f"logit_bias has {shown(name)}; expected token ids", "logit_bias") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands there twice")
    return table


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
