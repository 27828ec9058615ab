"""Whatever a client sends is honoured, refused, or listed as ignored: nothing is lost in silence."""

import httpx
import pytest

from tests.llm.llava import make, noise
from tests.server.conftest import CHAT, PARIS, Running, opened
from tests.server.test_pictures import asked, data_url
from tests.server.test_refusals import refusal
from tests.server.test_tools import ASKED, WEATHER, made
from tests.text.build import byte_level, write
from tests.text.test_tools import HERMES


def listed(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-ignored-fields", "").split(", ")


def test_fields_within_fields_are_listed_by_their_path(server):
    parts = [{"type": "text", "text": CHAT[0]["content"], "cache_control": {"type": "ephemeral"}, "citations": None}]
    message = {"role": "user", "content": parts, "name": "Ada", "foo": 1, "refusal": None}
    options = {"include_usage": True, "include_obfuscation": False}
    answer = server.chat(messages=[message], user="me", store=None, stream=True, stream_options=options)
    names = ["user", "stream_options.include_obfuscation", "messages.name", "messages.foo"]
    assert listed(answer) == [*names, "messages.content.cache_control"]
    assert listed(server.chat(messages=[{"role": "user", "content": "x"}])) == [""]


def test_tools_and_the_choice_of_one(tmp_path):
    with opened(made(tmp_path / "tiny", HERMES, False)) as llm, Running(llm) as running:
        choice = {"type": "function", "function": {"name": "weather", "x": 1}, "mode": "auto"}
        answer = running.chat(messages=ASKED, tools=[WEATHER | {"cache_control": 1}], tool_choice=choice, max_tokens=4)
        assert listed(answer) == ["tools.cache_control", "tool_choice.mode", "tool_choice.function.x"]
        call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        told = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        told += [{"role": "tool", "content": "Sunny.", "tool_call_id": "c"}]
        assert listed(running.chat(messages=[*ASKED, *told], tools=[WEATHER], max_tokens=4)) == [""]
        running.settle()


def test_what_a_template_shows_is_not_ignored(tmp_path):
    template = "{% for m in messages %}{{ m.name }}: {{ m.content }}\n{{ m.reasoning_content }}{% endfor %}"
    with opened(made(tmp_path / "tiny", template, False)) as llm, Running(llm) as running:
        message = {"role": "user", "content": "x", "name": "Ada", "reasoning_content": "y", "tool_calls": []}
        assert listed(running.chat(messages=[message], max_tokens=2)) == ["messages.tool_calls"]
        running.settle()


def test_what_stands_beside_a_picture(tmp_path):
    with opened(make(tmp_path / "llava"), kv_tokens=400, max_requests=4, step_tokens=64) as llm:
        with Running(llm) as running:
            (message,) = asked(data_url(noise(20, 20)))
            message["content"][0]["image_url"]["detail"] = "low"
            message["content"][0]["cache_control"] = {"type": "ephemeral"}
            found = listed(running.chat(messages=[message], max_tokens=2))
            assert found == ["messages.content.cache_control", "messages.content.image_url.detail"]
            running.settle()


def test_tokenize_and_detokenize(server):
    plain = server.post("/tokenize", prompt="Hello").json()["tokens"]
    bare = server.post("/tokenize", prompt="Hello", add_special_tokens=False)
    assert [server.llm.tokenizer.bos_id, *bare.json()["tokens"]] == plain and listed(bare) == [""]
    same = server.post("/tokenize", prompt="Hello", add_special_tokens=True, return_token_strs=True)
    assert same.json()["tokens"] == plain and listed(same) == ["return_token_strs"]
    chat = server.post("/tokenize", messages=CHAT, add_special_tokens=False, add_generation_prompt=True)
    assert listed(chat) == ["add_generation_prompt", "add_special_tokens"]
    text = server.post("/detokenize", tokens=plain).json()["prompt"]
    assert text != "Hello" and text.endswith("Hello")
    assert server.post("/detokenize", tokens=plain, skip_special_tokens=True).json()["prompt"] == "Hello"
    assert listed(server.post("/detokenize", tokens=plain, foo=1)) == ["foo"]


@pytest.mark.parametrize("wishes", [
    {"functions": []}, {"function_call": "auto"}, {"best_of": 1}, {"modalities": ["text"]}, {"user": None},
])  # fmt: skip
def test_what_asks_for_what_happens_anyway_is_honoured(server, wishes):
    answer = server.chat(**wishes)
    assert listed(answer) == [""] and answer.json()["choices"][0]["message"]["content"] == PARIS


def test_an_empty_prompt_names_its_field(tmp_path):
    """This tokenizer puts no BOS before a text, so only the engine sees that nothing is left."""
    folder = made(tmp_path / "tiny", HERMES)
    with opened(write(folder, byte_level(adds_bos=False))) as llm, Running(llm) as running:
        error = refusal(running.post("/v1/completions", prompt=""))
        assert error["param"] == "prompt" and "empty" in error["message"]
        running.settle()
