"""What a user wants an answer to be, as llguidance reads it, and bounds on it.

The bounds are for strangers' grammars: llguidance compiles by recursion, and a chain of some thousand rules within each
other ends the whole process. With the 8 MB of stack that a thread has on Linux, one and a half times the bound does no
harm (`tests/text/test_grammar.py`).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lite_llm.errors import UsageError, shown

_MOST_CHARS = {"json": 1 << 16, "regex": 1 << 12, "lark": 1 << 14, "choice": 1 << 16}
_LONGEST_CHOICE = 1 << 12  # characters
_DEEPEST = 800  # things within each other, at the worst
_OPENERS = re.compile(r"[(\[{\n]")
# Between the tokens of JSON: a space, or a new line and its indentation. llguidance would take any number of both, and
# a model that gets lost there never comes back.
_SPACES = {"whitespace_pattern": r" |\n[ \t]{0,20}"}


class Source(NamedTuple):
    kind: str  # "json", "regex" or "lark"
    text: str


class CallLayout(NamedTuple):
    """How a checkpoint writes a call around its name and its arguments."""

    before: tuple[str, ...]  # texts, of which some may be tokens of that name
    key: str  # of the arguments
    after: tuple[str, ...]
    between: str  # two calls


def source_of(
    *,
    json: Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    lark: str | None = None,
    choice: Sequence[str] | None = None,
) -> Source:
    """One of: a JSON schema ({"type": "object"} is any object), a regular expression for the whole answer (that of
    Rust's crate regex, without look-around), a Lark grammar (llguidance's dialect, from `start`), texts to choose from.

    UsageError for anything else, or too much of it.
    """
    wishes = {"json": (json, _json), "regex": (regex, _regex), "lark": (lark, _lark), "choice": (choice, _choice)}
    given = [(name, *wish) for name, wish in wishes.items() if wish[0] is not None]
    if len(given) != 1:
        found = " and ".join(name for name, *_ in given) or "nothing"
        raise UsageError(f"a grammar of {found}; expected one of {', '.join(wishes)}")
    ((name, value, make),) = given
    return make(name, value)


def source_of_calls(
    layout: CallLayout, tools: Iterable[tuple[str, str, Any]], several: bool, spelled: Callable[[str], str]
) -> Source:
    """Of answers that are one call, or one or `several`. `tools`: for each that may be called where its schema comes
    from (for errors), its name, and the schema of its arguments. `spelled`: `before` and `after` as Lark has them."""
    before, after = (" ".join(map(spelled, texts)) for texts in (layout.before, layout.after))
    more = f" ({_quoted(layout.between)} call)*" if several else ""
    calls, rules = [], []
    for number, (where, name, schema) in enumerate(tools):
        head = _quoted(f'{{"name": {_quoted(name)}, "{layout.key}": ')
        calls.append(f"call_{number}")
        rules.append(f'call_{number}: {before} {head} arguments_{number} "}}" {after}')
        rules.append(f"arguments_{number}: %json {_json(where, schema).text}")
    return Source("lark", "\n".join([f"start: call{more}", f"call: {' | '.join(calls)}", *rules]))


def arguments_of(schema: Any) -> Any:
    """A tool's `parameters` as its grammar takes them: where an empty list of them is all that is said, none.

    JSON Schema would let a model add what it likes, and one that has nothing to say goes on until the context is full.
    """
    if schema is None or isinstance(schema, Mapping) and (not schema or "properties" in schema):
        said = {key for key, value in (schema or {}).items() if value}
        if said <= {"type", "title", "description", "$schema"}:
            return {"type": "object", "properties": {}, "additionalProperties": False}
    return schema


def _json(name: str, schema: Any) -> Source:
    if not isinstance(schema, (Mapping, bool)):
        raise UsageError(f"{name} = {shown(schema)}; expected a JSON schema, which is an object")
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    try:
        text = json.dumps({**schema, "x-guidance": {**_SPACES, **schema.get("x-guidance", {})}}, allow_nan=False)
        refs: set[str] = set()
        depth = _depth(schema, refs)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no usable JSON: {error}") from None
    if depth * (1 + len(refs)) > _DEEPEST:  # a path that passes each reference once
        raise UsageError(f"{name} is too deep: {depth} levels and {len(refs)} references to follow")
    return Source("json", _short("json", name, text))


def _depth(value: Any, refs: set[str]) -> int:
    """Levels of a JSON value; adds to `refs` what it refers to."""
    if isinstance(value, Mapping):
        refs.update(str(value[key]) for key in ("$ref", "$dynamicRef", "$recursiveRef") if key in value)
        value = list(value.values())
    elif not isinstance(value, (list, tuple)):
        return 1
    return 1 + max((_depth(one, refs) for one in value), default=0)


def _regex(name: str, text: Any) -> Source:
    return Source("regex", _short("regex", name, _text(name, text)))


def _lark(name: str, text: Any) -> Source:
    text = _short("lark", name, _text(name, text))
    if "%json" in text:  # its depth would have to be known
        raise UsageError(f"{name} has %json; send a schema as such")
    if (found := len(_OPENERS.findall(text))) > _DEEPEST:
        raise UsageError(f"{name} is too long: {found:,} lines and opening brackets; at most {_DEEPEST:,} are taken")
    return Source("lark", text)


def _choice(name: str, texts: Any) -> Source:
    if not isinstance(texts, (list, tuple)) or not texts:
        raise UsageError(f"{name} = {shown(texts)}; expected a list of texts")
    for index, text in enumerate(texts):
        if len(_text(f"{name}[{index}]", text)) > _LONGEST_CHOICE:
            raise UsageError(f"{name}[{index}] is too long; at most {_LONGEST_CHOICE:,} characters are taken")
    # One terminal, as an enum of JSON is: alternatives of a rule are parsed side by side, and 2,000 of them at most.
    return Source("lark", _short("choice", name, "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, texts))))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} = {shown(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} = {shown(value)}; expected whole characters") from None
    return value


def _short(kind: str, name: str, text: str) -> str:
    if len(text) > _MOST_CHARS[kind]:
        raise UsageError(f"{name} is too long: {len(text):,} characters; at most {_MOST_CHARS[kind]:,} are taken")
    return text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # which Lark does not take as it is
