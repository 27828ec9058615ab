"""Tool calls in what a model writes: the form that its checkpoint uses, and parsers that take the text as it comes.

A call is the JSON object of a name and an object of arguments. Hermes, Qwen2.5 and Qwen3 put each one between
`<tool_call>` and `</tool_call>`, anywhere in an answer; Llama 3.x answers with nothing but such objects. What is not
exactly that stays text, so parsers neither lose nor invent anything, however the text is cut into pieces.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from lite_llm.errors import LiteLLMError
from lite_llm.text.grammar_sources import CallLayout
from lite_llm.text.tokenizer import CALL_END, CALL_START, Tokenizer

_PYTHON_TAG = "<|python_tag|>"  # Llama 3.x may write it before a call; a special token, so mostly not in the text
_SPACE = " \t\r\n"
_LONGEST_SPACE = 1000  # characters between calls; so that nobody's endless spaces are looked at again and again
_SPACES = re.compile(f"[{_SPACE}]*")
_BETWEEN = re.compile(f"[{_SPACE};]*")
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_OUTSIDE = re.compile(f"[{_SPACE}0-9:,.+\\-eEtrufalsn]*")  # what JSON has beside strings and brackets; no NaN
_KEYS = ("name", "arguments", "parameters", "type")
_CLOSERS = {"{": "}", "[": "]"}


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # a JSON object, character for character as the model wrote it


class CallParser(Protocol):
    """Takes one answer; returns its content and its calls, each once it is certain, in order.

    Content joins to the answer without its calls. Whitespace between calls, and between a call and an end of the
    answer, belongs to the calls, up to a length.
    """

    def add(self, text: str) -> list[str | Call]: ...

    def finish(self) -> list[str | Call]:
        """The answer has ended: returns what was held back."""
        ...


class MarkedCalls:
    """Calls between `<tool_call>` and `</tool_call>`, of which the last may be missing at the end of the answer."""

    layout = CallLayout((CALL_START, "\n"), "arguments", ("\n", CALL_END), "\n")

    def __init__(self, names: Collection[str]):
        """`names` of the tools that were offered; what calls another one is content."""
        self._names = names
        self._held = ""
        self._from = 0  # where in `_held` begins what is undecided: whitespace while `_blank`, then perhaps a call
        self._blank = True  # no content yet since the last call, or the beginning
        self._called = False
        self._body: int | None = None  # where a call may go on behind its marker
        self._object = _JSONObject()
        self._call: Call | None = None  # complete but for its end marker

    def add(self, text: str) -> list[str | Call]:
        self._held += text
        return self._said(last=False)

    def finish(self) -> list[str | Call]:
        return self._said(last=True)

    def _said(self, last: bool) -> list[str | Call]:
        said: list[str | Call] = []
        while self._looks_like_call(said, last) if self._body is None else self._is_decided(said, last):
            pass
        if self._body is None:  # while a call is followed, places in the text must stay
            self._held, self._from = self._held[self._from :], 0
        return said

    def _looks_like_call(self, said: list[str | Call], last: bool) -> bool:
        """Whether a call may have begun; what stands before it is said."""
        held = self._held
        start = held.find(CALL_START, self._from)
        end = start if start >= 0 else len(held) - (0 if last else _overlap(held[self._from :], CALL_START))
        text = held[self._from : end]
        if self._blank and len(text) <= _LONGEST_SPACE and not text.strip(_SPACE):
            if not last:  # it may be the space before a call
                end = self._from
            if self._called or end == self._from:  # or it was the space behind one
                text = ""
        if text:
            said.append(text)
            self._blank = False
        self._from = end
        if start < 0:
            return False
        self._body, self._object, self._call = start + len(CALL_START), _JSONObject(), None
        return True

    def _is_decided(self, said: list[str | Call], last: bool) -> bool:
        """Whether it is clear by now whether what looks like a call is one."""
        held = self._held
        if self._call is None:
            found = self._object.follow(held, self._body)
            if found is None and not last:
                return False
            self._call = _call_in(found, self._names) if found else None
            if self._call is None:
                return self._no_call(said)
        at = _SPACES.match(held, self._object.at).end()
        rest = held[at : at + len(CALL_END)]
        if rest != CALL_END:
            if not CALL_END.startswith(rest):
                return self._no_call(said)
            if not last:
                return False
        said.append(self._call)
        self._from, self._body, self._blank, self._called = at + len(rest), None, True, True
        return True

    def _no_call(self, said: list[str | Call]) -> bool:
        """What follows the marker is looked through once more, for a call may stand there."""
        said.append(self._held[self._from : self._body])
        self._from, self._body, self._blank = self._body, None, False
        return True


class BareCalls:
    """Calls that are the whole answer, apart by semicolons or whitespace, so that all of them come at its end."""

    layout = CallLayout((), "parameters", (), "; ")

    def __init__(self, names: Collection[str]):
        """`names` of the tools that were offered; an answer that calls another one is content."""
        self._names = names
        self._held = ""
        self._at = 0  # up to where it consists of calls
        self._begun = False  # the place of a tag is behind
        self._calls: list[Call] = []
        self._object: _JSONObject | None = None
        self._is_text = False

    def add(self, text: str) -> list[str | Call]:
        if self._is_text:
            return [text] if text else []
        self._held += text
        while self._is_call():
            pass
        return self._as_text() if self._is_text else []

    def finish(self) -> list[str | Call]:
        if self._object is None and self._calls:
            return list(self._calls)
        return self._as_text()

    def _is_call(self) -> bool:
        """Whether one more is complete."""
        if self._object is None:
            self._begun = self._begun or self._begins()
            if not self._begun:
                return False
            self._at = (_BETWEEN if self._calls else _SPACES).match(self._held, self._at).end()
            if self._at == len(self._held):
                return False
            self._object = _JSONObject()
        found = self._object.follow(self._held, self._at)
        if found is None:
            return False
        call = _call_in(found, self._names) if found else None
        if call is None:
            self._is_text = True
            return False
        self._calls.append(call)
        self._at, self._object = self._object.at, None
        return True

    def _begins(self) -> bool:
        """Go behind spaces and the tag, if there is one; False while it may become one."""
        self._at = _SPACES.match(self._held, self._at).end()
        head = self._held[self._at : self._at + len(_PYTHON_TAG)]
        self._at += len(head) if head == _PYTHON_TAG else 0
        return head == _PYTHON_TAG or not _PYTHON_TAG.startswith(head)

    def _as_text(self) -> list[str | Call]:
        text, self._held, self._is_text = self._held, "", True
        return [text] if text else []


class _JSONObject:
    """Finds the end of one JSON object in a text that grows. Judges brackets and strings only, each character once."""

    def __init__(self):
        self.at = 0  # behind the object, once it is there
        self._start: int | None = None
        self._closers: list[str] = []
        self._in_string = False

    def follow(self, text: str, start: int) -> str | None:
        """The object that begins at `start`, after whitespace; None while it is not whole, "" if it is none."""
        if self._start is None:
            start = _SPACES.match(text, start).end()
            if start == len(text):
                return None
            if text[start] != "{":
                return ""
            self._start, self.at, self._closers = start, start + 1, ["}"]
        while self._closers:
            self.at = (_IN_STRING if self._in_string else _OUTSIDE).match(text, self.at).end()
            char = text[self.at : self.at + 1]
            size = 1
            if not char:
                return None
            if char == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                if char != "\\":
                    return ""
                size = 2
                if self.at + 1 == len(text):
                    return None
            elif char in _CLOSERS:
                self._closers.append(_CLOSERS[char])
            elif char == self._closers[-1]:
                self._closers.pop()
            else:
                return ""
            self.at += size
        return text[self._start : self.at]


def _call_in(text: str, names: Collection[str]) -> Call | None:
    """The call that an object's text is; None if it is none, or of a tool that was not offered."""
    try:
        members = _members(text)
    except (ValueError, RecursionError):
        return None
    name, _ = members.pop("name", (None, ""))
    kind, _ = members.pop("type", ("function", ""))  # Llama likes to write it
    if kind != "function" or not isinstance(name, str) or name not in names or len(members) != 1:
        return None
    (key, (value, source)), *_ = members.items()
    return Call(name, source) if key in ("arguments", "parameters") and isinstance(value, dict) else None


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of a call's object, each as its value (numbers are 0) and its text. ValueError for what is none."""
    found: dict[str, tuple[Any, str]] = {}
    at, follows = 0, "{"
    while follows != "}":
        at = _expect(text, at, follows)
        key, at = _DECODER.raw_decode(text, at)
        start = _expect(text, at, ":")
        value, end = _DECODER.raw_decode(text, start)
        if key not in _KEYS or key in found:
            raise ValueError
        found[key] = value, text[start:end]
        at = _SPACES.match(text, end).end()
        follows = "}" if text[at : at + 1] == "}" else ","
    return found


