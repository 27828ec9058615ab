"""Answers that must have a form, over the API: response_format, structured_outputs, and tools that must be called."""

import json
import re
import sys
import threading
import time

import openai
import pydantic
import pytest

from lite_llm.text.tools import MarkedCalls
from tests.server.conftest import CHAT, COPY, PARIS, Running, opened
from tests.server.test_refusals import refusal
from tests.server.test_tools import ASKED, made, streamed
from tests.text.test_grammar import TOOLS
from tests.text.test_tools import HERMES, LLAMA


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    city: str = pydantic.Field(max_length=12)
    sure: bool


def formed(**wishes) -> dict:
    schema = {"name": "answer", "strict": True, "schema": Answer.model_json_schema()}
    return {"response_format": {"type": "json_schema", "json_schema": schema | wishes}, "max_tokens": 200}


def test_the_official_client_gets_what_its_class_says(server):
    parsed = server.openai.chat.completions.parse(model="demo/chat", messages=CHAT, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer) and parsed.choices[0].finish_reason == "stop"
    wishes = dict(model="demo/chat", messages=CHAT, temperature=1.5, n=3, seed=5, logprobs=True, **formed())
    choices = server.openai.chat.completions.create(**wishes).choices
    texts = [choice.message.content for choice in choices]
    assert len({Answer.model_validate_json(text).city for text in texts}) == 3
    assert ["".join(one.token for one in choice.logprobs.content) for choice in choices] == texts
    told = ["", "", ""]
    for chunk in server.openai.chat.completions.create(**wishes, stream=True):
        for choice in chunk.choices:
            told[choice.index] += choice.delta.content or ""
    assert told == texts


@pytest.mark.parametrize("wish, check", [
    ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"json": Answer.model_json_schema()}}, Answer.model_validate_json),
    ({"structured_outputs": {"json": json.dumps(Answer.model_json_schema())}}, Answer.model_validate_json),
    ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"regex": "[A-C]{2}-[0-9]{3}"}}, re.compile("[A-C]{2}-[0-9]{3}").fullmatch),
    ({"structured_outputs": {"choice": ["Rome", "Oslo"], "regex": None}}, {"Rome", "Oslo"}.__contains__),
    ({"structured_outputs": {"grammar": 'start: "ja" | "nein"'}}, {"ja", "nein"}.__contains__),
    ({"response_format": {"type": "text"}, "structured_outputs": {}}, PARIS.__eq__),
])  # fmt: skip
def test_every_way_to_say_it(server, wish, check):
    shut = "" if "text" in str(wish) else " Say {}."
    messages = [{"role": "user", "content": CHAT[0]["content"] + shut}]
    logit_bias = {str(server.llm.tokenizer.encode("}")[-1]): 30} if "object" in str(wish) else None
    answer = server.chat(**wish, messages=messages, logit_bias=logit_bias, max_tokens=300).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and check(answer["message"]["content"]), answer
    prompt = dict(prompt=CHAT[0]["content"], echo=True, max_tokens=300, temperature=0.5, logit_bias=logit_bias)
    answer = server.post("/v1/completions", **wish | prompt).json()["choices"][0]
    if "text" not in str(wish):
        assert check(answer["text"].removeprefix(CHAT[0]["content"])) and answer["finish_reason"] == "stop", answer


