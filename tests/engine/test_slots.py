"""The slot pool against a plain set (KVP-01 to 04, 08, 09)."""

import random
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lite_llm.batch import PAD_SLOT
from lite_llm.engine.slots import PoolFull, SlotError, SlotPool

CI = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class SlotMachine(RuleBasedStateMachine):
    """Requests take slots and give them back in any order and mixture."""

    @initialize(total=st.integers(2, 24))
    def start(self, total):
        self.pool, self.total = SlotPool(total), total
        self.free = set(range(1, total))
        self.owned: list[list[int]] = []
        self.kept: set[int] = set()

    @rule(n=st.integers(0, 26), after=st.integers(-1, 26), follow=st.booleans(), pick=st.randoms(use_true_random=False))
    def alloc(self, n, after, follow, pick):
        if follow and self.owned:  # as a request does: go on behind its last slot
            after = pick.choice(self.owned)[-1]
        after = None if after < 0 else after
        if n > len(self.free):
            with pytest.raises(PoolFull, match=f"{n} KV slots .* {len(self.free)} of {self.total - 1}"):
                self.pool.alloc(n, after)
            return
        got = self.pool.alloc(n, after)
        assert len(got) == n == len(set(got)) and set(got) <= self.free, "a slot was handed out twice"
        if n and after is not None and after + 1 in self.free and after not in self.free:
            run = next(i for i in range(1, n + 1) if after + i + 1 not in self.free or i == n)
            assert got[:run] == list(range(after + 1, after + 1 + run)), "the run was not continued"
        self.free -= set(got)
        if got:
            self.owned.append(got)

    @precondition(lambda self: self.owned)
    @rule(pick=st.randoms(use_true_random=False), part=st.booleans())
    def give_back(self, pick, part):
        mine = self.owned.pop(pick.randrange(len(self.owned)))
        keep = [slot for slot in mine if part and pick.random() < 0.5]
        back = [slot for slot in mine if slot not in keep]
        pick.shuffle(back)
        self.pool.free(back)
        self.free |= set(back)
        self.kept -= set(back)
        if keep:
            self.owned.append(keep)

    @rule(
        wrong=st.sampled_from([PAD_SLOT, -1, -3, 24, 10**30, True, 1.0, 2.5, float("nan"), "1", None]),
        at=st.integers(0, 3),
    )
    def free_nonsense(self, wrong, at):
        self._refused([slot for mine in self.owned for slot in mine][:3], wrong, at)

    @precondition(lambda self: self.free)
    @rule(pick=st.randoms(use_true_random=False), at=st.integers(0, 3))
    def free_twice(self, pick, at):
        self._refused([slot for mine in self.owned for slot in mine][:3], pick.choice(sorted(self.free)), at)

    @precondition(lambda self: self.owned)
    @rule(pick=st.randoms(use_true_random=False))
    def free_one_twice_in_a_call(self, pick):
        mine = pick.choice(self.owned)
        self._refused(mine, pick.choice(mine), 0)

    @precondition(lambda self: self.owned)
    @rule(pick=st.randoms(use_true_random=False), kept=st.booleans())
    def mark(self, pick, kept):
        mine = pick.choice(self.owned)
        marked = pick.sample(mine, pick.randint(0, len(mine)))
        self.pool.mark(marked, kept)
        self.kept = self.kept | set(marked) if kept else self.kept - set(marked)

    @invariant()
    def cells_are_counted_slot_by_slot(self):
        used = {slot for mine in self.owned for slot in mine} - self.kept
        for size in (1, 3, self.total):
            cells = [set(range(first, min(first + size, self.total))) for first in range(1, self.total, size)]
            counts = [len(cell & used) for cell in cells], [len(cell & self.kept) for cell in cells]
            assert self.pool.cells(size) == counts

    def _refused(self, slots, wrong, at):
        call = list(slots)
        call.insert(at, wrong)
        with pytest.raises(SlotError):
            self.pool.free(call)

    @invariant()
    def accounting(self):
        assert self.pool.free_count == len(self.free)
        assert {slot for slot in range(1, self.total) if self.pool.is_free(slot)} == self.free
        assert not self.pool.is_free(PAD_SLOT)
        held = [slot for mine in self.owned for slot in mine]
        assert len(held) == len(set(held)) == self.total - 1 - len(self.free)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        rest = self.pool.alloc(self.pool.free_count)  # whatever happened, exactly the free count is served
        assert set(rest) == self.free
        with pytest.raises(PoolFull):
            self.pool.alloc(1)
        self.pool.free([slot for mine in self.owned for slot in mine] + rest)
        assert sorted(self.pool.alloc(self.total - 1)) == list(range(1, self.total))


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = CI