def _expect(text: str, at: int, char: str) -> int:
    """Where what follows `char` begins."""
    at = _SPACES.match(text, at).end()
    if text[at : at + 1] != char:
        raise ValueError
    return _SPACES.match(text, at + 1).end()


def _zero(digits: str) -> int:
    return 0  # Python refuses numbers of very many digits, and the text is what counts


_DECODER = json.JSONDecoder(parse_int=_zero, parse_float=_zero)


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    return next((size for size in range(len(marker) - 1, 0, -1) if text.endswith(marker[:size])), 0)


# ---- which form it is

_MARK = "marked2718281828"
_NAME, _ARGUMENTS = "probe_4815162342", {"place": "Paris"}
_ASKED = {"role": "user", "content": "Hello"}
_TOOL = {
    "name": _NAME,
    "description": "A probe.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "A place."}}},
}
_CALL = {"id": "probe4815", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the checkpoint's chat template tells the model of tools. Renders a short chat."""
    return _NAME in _rendered(tokenizer, [_ASKED])


def parser_of(tokenizer: Tokenizer) -> type[MarkedCalls] | type[BareCalls] | None:
    """What reads the calls of a checkpoint, found from how its template writes one; None: it uses another form."""
    text = _rendered(tokenizer, [_ASKED, {"role": "assistant", "content": None, "tool_calls": [_CALL]}])
    for start in re.finditer(r"\{", text):
        try:
            found, end = json.JSONDecoder().raw_decode(text, start.start())
        except ValueError:
            continue
        if found in ({"name": _NAME, "arguments": _ARGUMENTS}, {"name": _NAME, "parameters": _ARGUMENTS}):
            if text[: start.start()].rstrip().endswith(CALL_START):
                return MarkedCalls if text[end:].lstrip().startswith(CALL_END) else None
            return BareCalls if "parameters" in found else None
    return None


def heeded(tokenizer: Tokenizer) -> frozenset[str]:
    """What of messages, beside role and content, the checkpoint's chat template writes anywhere. Renders a few."""
    called = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
    told = {"role": "tool", "content": "Sunny.", "tool_call_id": _CALL["id"], "name": _MARK}
    thought = {"role": "assistant", "content": "Hi.", "reasoning_content": _MARK}
    chats = {"name": ([_ASKED | {"name": _MARK}], [_ASKED, called, told]), "reasoning_content": ([_ASKED, thought],)}
    keys = {key for key, tries in chats.items() if any(_MARK in _rendered(tokenizer, chat) for chat in tries)}
    return frozenset(keys | ({"tool_calls", "tool_call_id"} if takes_tools(tokenizer) else set()))


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """ "" if the template cannot render it."""
    try:
        ids = tokenizer.chat_ids(messages, add_generation_prompt=False, tools=[{"type": "function", "function": _TOOL}])
    except LiteLLMError:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False)
