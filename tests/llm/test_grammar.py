"""The bundled chat model made to keep to a schema, at any heat and seed, beside others that answer as they like."""

import pydantic
import pytest

from lite_llm import SamplingParams
from lite_llm.errors import UsageError
from lite_llm.llm import LLM
from tests.llm.conftest import CHAT

OPTIONS = dict(device="cpu", dtype="float32", kv_tokens=2048, max_requests=16, step_tokens=256)
FREE = [[{"role": "user", "content": text}] for text in ("Tell me a story.", "What is 17 + 25?", "hi", "Count to 9.")]


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    city: str = pydantic.Field(max_length=12)
    sure: bool
    years: list[int] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def demo():
    with LLM(say=lambda text: None, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def grammar(demo):
    schema = Answer.model_json_schema()
    schema["properties"]["years"]["items"] |= {"minimum": 0, "maximum": 2100}
    return demo.grammars.compile(json=schema)


def test_every_answer_keeps_to_the_schema(demo, grammar):
    wishes = [
        SamplingParams(grammar=grammar, temperature=heat, seed=seed, n=4, max_tokens=300, **more)
        for seed, (heat, more) in enumerate(
            [(0.0, {}), (0.7, {}), (1.0, {}), (1.5, {}), (5.0, {}), (100.0, {}), (1.0, dict(top_p=0.3)),
             (2.0, dict(top_k=2)), (1.0, dict(min_p=0.5)), (1.0, dict(repetition_penalty=1.3)),
             (1.0, dict(logit_bias={1: -100, 5: 50})), (1.0, dict(min_tokens=12))]
        )
    ]  # fmt: skip
    outputs = demo.chat([FREE[i % 4] for i in range(len(wishes))], wishes)
    for output in outputs:
        for choice in output.choices:
            assert (choice.finish_reason, choice.stop) == ("stop", 1), choice
            Answer.model_validate_json(choice.text)
    hot = outputs[2].choices
    assert len({choice.text for choice in hot}) == 4, "each choice has a state of its own"


def test_others_answer_as_if_they_were_alone(demo, grammar):
    free, held = SamplingParams(max_tokens=60), SamplingParams(grammar=grammar, max_tokens=200, temperature=1.0, seed=3)
    logged = SamplingParams(max_tokens=60, logprobs=2)
    alone = demo.chat(FREE, [free, free, logged, logged])
    alone_held = [demo.chat(talk, held) for talk in FREE]
    together = demo.chat(
        [talk for talk in FREE for _ in range(2)], [free, held, free, held, logged, held, logged, held]
    )
    assert [output.text for output in together[::2]] == [output.text for output in alone]
    assert [output.token_ids for output in together[1::2]] == [output.token_ids for output in alone_held]
    told = [[entry.token for entry in output.choices[0].logprobs] for output in together[4::2]]
    assert told == [list(output.token_ids) for output in alone[2:]]


def test_a_small_pool_changes_nothing(demo, grammar):
    wish = SamplingParams(grammar=grammar, max_tokens=120, temperature=1.0, seed=5)
    want = [demo.chat(talk, wish).token_ids for talk in FREE]
    with LLM(say=lambda text: None, **OPTIONS | dict(kv_tokens=160, context=160)) as llm:
        names = [llm.add_request(talk, wish) for talk in FREE]
        given_way = 0
        while not all(map(llm.finished, names)):
            llm.step()
            given_way = max(given_way, sum(request.preemptions for request in requests_of(llm)))
        assert [llm.result(name).token_ids for name in names] == want and given_way


def requests_of(llm: LLM) -> list:
    return [answer.request for answers in llm._streams.values() for answer in answers]


def test_what_cuts_an_answer_short(demo, grammar):
    cut = demo.chat(CHAT, SamplingParams(grammar=grammar, max_tokens=4))
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 4
    stopped = demo.chat(CHAT, SamplingParams(grammar=grammar, stop="city", max_tokens=100))
    assert stopped.choices[0].stop == "city" and stopped.text.endswith('"')
    name = demo.add_request(CHAT, SamplingParams(grammar=grammar, max_tokens=100))
    for _ in range(5):
        demo.step()
    demo.abort(name)
    assert demo.result(name).choices[0].finish_reason == "abort"
    demo.forget(name)
    while not demo.engine.idle:
        demo.step()
    demo.engine.scheduler.check()
    assert not demo.engine.scheduler.running and demo.engine.scheduler.prefix.protected == 0


def test_a_stream_of_a_choice(demo):
    wish = SamplingParams(grammar=demo.grammars.compile(choice=["Paris", "London"]))
    pieces = list(demo.stream([{"role": "user", "content": "What is the capital of France?"}], wish))
    assert "".join(piece.text for piece in pieces) == "Paris" and pieces[-1].finish_reason == "stop"


def test_without_a_tokenizer_there_are_no_grammars():
    with LLM(shape="tiny-llama-3.2-1b", random_weights=True, device="cpu", say=lambda text: None, context=64) as llm:
        with pytest.raises(UsageError, match="has no tokenizer, without which there are no grammars"):
            llm.grammars  # noqa: B018
