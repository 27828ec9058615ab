"""Tool calls in text: found whatever the cut, and everything that is none stays content, character for character."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from lite_llm.text import Detokenizer, Tokenizer
from lite_llm.text.tools import BareCalls, Call, MarkedCalls, parser_of, takes_tools
from tests.text import build

TURN = "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
END = "<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}<|start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|eot_id|>\n{% endif %}"
ONE = '{"name": "{{ c.function.name }}", "KEY": {{ c.function.arguments | tojson }}}'
CALLS = "{% for c in m.tool_calls or [] %}CALL{% endfor %}"
HERMES = TOOLS + TURN + CALLS.replace("CALL", f"\n<tool_call>\n{ONE}\n</tool_call>").replace("KEY", "arguments") + END
SWAPPED = HERMES.replace(ONE.replace("KEY", "arguments"), (
    '{ "arguments": {{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}'
))  # fmt: skip
LLAMA = TOOLS + TURN + CALLS.replace("CALL", ONE).replace("KEY", "parameters") + END
MISTRAL = TOOLS + TURN + CALLS.replace("CALL", f"[TOOL_CALLS][{ONE}]").replace("KEY", "arguments") + END
PLAIN = TURN + CALLS.replace("CALL", ONE).replace("KEY", "parameters") + END  # calls, but nobody says of what
NAMES = ("f", "look-up")

PIECES = [
    "<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>\n", '{"name": "f", "arguments": {}}',
    '{"arguments": {"a": [1.50, "</tool_call> \\" { \\\\"]}, "name": "look-up"}', '{"name": "g", "arguments": {}}',
    '{"name": "f", "arguments": "x"}', '{"type": "function", "name": "f", "parameters": {"é": null}}', "<tool",
    '{"name": "f", "parameters": {"x": "<tool_call>"}}', "<", "{", "}", '"', "\\", ";", " ", "\n", "word",
    "<|python_tag|>",
    "<|python", "好", "\u00a0", '{"name": "f", "arguments": ',
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=9).map("".join)
WELL_FORMED = st.lists(st.sampled_from([f"<tool_call>{one}</tool_call>" for one in PIECES if "}" in one] + PIECES))
SETTINGS = settings(max_examples=400, deadline=None)
parsers = pytest.mark.parametrize("parser", [MarkedCalls, BareCalls])


def said(parser, pieces: list[str]) -> list[str | Call]:
    """What the parser makes of an answer in pieces; neighbouring texts are joined."""
    reader, found = parser(NAMES), []
    for one in [one for piece in pieces for one in reader.add(piece)] + reader.finish():
        assert one, "nothing is said with nothing in it"
        if isinstance(one, str) and found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places}) + [len(text)]
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def spaces(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip(" \t\r\n"))


def is_call(text: str, at: int) -> tuple[Call, int] | None:
    """A call that begins at its marker, and where it ends."""
    if not text.startswith("<tool_call>", at):
        return None
    at = spaces(text, at + len("<tool_call>"))
    try:
        found, end = json.JSONDecoder(object_pairs_hook=tuple).raw_decode(text, at)
    except ValueError:
        return None
    members = dict(found) if isinstance(found, tuple) else {}
    if text[at : at + 1] != "{" or members.pop("name", None) not in NAMES or len(members) not in (1, 2):
        return None
    members.pop("type", None)
    arguments = members.get("arguments", members.get("parameters"))
    if not isinstance(arguments, tuple):
        return None
    behind = text[spaces(text, end) :][: len("</tool_call>")]
    complete = (
        behind == "</tool_call>" or len(text) - spaces(text, end) == len(behind) and "</tool_call>".startswith(behind)
    )
    return (found, spaces(text, end) + len(behind)) if complete else None


@parsers
@SETTINGS
@given(TEXTS, st.lists(st.integers(0, 1000)))
@example('<|python_tag|><|python_tag|>{"name": "f", "arguments": {}}', [])
def test_the_cut_makes_no_difference(parser, text, places):
    assert said(parser, cut(text, places)) == said(parser, [text]) == said(parser, list(text))


@SETTINGS
@given(st.one_of(TEXTS, WELL_FORMED.map("".join)))
def test_every_character_is_content_or_of_a_call_and_no_call_is_missed(text):
    at = 0
    found = said(MarkedCalls, [text])
    for one in found:
        if isinstance(one, str):
            assert text.startswith(one, at)
            assert not any(is_call(text, place) for place in range(at, at + len(one)))
            at += len(one)
        else:
            members, at = is_call(text, spaces(text, at))
            assert dict(members)["name"] == one.name
            source = json.loads(one.arguments, object_pairs_hook=tuple)
            assert source == dict(members).get("arguments", dict(members).get("parameters"))
    assert not text[at:].strip(" \t\r\n") and (at == len(text) or found)


@SETTINGS
@given(TEXTS)
def test_an_answer_is_calls_throughout_or_content(text):
    found = said(BareCalls, [text])
    if not found or isinstance(found[0], str):
        assert "".join(found) == text
    else:
        joined = text.replace("<|python_tag|>", "")
        for call in found:
            assert isinstance(call, Call) and call.arguments in joined


@pytest.mark.parametrize("text, expected", [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [Call("f", '{"a": 1}')]),
    ('So.\n<tool_call>{"name":"f","arguments":{}}</tool_call>', ["So.\n", Call("f", "{}")]),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "look-up", "arguments": {}}\n'
     "</tool_call>\n", [Call("f", "{}"), Call("look-up", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}', [Call("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_', [Call("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call>\n\nDone.', [Call("f", "{}"), "\n\nDone."]),
    ('<tool_call>{"name":"f","arguments":{"x":12345678901234567890.10, "y":1e999}}</tool_call>',
     [Call("f", '{"x":12345678901234567890.10, "y":1e999}')]),
    ('<tool_call>{"name":"f","arguments":{"x":%s}}</tool_call>' % ("9" * 5000), [Call("f", '{"x":%s}' % ("9" * 5000))]),
    ('<tool_call>oops</tool_call><tool_call>{"name":"f","arguments":{}}',
     ["<tool_call>oops</tool_call>", Call("f", "{}")]),
    ('<tool_call> \n<tool_call>{"name":"f","arguments":{}}', ["<tool_call> \n", Call("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call><tool_call> ', [Call("f", "{}"), "<tool_call> "]),
    ("Write <tool_call> and </tool_call>.", ["Write <tool_call> and </tool_call>."]),
    (" \n", [" \n"]), ("", []),
])  # fmt: skip
def test_marked_calls(text, expected):
    assert said(MarkedCalls, [text]) == expected == said(MarkedCalls, list(text))


@pytest.mark.parametrize("body", [
    '{"name": "g", "arguments": {}}', '{"name": "f"}', '{"arguments": {}}', '{"name": "f", "arguments": "{}"}',
    '{"name": "f", "arguments": []}', '{"name": "f", "arguments": {}, "parameters": {}}',
    '{"name": 5, "arguments": {}}',
    '{"name": "f", "name": "f", "arguments": {}}', '{"name": "f", "arguments": {}, "more": 1}', '["f"]', "f()",
    '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": [-Infinity]}}',
    '{"name": "f", "arguments": {x: 1}}', '{"name": "f", "arguments": {}',
    '{"name": "f", "arguments": {}} {}', '{"name": "f", "arguments": {"x": "\n"}}', "{}", "{} {}", "[]]",
    '{"name": "f",}',
    '{"type": "tool", "name": "f", "arguments": {}}', "[" * 5000, '{"name": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"name": "f", "arguments": {"a" "b"}}', '{"name": "f" "arguments": {}}', '{"name": "f", 7: {}}',
])  # fmt: skip
def test_what_is_no_call_stays_text(body):
    text = f"<tool_call>{body}</tool_call>"
    assert said(MarkedCalls, [text]) == [text]
    assert said(BareCalls, [body]) == [body]


def test_text_is_held_back_only_while_it_may_be_a_call():
    reader = MarkedCalls(NAMES)
    assert reader.add("Hello <") == ["Hello "] and reader.add("b> \n") == ["<b> \n"]
    assert reader.add("<tool_call>\n") == [] and reader.add("x") == ["<tool_call>", "\nx"]
    assert reader.add('<tool_call>{"name": "f", "arguments": {"x": "y') == []
    assert reader.add('"}}</tool_call>') == [Call("f", '{"x": "y"}')]
    assert reader.add("\n") == [] and reader.add("-") == ["\n-"]
    assert reader.add('<tool_call>{"a\n') == ["<tool_call>", '{"a\n'], "no string goes over a line"
    bare = BareCalls(NAMES)
    assert bare.add(" ") == [] and bare.add("Hello") == [" Hello"] and bare.add(" {") == [" {"]


@pytest.mark.parametrize("text, expected", [
    ('{"name": "f", "parameters": {"a": 1}}', [Call("f", '{"a": 1}')]),
    ('<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [Call("f", "{}")]),
    ('{"name": "f", "parameters": {}}; {"name": "look-up", "parameters": {}}\n',
     [Call("f", "{}"), Call("look-up", "{}")]),
    ('{"name": "f", "parameters": {}} is it', ['{"name": "f", "parameters": {}} is it']),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
     ['{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}']),
    ('I call {"name": "f", "parameters": {}}', ['I call {"name": "f", "parameters": {}}']),
    ("<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
])  # fmt: skip
def test_bare_calls(text, expected):
    assert said(BareCalls, [text]) == expected == said(BareCalls, list(text))


def test_spaces_without_end_are_text_after_a_while():
    call = '<tool_call>{"name":"f","arguments":{}}</tool_call>'
    for parser, text in ((MarkedCalls, " " * 5000), (MarkedCalls, " " * 1001 + call)):
        assert said(parser, [text])[0] == text.removesuffix(call)
    reader = MarkedCalls(NAMES)
    assert [reader.add(" " * 10) for _ in range(101)][-1] == [" " * 1010]


def load(folder, template: str, special: bool) -> Tokenizer:
    backend = build.byte_level()
    for text in ("<tool_call>", "</tool_call>", "[TOOL_CALLS]"):
        backend.add_tokens([AddedToken(text, special=special, normalized=False)])
    backend.add_special_tokens([AddedToken("<|python_tag|>", normalized=False)])
    return Tokenizer.load(build.write(folder, backend, template))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("template, parser, takes", [
    (HERMES, MarkedCalls, True), (SWAPPED, MarkedCalls, True), (LLAMA, BareCalls, True), (MISTRAL, None, True),
    (PLAIN, BareCalls, False), (build.TEMPLATE, None, False), (None, None, False),
    (TOOLS + TURN + "{% if m.tool_calls %}{{ raise_exception('no') }}{% endif %}" + END, None, True),
    (HERMES.replace("</tool_call>", "</call>"), None, True),
])  # fmt: skip
def test_the_form_is_found_from_how_the_template_writes_a_call(tmp_path, template, parser, takes, special):
    tokenizer = load(tmp_path, template, special)
    assert takes_tools(tokenizer) == takes and parser_of(tokenizer) is parser


@pytest.mark.parametrize("special", [False, True])
def test_the_markup_of_calls_is_text_even_as_special_tokens(tmp_path, special):
    tokenizer = load(tmp_path, HERMES, special)
    text = 'So.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    ids = tokenizer.encode(text + "<|eot_id|>")[1:]
    stream = Detokenizer(tokenizer)
    pieces = [stream.add([token]) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert said(MarkedCalls, pieces) == ["So.\n", Call("f", '{"x": 1}')]


def test_llamas_tag_is_skipped_and_the_call_is_found_without_it(tmp_path):
    tokenizer = load(tmp_path, LLAMA, special=True)
    ids = tokenizer.encode('<|python_tag|>{"name": "f", "parameters": {"x": 1}}')[1:]
    assert said(BareCalls, [tokenizer.decode([token]) for token in ids]) == [Call("f", '{"x": 1}')]
    assert said(BareCalls, [tokenizer.decode(ids, skip_special_tokens=False)]) == [Call("f", '{"x": 1}')]
