"""Questions to an engine, wherever it is: functions that are sent to its process by name, or called in this one."""

from lite_llm.server.steady import Steady


def counts(steady: Steady) -> tuple[int, int, int]:
    """Answers that run, those that wait, and tokens made so far."""
    scheduler = steady.llm.engine.scheduler
    return len(scheduler.running), len(scheduler.waiting), scheduler.made


def idle(steady: Steady) -> bool:
    return steady.idle


def check(steady: Steady) -> None:
    """Nothing is left of any request, and every slot has its owner."""
    scheduler = steady.llm.engine.scheduler
    scheduler.check()
    assert not steady.llm._streams and not steady._open and not steady._whole and scheduler.prefix.protected == 0
    assert scheduler.prefix.size + scheduler.slots.free_count == scheduler.capacity
