"""Questions to an engine, wherever it is: functions that are sent to its process by name, or called in this one."""

import os
import time

from lite_llm.server import steady as steady_module
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


# ---- what tests have it do


def fail(steady: Steady, steps: int, error: Exception) -> None:
    """The next steps raise."""
    engine = steady.llm.engine
    step, left = engine.step, [error] * steps

    def failing():
        if left:
            raise left.pop()
        engine.step = step
        return step()

    engine.step = failing


def fail_for_good(steady: Steady) -> None:
    """From here on there is always work, and it fails with what cannot be sent."""
    engine = steady.llm.engine
    type(engine).idle = property(lambda _: False)

    class Local(Exception):
        pass

    def failing():
        raise Local("secret internals")

    engine.step = failing


def lose_device(steady: Steady) -> None:
    """Every step fails as on a GPU whose context is lost."""
    steady_module.device_is_lost = lambda: True
    fail(steady, 100, RuntimeError("an illegal memory access"))


def hang(steady: Steady, seconds: float) -> None:
    """The next step takes so long."""
    engine = steady.llm.engine
    step = engine.step

    def hanging():
        engine.step = step
        time.sleep(seconds)
        return step()

    engine.step = hanging


def compile_one(steady: Steady) -> None:
    steady.kernels.compiled.append("attend")


def size(steady: Steady, data: bytes) -> int:
    return len(data)


def wrong(steady: Steady) -> None:
    raise ValueError("asked for nonsense")


# ---- in the place of `LLM`


def exploding(model, **options):
    raise RuntimeError("no such luck")


def vanishing(model, **options):
    os._exit(7)


def sleeping(model, **options):
    time.sleep(60)
