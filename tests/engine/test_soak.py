"""tests/engine/soak.py, in small: that it does what it says, and that it sees a lost slot and a wrong token."""

import pytest

from lite_llm.engine.slots import SlotPool
from tests.close import DEVICE
from tests.engine import soak


def test_everything_happens_and_every_answer_is_exact(monkeypatch):
    monkeypatch.setattr(soak, "FAILED", 0.02)
    found = soak.soak(400, 32, DEVICE, seed=0)
    assert found["exact"] + found["cancelled"] + found["failed"] == 400
    assert found["exact"] > 100 and found["cancelled"] > 5 and found["failed"] > 5 and found["preempted"] > 5


def test_a_lost_slot_is_seen(monkeypatch):
    free = SlotPool.free
    monkeypatch.setattr(SlotPool, "free", lambda pool, slots: free(pool, list(slots)[1:]))
    with pytest.raises(AssertionError, match="a slot is lost"):
        soak.soak(40, 16, DEVICE, seed=0)


def test_a_wrong_token_is_seen(monkeypatch):
    def wrong(*args):
        return [(ask, [answer[0] + 1, *answer[1:]]) for ask, answer in copies(*args)]

    copies = soak.copies
    monkeypatch.setattr(soak, "copies", wrong)
    with pytest.raises(soak.Wrong, match="instead of"):
        soak.soak(40, 16, DEVICE, seed=0)
