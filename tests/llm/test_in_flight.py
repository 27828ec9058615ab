"""What `in_flight` says at every moment is what the scheduler knows, and asking changes nothing."""

import dataclasses
import json
import random
import time

import pytest

from lite_llm.errors import UsageError
from lite_llm.llm import LLM
from lite_llm.outputs import InFlight, Progress
from tests.llm.conftest import OPTIONS, joined, params


def only(llm) -> Progress:
    (progress,) = llm.in_flight().requests
    return progress


def checked(llm) -> InFlight:
    """The snapshot, compared with the scheduler's own books."""
    now, scheduler = llm.in_flight(), llm.engine.scheduler
    states = [p.state for p in now.requests]
    assert now.running == states.count("prompt") + states.count("decoding") == len(scheduler.running)
    assert now.waiting == states.count("waiting") == len(scheduler.waiting)
    assert now.slots_used == len({slot for request in scheduler.running for slot in request.slots})
    assert now.slots_used + now.slots_cached + scheduler.slots.free_count == now.slots == scheduler.capacity
    assert (sum(now.map.used), sum(now.map.cached)) == (now.slots_used, now.slots_cached)
    used = {slot for request in scheduler.running for slot in request.slots}
    cells = range(1, now.slots + 1, now.map.size)
    assert now.map.used == tuple(len(used & set(range(first, first + now.map.size))) for first in cells)
    for p in now.requests:
        assert 0 <= p.prompt_done <= p.prompt and 0 <= p.output <= p.wanted and p.age >= 0
        assert (p.finish_reason is not None) == (p.state == "done")
        assert (p.first_token is not None) == (p.output > 0)
        assert p.slots == 0 or p.state in ("prompt", "decoding")
        assert p.state != "decoding" or p.prompt_done == p.prompt
    return now


def test_the_life_of_a_request(llm):
    """A prompt of 60 tokens, 24 a step."""
    name = llm.add_request(list(range(5, 65)), params(max_tokens=3))
    seen = []
    while not llm.finished(name):
        seen.append(only(llm))
        llm.step()
        checked(llm)
    seen.append(only(llm))
    assert [p.state for p in seen] == ["waiting", "prompt", "prompt", "decoding", "decoding", "done"]
    assert [p.prompt_done for p in seen] == [0, 24, 48, 60, 60, 60]
    assert [p.output for p in seen] == [0, 0, 0, 1, 2, 3]
    assert {(p.id, p.index, p.prompt, p.cached, p.wanted) for p in seen} == {(name, 0, 60, 0, 3)}
    assert [p.age for p in seen] == sorted(p.age for p in seen) and only(llm).age == seen[-1].age
    assert seen[-1].finish_reason == "length" and seen[-1].slots == 0 < seen[-2].slots
    llm.forget(name)
    assert llm.in_flight().requests == ()


def test_answers_to_one_prompt_are_apart_and_what_is_cached_is_told(llm):
    prompt = list(range(5, 45))
    llm.generate(prompt, params(max_tokens=1))
    assert llm.in_flight().slots_cached >= 39
    name = llm.add_request(prompt, params(n=3))
    llm.step()
    now = checked(llm)
    assert [(p.id, p.index, p.cached) for p in now.requests] == [(name, i, 39) for i in range(3)]
    assert now.slots_used < sum(p.slots for p in now.requests), "a shared prefix counts once in the pool"
    llm.forget(name)


def test_without_a_limit_an_answer_may_fill_the_context(llm):
    name = llm.add_request([5, 6, 7], params(max_tokens=None))
    assert only(llm).wanted == llm.cfg.max_len - 3
    llm.forget(name)


def test_a_preempted_request_waits_and_is_computed_again(llm):
    """Eight answers want twice the slots that the pool has."""
    names = [llm.add_request([5 + i] * 20, params(max_tokens=60)) for i in range(8)]
    seen = []
    while not all(llm.finished(name) for name in names):
        llm.step()
        seen += [p for p in checked(llm).requests if p.preemptions]
    waiting = [p for p in seen if p.state == "waiting"]
    assert waiting and all(p.output and not p.prompt_done and not p.slots for p in waiting)
    assert {p.state for p in seen} == {"waiting", "prompt", "decoding", "done"}
    for name in names:
        llm.forget(name)


