"""The official client: what it sends is understood, and what it gets is what it expects (SRV-02, SRV-09)."""

import json

import httpx
import openai
import pytest

from tests.server.conftest import CHAT, PARIS

pytestmark = pytest.mark.filterwarnings("error::pydantic.warnings.PydanticDeprecationWarning")


def test_a_chat(server):
    answer = server.openai.chat.completions.create(model="demo/chat", messages=CHAT)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", PARIS, "stop")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and choice.logprobs is None
    assert answer.usage.prompt_tokens > 5 and answer.usage.completion_tokens == 9
    again = server.openai.chat.completions.create(model="demo/chat", messages=CHAT)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.id != answer.id


def test_a_stream_has_openais_shape(server):
    chunks = list(
        server.openai.chat.completions.create(
            model="demo/chat", messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
    )
    first, last, usage = chunks[0], chunks[-2], chunks[-1]
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == PARIS
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage.completion_tokens == 9
    assert all(chunk.usage is None and chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    raw = server.chat(stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert ['"usage":null' in event for event in raw[:-3]] == [True] * (len(raw) - 3) and raw[-2] == "data: [DONE]"
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"


def test_usage_can_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        server.openai.chat.completions.create(model="demo/chat", messages=CHAT, stream=True, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 9 and all(chunk.usage.prompt_tokens > 5 for chunk in chunks)


def test_without_include_usage_no_chunk_has_any(server):
    with server.openai.chat.completions.with_streaming_response.create(
        model="demo/chat", messages=CHAT, stream=True
    ) as response:
        text = response.read().decode()
    assert text.count("data: {") > 5, "tokens come as they are made"
    assert "usage" not in text and text.endswith("\n\ndata: [DONE]\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")


def test_several_answers_and_their_seeds(server):
    wishes = dict(model="demo/chat", messages=CHAT, temperature=4, max_tokens=8)
    one, two = (server.openai.chat.completions.create(**wishes, n=3, seed=5) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and len(set(texts)) > 1
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    alone = server.openai.chat.completions.create(**wishes, seed=6)
    assert alone.choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for chunk in server.openai.chat.completions.create(**wishes, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs_of_a_chat(server):
    wishes = dict(model="demo/chat", messages=CHAT, logprobs=True, top_logprobs=3)
    found = server.openai.chat.completions.create(**wishes).choices[0].logprobs.content
    assert "".join(one.token for one in found) == PARIS
    for one in found:
        assert one.logprob <= 0 and len(one.top_logprobs) == 3 and bytes(one.bytes).decode() == one.token
        assert one.top_logprobs[0].logprob == max(top.logprob for top in one.top_logprobs) >= one.logprob
    streamed = []
    for chunk in server.openai.chat.completions.create(**wishes, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [one.token for one in streamed] == [one.token for one in found]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in found], abs=1e-4)
    none = server.openai.chat.completions.create(model="demo/chat", messages=CHAT, logprobs=True)
    assert none.choices[0].logprobs.content[0].top_logprobs == []


def test_stop_strings_bias_and_lengths(server):
    def text(**wishes) -> tuple[str, str]:
        choice = server.openai.chat.completions.create(model="demo/chat", messages=CHAT, **wishes).choices[0]
        return choice.message.content, choice.finish_reason

    assert text(stop=" Paris") == ("The capital of France is", "stop")
    assert text(stop=["x-y", "France"]) == ("The capital of ", "stop")
    assert text(max_tokens=3) == ("The capital of", "length")
    assert text(max_completion_tokens=3, max_tokens=3) == ("The capital of", "length")
    longer = text(extra_body={"ignore_eos": True, "min_tokens": 12}, max_tokens=15)
    assert longer[1] == "length" and longer[0].startswith(PARIS)
    paris = server.post("/tokenize", prompt=" Paris").json()["tokens"][-1]
    assert "Paris" not in text(logit_bias={str(paris): -1e6})[0]
    assert text(temperature=2.0, extra_body={"top_k": 1}, seed=3) == (PARIS, "stop")
    assert text(temperature=2.0, top_p=1e-6, presence_penalty=0.0) == (PARIS, "stop")


def test_completions_take_texts_and_ids(server):
    create = server.openai.completions.create
    one = create(model="demo/chat", prompt="The capital of France", max_tokens=5, temperature=0)
    assert one.object == "text_completion" and one.usage.completion_tokens == 5
    assert one.choices[0].finish_reason == "length"
    ids = server.post("/tokenize", prompt="The capital of France").json()["tokens"]
    assert create(model="demo/chat", prompt=ids, max_tokens=5, temperature=0).choices[0].text == one.choices[0].text
    several = create(model="demo/chat", prompt=[ids, ids[:3]], n=2, max_tokens=5, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [one.choices[0].text] * 2
    assert several.usage.prompt_tokens == len(ids) + 3 and several.usage.completion_tokens == 20
    texts = create(model="demo/chat", prompt=["The capital of France", "The"], max_tokens=5, temperature=0)
    assert texts.choices[0].text == one.choices[0].text
    assert create(model="demo/chat", prompt="The").usage.completion_tokens <= 16


def test_completions_echo_stream_and_logprobs(server):
    create, wishes = server.openai.completions.create, dict(model="demo/chat", prompt="The capital of France")
    plain = create(**wishes, temperature=0, logprobs=2).choices[0]
    assert "".join(plain.logprobs.tokens) == plain.text and plain.logprobs.text_offset[0] == 0
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs) == len(plain.logprobs.top_logprobs)
    echoed = create(**wishes, temperature=0, echo=True).choices[0]
    assert echoed.text == wishes["prompt"] + plain.text
    chunks = list(create(**wishes, temperature=0, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.text
    assert chunks[-1].choices[0].finish_reason == plain.finish_reason
    streamed = [c.choices[0].logprobs for c in create(**wishes, temperature=0, logprobs=2, stream=True)]
    offsets = [offset for one in streamed if one for offset in one.text_offset]
    assert offsets == plain.logprobs.text_offset


def test_token_ids(server):
    """As vLLM has them: in whole answers and in streams every token that was drawn, a final stop token included."""
    wishes = dict(model="demo/chat", messages=CHAT, n=2, extra_body={"return_token_ids": True})
    for most, reason in ((20, "stop"), (4, "length")):
        whole = server.openai.chat.completions.create(**wishes, max_tokens=most)
        streamed = [[], []]
        for chunk in server.openai.chat.completions.create(**wishes, max_tokens=most, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += getattr(choice, "token_ids", [])
        assert streamed == [choice.token_ids for choice in whole.choices] and whole.choices[0].finish_reason == reason
        assert sum(map(len, streamed)) == whole.usage.completion_tokens
        shown = server.post("/detokenize", tokens=streamed[0], skip_special_tokens=True).json()["prompt"]
        assert shown == whole.choices[0].message.content
    ids = server.llm.read("The capital of France").ids
    fields = dict(prompt=[ids, ids[:3]], temperature=0, max_tokens=6, ignore_eos=True, return_token_ids=True)
    whole = server.post("/v1/completions", **fields)
    assert "x-ignored-fields" not in whole.headers
    told = [choice["token_ids"] for choice in whole.json()["choices"]]
    assert [len(one) for one in told] == [6, 6]
    streamed = [[], []]
    for event in server.post("/v1/completions", **fields, stream=True).text.split("\n\n")[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    assert streamed == told
    none = server.post("/v1/completions", prompt=ids, max_tokens=0, echo=True, return_token_ids=True).json()
    assert none["choices"][0]["token_ids"] == []
    assert "token_ids" not in server.post("/v1/completions", prompt=ids, max_tokens=2).text


def test_models(server):
    model = server.openai.models.list().data[0]
    assert model.id == "demo/chat" and model.object == "model"
    assert server.openai.models.retrieve("demo/chat").id == "demo/chat"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-4")


def test_characters_that_take_several_tokens_arrive_whole(server):
    wishes = dict(messages=[{"role": "user", "content": "你好 🦙 é"}], temperature=1.9, max_tokens=40, ignore_eos=True)
    for seed in range(4):
        whole = server.chat(**wishes, seed=seed).json()["choices"][0]["message"]["content"]
        stream = server.openai.chat.completions.create(
            model="demo/chat", messages=wishes["messages"], temperature=1.9, max_tokens=40, seed=seed, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_text_becomes_tokens_and_text_again(server):
    found = server.post("/tokenize", prompt="Hello, 世界!").json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == server.llm.cfg.max_len
    text = server.post("/detokenize", tokens=found["tokens"]).json()["prompt"]
    assert text.endswith("Hello, 世界!")
    assert server.post("/tokenize", messages=CHAT).json()["tokens"] == server.llm.read(CHAT).ids


def test_echo_with_logprobs_scores_the_prompt(server):
    """What lm-eval asks for: the prompt's token ids, one token more, and log probabilities of all of them."""
    ids = server.llm.read("The capital of France is Paris.").ids
    wishes = dict(model="demo/chat", temperature=0, max_tokens=1, logprobs=2, echo=True)
    for prompt in (ids, "The capital of France is Paris."):
        choice = server.openai.completions.create(prompt=prompt, **wishes).choices[0]
        found = choice.logprobs
        size = len(ids) + len(found.tokens[len(ids) :])
        assert len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == size > len(ids)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for place, (token, offset) in enumerate(zip(found.tokens, found.text_offset, strict=True)):
            assert choice.text[offset:].startswith(token) or place == 0
        for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert logprob <= max(top.values()) + 1e-6 and 1 <= len(top) <= 2
    found = server.openai.completions.create(prompt=ids, **wishes).choices[0].logprobs
    ahead = server.openai.completions.create(prompt=ids[:-1], **wishes | {"logprobs": 20, "echo": False}).choices[0]
    known = ahead.logprobs.top_logprobs[0][found.tokens[len(ids) - 1]]  # the same token, as the next one of an answer
    assert found.token_logprobs[len(ids) - 1] == pytest.approx(known, abs=1e-3)


def test_a_prompt_is_scored_without_an_answer(server):
    """`max_tokens` 0: log probabilities as with an answer, which is neither shown nor counted."""
    ids = server.llm.read("The capital of France is Paris.").ids
    wishes = dict(model="demo/chat", temperature=0, logprobs=2, echo=True, prompt=ids)
    alone = server.openai.completions.create(**wishes, max_tokens=0)
    choice = alone.choices[0]
    longer = server.openai.completions.create(**wishes, max_tokens=1).choices[0].logprobs
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(longer.token_logprobs[1 : len(ids)], abs=1e-5)
    assert choice.logprobs.tokens == longer.tokens[: len(ids)] and len(choice.logprobs.text_offset) == len(ids)
    assert len(choice.logprobs.top_logprobs) == len(ids)
    assert (choice.text, choice.finish_reason) == ("<|begin_of_text|>The capital of France is Paris.", "length")
    assert (alone.usage.completion_tokens, alone.usage.prompt_tokens) == (0, len(ids))
    bare = server.openai.completions.create(model="demo/chat", prompt="The", echo=True, max_tokens=0).choices[0]
    assert (bare.text, bare.logprobs) == ("The", None)
    for wrong in ({"echo": False}, {"stream": True}):
        with pytest.raises(openai.BadRequestError):
            server.openai.completions.create(**wishes | wrong, max_tokens=0)


def test_minus_one_turns_top_k_off(server):
    wishes = dict(temperature=9.0, seed=3, max_tokens=12)
    off, zero, one = (server.chat(**wishes, top_k=k).json()["choices"] for k in (-1, 0, 1))
    assert off == zero != one


def test_load_balancers_ask_by_head(server):
    for path in ("/health", "/health/ready"):
        answer = httpx.head(server.url + path)
        assert (answer.status_code, answer.content) == (200, b"")
    server.bridge.draining = True
    try:
        late = httpx.get(server.url + "/health/ready")
    finally:
        server.bridge.draining = False
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")


def test_a_salt_keeps_prefixes_apart(server):
    def cached(**wishes) -> int:
        return server.chat(**wishes).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 5 and cached(cache_salt="new") == 0
