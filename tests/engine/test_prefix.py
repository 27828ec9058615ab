"""The prefix cache against a plain dict of prefixes (RDX-01, 03, 04, 06, 10, 11)."""

import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lite_llm.engine.prefix import Node, PrefixCache

CI = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TOKENS = st.lists(st.integers(0, 1), max_size=7)


class PrefixMachine(RuleBasedStateMachine):
    """Vocabulary 2. The model knows each cached prefix with its slot, its last use and its locks."""

    def __init__(self):
        super().__init__()
        self.cache, self.next_slot, self.now = PrefixCache(), 1, 0
        self.slot: dict[tuple[int, ...], int] = {}
        self.used: dict[tuple[int, ...], int] = {}
        self.locks: list[tuple[tuple[int, ...], Node]] = []

    def cached_length(self, ids) -> int:
        return next((n for n in range(len(ids), 0, -1) if tuple(ids[:n]) in self.slot), 0)

    def touch(self, ids) -> None:
        self.now += 1
        for n in range(1, len(ids) + 1):
            self.used[tuple(ids[:n])] = self.now

    def protected(self) -> set[tuple[int, ...]]:
        return {ids[:n] for ids, _ in self.locks for n in range(1, len(ids) + 1)}

    def match_and_lock(self, ids) -> tuple[int, ...]:
        length = self.cached_length(ids)
        slots, node = self.cache.match(ids)
        assert slots == [self.slot[tuple(ids[:n])] for n in range(1, length + 1)], "not the longest cached prefix"
        self.touch(ids[:length])
        self.locks.append((tuple(ids[:length]), node))
        return tuple(ids[:length])

    def insert_after(self, hit, rest) -> list[int]:
        """As a request does: its shared slots, then its own; returns what it has to free."""
        ids = list(hit) + rest
        own = list(range(self.next_slot, self.next_slot + len(rest)))
        self.next_slot += len(rest)
        slots = [self.slot[hit[: n + 1]] for n in range(len(hit))] + own
        before = self.cached_length(ids)
        given, handed = list(ids), list(slots)
        back = self.cache.insert(given, handed, len(hit))
        assert back == slots[len(hit) : before], "the tree must return exactly what it has already"
        given.clear()  # the caller's lists stay the caller's
        handed.clear()
        for n in range(before + 1, len(ids) + 1):
            self.slot[tuple(ids[:n])] = slots[n - 1]
        self.touch(ids)
        return back

    @rule(ids=TOKENS)
    def match(self, ids):
        self.match_and_lock(ids)

    @rule(ids=TOKENS, rest=TOKENS)
    def a_whole_request(self, ids, rest):
        """RDX-03: prefix equal to a node, one less, one more: all occur at this size."""
        hit = self.match_and_lock(ids)
        self.insert_after(hit, ids[len(hit) :] + rest)

    @precondition(lambda self: self.locks)
    @rule(pick=st.integers(0, 99), rest=TOKENS)
    def finish(self, pick, rest):
        """RDX-04: two that computed the same hand in twice; the second keeps its slots."""
        hit, node = self.locks[pick % len(self.locks)]
        self.insert_after(hit, rest)
        self.locks.pop(pick % len(self.locks))
        self.cache.unlock(node)

    @precondition(lambda self: self.locks)
    @rule(pick=st.integers(0, 99))
    def unlock(self, pick):
        _, node = self.locks.pop(pick % len(self.locks))
        self.cache.unlock(node)

    @rule(n=st.integers(0, 12))
    def evict(self, n):
        """The tails of the leaf used longest ago go first; what is locked stays (RDX-06)."""
        freed = self.cache.evict(n)
        assert len(freed) == min(n, len(set(self.slot) - self.protected()))
        left = list(freed)
        while left:
            safe = self.protected()
            tails = [ids for ids in self.slot if ids not in safe and not self._longer(ids)]
            tail = min(tails, key=lambda ids: self.used[ids])
            run = [tail]  # a leaf goes from its end; its start may be older than other leaves
            while len(run) < len(left) and (up := run[-1][:-1]) and up not in safe:
                if any(other[: len(up)] == up and other not in run and other != up for other in self.slot):
                    break
                if self.used[up] != self.used[tail]:
                    break
                run.append(up)
            taken = []
            for ids in run:
                if self.slot[ids] not in left:
                    break
                taken.append(ids)
            assert taken, "something used more recently, locked or in the middle was evicted"
            for ids in taken:
                left.remove(self.slot.pop(ids))
                del self.used[ids]

    @rule()
    def flush(self):
        """RDX-11: all but what is locked."""
        freed = self.cache.evict(10**9)
        assert sorted(freed) == sorted(slot for ids, slot in self.slot.items() if ids not in self.protected())
        for ids in set(self.slot) - self.protected():
            del self.slot[ids], self.used[ids]

    def _longer(self, ids) -> bool:
        return any(len(other) > len(ids) and other[: len(ids)] == ids for other in self.slot)

    @invariant()
    def recount(self):
        cache, seen = self.cache, {}
        assert cache.size == len(self.slot)
        assert cache.protected == len(self.protected()) and cache.evictable == cache.size - cache.protected
        for node in cache.nodes():
            path, above = node.tokens, node.parent
            while above.parent is not None:
                path, above = above.tokens + path, above.parent
            assert above is cache.root and node.parent.children[node.tokens[0]] is node
            assert len(node.tokens) == len(node.slots) > 0
            locked = sum(len(ids) >= len(path) and list(ids[: len(path)]) == path for ids, _ in self.locks)
            assert node.locks == locked, "a lock is lost or left over"
            start = len(path) - len(node.tokens)
            seen |= {tuple(path[: start + i + 1]): slot for i, slot in enumerate(node.slots)}
        assert seen == self.slot


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = CI


