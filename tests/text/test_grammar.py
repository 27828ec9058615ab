"""Grammars: whatever is drawn from what they allow is what was asked for, and what cannot be honoured is refused."""

import importlib.metadata
import json
import random
import re
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydantic
import pytest

import lite_llm
from lite_llm.errors import EnvironmentProblem, UnsupportedModel, UsageError
from lite_llm.text import Detokenizer, Tokenizer, grammar
from lite_llm.text.grammar import GrammarCompiler
from tests.text.build import byte_fallback, byte_level, metaspace, plain_metaspace, write
from tests.text.test_tools import HERMES, LLAMA, MISTRAL

PADDING = 37
DEMO = Path(lite_llm.__file__).parent / "demo" / "chat"


class Place(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    name: str = pydantic.Field(max_length=8)
    rain: bool
    days: list[int] = pydantic.Field(min_length=1, max_length=3)
    next: "Place | None"


def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    ends = {tokenizer.token_id("</s>") or 1, tokenizer.token_id("<|eot_id|>") or 1}
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, ends)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, metaspace])
def tokenizer(request, tmp_path_factory):
    return Tokenizer.load(write(tmp_path_factory.mktemp("tokenizer"), request.param()))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return compiler_of(Tokenizer.load(write(tmp_path_factory.mktemp("tokenizer"), byte_level(), HERMES)))


