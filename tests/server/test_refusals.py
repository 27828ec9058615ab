"""What is wrong is refused in OpenAI's shape, with the field's name and never with a 5xx (SRV-01, SMP-01, SRV-12)."""

import httpx
import openai
import pytest

from tests.server.conftest import CHAT, Running

WRONG = [
    (name, value)
    for name in (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "n", "max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs",
    )
    for value in (1e308, 2**64, True, "7", [], {})
] + [
    ("temperature", -1), ("top_p", 1.5), ("top_k", -2), ("n", 0), ("n", 65), ("max_tokens", 0), ("max_tokens", -1),
    ("n", 1.5), ("seed", 0.5), ("stop", ""), ("stop", [""]), ("stop", 7), ("stop", ["x"] * 17), ("stop", [1]),
    ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"999999": 1}), ("logit_bias", {"1": "x"}),
    ("logit_bias", {"1": 1e300}), ("logit_bias", []), ("stream", "yes"), ("stream", 1), ("logprobs", 1),
    ("top_logprobs", 21), ("ignore_eos", 1), ("stop_token_ids", ["1"]), ("stop_token_ids", [-1]), ("model", 5),
    ("messages", []), ("messages", "Hi"), ("messages", None), ("messages", {}), ("messages", [1]),
    ("messages", [CHAT[0], 5]), ("stream_options", {"include_usage": True}), ("stream_options", 3),
]  # fmt: skip
UNSUPPORTED = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("guided_json", {"type": "object"}),
    ("functions", [{"name": "f"}]), ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"x": 1}),
    ("audio", {"voice": "x"}), ("modalities", ["text", "audio"]), ("guided_regex", "a*"), ("best_of", 4),
    ("prompt_embeds", "AAAA"), ("suffix", "end"),
]  # fmt: skip
HARMLESS = dict(
    tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], best_of=1, stop=None,
    logit_bias=None, stream_options=None, top_logprobs=None, seed=None, functions=None,
)  # fmt: skip


def refusal(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
    assert 5 < len(error["message"]) < 600 and response.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize("name, value", WRONG, ids=lambda value: str(value)[:20])
def test_a_bad_value_names_its_field(server, name, value):
    wishes = {"logprobs": True} if name == "top_logprobs" else {}
    error = refusal(server.chat(**wishes | {name: value}))
    assert error["type"] == "invalid_request_error" and error["param"].split("[")[0] == name, error


@pytest.mark.parametrize("name, value", UNSUPPORTED, ids=lambda value: str(value)[:20])
def test_what_would_change_the_answer_is_refused(server, name, value):
    error = refusal(server.chat(**{name: value}))
    assert (error["param"], error["code"]) == (name, "unsupported")


def test_what_changes_nothing_is_taken_and_what_is_ignored_is_listed(server):
    answer = server.chat(**HARMLESS, user="me", metadata={"a": "b"}, store=True, **{"x\r\ny: 1": 1, "ü": 2})
    assert answer.status_code == 200
    listed = answer.headers["x-ignored-fields"].split(", ")
    assert listed == ["user", "metadata", "store", "x\\r\\ny: 1", "\\xfc"]
    assert "x-ignored-fields" not in server.chat(**HARMLESS).headers


@pytest.mark.parametrize("messages, param", [
    ([{"role": "boss", "content": "x"}], "messages[0].role"),
    ([*CHAT, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}], "messages"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
     "messages[0].content[0].image_url"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}], "messages"),
    ([{"role": "tool", "content": "x"}], "messages"),
    ([{"role": "user", "content": "x"}] * 3000, "messages"),
    ([{"role": "user", "content": "x" * 600_000}], "messages"),
])  # fmt: skip
def test_bad_messages_name_the_place(server, messages, param):
    assert refusal(server.chat(messages=messages))["param"] == param


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], 2], {}, 5, None, [1.5], [True], [-1], [10**9], [2**70]])
def test_bad_prompts(server, prompt):
    error = refusal(server.post("/v1/completions", prompt=prompt))
    assert error["param"] == "prompt"


def test_prompts_that_are_too_many_or_too_long(server):
    assert refusal(server.post("/v1/completions", prompt=["a"] * 1000))["param"] == "prompt"
    error = refusal(server.post("/v1/completions", prompt=["a"] * 64, n=64))
    assert error["param"] == "prompt" and "64 prompts with n = 64 make 4,096 answers; at most 80" in error["message"]
    for text in ("word " * 5000, "word " * 110_000):  # the second is not even tokenized
        error = refusal(server.chat(messages=[{"role": "user", "content": text}]))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages"), error
        error = refusal(server.post("/v1/completions", prompt=text, stream=True))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt"), error
    assert "550,000 characters; at most 524,288" in error["message"]
    assert refusal(server.post("/tokenize", prompt=text))["param"] == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model="demo/chat", messages=[])
    assert caught.value.param == "messages"


def test_echo_with_logprobs_is_not_streamed(server):
    error = refusal(server.post("/v1/completions", prompt="x", echo=True, logprobs=1, stream=True))
    assert error["param"] == "stream"