def test_match_returns_a_list_of_its_own():
    cache = PrefixCache()
    cache.insert([1, 2, 3], [4, 5, 6])
    slots, node = cache.match([1, 2, 3])
    slots.append(99)
    assert cache.match([1, 2, 3])[0] == [4, 5, 6]
    cache.unlock(node)


def test_the_least_recently_used_tail_goes_first():
    cache = PrefixCache()
    cache.insert([1, 2, 3, 4], [10, 11, 12, 13])
    cache.insert([1, 2, 5], [10, 11, 14])
    cache.unlock(cache.match([1, 2, 3, 4])[1])
    assert cache.evict(1) == [14]
    assert cache.evict(1) == [13]
    assert sorted(cache.evict(2)) == [11, 12]
    assert cache.match([1, 2, 3])[0] == [10]


def test_a_lock_holds_through_splits_and_evictions():
    cache = PrefixCache()
    cache.insert([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    slots, node = cache.match([1, 2, 3])  # splits the edge
    assert slots == [1, 2, 3] and cache.protected == 3
    cache.match([1])  # splits the locked part
    assert sorted(cache.evict(99)) == [4, 5]
    cache.unlock(node)
    assert (cache.protected, cache.evictable) == (1, 2)
    assert sorted(cache.evict(99)) == [2, 3]


def test_a_long_time_of_hits_does_not_fill_the_memory():
    cache = PrefixCache()
    cache.insert([1, 2], [1, 2])
    for _ in range(5000):
        cache.unlock(cache.match([1, 2])[1])
    assert len(cache._leaves) < 200
    assert cache.evict(5) == [1, 2]
    assert cache.size == 0


def test_a_long_chain_and_a_wide_node():
    """No recursion, and nothing that grows with the square (RDX-10). A chain of one-token nodes is the worst tree."""
    depth, cache, node = 100_000, PrefixCache(), None
    node = cache.root
    for i in range(depth):  # what 100,000 requests, each one token longer than the last, would leave
        child = Node([i], [i + 1], node)
        node.children[i] = node = child
    cache.size = depth
    start = time.process_time()
    slots, last = cache.match(list(range(depth)))
    assert slots == list(range(1, depth + 1)) and cache.protected == depth and cache.evict(1) == []
    cache.unlock(last)
    assert len(cache.nodes()) == depth
    assert cache.evict(depth) == list(range(depth, 0, -1)) and cache.size == 0

    cache.insert(list(range(depth)), list(range(depth)))
    assert len(cache.match(list(range(depth - 1)) + [0])[0]) == depth - 1

    wide = PrefixCache()
    for i in range(20_000):
        wide.insert([7, i, i], [i + 1, 20_001 + i, 40_001 + i])
    assert wide.size == 1 + 2 * 20_000
    assert wide.match([7, 19_999, 19_999])[0] == [1, 40_000, 60_000]
    assert set(wide.evict(20_000)) == {n + 1 for i in range(10_000) for n in (20_000 + i, 40_000 + i)}
    assert time.process_time() - start < 10