def allowed(state) -> list[int]:
    return np.unpackbits(state.allowed.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def drawn(grammar, tokenizer: Tokenizer, seed: int, most: int = 600) -> str | None:
    """The text of a random answer; None if it has no end in sight."""
    draw, state, ids = random.Random(seed), grammar.start(), []
    ends = {tokenizer.token_id("</s>"), tokenizer.token_id("<|eot_id|>")}
    for _ in range(most):
        tokens = allowed(state)
        assert tokens and max(tokens) < tokenizer.vocab_size, "stuck, or padding"
        assert not ends & set(tokens) or ends <= set(tokens), "one end is as good as another"
        token = draw.choice(tokens)
        if token in ends:
            detokenizer = Detokenizer(tokenizer)
            return detokenizer.add(ids) + detokenizer.finish()
        ids.append(token)
        state.advance(token)
    return None


def test_random_answers_of_every_kind_of_tokenizer_are_what_was_asked_for(tokenizer):
    compiler = compiler_of(tokenizer)
    grammar = compiler.compile(json=Place.model_json_schema())
    texts = [drawn(grammar, tokenizer, seed) for seed in range(25)]
    whole = [Place.model_validate_json(text) for text in texts if text is not None]
    assert len(whole) > 10
    for kind, source, check in (
        ("regex", "[a-f]{2,4}(-[0-9]+)?x", lambda text: re.fullmatch("[a-f]{2,4}(-[0-9]+)?x", text)),
        ("choice", ["lo", "low", 'a "b"\\\n', "ab"], {"lo", "low", 'a "b"\\\n', "ab"}.__contains__),
        (
            "lark",
            'start: item ("," item)*\nitem: "a" | /[0-9]+/',
            lambda text: re.fullmatch(r"(a|\d+)(,(a|\d+))*", text),
        ),
        ("json", True, lambda text: json.loads(text) or True),
        ("json", {"type": "object"}, lambda text: isinstance(json.loads(text), dict)),
    ):
        grammar = compiler.compile(**{kind: source})
        found = [text for seed in range(20) if (text := drawn(grammar, tokenizer, seed)) is not None]
        assert len(set(found)) > 2 and all(check(text) for text in found), (kind, found)


def test_a_choice_may_have_thousands_of_items_and_any_characters(compiler):
    """Each is one whole answer, and nothing else is."""
    odd = ["\x7f", "a\x00b", "\u2028", "\\", "/x/", "a|b", "[ab]", '"', "\n", "<|eot_id|>"]
    items = [f"{number}. item" for number in range(2100)] + odd
    grammar, tokenizer = compiler.compile(choice=items), compiler._tokenizer
    ends = {tokenizer.token_id("</s>"), tokenizer.token_id("<|eot_id|>")}
    texts = [drawn(grammar, tokenizer, seed) for seed in range(20)]
    assert len(set(texts)) > 10 and set(texts) <= {*items}
    for item in odd[:-1] + items[:2100:300]:
        state = grammar.start()
        for token in tokenizer.encode(item, bos=False):
            assert token in allowed(state), item
            state.advance(token)
        assert ends <= set(allowed(state)), item


def test_spaces_between_json_come_to_an_end(compiler):
    """As models write it, on one line or with indentation; but nobody gets lost in them."""
    grammar, tokenizer = (
        compiler.compile(json={"type": "object", "properties": {"a": {"const": 1}}}),
        compiler._tokenizer,
    )
    ends = {tokenizer.token_id("</s>"), tokenizer.token_id("<|eot_id|>")}

    def taken(text: str) -> bool:
        state = grammar.start()
        for token in tokenizer.encode("<s>" + text)[1:]:
            if token not in allowed(state):
                return False
            state.advance(token)
        return ends <= set(allowed(state))

    for text in ('{"a":1}', '{"a": 1}', '{\n    "a": 1\n}', '{\n\t"a" : 1 }', "{}", "{ }"):
        assert taken(text), text
    for text in ('{"a":  1}', '{"a":\n\n1}', "{" + "\n" + " " * 21 + "}", '{"a":1} ', ' {"a":1}', '{"a": 2}', "{"):
        assert not taken(text), text


@pytest.mark.parametrize("wish, match", [
    ({}, "of nothing; expected one of json, regex, lark, choice"), (dict(json={}, regex="a"), "of json and regex"),
    (dict(json=5), "json = 5; expected a JSON schema"), (dict(json="{}"), "json = '{}'; expected"),
    (dict(json={"type": "obj"}), "json is no usable grammar: Invalid type: obj"),
    (dict(json={"not": {}}), r'json is no usable grammar: Unimplemented keys: \["not"\]'),
    (dict(json={"$ref": "#/nowhere"}), "json is no usable grammar: Pointer '/nowhere' does not exist"),
    (dict(json={"$ref": "http://a.b/c"}), "json is no usable grammar: .*does not fetch"),
    (dict(json=False), "json is no usable grammar: Unsatisfiable"),
    (dict(json={"enum": [float("nan")]}), "json is no usable JSON"),
    (dict(json={"enum": [{1}]}), "json is no usable JSON"),
    (dict(json={"enum": ["\ud800"]}), "json is no usable grammar: "),
    (dict(json={"enum": ["x" * 70_000]}), "json is too long: 70,0.. characters; at most 65,536"),
    (dict(regex="("), "regex is no usable grammar: .*unclosed group"),
    (dict(regex=b"a"), "regex = b'a'; expected a text"),
    (dict(regex="(?=a)"), "regex is no usable grammar: .*look-around"),
    (dict(regex="\ud800"), "expected whole characters"),
    (dict(regex="a" * 5000), "regex is too long"),
    (dict(lark="start: other"), 'lark is no usable grammar: .*unknown name: "other"'), (dict(lark=""), "Empty grammar"),
    (dict(lark="start: %json {}"), "lark has %json"),
    (dict(lark="start: /a/" + " " * (1 << 14)), "lark is too long: 16,394"),
    (dict(choice=[]), "choice = "), (dict(choice="ab"), "choice = 'ab'; expected a list"),
    (dict(choice=["a", 5]), r"choice\[1\] = 5"), (dict(choice=["a" * 5000]), r"choice\[0\] is too long"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_named(compiler, wish, match):
    with pytest.raises(UsageError, match=match) as caught:
        compiler.compile(**wish)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def chained(count: int, nest) -> dict:
    steps = {f"a{i}": nest({"$ref": f"#/$defs/a{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": steps | {f"a{count}": {"type": "null"}}}


BOMBS = {
    "rules": lambda n: {"lark": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(n)) + f'\na{n}: "x"'},
    "tokens": lambda n: {"lark": "start: A0\n" + "\n".join(f'A{i}: A{i + 1} "y"' for i in range(n)) + f'\nA{n}: "x"'},
    "brackets": lambda n: {
        "lark": "start: a0\n"
        + "\n".join(f"a{i}: {'(' * 20}a{i + 1}{')*' * 20}" for i in range(n // 21))
        + f'\na{n // 21}: "x"'
    },
    "references": lambda n: {"json": chained(n // 4 - 1, lambda ref: ref)},
    "objects": lambda n: {"json": chained(n // 6 - 1, lambda ref: {"properties": {"x": ref}, "required": ["x"]})},
    "deep": lambda n: {"json": chained(n // 22, lambda ref: json.loads('{"items":' * 16 + json.dumps(ref) + "}" * 16))},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_grammars_that_would_end_the_process_are_refused(compiler, kind):
    with pytest.raises(UsageError, match="too (deep|long)"):
        compiler.compile(**BOMBS[kind](880))


def test_what_is_not_refused_is_far_from_ending_the_process():
    """llguidance recurses: at one and a half times the bound it still returns, in a thread."""
    code = """
import threading
from lite_llm.errors import UsageError
from lite_llm.text import grammar_sources
from tests.text.test_grammar import BOMBS, DEMO, GrammarCompiler, Tokenizer

grammar_sources._DEEPEST *= 100
grammar_sources._MOST_CHARS = dict.fromkeys(grammar_sources._MOST_CHARS, 1 << 20)
compiler = GrammarCompiler(Tokenizer.load(DEMO), 2048, [1])


def work():
    for kind, bomb in BOMBS.items():
        try:
            compiler.compile(**bomb(1200)).start()
        except UsageError as error:  # for another reason, found by llguidance
            assert "Too many items" in str(error), error
        print(kind)


thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, list(BOMBS)), done.stderr[-500:]


def test_compiling_does_not_hold_python_up(compiler):
    """The engine's thread goes on: this one, meanwhile, is never away for long."""
    schema = {"type": "object", "properties": {f"p{i}": {"enum": [f"v{i}-{j}" for j in range(99)]} for i in range(50)}}
    work = threading.Thread(target=lambda: compiler.compile(json=schema))
    work.start()
    times = [time.perf_counter()]
    while work.is_alive():
        time.sleep(0)
        times.append(time.perf_counter())
    longest, whole = max(later - one for one, later in pairwise(times)), times[-1] - times[0]
    assert longest < whole / 2, (longest, whole)


def test_a_grammar_that_takes_too_much_work_for_a_token_is_refused(compiler, monkeypatch):
    assert compiler.compile(lark="start: " + '"a"? ' * 98)
    monkeypatch.setitem(grammar._LIMITS, "step_max_items", 50)
    with pytest.raises(UsageError, match="lark is no usable grammar: .*Too many items"):
        compiler.compile(lark="start: " + '"a"? ' * 99)


def test_an_answer_that_fails_allows_nothing(compiler, caplog):
    """Not even its end, which llguidance would let it have."""
    state = compiler.compile(regex="a+b").start()
    other = state.copy()
    state.advance(compiler._tokenizer.encode("<s>b")[-1])
    assert not allowed(state) and "the grammar of an answer failed" in caplog.text
    assert allowed(other) and allowed(compiler.compile(regex="a+b").start()) == allowed(other)


def test_a_source_is_compiled_once(compiler, monkeypatch):
    one = compiler.compile(regex="once")
    assert compiler.compile(regex="once") is one and compiler.compile(regex="twice") is not one


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"city": {"enum": ["Paris", "Rome"]}}}}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                                      "additionalProperties": False}}},
]  # fmt: skip


@pytest.mark.parametrize("template, marked", [(HERMES, True), (HERMES, False), (LLAMA, False)])
def test_calls_are_read_as_such(tmp_path, template, marked):
    """Also where the markers of calls are tokens of their own, which text never becomes."""
    backend = byte_level()
    if marked:
        backend.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = Tokenizer.load(write(tmp_path / "tokenizer", backend, template))
    compiler = compiler_of(tokenizer)
    for only, several in ((None, False), ("clock", False), ("weather", False), (None, True)):
        grammar, names, counts = compiler.calls(TOOLS, only, several), set(), set()
        for seed in range(30):
            text = drawn(grammar, tokenizer, seed, 2000)
            parser = compiler._form(("weather", "clock"))
            calls = [*parser.add(text), *parser.finish()]
            assert all(not isinstance(call, str) for call in calls), text
            names |= {call.name for call in calls}
            counts.add(len(calls))
            for call in calls:
                found = json.loads(call.arguments)
                assert found in ([{"city": "Paris"}, {"city": "Rome"}] if call.name == "weather" else [{}])
            assert not marked or text.startswith("<tool_call>\n")
        assert names == ({only} if only else {"weather", "clock"})
        assert (counts == {1}) != several and min(counts) == 1


def test_a_tool_that_cannot_be_honoured_is_named(compiler, tmp_path):
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(UsageError, match=r"tools\[2\].function.parameters is no usable grammar: .*\"not\""):
        compiler.calls([*TOOLS, bad])
    assert compiler.calls([*TOOLS, bad], "clock")
    with pytest.raises(UsageError, match="no such tool"):
        compiler.calls(TOOLS, "sundial")
    other = compiler_of(Tokenizer.load(write(tmp_path / "tokenizer", byte_level(), MISTRAL)))
    with pytest.raises(UsageError, match="a form that is not known"):
        other.calls(TOOLS)


def test_what_is_missing_is_said(compiler, monkeypatch, tmp_path):
    for folder in (DEMO.parent / "copy", write(tmp_path / "t5", plain_metaspace())):
        with pytest.raises(UnsupportedModel, match="cannot use this checkpoint's tokenizer: .*decoder"):
            compiler_of(Tokenizer.load(folder)).compile(regex="a")
    with pytest.raises(UnsupportedModel, match="no token that ends an answer"):
        GrammarCompiler(Tokenizer.load(DEMO), 2048, []).compile(regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentProblem, match="pip install -r requirements-grammar.txt"):
        GrammarCompiler(Tokenizer.load(DEMO), 2048, [1]).compile(regex="a")


@pytest.mark.parametrize("found", ["1.6.1", "0.10.1", "1.8.0rc1"])
def test_a_version_that_is_too_old_is_named(found, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    want = rf"llguidance 1\.9 or newer; found {re.escape(found)}: pip install -r requirements-grammar.txt"
    with pytest.raises(EnvironmentProblem, match=want):
        GrammarCompiler(Tokenizer.load(DEMO), 2048, [1]).compile(regex="a")


def test_versions_from_the_one_of_the_requirements_on_are_taken(monkeypatch):
    required = (Path(lite_llm.__file__).parents[1] / "requirements-grammar.txt").read_text().strip()
    assert required == f"llguidance>={grammar._OLDEST}"
    for found in (grammar._OLDEST, "1.10.0", "2.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        GrammarCompiler(Tokenizer.load(DEMO), 2048, [1]).compile(regex="a")
