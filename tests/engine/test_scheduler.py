"""The scheduler over a pool of plain Python, every slot recounted after every step (SCH-01 to 08, 13)."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lite_llm.errors import ContextExceeded
from tests.engine.models import Simulation, answer_of, ask

CI = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=10)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests with prompts of two symbols arrive, are cancelled and preempted at any moment, in a tiny pool."""

    @initialize(
        slots=st.integers(12, 24),
        rows=st.integers(1, 4),
        spare=st.integers(0, 5),
        cache=st.booleans(),
        full=st.integers(1, 4),
    )
    def start(self, slots, rows, spare, cache, full):
        self.sim = Simulation(slots, rows, rows + spare, cache, full=full)
        self.prompts, self.cancelled = {}, {}

    @rule(prompt=PROMPT, answer=st.integers(1, 30), stop=st.none() | st.integers(0, 3))
    def add(self, prompt, answer, stop):
        capacity = self.sim.scheduler.capacity
        request = ask(prompt, () if stop is None else (stop,), max_tokens=answer)
        self.sim.scheduler.add(request)
        assert request.max_len == min(len(prompt) + answer, capacity + 1)
        self.prompts[request] = prompt

    @rule(over=st.integers(1, 5))
    def add_too_long(self, over):
        capacity = self.sim.scheduler.capacity
        with pytest.raises(ContextExceeded, match=f"{capacity + over} tokens.* {capacity + 1} fit"):
            self.sim.add([0] * (capacity + over))

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.sim.step()

    @precondition(lambda self: self.prompts)
    @rule(pick=st.integers(0, 99), reason=st.sampled_from(["abort", "stop", "error"]))
    def cancel(self, pick, reason):
        request = list(self.prompts)[pick % len(self.prompts)]
        if request.finish_reason is None:
            self.cancelled[request] = reason
        self.sim.cancel(request, reason)
        self.sim.cancel(request, "abort")  # twice

    @rule(reason=st.sampled_from(["abort", "error"]))
    def cancel_a_stranger(self, reason):
        self.sim.cancel(ask([1, 0]), reason)

    @precondition(lambda self: self.sim.scheduler.running)
    @rule(pick=st.integers(0, 99))
    def preempt(self, pick):
        running = self.sim.scheduler.running
        self.sim.preempt(running[pick % len(running)])

    @rule()
    def flush(self):
        self.sim.scheduler.slots.free(self.sim.scheduler.prefix.evict(10**9))
        self.sim.after()

    @precondition(lambda self: self.sim.scheduler.running)
    @rule()
    def a_step_that_fails(self):
        before = dict.fromkeys(self.sim.scheduler.running + list(self.sim.scheduler.waiting))
        plan = self.sim.scheduler.plan()
        self.sim.scheduler.fail(plan, "error")
        self.sim.after()
        planned = [request for request, _ in plan]
        assert all((r.finish_reason == "error") == (r in planned) for r in before)
        self.cancelled |= dict.fromkeys(planned, "error")

    @invariant()
    def every_request_is_in_one_place(self):
        if not hasattr(self, "sim"):
            return
        scheduler = self.sim.scheduler
        for request, prompt in self.prompts.items():
            places = (
                (request in scheduler.waiting) + (request in scheduler.running) + (request.finish_reason is not None)
            )
            assert places == 1
            whole = answer_of(request, prompt, self.sim.vocab)
            if request in self.cancelled:
                assert request.finish_reason == self.cancelled[request]
                assert request.output == whole[: request.output_len]
            elif request.finish_reason is None:
                assert request.output == whole[: request.output_len] and request.output_len < len(whole)
            else:
                assert request.output == whole
                assert request.finish_reason == ("stop" if whole[-1] in request.stop_ids else "length")
            assert request.ids[: request.prompt_len] == prompt

    def teardown(self):
        if not hasattr(self, "sim"):
            return
        self.sim.run()
        self.every_request_is_in_one_place()
        scheduler = self.sim.scheduler
        assert scheduler.prefix.protected == 0
        assert scheduler.prefix.size + scheduler.slots.free_count == scheduler.capacity, "idle is cache + free"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = CI


