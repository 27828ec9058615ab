"""What a client says an answer must be, and the grammar for it: `response_format`, `structured_outputs`, and tools that
must be called. Used by the threads that read requests, for compiling takes its time.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from lite_llm.engine.constraint import Grammar
from lite_llm.errors import EnvironmentProblem, UnsupportedModel, UsageError, shown
from lite_llm.llm import LLM
from lite_llm.server.refusals import Refusal, refusal_of
from lite_llm.server.schema import ChatRequest, Wishes
from lite_llm.text.escape import visible

_ANY_OBJECT = {"type": "object"}
_KINDS = {"json": "json", "regex": "regex", "choice": "choice", "grammar": "lark"}  # of structured_outputs
_IGNORED = "response_format.json_schema.description"


class _Wish(NamedTuple):
    field: str  # that says so
    kind: str  # as `GrammarCompiler.compile` calls it
    value: Any


class Wanted(NamedTuple):
    """What an answer must be, and the field that says so."""

    field: str | None = None
    grammar: Grammar | None = None


class Constraints:
    """What one model's answers can be made to be."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def of_answer(self, request: Wishes) -> Wanted:
        """The grammar that a request asks for. Refusal, naming the field, for what cannot be honoured."""
        wish = _wish(request)
        if wish is None:
            return Wanted()
        return _compiled(wish.field, wish.kind, lambda: self._llm.grammars.compile(**{wish.kind: wish.value}))

    def of_chat(self, request: ChatRequest, offered: list[dict[str, Any]]) -> Wanted:
        """The same, or that of answers which call one of the `offered` tools, if `tool_choice` forces them to."""
        if not offered:
            return self.of_answer(request)
        if wish := _wish(request):
            reason = "with tools an answer may be a call; send tool_choice = 'none', or no tools"
            raise Refusal(400, f"{wish.field}: {reason}", wish.field.split(".")[0], "unsupported")
        choice = request.tool_choice
        if choice in (None, "auto"):
            return Wanted()
        only = None if choice == "required" else choice["function"]["name"]
        several = only is None and request.parallel_tool_calls is not False
        return _compiled("tool_choice", "tools", lambda: self._llm.grammars.calls(offered, only, several))


def ignored_of(request: Wishes) -> list[str]:
    """The fields that nothing is made of, for the receipt."""
    described = isinstance(request.response_format, dict) and request.response_format.get("json_schema")
    return [_IGNORED] if isinstance(described, dict) and described.get("description") else []


def _compiled(field: str, kind: str, make: Callable[[], Grammar]) -> Wanted:
    try:
        return Wanted(field, make())
    except UsageError as error:
        if kind == "tools" and error.message.startswith(kind):
            raise refusal_of(error) from None
        text = str(error)
        text = field + text[len(kind) :] if text.startswith(kind) else f"{field}: {text}"
        raise Refusal(400, visible(text), field) from None
    except (EnvironmentProblem, UnsupportedModel) as error:
        raise Refusal(400, f"{field}: {visible(str(error))}", field, "unsupported") from None


def _wish(request: Wishes) -> _Wish | None:
    found = [wish for wish in (_format(request.response_format), _outputs(request.structured_outputs)) if wish]
    if len(found) > 1:
        raise Refusal(400, "response_format and structured_outputs are both there; send one", "structured_outputs")
    return found[0] if found else None


def _format(value: Any) -> _Wish | None:
    """OpenAI's response_format."""
    name = "response_format"
    if value in (None, {}):
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        _check_keys(name, value, ("type", "json_schema"))
        return _schema(f"{name}.json_schema", value.get("json_schema"))
    if kind not in ("text", "json_object"):
        raise Refusal(400, f"{name} = {shown(value)}; expected type text, json_object or json_schema", name)
    _check_keys(name, value, ("type",))
    return None if kind == "text" else _Wish(name, "json", _ANY_OBJECT)


def _schema(name: str, value: Any) -> _Wish:
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
        raise Refusal(400, f"{name} = {shown(value)}; expected an object with name and schema", name)
    _check_keys(name, value, ("name", "description", "schema", "strict"))
    return _Wish(f"{name}.schema", "json", value["schema"])


def _outputs(value: Any) -> _Wish | None:
    """vLLM's structured_outputs."""
    name = "structured_outputs"
    if value in (None, {}):
        return None
    if not isinstance(value, dict):
        raise Refusal(400, f"{name} = {shown(value)}; expected an object", name)
    _check_keys(name, value, (*_KINDS, "json_object"))
    given = {key: one for key, one in value.items() if one not in (None, False)}
    if len(given) != 1:
        raise Refusal(400, f"{name} = {shown(value)}; expected one of {', '.join(_KINDS)}", name)
    ((key, one),) = given.items()
    if key == "json_object":
        return _Wish(f"{name}.{key}", "json", _ANY_OBJECT)
    if key == "json" and isinstance(one, str):
        try:
            one = json.loads(one)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"{name}.json is no JSON: {error}", f"{name}.json") from None
    return _Wish(f"{name}.{key}", _KINDS[key], one)


def _check_keys(name: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, one in value.items():
        if key not in known and one not in (None, False):
            own = visible(f"{name}.{key[:40]}")
            raise Refusal(400, f"{own} = {shown(one)}; expected only {', '.join(known)}", own, "unsupported")
