"""Tool calls over the API, with the official client: what a model wrote as a call arrives as one, in OpenAI's shape."""

import json

import openai
import pytest
import torch
import transformers
from tokenizers import AddedToken

from tests.server.conftest import Running, opened
from tests.server.test_refusals import refusal
from tests.text.build import byte_level, write
from tests.text.test_tools import HERMES, LLAMA, MISTRAL

ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
PARIS = '{"city": "Paris <\\u00e9>", "days": 2.50}'
CALL = '<tool_call>\n{"name": "weather", "arguments": ' + PARIS + "}\n</tool_call>"
TWO = CALL + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
BARE = '{"name": "weather", "parameters": ' + PARIS + "}"


class Saying(Running):
    """A server of a random model, whose requests all answer what `text` says, token by token, and then stop."""

    def __init__(self, llm):
        super().__init__(llm)
        self.text, scheduler = "", llm.engine.scheduler
        commit, stop = scheduler.commit, llm.tokenizer.encode("<|eot_id|>")[-1]

        def committing(requests, tokens):
            script = [*llm.tokenizer.encode("<s>" + self.text)[1:], *[stop] * 200]
            commit(requests, [[script[request.output_len]] for request in requests])

        scheduler.commit = committing

    def ask(self, text: str, **wishes):
        self.text = text
        create = self.openai.chat.completions.create
        return create(model="tiny", **{"messages": ASKED, "tools": [WEATHER, CLOCK], **wishes})


def made(folder, template: str, special: bool = False):
    """A checkpoint; `special`: so are its tokens for calls."""
    tokenizer = byte_level()
    for text in ("<tool_call>", "</tool_call>"):
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|python_tag|>", normalized=False)])
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write(folder, tokenizer, template)


@pytest.fixture(scope="module", params=[False, True], ids=["added", "special"])
def hermes(request, tmp_path_factory):
    folder = made(tmp_path_factory.mktemp("hermes") / "tiny", HERMES, request.param)
    with opened(folder) as llm, Saying(llm) as running:
        yield running
        running.settle()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with opened(made(tmp_path_factory.mktemp("llama") / "tiny", LLAMA)) as llm, Saying(llm) as running:
        yield running
        running.settle()


def streamed(chunks) -> tuple[str, list[tuple[str, str, str]], str]:
    """Content, calls as id, name and arguments, and the finish reason; the shape of the chunks is checked."""
    content, calls, reasons = "", [], []
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.index == len(calls):
                assert call.id.startswith("call_") and call.type == "function" and call.function.arguments == ""
                calls.append([call.id, call.function.name, ""])
            else:
                assert call.index == len(calls) - 1 and call.id is None and call.function.name is None
                calls[-1][2] += call.function.arguments
        reasons.append(choice.finish_reason)
    assert not any(reasons[:-1])
    return content, [tuple(call) for call in calls], reasons[-1]


@pytest.mark.parametrize("text, content, calls", [
    (CALL, None, [("weather", PARIS)]),
    ("Let me see.\n" + TWO, "Let me see.\n", [("weather", PARIS), ("clock", "{}")]),
    ("It rains.", "It rains.", []),
    ('<tool_call>{"name": "clock", "arguments": {]}</tool_call>',
     '<tool_call>{"name": "clock", "arguments": {]}</tool_call>', []),
    (CALL.replace("weather", "launch"), CALL.replace("weather", "launch"), []),
])  # fmt: skip
def test_calls_whole_and_as_a_stream(hermes, text, content, calls):
    choice = hermes.ask(text).choices[0]
    found = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in found] == calls
    assert choice.message.content == content and choice.finish_reason == ("tool_calls" if calls else "stop")
    assert len({call.id for call in found}) == len(found) and all(call.type == "function" for call in found)
    told, streams, reason = streamed(hermes.ask(text, stream=True))
    assert (told, reason) == (content or "", choice.finish_reason)
    assert [call[1:] for call in streams] == calls and not {call[0] for call in streams} & {call.id for call in found}


