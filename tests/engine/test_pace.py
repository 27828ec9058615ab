"""On a CPU steps are timed as they run, and prompts held back beside those that decode (SCH-07)."""

import pytest

from lite_llm.engine.pace import LEAST, Pace
from tests.engine.models import Rig, alone


def test_what_is_not_known_yet_is_learnt_from_few_tokens():
    pace = Pace()
    assert pace.beside(2.0) == LEAST
    pace.note(1, 20, 1.0)  # with nothing to compare it with
    assert pace.each is None
    pace.note(3, 0, 0.010)
    assert pace.beside(2.0) == LEAST
    pace.note(3, 8, 0.014)
    assert pace.beside(2.0) == pytest.approx(20, abs=1) and pace.beside(3.0) == pytest.approx(40, abs=1)


def test_steps_hold_what_was_asked_for_when_costs_change():
    pace, alone_s = Pace(), 0.005
    for each_s in (0.0001, 0.0004, 0.00005):
        for _ in range(30):
            pace.note(4, 0, alone_s)
            tokens = pace.beside(2.0)
            pace.note(4, tokens, alone_s + tokens * each_s)
        assert alone_s + tokens * each_s == pytest.approx(2 * alone_s, rel=0.1) and tokens > LEAST
    pace.note(0, 100, 100 * each_s)  # a prompt alone tells it too
    assert pace.each == pytest.approx(each_s, rel=0.1)


@pytest.mark.parametrize("slowdown, most", [(None, 100), (3.0, 20)])
def test_an_engine_on_a_cpu_holds_prompts_back_beside_decodes(slowdown, most, monkeypatch):
    rig = Rig(slots=400, rows=4, step_tokens=100, max_len=200)
    rig.engine.max_slowdown = slowdown
    first = rig.add([1, 2], max_tokens=50)
    rig.step()
    monkeypatch.setattr(Pace, "note", lambda *_: None)
    rig.engine.pace.alone, rig.engine.pace.each = 0.010, 0.001
    second = rig.add([i % 16 for i in range(150)], max_tokens=2)
    rig.step()
    assert second.cached == most
    rig.run()
    assert (second.output, second.finish_reason) == alone(second, 16) and first.finish_reason == "length"


def test_an_engine_notes_its_steps():
    rig = Rig(slots=60, rows=2, step_tokens=30)
    rig.add([1, 2, 3], max_tokens=4)
    rig.run()
    assert rig.engine.pace.alone > 0 and rig.engine.pace.each > 0
