"""A request past its deadline ends wherever it is, and nobody else notices (SCH-07)."""

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest

from lite_llm.engine import engine as engines
from tests.engine.models import Rig, Simulation, answer_of, ask


def late(ids: list[int], deadline: float | None, answer: int = 8):
    return dataclasses.replace(ask(ids, max_tokens=answer), deadline=deadline)


def test_a_deadline_ends_a_request_in_every_state():
    """Waiting, in its prompt, decoding, preempted, ended: its slots are back at once, and the others say all."""
    seen = set()
    for steps in range(16):
        sim = Simulation(slots=24, rows=2, step_tokens=3, cache=False)
        moments = [5.0 if i == steps % 4 else (None, 9.0)[i % 2] for i in range(4)]
        requests = [late([i % 2, 1] * 3, moment, 4) for i, moment in enumerate(moments)]
        for request in requests:
            sim.scheduler.add(request)
        for _ in range(steps):
            sim.step()
        if steps % 3 == 2 and sim.scheduler.running:
            sim.preempt(sim.scheduler.running[-1])
        victim = requests[steps % 4]
        before, state = victim.finish_reason, victim.state + "!" * victim.preemptions
        assert sim.scheduler.expire(4.9) == [] and victim.finish_reason == before
        assert sim.scheduler.expire(5.0) == ([] if before else [victim])
        sim.after()
        assert victim.finish_reason == (before or "timeout") and victim.slots == [] and victim.row is None
        assert victim not in sim.scheduler.running and victim not in sim.scheduler.waiting
        said = victim.output
        sim.run()
        assert victim.output == said and sim.scheduler.slots.free_count == 23
        for request in requests:
            whole = answer_of(request, request.ids[:6], 4)
            assert request.output == (whole[: request.output_len] if request is victim else whole)
        seen.add(state)
    assert {"waiting", "waiting!", "prompt", "decoding", "done"} <= seen


def test_those_who_have_ended_are_not_remembered_until_their_deadline():
    scheduler = Simulation().scheduler
    waiting = late([1, 0], 1e6)
    scheduler.add(waiting)
    for _ in range(500):
        request = late([1], 1e9)
        scheduler.add(request)
        scheduler.cancel(request, "abort")
    assert len(scheduler._deadlines) < 100
    assert scheduler.expire(1e6) == [waiting] and scheduler.expire(2e9) == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_step_ends_who_is_late_before_it_plans(ahead, monkeypatch):
    """With the clock at its deadline a request takes part in no further step, and tokens under way are dropped."""
    now = [100.0]
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))
    rig = Rig(rows=2, step_tokens=8, slots=60, ahead=ahead)
    slow, other, queued = late([1] * 4, 101.0, 30), late([2] * 4, math.inf, 30), late([3] * 4, 100.5)
    for request in (slow, other, queued):
        rig.add(request)
    for _ in range(6):
        rig.step()
    assert slow.output_len > 2 and queued.state == "waiting"
    now[0] = 100.7
    assert queued in rig.step() and queued.finish_reason == "timeout" and queued.admitted is None
    said, now[0] = slow.output_len, 101.0
    assert slow in rig.step() and (slow.finish_reason, slow.output_len) == ("timeout", said)
    assert slow.slots == []
    rig.run()
    assert slow.output_len == said and (other.output_len, other.finish_reason) == (30, "length")


def test_the_moment_of_admission_is_the_first_one():
    sim = Simulation(slots=24, rows=1, step_tokens=6)
    first, second = sim.add([1, 0], 3), sim.add([0, 1], 3)
    start = time.monotonic()
    sim.step()
    moment = first.admitted
    assert moment >= start > first.arrived and second.admitted is None
    sim.preempt(first)
    sim.run()
    assert first.preemptions and first.admitted == moment <= first.first_token
    assert moment < second.admitted <= second.first_token