@pytest.mark.parametrize("steps, state, computed", [(0, "waiting", 0), (1, "prompt", 0), (4, "decoding", 60)])
def test_an_aborted_request_is_done(llm, steps, state, computed):
    name = llm.add_request(list(range(5, 65)), params())
    for _ in range(steps):
        llm.step()
    assert only(llm).state == state
    llm.abort(name)
    ended = only(llm)
    assert (ended.state, ended.finish_reason, ended.slots, ended.prompt_done) == ("done", "abort", 0, computed)
    assert checked(llm).slots_used == 0
    llm.forget(name)


def test_at_any_moment_of_a_disorderly_day(llm):
    rng, names, forgotten = random.Random(0), [], 0
    before = llm.in_flight().tokens
    for _ in range(300):
        if rng.random() < 0.3:
            prompt = [rng.randrange(5, 60)] * rng.randrange(1, 60)
            names.append(llm.add_request(prompt, params(max_tokens=rng.randrange(1, 50), n=rng.choice([1, 1, 2]))))
        if names and rng.random() < 0.1:
            llm.abort(rng.choice(names))
        if names and rng.random() < 0.1:
            name = names.pop(rng.randrange(len(names)))
            forgotten += sum(p.output for p in llm.in_flight().requests if p.id == name)
            llm.forget(name)
        llm.step()
        now = checked(llm)
        assert now.tokens - before == forgotten + sum(p.output for p in now.requests)
    for name in names:
        llm.forget(name)


def test_a_moment_may_travel_as_json_and_nothing_else_is_taken_for_one(llm):
    name = llm.add_request([5, 6, 7], params(n=2))
    llm.step()
    now = llm.in_flight()
    told = json.loads(json.dumps(dataclasses.asdict(now)))
    assert InFlight.read(told | {"model": "x"}) == now
    cells = told["map"]
    wrong = [{"map": cells | change} for change in ({"size": 0}, {"used": []}, {"cached": [0] * 3}, {"used": None})]
    for change in (*wrong, {"slots": 0}, {"slots": "many"}, {"map": []}, {"requests": [{}]}, {"requests": 3}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            InFlight.read(told | change)
    llm.forget(name)


@pytest.mark.parametrize("deadline", [-1, float("nan"), "soon", True])
def test_a_deadline_that_is_none_is_refused(llm, deadline):
    with pytest.raises(UsageError, match="deadline = .*expected a moment"):
        llm.add_request([5], params(), deadline=deadline)


def test_a_deadline_ends_all_answers_and_keeps_what_was_said(llm):
    name = llm.add_request([5, 6, 7], params(n=2), deadline=time.monotonic() + 0.2)
    other = llm.add_request([8, 9], params(max_tokens=90))
    deltas = []
    while not llm.finished(name):
        deltas += [delta for delta in llm.step() if delta.id == name]
        time.sleep(0.03)
    output = llm.result(name)
    assert [choice.finish_reason for choice in output.choices] == ["timeout"] * 2
    assert 0.2 <= output.timings.total < 2 and 0 <= output.timings.queued <= output.timings.first_token
    for choice in output.choices:
        text, tokens, reason = joined(deltas, choice.index)
        assert (text, tokens, reason) == (choice.text, choice.token_ids, "timeout") and tokens
    while not llm.finished(other):
        llm.step()
    assert llm.result(other).finish_reason == "length"
    for one in (name, other):
        llm.forget(one)


def test_who_never_ran_was_in_the_queue_all_the_time(llm):
    busy = [llm.add_request([5 + i], params()) for i in range(8)]
    late = llm.add_request([7, 8], params(), deadline=time.monotonic() + 0.01)
    llm.step()
    time.sleep(0.02)
    llm.step()
    output = llm.result(late)
    assert (output.finish_reason, output.token_ids) == ("timeout", ())
    assert output.timings.queued == output.timings.total >= 0.01
    for name in (*busy, late):
        llm.forget(name)


def test_a_closed_model_has_nothing_in_flight(checkpoint):
    llm = LLM(checkpoint, **OPTIONS)
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.in_flight()