@pytest.mark.parametrize("n", [-1, -(10**9), True, 1.0, "1", None])
def test_a_count_that_is_none_is_refused(n):
    pool = SlotPool(8)
    with pytest.raises(ValueError):
        pool.alloc(n)
    assert pool.free_count == 7


def test_nothing_all_and_one_too_many():
    pool = SlotPool(13)
    assert pool.alloc(0) == [] and pool.alloc(0, after=3) == []
    with pytest.raises(PoolFull, match="13 KV slots were asked for and 12 of 12 are free"):
        pool.alloc(13)
    assert sorted(pool.alloc(12)) == list(range(1, 13))
    assert pool.alloc(0) == []
    with pytest.raises(PoolFull, match="1 KV slots were asked for and 0 of 12 are free"):
        pool.alloc(1)


def test_what_was_allocated_is_owned():
    pool = SlotPool(16)
    mine, other = pool.alloc(4), pool.alloc(4)
    mine_before, other_before = list(mine), list(other)
    other.clear()
    pool.free(other_before)
    third = pool.alloc(8)
    assert mine == mine_before and not set(mine) & set(third)


def test_a_request_that_grows_alone_stays_in_one_run():
    pool = SlotPool(1000)
    first, second = pool.alloc(10), pool.alloc(10)
    for _ in range(100):
        for mine in (first, second):
            mine += pool.alloc(1, after=mine[-1])
    assert first == list(range(first[0], first[0] + 110)) and second == list(range(second[0], second[0] + 110))


@pytest.mark.parametrize("order", [1, -1, 5, 7])
def test_slots_given_back_one_by_one_become_one_run_again(order):
    """Whatever the order: up, down, in strides."""
    pool = SlotPool(13)
    pool.alloc(12)
    for i in range(12):
        pool.free([i * order % 12 + 1])
    assert pool.alloc(6) == list(range(7, 13)), "from the middle of the whole"


def test_a_run_that_was_taken_whole_is_forgotten():
    pool = SlotPool(10)
    pool.alloc(9)
    pool.free([3, 4])
    assert pool.alloc(2) == [3, 4]
    pool.free([5, 6])  # behind the run that is gone
    assert pool.alloc(2) == [5, 6]


def test_every_second_slot_free_still_serves_the_free_count():
    pool = SlotPool(2001)
    everything = sorted(pool.alloc(2000))
    pool.free(everything[::2])
    assert sorted(pool.alloc(1000)) == everything[::2]


def test_checks_stay_under_python_O():
    script = """
        import sys
        assert False, "this test is about python -O"
        from lite_llm.engine.slots import PoolFull, SlotError, SlotPool
        pool = SlotPool(12)
        mine = pool.alloc(6)
        gone = pool.alloc(2)
        pool.free(gone)
        for wrong in ([0], [-1], [12], [gone[0]], [mine[0]] * 2, [True], [1.0], [mine[1], 99], ["1", mine[0]], [None]):
            try:
                pool.free(wrong)
            except SlotError:
                continue
            sys.exit(f"free({wrong}) was taken")
        try:
            pool.alloc(6)
            sys.exit("alloc beyond the pool")
        except PoolFull:
            pass
        if pool.free_count != 5 or any(pool.is_free(slot) for slot in mine) or not pool.is_free(gone[0]):
            sys.exit("the pool changed")
    """
    subprocess.run([sys.executable, "-O", "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_cost_stays_flat_over_a_long_run():
    """Counted in calls, those of heapq included, and not in seconds: those depend on who else is at work."""
    pool, draw, owned, marks = SlotPool(4097), random.Random(0), [], []
    for _ in range(20):
        calls = 0

        def count(frame, event, what):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            for _ in range(2_500):
                if pool.free_count > 64 and draw.random() < 0.5:
                    owned.append(pool.alloc(draw.randint(1, 32), after=draw.randrange(4097)))
                elif owned:
                    pool.free(owned.pop(draw.randrange(len(owned))))
        finally:
            sys.setprofile(None)
        marks.append(calls)
        assert len(pool._largest) <= 65 + 4 * len(pool._end) + 64
    assert min(marks[-4:]) < 1.5 * min(marks[2:6]), marks


def test_a_slot_given_back_is_the_one_that_comes_next():
    pool = SlotPool(5)
    pool.alloc(4)
    pool.free([1])
    assert pool.alloc(1) == [1]