def trace(seed: int, cancels: bool = True) -> int:
    """A random life of a scheduler; every answer must be that of a generator which does one request at a time."""
    draw = random.Random(seed)
    rows = draw.randint(1, 4)
    full = draw.choice((1, 1, 2, 5))
    sim = Simulation(draw.randint(12, 24), rows, rows + draw.randint(0, 6), draw.random() < 0.8, full=full)
    sim.scheduler.spread = draw.choice((None, lambda decodes: 2))
    todo, live, cancelled = draw.randint(1, 8), {}, {}
    while todo or sim.scheduler.running or sim.scheduler.waiting:
        if todo and draw.random() < 0.4:
            prompt = [draw.randint(0, 1) for _ in range(draw.randint(1, 10))]
            live[sim.add(prompt, draw.randint(1, 14), [draw.randint(0, 3)] * (draw.random() < 0.3))] = prompt
            todo -= 1
        if cancels and live and draw.random() < 0.06:
            request = draw.choice(list(live))
            if request.finish_reason is None:
                cancelled[request] = True
                sim.cancel(request)
        if sim.scheduler.running and draw.random() < 0.06:
            sim.preempt(draw.choice(sim.scheduler.running))
        if sim.scheduler.running or sim.scheduler.waiting:
            assert sim.step(), "stuck"
    for request, prompt in live.items():
        whole = answer_of(request, prompt, sim.vocab)
        if request in cancelled:
            assert request.finish_reason == "abort" and request.output == whole[: request.output_len]
        else:
            assert request.output == whole
            assert request.finish_reason == ("stop" if whole[-1] in request.stop_ids else "length")
    return sum(request.preemptions for request in live)


@pytest.mark.parametrize("part", range(4))
def test_random_lives_give_the_tokens_of_a_naive_generator(part):
    """SCH-13. Preemptions happen by themselves too."""
    assert sum(trace(seed) for seed in range(part * 2500, part * 2500 + 2500)) > 1000


def test_a_request_that_never_fits_is_refused_and_others_go_on():
    sim = Simulation(slots=13, rows=2, step_tokens=4)
    fits = sim.add([1, 0, 1])
    with pytest.raises(ContextExceeded, match="13 tokens; with at least one for the answer 13 fit"):
        sim.add([0] * 13)
    sim.run()
    assert fits.output == answer_of(fits, [1, 0, 1], 4)


@pytest.mark.parametrize("cache", [True, False])
def test_a_request_alone_may_fill_the_pool_to_the_last_slot(cache):
    """SCH-03: the last token sampled needs no slot."""
    sim = Simulation(slots=13, rows=2, step_tokens=4, cache=cache)
    for prompt, answer, length in [([1] * 12, 99, 1), ([0, 1], 99, 11), ([0, 1, 1], 10, 10), ([0, 1, 0], 9, 9)]:
        request = sim.add(prompt, answer)
        sim.run()
        assert (request.output_len, request.finish_reason) == (length, "length")
        assert request.output == answer_of(request, prompt, 4) and request.preemptions == 0


