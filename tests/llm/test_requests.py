"""Leaving, failing and closing: no request harms another, and nothing stays behind."""

import itertools

import pytest
import torch

from lite_llm.errors import ContextExceeded, LiteLLMError, UsageError
from lite_llm.llm import LLM
from tests.llm.conftest import CHAT, OPTIONS, PROMPTS, joined, params


def test_leaving_a_stream_early_frees_its_slots(llm):
    for taken in range(1, 6):
        stream = llm.stream("Hello world", params(max_tokens=50, n=2))
        for _ in range(taken):
            next(stream)
        assert not llm.engine.idle
        stream.close()
        assert llm.engine.idle and llm.engine.scheduler.running == []


def test_streams_that_run_at_the_same_time_lose_nothing(llm):
    wishes = [params(temperature=1.0, seed=i, n=1 + i % 3, max_tokens=6 + 5 * (i % 2)) for i in range(4)]
    want = [llm.generate(PROMPTS[i], wish) for i, wish in enumerate(wishes)]
    for pace in (1, 3):
        streams = [llm.stream(PROMPTS[i], wish) for i, wish in enumerate(wishes)]
        got = [[] for _ in streams]
        open_streams = set(range(4))
        while open_streams:
            for i in sorted(open_streams):
                for _ in range(pace if i else 1):
                    delta = next(streams[i], None)
                    if delta is None:
                        open_streams.discard(i)
                        break
                    got[i].append(delta)
        for deltas, output in zip(got, want, strict=True):
            for choice in output.choices:
                assert joined(deltas, choice.index) == (choice.text, choice.token_ids, choice.finish_reason)


def test_the_step_interface(llm):
    free = llm.generate("Hello", params())
    name, other = llm.add_request("Hello", params()), llm.add_request("x", params(max_tokens=2), id="mine")
    assert other == "mine" and not llm.finished(name)
    deltas = []
    while not (llm.finished(name) and llm.finished(other)):
        deltas += llm.step()
    assert joined([d for d in deltas if d.id == name])[0] == free.text == llm.result(name).text
    assert llm.result(other).usage.completion_tokens == 2 and llm.step() == []
    llm.abort(name)
    assert llm.result(name).choices == free.choices, "a finished answer does not change"
    for each in (name, other):
        llm.forget(each)
        llm.forget(each)
        with pytest.raises(UsageError, match="no request"):
            llm.result(each)
    llm.abort("never heard of")


def test_a_prefix_is_shared_within_its_salt_alone(llm):
    prompt = "Hello there, how do you do"
    found = []
    for salt in ("", "ada", "", "ada", "bob", "ada\ud800"):
        name = llm.add_request(prompt, params(), salt=salt)
        while not llm.finished(name):
            llm.step()
        found.append(llm.result(name))
        llm.forget(name)
    hits = [output.usage.cached_tokens > 0 for output in found]
    assert hits[1:] == [False, True, True, False, False]
    assert len({output.text for output in found}) == 1


def test_an_aborted_answer_keeps_what_it_said(llm):
    free = llm.generate("Hello", params(max_tokens=30))
    for steps in (0, 1, 2, 7, 15):
        name = llm.add_request("Hello", params(max_tokens=30))
        for _ in range(steps):
            llm.step()
        llm.abort(name)
        llm.abort(name)
        output = llm.result(name)
        assert output.finish_reason == "abort" and llm.finished(name) and llm.engine.idle
        assert output.token_ids == free.token_ids[:steps]
        assert output.text == llm.tokenizer.decode(output.token_ids)
        llm.forget(name)


def test_an_id_in_use_is_refused_and_its_owner_untouched(llm):
    """SCH-09."""
    want = llm.generate("Hello", params()).text
    llm.add_request("Hello", params(), id="a")
    llm.step()
    with pytest.raises(UsageError, match="'a' is in use"):
        llm.add_request("x", params(), id="a")
    while not llm.finished("a"):
        llm.step()
    assert llm.result("a").text == want
    llm.forget("a")