def test_the_shape_of_the_documents(hermes):
    hermes.text = CALL
    message = hermes.chat(tools=[WEATHER], max_tokens=200).json()["choices"][0]["message"]
    assert message.keys() == {"role", "content", "refusal", "tool_calls"} and message["content"] is None
    (call,) = message["tool_calls"]
    assert call.keys() == {"id", "type", "function"} and call["function"].keys() == {"name", "arguments"}
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris <é>", "days": 2.5}
    assert len(call["id"]) == 29 and call["id"].startswith("call_")
    hermes.text = "It rains."
    assert "tool_calls" not in hermes.chat(tools=[WEATHER]).json()["choices"][0]["message"]


def test_several_answers_and_usage(hermes):
    answer = hermes.ask(TWO, n=3)
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [2, 2, 2]
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 6
    found = [[], [], []]
    chunks = list(hermes.ask(TWO, n=3, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            found[choice.index] += [call.index for call in choice.delta.tool_calls or ()]
    assert found == [[0, 0, 1, 1]] * 3 and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_logprobs_are_of_every_token_also_of_calls(hermes):
    hermes.text = "So.\n" + CALL
    whole = hermes.ask(hermes.text, logprobs=True).choices[0].logprobs.content
    told = []
    for chunk in hermes.ask(hermes.text, logprobs=True, stream=True):
        told += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert len(told) == len(whole) > 20


def test_ids_are_of_every_token_also_of_calls(hermes):
    wishes = {"extra_body": {"return_token_ids": True}}
    whole = hermes.ask("So.\n" + CALL, **wishes).choices[0].token_ids
    chunks = [chunk.choices[0] for chunk in hermes.ask("So.\n" + CALL, stream=True, **wishes)]
    assert [token for choice in chunks for token in getattr(choice, "token_ids", [])] == whole and len(whole) > 20


def test_an_answer_that_was_cut_says_so(hermes):
    whole = hermes.ask(TWO)
    most = whole.usage.completion_tokens - 8
    choice = hermes.ask(TWO, max_tokens=most).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert choice.finish_reason == "length" and choice.message.content.startswith("\n<tool_call>")
    assert streamed(hermes.ask(TWO, max_tokens=most, stream=True))[2] == "length"


def test_without_parallel_calls_the_answer_ends_with_its_first(hermes):
    choice = hermes.ask("So.\n" + TWO + " Bye.", parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert (choice.message.content, choice.finish_reason) == ("So.\n", "tool_calls")
    content, calls, reason = streamed(hermes.ask("So.\n" + TWO + " Bye.", parallel_tool_calls=False, stream=True))
    assert (content, len(calls), reason) == ("So.\n", 1, "tool_calls")
    whole = hermes.ask(TWO, parallel_tool_calls=True)
    assert len(whole.choices[0].message.tool_calls) == 2


def test_with_none_or_no_tools_nothing_is_a_call(hermes):
    for wishes in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}, {"tools": []}):
        choice = hermes.ask(CALL, **wishes).choices[0]
        assert choice.message.content == CALL and not choice.message.tool_calls and choice.finish_reason == "stop"
    told, plain = hermes.ask("x"), hermes.ask("x", tool_choice="none")
    assert plain.usage.prompt_tokens == hermes.ask("x", tools=openai.NOT_GIVEN).usage.prompt_tokens
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 50


def test_a_conversation_with_results_goes_on(hermes, llama):
    for running, text in ((hermes, CALL), (llama, BARE)):
        message = running.ask(text).choices[0].message
        id = message.tool_calls[0].id
        messages = [
            *ASKED,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": id, "content": "Rain"},
        ]
        assert running.ask("It rains.", messages=messages).choices[0].message.content == "It rains."
        tokens = running.post("/tokenize", messages=messages, tools=[WEATHER]).json()["tokens"]
        prompt = running.post("/detokenize", tokens=tokens).json()["prompt"]
        assert json.dumps(json.loads(PARIS), ensure_ascii=False) in prompt and "tool\nRain" in prompt
        assert '"description": "Tells it."' in prompt and prompt.endswith("assistant\n")


def test_results_get_their_functions_name_for_templates_that_want_it(tmp_path):
    template = HERMES.replace("{{ m.role }}\n", "{{ m.role }} {{ m.name }}\n")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "call_1", "content": "x"}]
    with opened(made(tmp_path / "tiny", template)) as llm, Running(llm) as running:
        tokens = running.post("/tokenize", messages=messages, tools=[WEATHER]).json()["tokens"]
        assert "tool weather\nx" in running.post("/detokenize", tokens=tokens).json()["prompt"]