@pytest.mark.parametrize("cache", [True, False])
def test_requests_that_outgrow_the_pool_say_the_same_as_with_a_big_one(cache):
    """SCH-04."""
    answers = {}
    for slots in (15, 500):
        sim = Simulation(slots, rows=4, step_tokens=8, cache=cache)
        requests = [sim.add([i % 2, 1, i // 2 % 2], 10) for i in range(9)]
        sim.run()
        answers[slots] = [r.output for r in requests]
        assert (sum(r.preemptions for r in requests) > 0) == (slots == 15)
    assert answers[15] == answers[500]


def test_two_that_fight_for_the_pool_end_in_bounded_time():
    """SCH-06: the older one is never evicted, so it needs no more steps than alone; then comes the other."""
    sim = Simulation(slots=13, rows=2, step_tokens=2, cache=False)
    old, young = sim.add([0, 0, 0], 9), sim.add([1, 1, 1], 9)
    while old.finish_reason is None:
        sim.step()
    assert old.preemptions == 0 and sim.steps <= 2 + 9
    sim.run()
    assert young.preemptions > 0 and sim.steps <= 2 * (3 + 9) + young.preemptions
    assert young.output == answer_of(young, [1, 1, 1], 4)


def test_no_decode_waits_for_a_long_prompt():
    """SCH-07: each decode advances in each step; the prompt gets the whole budget and is not starved."""
    sim = Simulation(slots=200, rows=4, step_tokens=6)
    decodes = [sim.add([i], 40) for i in range(3)]
    sim.step()
    long = sim.add([1, 0] * 40, 4)
    steps = 0
    while long.output_len == 0:
        before = [r.output_len for r in decodes]
        plan = dict(sim.step())
        steps += 1
        assert [r.output_len for r in decodes] == [n + 1 for n in before]
        assert plan[long] == 6 or long.output_len
    assert steps == -(-80 // 6)


def test_of_those_that_decode_the_longest_come_first():
    sim = Simulation(slots=200, rows=5, step_tokens=40)
    short, long, middle = sim.add([0], 9), sim.add([1, 0] * 9, 9), sim.add([1] * 5, 9)
    sim.step()
    late = sim.add([0, 0] * 4, 9)
    assert [request for request, _ in sim.step()] == [long, middle, short, late]
    assert [request for request, _ in sim.step()] == [long, late, middle, short]
    assert sim.scheduler.running == [short, long, middle, late]


def test_tokens_that_a_later_step_has_better_room_for_wait_in_their_slots():
    sim = Simulation(slots=100, rows=4, step_tokens=20, full=8)
    first, second, third = sim.add([0] * 5, 4), sim.add([1] * 4, 4), sim.add([0, 1] * 3, 4)
    assert sim.step() == [(first, 5), (second, 3)]  # of 15, and the others are there but do not get on
    assert third.row is not None and third.cached == 0 and len(third.slots) == 6
    assert sim.step() == [(first, 1), (second, 1), (third, 6)]  # seven are too few to hold any back
    sim.run()
    assert [r.output for r in (first, second, third)] == [
        answer_of(r, r.ids[: r.prompt_len], 4) for r in (first, second, third)
    ]


def test_prompts_take_no_more_beside_decodes_than_they_may():
    sim = Simulation(slots=400, rows=8, step_tokens=64)
    sim.scheduler.beside = lambda decodes: {1: 20, 2: 10, 3: 1}[decodes]
    long = sim.add([1, 0] * 100, 4)
    assert dict(sim.step()) == {long: 64}  # nobody decodes yet
    first = sim.add([0], 60)
    while not long.decoding:
        plan = dict(sim.step())
        assert sum(n for request, n in plan.items() if request is not first or not first.decoding) <= 64
    second, tiny = sim.add([1, 1, 0] * 10, 60), sim.add([0, 0], 60)
    seen = []
    while not (second.decoding and tiny.decoding):
        decodes = sum(request.decoding for request in sim.scheduler.running)
        plan = dict(sim.step())
        seen.append((decodes, sum(plan.values()) - decodes))
    assert seen[0] == (2, 10) and all(tokens <= {2: 10, 3: 1}[decodes] for decodes, tokens in seen), seen


def test_prompts_get_on_even_where_they_may_take_nothing():
    sim = Simulation(slots=200, rows=4, step_tokens=64)
    sim.scheduler.beside = lambda decodes: 0
    sim.add([0], 100), sim.add([1], 100), sim.step()
    late = sim.add([1, 0] * 9, 2)
    sim.step()
    assert late.row is None  # it may not begin ...
    sim.scheduler.beside = lambda decodes: 5
    sim.step()
    sim.scheduler.beside = lambda decodes: 0
    for _ in range(13):
        sim.step()
    assert late.output_len == 1  # ... but goes on, a token at a time


def test_tiny_requests_start_while_a_long_prompt_is_computed_only_after_it_and_in_order():
    """SCH-07 the other way round: first come, first served; nobody is passed."""
    sim = Simulation(slots=100, rows=4, step_tokens=8)
    long = sim.add([1] * 40, 2)
    tiny = [sim.add([0, i], 3) for i in range(5)]
    sim.run()
    firsts = [r.first_token for r in [long, *tiny]]
    assert firsts == sorted(firsts) and sim.steps <= 6 + 2 * 4


def test_one_step_never_spends_more_than_its_budget_and_never_less_than_it_can():
    sim = Simulation(slots=300, rows=8, step_tokens=16)
    for i in range(8):
        sim.add([1, 0, i % 2] * 7, 5)
    assert sum(n for _, n in sim.step()) == 16
    sim.run()


def test_an_evicted_request_is_next_in_line():
    sim = Simulation(slots=13, rows=2, step_tokens=6, cache=False)
    first, second, third = sim.add([0] * 4, 9), sim.add([1] * 4, 6), sim.add([1, 0], 3)
    while not second.preemptions:
        sim.step()
    assert list(sim.scheduler.waiting) == [second, third] and sim.scheduler.running == [first]
    sim.run()
    assert second.first_token < third.first_token
    assert first.finish_reason == second.finish_reason == third.finish_reason == "length"


def test_slots_on_stock_are_given_back_before_anybody_gives_way():
    """The prompt took what the other one left free; the rest of its stock serves both until the pool is full."""
    sim = Simulation(slots=400, rows=2, step_tokens=400, cache=False)
    old = sim.add([1], 300)
    for _ in range(2):
        sim.step()
    assert len(old.slots) - old.cached > 50
    young = sim.add([0] * (sim.scheduler.slots.free_count - 1), 200)
    while not young.preemptions:
        held = old.cached + young.cached
        sim.step()
    assert held >= sim.scheduler.capacity - 1
    sim.run()
    assert old.output == answer_of(old, [1], 4) and old.preemptions == 0


def test_cancel_in_every_state():
    """SCH-08: waiting, in its prompt, decoding, preempted, ended, unknown; the slots are back at once."""
    for steps in range(12):
        sim = Simulation(slots=24, rows=2, step_tokens=3, cache=False)
        requests = [sim.add([0, 1] * 3, 4), sim.add([1, 1] * 3, 4), sim.add([1, 0], 4)]
        for _ in range(steps):
            sim.step()
        if steps % 3 == 2 and sim.scheduler.running:
            sim.preempt(sim.scheduler.running[-1])
        victim = requests[steps % 3]
        ended = victim.finish_reason
        for _ in range(2):
            sim.cancel(victim)
        assert victim.finish_reason == (ended or "abort") and victim.slots == []
        assert victim not in sim.scheduler.running and victim not in sim.scheduler.waiting
        sim.cancel(ask([1]))
        sim.run()
        assert sim.scheduler.slots.free_count == 23
        assert all(r.output == answer_of(r, r.ids[: r.prompt_len], 4) for r in requests if r is not victim)


def test_a_finished_prompt_is_reused_and_one_token_is_left_to_compute():
    """RDX-03, RDX-09: the hit is as long as it can be, never the whole prompt."""
    sim = Simulation(slots=100, rows=2, step_tokens=50)
    first = sim.add([0, 1, 1, 0, 1], 4)
    sim.run()
    whole = first.ids[:]
    longer = sim.add([*whole, 1, 0], 2)
    sim.run()
    assert longer.prefix_hit == len(whole) - 1, "the last token sampled was never computed"
    for length, hit in [(5, 4), (3, 2), (8, 7), (1, 0)]:
        again = sim.add(whole[:length], 3)
        assert sum(n for _, n in sim.step()) == 1
        sim.run()
        assert again.prefix_hit == hit and again.output == answer_of(again, whole[:length], 4)


@pytest.mark.parametrize("steps", range(10))
def test_cancel_one_of_many_that_share_a_prefix(steps):
    """RDX-05 without a model: the others read the same slots on."""
    sim = Simulation(slots=60, rows=8, step_tokens=12)
    shared = [1, 0, 0, 1, 1, 0]
    sim.add(shared, 2)
    sim.run()
    requests = [sim.add(shared + [i % 2, i // 2 % 2], 6) for i in range(16)]
    for _ in range(steps):
        sim.step()
    sim.cancel(requests[steps % 8])
    sim.run()
    for request in requests:
        whole = answer_of(request, request.ids[:8], 4)
        assert request.output == (whole if request.finish_reason != "abort" else whole[: request.output_len])


def test_a_failed_request_is_not_cached():
    """RDX-07, seen from the pool: all slots of its own are free again, the shared ones stay."""
    sim = Simulation(slots=30, rows=2, step_tokens=8)
    sim.add([1, 1, 1], 2)
    sim.run()
    size = sim.scheduler.prefix.size
    bad = sim.add([1, 1, 1, 0, 0, 0], 5)
    sim.step()
    sim.step()
    sim.cancel(bad, "error")
    assert sim.scheduler.prefix.size == size
    assert sim.scheduler.slots.free_count == 29 - size
    sim.run()
