"""Prompts beside decodes are spread over the steps that take place anyway (SCH-07)."""

import pytest

from lite_llm.engine import runner
from tests.engine.models import Simulation, answer_of


def tokens_of_prompts(sim: Simulation) -> int:
    """Of the next step."""
    decoding = {request for request in sim.scheduler.running if request.decoding}
    return sum(n for request, n in sim.step() if request not in decoding)


def decodes(sim: Simulation) -> int:
    return sum(request.decoding for request in sim.scheduler.running)


def one_decodes(spread: int | None, answer: int, prompts: int, length: int, rows: int = 16) -> Simulation:
    """A simulation in which one request decodes, with `answer` tokens left, and as many prompts come."""
    sim = Simulation(slots=4000, rows=rows, step_tokens=512)
    sim.scheduler.spread = spread and (lambda decodes: max(spread - decodes, spread // 2))
    sim.add([0], answer + 1), sim.step()
    for i in range(prompts):
        sim.add([i % 2] + [1, 0] * (length // 2) + [0] * (length % 2), 20)
    return sim


def test_a_step_with_decodes_has_as_many_tokens_as_it_should():
    sim = one_decodes(32, 100, 8, 20)
    while sim.scheduler.waiting:
        assert 32 - decodes(sim) == tokens_of_prompts(sim)
    sim.run()


def test_many_decodes_leave_half_of_it_to_prompts():
    sim = one_decodes(8, 100, 11, 1)
    while sim.scheduler.waiting:
        sim.step()
    late = sim.add([1, 0] * 10, 4)
    assert decodes(sim) > 8 and tokens_of_prompts(sim) == 4 and late.cached == 4


def test_prompts_hurry_where_the_answers_under_way_end_first():
    assert tokens_of_prompts(one_decodes(32, 4, 12, 50)) == 12 * 51 // 4
    assert tokens_of_prompts(one_decodes(32, 1, 12, 50)) == 512  # all that a step takes


def test_prompts_that_cannot_begin_make_no_hurry():
    assert tokens_of_prompts(one_decodes(16, 4, 12, 50, rows=3)) == 34  # of 2 * 51, by 3 requests


def test_however_long_an_answer_may_become_prompts_are_read_in_as_many_steps_as_there_are_requests():
    assert tokens_of_prompts(one_decodes(32, 1000, 12, 50)) == 48  # of 12 * 51, by 13 requests
    assert tokens_of_prompts(one_decodes(32, 1000, 1, 900)) == 451


def test_what_is_left_of_a_prompt_hurries_too():
    sim = one_decodes(16, 4, 1, 200)
    assert [tokens_of_prompts(sim) for _ in range(3)] == [101, 50, 25]


@pytest.mark.parametrize("answer, tokens", [(4, 12 * 51 // 3), (1, 512)])
def test_tokens_under_way_count_as_answered(answer, tokens):
    sim = one_decodes(32, answer, 12, 50)
    first = sim.scheduler.running[0]
    first.flying = 1
    assert sum(n for request, n in sim.scheduler.plan() if request is not first) == tokens


@pytest.mark.parametrize("most", [16, 40, 64, 200, 256, 600])
def test_large_shapes_hold_all_but_the_decodes(most):
    chooser = runner.Runner.__new__(runner.Runner)
    chooser.fixed = runner.shapes(most, 2048)
    for decodes in range(1, most + 1):
        padded = -(-decodes // 16) * 16
        if padded <= min(most, runner.LARGE // 2):
            assert chooser.large(decodes) == runner.LARGE - padded
        assert chooser.fill(decodes, chooser.large(decodes)) == chooser.large(decodes) >= runner.LARGE // 2
    assert (16, 32 if most >= 32 else 16, 496, 1) in runner.shapes(most, 512)


def test_nobody_waits_where_nobody_decodes_or_nothing_is_to_be_spread():
    sim = Simulation(slots=4000, rows=16, step_tokens=512)
    sim.scheduler.spread = lambda decodes: 32
    for _ in range(8):
        sim.add([1, 0] * 40, 4)
    assert tokens_of_prompts(sim) == 512
    assert tokens_of_prompts(one_decodes(None, 100, 8, 80)) == 512


@pytest.mark.parametrize("spread", [1, 2, 5, 64])
def test_answers_are_the_same_however_prompts_are_spread(spread):
    sim = Simulation(slots=60, rows=4, step_tokens=8)
    sim.scheduler.spread = lambda decodes: spread
    prompts = [[i % 2, 1, 0] * (1 + i % 4) for i in range(12)]
    asked = {sim.add(prompt, 3 + i % 9): prompt for i, prompt in enumerate(prompts)}
    sim.run()
    for request, prompt in asked.items():
        assert request.output == answer_of(request, prompt, sim.vocab)