def test_llamas_calls(llama):
    for text in (BARE, "<|python_tag|>" + BARE, BARE + '; {"name": "clock", "parameters": {}}'):
        content, calls, reason = streamed(llama.ask(text, stream=True))
        assert (content, reason) == ("", "tool_calls")
        assert calls[0][1:] == ("weather", PARIS) and len(calls) == 1 + text.count(";")
        message = llama.ask(text).choices[0].message
        assert message.content is None and [call.function.name for call in message.tool_calls][0] == "weather"
    for text in (BARE + " is it", "I call " + BARE, BARE + "; x"):
        assert streamed(llama.ask(text, stream=True)) == (text, [], "stop")
        assert llama.ask(text).choices[0].message.content == text


def test_what_of_a_tool_nothing_is_made_of_is_listed(hermes):
    tool = {"type": "function", "function": WEATHER["function"] | {"strict": True, "colour": "red"}}
    answer = hermes.chat(tools=[tool])
    assert answer.headers["x-ignored-fields"] == "tools.colour, tools.strict"
    assert "x-ignored-fields" not in hermes.chat(tools=[WEATHER, CLOCK]).headers


def function(**fields) -> list[dict]:
    return [WEATHER, {"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize("wishes, param", [
    ({"tools": {}}, "tools"), ({"tools": "x"}, "tools"), ({"tools": [CLOCK] * 129}, "tools"),
    ({"tools": [5]}, "tools[0]"), ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [CLOCK, {"type": "function"}]}, "tools[1]"), ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    *(({"tools": function(name=name)}, "tools[1].function.name") for name in ("", "a b", "x" * 65, None, 5, "f\n")),
    ({"tools": function(description=[])}, "tools[1].function.description"),
    ({"tools": function(parameters=[])}, "tools[1].function.parameters"),
    ({"tools": function(description="x" * (1 << 18))}, "tools"),
    ({"tools": function(parameters=json.loads('{"a":' * 70 + "1" + "}" * 70))}, "tools"),
    ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
])  # fmt: skip
def test_bad_tools_name_the_place(llama, wishes, param):
    assert refusal(llama.chat(**wishes))["param"] == param


def test_the_largest_tools_that_are_taken(llama):
    """The template is through with them in time; that they do not fit is the context's matter."""
    schema = {f"field{index}": {"type": "string", "enum": ["a", "b"]} for index in range(4500)}
    assert refusal(llama.chat(tools=function(parameters=schema)))["code"] == "context_length_exceeded"
    deep = json.loads('{"a":' * 58 + "1" + "}" * 58)
    assert llama.chat(tools=function(parameters=deep)).status_code == 200


@pytest.mark.parametrize("depth", [100, 400, 900, 1100, 40_000])
def test_deep_arguments_in_messages(llama, depth):
    arguments = "[" * depth + "]" * depth
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = llama.chat(messages=[*ASKED, {"role": "assistant", "tool_calls": [call]}, *ASKED])
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(
    "calls", [[{}], [{"id": 5}], [{"function": 5}], [5], "x", [{"id": [], "function": {"name": "f"}}]]
)
def test_broken_calls_in_messages(llama, calls):
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "x"}]
    messages[-1]["tool_call_id"] = []
    refusal(llama.chat(messages=messages, tools=[CLOCK]))


def test_checkpoints_that_take_no_tools(server, tmp_path):
    error = refusal(server.chat(tools=[CLOCK]))
    assert (error["param"], error["code"]) == ("tools", "unsupported") and "template" in error["message"]
    assert refusal(server.post("/v1/completions", prompt="x", tools=[CLOCK]))["param"] == "tools"
    with opened(made(tmp_path / "tiny", MISTRAL)) as llm, Running(llm) as running:
        assert "form that is not read" in refusal(running.chat(tools=[CLOCK]))["message"]
        assert running.chat(tools=[CLOCK], tool_choice="none").status_code == 200
