"""Tools in a chat: what a client offers, checked, and the model's calls as OpenAI has them.

The template tells the model of the tools, and what it writes in the checkpoint's form of a call is one. Only where
`tool_choice` forces a call (`constraints.py`) does a model have to make one, and to keep to the tool's schema.
"""

import json
import re
import secrets
import string
from collections.abc import Callable
from typing import Any

from lite_llm.errors import shown
from lite_llm.server.refusals import Refusal
from lite_llm.text import Tokenizer
from lite_llm.text.tools import Call, CallParser, parser_of, takes_tools

_MOST_TOOLS = 128
_MOST_CHARS = 1 << 18  # of all tools as JSON: more takes a template longer than it is given
_DEEPEST = 64  # lists and objects within each other
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SYMBOLS = string.ascii_letters + string.digits
_HONOURED = ("name", "description", "parameters")


class Toolbox:
    """What one checkpoint can do with tools."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._takes_tools = tokenizer is not None and takes_tools(tokenizer)
        self._parser = parser_of(tokenizer) if self._takes_tools else None

    def offered(self, tools: Any, choice: Any = None) -> list[dict[str, Any]]:
        """The tools that the model is told of, as templates want them. Refusal for what cannot be honoured."""
        tools = tools_of(tools)
        _check_choice(choice, [tool["function"]["name"] for tool in tools])
        if not tools or choice == "none":
            return []
        if not self._takes_tools:
            raise Refusal(400, "tools: this checkpoint's chat template takes none", "tools", "unsupported")
        if self._parser is None:
            reason = "this checkpoint writes calls in a form that is not read; known are those of Hermes and Llama 3"
            raise Refusal(400, f"tools: {reason}", "tools", "unsupported")
        return tools

    def reader(self, offered: list[dict[str, Any]], only_one: bool) -> "Callable[[], Calls] | None":
        """Makes what reads one answer; None if no tools were offered. `only_one` is that of `Calls`."""
        if not offered:
            return None
        names = frozenset(tool["function"]["name"] for tool in offered)
        return lambda: Calls(self._parser(names), only_one)


class Calls:
    """One answer: its text goes in, documents' content and calls come out."""

    def __init__(self, parser: CallParser, only_one: bool):
        """`only_one`: the answer ends with its first call, as far as the client is concerned."""
        self._parser, self._only_one, self.count = parser, only_one, 0

    @property
    def over(self) -> bool:
        """Whether whatever the model adds is not part of the answer."""
        return self._only_one and self.count > 0

    def add(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What can be told by now: content, and calls with their `index`, of which the answer's end brings the last."""
        content, calls = [], []
        said = self._parser.add(text)
        for one in said + self._parser.finish() if last else said:
            if self.over:
                break
            if isinstance(one, Call):
                calls.append(_document(self.count, one))
                self.count += 1
            else:
                content.append(one)
        return "".join(content), calls

    def reason(self, finish_reason: str) -> str:
        """An answer that was cut says so, unless it was over before."""
        return "tool_calls" if self.over or self.count and finish_reason == "stop" else finish_reason


def _check_choice(choice: Any, names: list[str]) -> None:
    if choice in (None, "none", "auto"):
        return
    field = "tool_choice"
    if choice == "required":
        if not names:
            raise Refusal(400, f"{field} = 'required' without tools", field)
        return
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        reason = "expected 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        raise Refusal(400, f"{field} = {shown(choice)}; {reason}", field)
    if function["name"] not in names:
        raise Refusal(400, f"{field} = {shown(function['name'])}; there is no such tool", field)


def _document(index: int, call: Call) -> dict[str, Any]:
    name = "call_" + "".join(secrets.choice(_SYMBOLS) for _ in range(24))
    return {
        "index": index, "id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments},
    }  # fmt: skip


def tools_of(value: Any) -> list[dict[str, Any]]:
    """A client's tools, without what no template is shown. Refusal, naming the place, for what they cannot be."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refusal(400, f"tools = {shown(value)}; expected a list", "tools")
    if len(value) > _MOST_TOOLS:
        raise Refusal(400, f"tools has {len(value)} entries; at most {_MOST_TOOLS} are taken", "tools")
    if _depth_above(value, _DEEPEST):
        raise Refusal(400, f"tools are nested too deeply; at most {_DEEPEST} levels are taken", "tools")
    if (size := len(json.dumps(value))) > _MOST_CHARS:
        raise Refusal(400, f"tools have {size:,} characters; at most {_MOST_CHARS:,} are taken", "tools")
    tools = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            where = f"tools[{index}].function.name"
            raise Refusal(400, f"{where} = {name!r} stands there twice", where)
    return tools


def ignored_of(tools: list[Any] | None, choice: Any = None) -> list[str]:
    """The fields of checked tools, and of a `tool_choice`, that nothing is made of, for the receipt."""
    names = {name for tool in tools or () for name in tool["function"] if name not in _HONOURED}
    names |= {name for tool in tools or () for name in tool if name not in ("type", "function")}
    names = [f"tools.{name}" for name in sorted(names)]
    if isinstance(choice, dict):
        names += [f"tool_choice.{name}" for name in choice if name not in ("type", "function")]
        names += [f"tool_choice.function.{name}" for name in choice["function"] if name != "name"]
    return names


def name_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool results have their function's name, found by its call's id: some templates want it."""
    names, named = {}, []
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(call.get("id"), str) and isinstance(function.get("name"), str):
                names[call["id"]] = function["name"]
        id = message.get("tool_call_id")
        if message.get("role") == "tool" and "name" not in message and isinstance(id, str) and id in names:
            message = message | {"name": names[id]}
        named.append(message)
    return named


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise Refusal(400, f"{where} = {shown(tool)}; expected {{'type': 'function', 'function': {{...}}}}", where)
    function = tool["function"]
    name, description, parameters = (function.get(key) for key in _HONOURED)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        reason = "expected 1 to 64 letters, digits, _ and -"
        raise Refusal(400, f"{where}.function.name = {shown(name)}; {reason}", f"{where}.function.name")
    if description is not None and not isinstance(description, str):
        own = f"{where}.function.description"
        raise Refusal(400, f"{own} = {shown(description)}; expected a text", own)
    if parameters is None:  # OpenAI's meaning of leaving them out
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        own = f"{where}.function.parameters"
        raise Refusal(400, f"{own} = {shown(parameters)}; expected a JSON schema, which is an object", own)
    told = {"name": name} | ({} if description is None else {"description": description})
    return {"type": "function", "function": told | {"parameters": parameters}}


def _depth_above(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)