def test_the_model_is_checked(server):
    error = refusal(server.chat(model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "demo/chat" in error["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b'{"messages": NaN}', b'{"temperature": Infinity, "messages": []}', b"\xff\xfe",
    b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a":' * 100_000, b'{"temperature": 1e999, "messages": []}', b"\0" * 9,
    b'{"seed": ' + b"9" * 5000 + b"}", b'{"logit_bias": {"1": ' + b"[" * 900 + b"]" * 900 + b'}, "messages": []}',
])  # fmt: skip
def test_bodies_that_are_no_requests(server, body):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        refusal(httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "extra", ['"user": NaN', '"user": -Infinity', '"user": 1, "user": 2', '"user": {"a": 1, "a": 1}']
)
def test_json_that_python_would_take_is_refused_all_the_same(server, extra):
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 1, {extra}}}'
    sent = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert "not valid JSON" in refusal(sent)["message"]


def test_a_number_of_very_many_digits_is_refused_in_our_words(server):
    body = b'{"seed": ' + b"9" * 5000 + b"}"
    sent = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert refusal(sent)["message"] == "the body is not valid JSON: a number has more than 4,300 digits"


def test_a_body_of_very_many_lists_is_not_read(server):
    error = refusal(server.chat(user=[[]] * 100_000))
    assert "100,000 opening brackets" in error["message"]


def test_deep_json_in_every_field(server):
    deep = '{"a":' * 400 + "1" + "}" * 400
    for name in ("tools", "metadata", "messages", "stop", "response_format", "user", "logit_bias", "stream_options"):
        body = f'{{"max_tokens": 1, "messages": [{{"role": "user", "content": "x"}}], "{name}": {deep}}}'
        body = body.replace('"messages": [{"role": "user", "content": "x"}], "messages"', '"messages"')
        answer = httpx.post(
            server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (200, 400), answer.text
        calls = f'{{"messages": [{{"role": "assistant", "tool_calls": [{deep}]}}], "max_tokens": 1}}'
    answer = httpx.post(
        server.url + "/v1/chat/completions", content=calls, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400), answer.text


def test_bodies_that_are_too_large(demo):
    with Running(demo, max_body=1000) as small:
        error = refusal(small.chat(user="x" * 1000), 413)
        assert "1,000 bytes" in error["message"]

        def pieces():
            for _ in range(100):
                yield b" " * 100

        sent = httpx.post(small.url + "/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        refusal(sent, 413)
        assert small.chat().status_code == 200
        small.settle()


def test_types_routes_and_methods(server):
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
    for kind in kinds:
        refusal(httpx.post(server.url + "/v1/completions", content=b"{}", headers={"content-type": kind}), 415)
    wrong = httpx.get(server.url + "/v1/chat/completions")
    assert refusal(wrong, 405) and wrong.headers["allow"] == "POST"
    refusal(httpx.delete(server.url + "/v1/models"), 405)
    refusal(httpx.get(server.url + "/v2"), 404)
    refusal(httpx.get(server.url + "/docs"), 404)
    assert "no embeddings" in refusal(server.post("/v1/embeddings", input="x"))["message"]


def test_tokenize_refuses_what_it_cannot_read(server):
    for fields in ({}, {"prompt": "x", "messages": CHAT}, {"prompt": 5}, {"messages": []}, {"prompt": "x", "model": 1}):
        refusal(server.post("/tokenize", **fields))
    for tokens in (None, "x", [-1], [10**12], [1.5], [True]):
        refusal(server.post("/detokenize", tokens=tokens))


def test_the_description_says_how_routes_answer_and_refuse(server):
    found = httpx.get(server.url + "/openapi.json").json()
    answers = {path: (*route.values(),)[0]["responses"] for path, route in found["paths"].items()}
    asked = [
        ("/v1/models/{name}", httpx.get(server.url + "/v1/models/x")),
        ("/metrics", httpx.get(server.url + "/metrics")),
    ]
    asked += [("/v1/embeddings", server.post("/v1/embeddings", input="x"))]
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        asked += [
            (path, server.post(path)),
            (path, server.post(path, model="x", prompt="x", tokens=[1], messages=CHAT)),
        ]
        asked += [(path, httpx.post(server.url + path, content="{}"))]
    assert [one.status_code for _, one in asked] == [404, 200, 400] + [400, 404, 415] * 4
    for path, one in asked:
        kinds = answers[path][str(one.status_code)]["content"]
        assert one.headers["content-type"].split(";")[0] in kinds, path
    assert "text/event-stream" in answers["/v1/chat/completions"]["200"]["content"]
    assert {"429", "500", "503"} <= answers["/v1/completions"].keys()
    assert "422" not in str(found) and "Refused" in found["components"]["schemas"]


def test_the_description_names_the_fields(server):
    found = httpx.get(server.url + "/openapi.json").json()
    schemas = found["components"]["schemas"]
    assert {"temperature", "logit_bias", "max_completion_tokens"} <= schemas["ChatRequest"]["properties"].keys()
    assert "/v1/chat/completions" in found["paths"]
    text = str(found)
    for name in ("ChatRequest", "CompletionRequest", "StreamOptions"):
        assert name in schemas and f"#/components/schemas/{name}" in text