BAD = {
    "too long": ([5] * 500, ContextExceeded),
    "not in the vocabulary": ([5, 10**6], UsageError),
    "negative": ([5, -1], UsageError),
    "nothing": ([], UsageError),
    "a wrong role": ([{"role": "nobody", "content": "x"}], UsageError),
    "text of another kind": ([{"role": "user", "content": 5}], UsageError),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_prompt_in_a_list_leaves_nothing_behind(llm, name):
    prompt, error = BAD[name]
    running = llm.add_request("Hello", params())
    llm.step()
    with pytest.raises(error) as caught:
        llm.generate(["x", prompt, "y"], params(n=2))
    assert caught.value.exit_code == 2 and len(llm.engine.scheduler.running) == 1 and not llm.engine.scheduler.waiting
    while not llm.finished(running):
        llm.step()
    assert llm.result(running).text == llm.generate("Hello", params()).text
    llm.forget(running)


def test_parameters_and_prompts_must_be_as_many(llm):
    with pytest.raises(UsageError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [params(), params()])


@pytest.mark.parametrize("k", range(1, 12))
def test_a_failing_forward_pass_tells_its_requests_and_the_next_one_works(llm, monkeypatch, k):
    """FLT-01 through the public interface."""
    want = [llm.generate(prompt, params(max_tokens=4)) for prompt in PROMPTS]
    forward, calls = llm.engine.model.forward, itertools.count(1)

    def failing(batch, kv):
        logits = forward(batch, kv)
        if next(calls) == k:
            raise torch.OutOfMemoryError("no memory")
        return logits

    monkeypatch.setattr(llm.engine.scheduler, "max_requests", 2)  # so that some wait
    monkeypatch.setattr(llm.engine.scheduler, "free_rows", [1, 0])
    monkeypatch.setattr(llm.engine.model, "forward", failing)
    names, failures = [llm.add_request(prompt, params(max_tokens=4)) for prompt in PROMPTS], 0
    while not all(llm.finished(name) for name in names):
        try:
            llm.step()
        except torch.OutOfMemoryError:
            failures += 1
        llm.engine.scheduler.check()
    results = [llm.result(name) for name in names]
    assert failures == 1 and 1 <= sum(r.finish_reason == "error" for r in results) <= 2
    for result, good in zip(results, want, strict=True):
        whole = result.finish_reason != "error"
        assert result.choices == good.choices or not whole
        assert result.token_ids == good.token_ids[: len(result.token_ids)]
    for name in names:
        llm.forget(name)
    assert llm.generate(PROMPTS[0], params(max_tokens=4)).choices == want[0].choices


def test_a_failure_inside_generate_and_stream_cleans_up(llm, monkeypatch):
    forward = llm.engine.model.forward
    monkeypatch.setattr(llm.engine.model, "forward", lambda batch, kv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, params())
    with pytest.raises(ZeroDivisionError):
        next(llm.stream("x", params()))
    monkeypatch.setattr(llm.engine.model, "forward", forward)
    assert llm.engine.idle and llm.generate("x", params()).finish_reason in ("length", "stop")


def test_a_closed_llm_says_so(checkpoint):
    llm = LLM(checkpoint, **OPTIONS)
    running = llm.stream("x", params())
    next(running)
    llm.close()
    llm.close()
    uses = [
        lambda: llm.generate("x"), lambda: llm.chat(CHAT), lambda: next(llm.stream("x")), llm.step,
        lambda: llm.add_request("x"), lambda: llm.engine, lambda: llm.generate(["x", "y"]),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(UsageError, match="closed"):
            use()
    with pytest.raises(LiteLLMError):
        list(running)
    llm.abort("x")
    llm.forget("x")


def test_the_context_manager_closes(checkpoint):
    with LLM(checkpoint, **OPTIONS) as llm:
        assert llm.generate("x", params(max_tokens=1)).finish_reason == "length"
    with pytest.raises(UsageError, match="closed"):
        llm.generate("x")


@pytest.mark.parametrize("call, said", [
    (lambda llm: llm.chat("Hello"), "list of messages, not a str"), (lambda llm: llm.chat(5), "not a int"),
    (lambda llm: llm.generate(None), "NoneType"), (lambda llm: llm.generate("hi", "params"), "params is a str"),
    (lambda llm: llm.generate("x" * 128 * 256 + "x"), "characters"),
    (lambda llm: llm.add_request("x", salt=5), "salt is a int"),
])  # fmt: skip
def test_arguments_of_a_wrong_kind_are_named(llm, call, said):
    with pytest.raises(UsageError, match=said):
        call(llm)