def test_a_description_is_listed_as_ignored(server):
    assert server.chat(**formed(description="Short.")).headers["x-ignored-fields"].endswith("json_schema.description")
    assert "x-ignored-fields" not in server.chat(**formed(description=None)).headers


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize("wish, param", [
    ({"response_format": "json"}, "response_format"), ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    (formed(examples=[1]), "response_format.json_schema.examples"),
    (formed(schema={"type": "obj"}), SCHEMA), (formed(schema={"uniqueItems": True}), SCHEMA),
    (formed(schema={"enum": ["x" * 70_000]}), SCHEMA), (formed(schema={"$ref": "#/x"}), SCHEMA),
    (formed() | {"ignore_eos": True}, "ignore_eos"),
    (formed() | {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": "a"}, "structured_outputs"),
    ({"structured_outputs": {"regex": None}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 7]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
])  # fmt: skip
def test_what_cannot_be_honoured_names_its_field(server, wish, param):
    error = refusal(server.chat(**wish))
    assert error["param"] == param and param in error["message"], error
    assert refusal(server.post("/v1/completions", prompt="x", **wish))["param"] == param


def test_a_keyword_that_is_not_supported_is_named(server):
    message = refusal(server.chat(**formed(schema={"type": "object", "not": {}})))["message"]
    assert message == SCHEMA + ' is no usable grammar: Unimplemented keys: ["not"]'


ITEMS = [f"{number}. item" for number in range(2100)]


def test_a_long_list_is_chosen_from(server):
    wishes = {"temperature": 3.0, "max_tokens": 60, "structured_outputs": {"choice": ITEMS}}
    texts = {server.chat(**wishes, seed=seed).json()["choices"][0]["message"]["content"] for seed in range(3)}
    assert texts <= set(ITEMS) and len(texts) > 1


@pytest.mark.parametrize("wish, param", [
    ({"structured_outputs": {"grammar": 'start: start "a"'}}, "structured_outputs.grammar"),
    (formed(schema={"$ref": "#"}), SCHEMA),
])  # fmt: skip
def test_a_grammar_without_an_end_is_told_so(server, wish, param):
    error = refusal(server.chat(**wish))
    assert error["param"] == param and "always leads back to itself" in error["message"]
    assert "verbose" not in error["message"] and "Bias" not in error["message"]


def test_a_grammar_that_fails_later_is_named_as_the_reason(server):
    """It compiles, and some tokens into the answer its limits are reached."""
    wishes = {
        "prompt": "x",
        "max_tokens": 100,
        "structured_outputs": {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    }
    sent = server.post("/v1/completions", **wishes)
    error = refusal(sent)
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "grammar_stuck")
    assert "grammar" in error["message"] and sent.headers["x-should-retry"] == "false"
    events = server.post("/v1/completions", **wishes, stream=True).text.strip().split("\n\n")
    assert len(events) > 1 and json.loads(events[-1][6:]) == {"error": error}


def test_where_there_can_be_no_grammars_they_are_refused(server, monkeypatch):
    with opened(COPY) as llm, Running(llm) as running:
        error = refusal(running.post("/v1/completions", prompt="x", structured_outputs={"regex": "a"}))
        assert (error["param"], error["code"]) == ("structured_outputs.regex", "unsupported")
    monkeypatch.setattr(server.llm.grammars, "_known", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = refusal(server.chat(**formed(schema={"enum": ["nobody compiled this before"]})))
    assert (error["param"], error["code"]) == (SCHEMA, "unsupported") and "requirements-grammar.txt" in error["message"]


def test_nobody_waits_while_a_grammar_is_compiled(server, monkeypatch):
    grammars, compiling = server.llm.grammars, threading.Event()
    compile = grammars.compile

    def slow(**wish):
        compiling.set()
        time.sleep(1.0)
        return compile(**wish)

    monkeypatch.setattr(grammars, "compile", slow)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(server.chat(**formed())))
    asking.start()
    assert compiling.wait(5)
    assert server.chat().json()["choices"][0]["message"]["content"] == PARIS and not answers
    asking.join(10)
    Answer.model_validate_json(answers[0].json()["choices"][0]["message"]["content"])


def test_who_leaves_ends_a_constrained_answer(server):
    wishes = dict(model="demo/chat", messages=CHAT, max_tokens=1500, stream=True)
    endless = {"type": "object", "properties": {"x": {"type": "string", "minLength": 5000}}, "required": ["x"]}
    stream = server.openai.chat.completions.create(**wishes, response_format=formed(schema=endless)["response_format"])
    for _ in range(4):
        next(stream)
    stream.close()
    server.settle()


# ---- calls that are forced


@pytest.fixture(scope="module", params=["hermes", "special", "llama"])
def forced(request, tmp_path_factory):
    template = LLAMA if request.param == "llama" else HERMES
    folder = made(tmp_path_factory.mktemp(request.param) / "tiny", template, request.param == "special")
    with opened(folder) as llm, Running(llm) as running:
        yield running
        running.settle()


def called(running: Running, **wishes) -> tuple[list[tuple[str, str]], str]:
    """The calls of a random model's answer, whole and streamed alike."""
    wishes = dict(model="tiny", messages=ASKED, tools=TOOLS, temperature=1.0, seed=1, max_tokens=600) | wishes
    choice = running.openai.chat.completions.create(**wishes).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    content, told, reason = streamed(running.openai.chat.completions.create(**wishes, stream=True))
    assert [call[1:] for call in told] == calls and reason == choice.finish_reason
    assert (content or None) == choice.message.content
    return calls, reason


def test_a_forced_call_is_one_and_keeps_to_the_schema(forced):
    assert called(forced, tool_choice="auto", seed=1)[0] == [], "by itself this model calls nothing"
    seen = set()
    for seed in range(3):
        calls, reason = called(forced, tool_choice="required", seed=seed)
        assert calls and reason == "tool_calls"
        for name, arguments in calls:
            found = json.loads(arguments)
            assert found == {} if name == "clock" else found["city"] in ("Paris", "Rome") and len(found) == 1
        seen |= {name for name, _ in calls}
    assert seen == {"weather", "clock"}
    no_end = {"logit_bias": dict.fromkeys(map(str, forced.llm.eos_ids), -100)}
    calls, reason = called(forced, tool_choice="required", max_tokens=150, **no_end)
    whole = forced.llm.grammars._form is MarkedCalls  # Llama's are certain at the end only, which was cut off
    assert len(calls) > 1 if whole else not calls
    assert reason == "length"
    calls, reason = called(forced, tool_choice="required", parallel_tool_calls=False, **no_end)
    assert len(calls) == 1 and reason == "tool_calls"
    for name in seen:
        choice = {"type": "function", "function": {"name": name}}
        calls, reason = called(forced, tool_choice=choice)
        assert ([call[0] for call in calls], reason) == ([name], "tool_calls")


@pytest.mark.parametrize("parameters", [{}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}])
def test_a_forced_call_of_a_tool_without_parameters_has_no_arguments(forced, parameters):
    tools = [{"type": "function", "function": {"name": "clock", "description": "The time."} | parameters}]
    for seed in range(3):
        wishes = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        ((name, arguments),), reason = called(forced, **wishes)
        assert (name, json.loads(arguments), reason) == ("clock", {}, "tool_calls")


def test_a_forced_call_that_was_cut_says_so(forced):
    calls, reason = called(forced, tool_choice="required", max_tokens=3)
    assert (calls, reason) == ([], "length")


BAD = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
FORMAT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("wishes, param", [
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "sundial"}}}, "tool_choice"),
    *(({"tool_choice": choice}, "tool_choice") for choice in (
        {"type": "function"}, {"function": {"name": "clock"}}, {"type": "allowed_tools"}, 5, [], "any",
        {"type": "function", "function": {"name": 5}})),
    ({"tools": [*TOOLS, BAD], "tool_choice": "required"}, "tools[2].function.parameters"),
    (FORMAT, "response_format"), (FORMAT | {"tool_choice": "required"}, "response_format"),
    ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
])  # fmt: skip
def test_a_choice_that_cannot_be_honoured_names_its_field(forced, wishes, param):
    assert refusal(forced.chat(**{"tools": TOOLS} | wishes))["param"] == param


def test_what_is_not_called_may_have_any_schema(forced):
    wishes = {"tools": [*TOOLS, BAD], "tool_choice": {"type": "function", "function": {"name": "clock"}}}
    assert forced.chat(**wishes, max_tokens=200).json()["choices"][0]["message"]["tool_calls"]
    assert forced.chat(tools=[*TOOLS, BAD]).status_code == 200
    assert forced.chat(**FORMAT, tools=TOOLS, tool_choice="none", max_tokens=30).status_code == 200
    with pytest.raises(openai.BadRequestError):
        forced.openai.chat.completions.create(model="tiny", messages=ASKED, tool_choice="required")
