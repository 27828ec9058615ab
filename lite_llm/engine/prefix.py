"""The radix tree of cached prefixes: which token sequences have their K and V in the pool, and in which slots.

A node holds a run of tokens and their slots; the path from the root spells the prefix. Tokens are compared, never
hashed, so a hit is never wrong. A lock on a node protects it and all above it; the rest can be evicted, oldest leaf
first, token by token.
"""

import heapq
import itertools
from collections.abc import Callable


class Node:
    __slots__ = ("tokens", "slots", "children", "parent", "locks", "used")

    def __init__(self, tokens: list[int], slots: list[int], parent: "Node | None"):
        self.tokens, self.slots, self.parent = tokens, slots, parent
        self.children: dict[int, Node] = {}  # by first token
        self.locks = 0  # requests that use this node or one below it
        self.used = 0  # when it was last matched or inserted


class PrefixCache:
    """Owns the slots it is given by `insert` until `evict` gives them back."""

    def __init__(self, mark: Callable[[list[int], bool], None] = lambda slots, evictable: None):
        """`mark` is told of slots that can be evicted from now on, and of those that cannot any more."""
        self._mark = mark
        self.root = Node([], [], None)
        self.size = 0  # slots that the tree owns
        self.protected = 0  # of these, in locked nodes
        self._clock = itertools.count(1)
        self._leaves: list[tuple[int, int, Node]] = []  # heap of candidates for eviction; some are out of date

    @property
    def evictable(self) -> int:
        return self.size - self.protected

    def match(self, ids: list[int]) -> tuple[list[int], Node]:
        """Slots of the longest cached prefix of `ids`, and the node where it ends, locked: unlock it after use."""
        node, slots = self._walk(ids)
        self._lock(node, 1)
        return slots, node

    def unlock(self, node: Node) -> None:
        self._lock(node, -1)

    def insert(self, ids: list[int], slots: list[int], shared: int = 0) -> list[int]:
        """Give the tree the slots of a computed sequence; returns those it does not take: it has other ones there.

        The first `shared` slots are the tree's, as a `match` that is still locked has given them.
        """
        assert len(ids) == len(slots)
        node, known = self._walk(ids)
        done = len(known)
        if done < len(ids):
            leaf = Node(ids[done:], slots[done:], node)
            node.children[ids[done]] = leaf
            self.size += len(leaf.slots)
            self._mark(leaf.slots, True)
            node = leaf
        self._touch(node)
        return [slot for slot, other in zip(slots[shared:done], known[shared:], strict=True) if slot != other]

    def evict(self, n: int) -> list[int]:
        """Up to n slots of unlocked nodes, which the tree forgets: the tails of the leaves used longest ago."""
        freed: list[int] = []
        while len(freed) < n and self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            if leaf.used != used or leaf.children or leaf.locks or leaf.parent is None:
                continue
            cut = max(len(leaf.slots) - (n - len(freed)), 0)
            freed += leaf.slots[cut:]
            if cut:
                del leaf.tokens[cut:], leaf.slots[cut:]
                heapq.heappush(self._leaves, (used, next(self._clock), leaf))
            else:
                parent, leaf.parent = leaf.parent, None
                del parent.children[leaf.tokens[0]]
                self._offer(parent)
        self.size -= len(freed)
        return freed

    def nodes(self) -> list[Node]:
        """Every node but the root; for accounting and tests."""
        found, todo = [], list(self.root.children.values())
        while todo:
            found.append(todo.pop())
            todo += found[-1].children.values()
        return found

    def _walk(self, ids: list[int]) -> tuple[Node, list[int]]:
        """As far down as `ids` leads; an edge that agrees in part is split where it parts."""
        node, slots, done = self.root, [], 0
        while done < len(ids) and (child := node.children.get(ids[done])):
            agree = _common(child.tokens, ids, done)
            if agree < len(child.tokens):
                child = self._split(child, agree)
            node = child
            slots += child.slots
            done += agree
        self._touch(node)
        return node, slots

    def _split(self, node: Node, at: int) -> Node:
        upper = Node(node.tokens[:at], node.slots[:at], node.parent)
        upper.locks, upper.used = node.locks, node.used
        upper.children[node.tokens[at]] = node
        node.parent.children[node.tokens[0]] = upper
        node.tokens, node.slots, node.parent = node.tokens[at:], node.slots[at:], upper
        return upper

    def _touch(self, node: Node) -> None:
        now, below = next(self._clock), node
        while node is not None:
            node.used, node = now, node.parent
        self._offer(below)

    def _offer(self, node: Node) -> None:
        if not node.children and not node.locks and node.parent is not None:
            heapq.heappush(self._leaves, (node.used, next(self._clock), node))
            if len(self._leaves) > 64 and len(self._leaves) > 4 * self.size:
                self._leaves = [(n.used, i, n) for i, n in enumerate(self.nodes()) if not n.children and not n.locks]
                heapq.heapify(self._leaves)

    def _lock(self, node: Node, change: int) -> None:
        leaf = node
        while node.parent is not None:
            if node.locks == (0 if change > 0 else 1):
                self.protected += change * len(node.slots)
                self._mark(node.slots, change < 0)
            node.locks += change
            assert node.locks >= 0
            node = node.parent
        self._offer(leaf)


class NoPrefix:
    """The cache that remembers nothing, so that the scheduler has no branch for it."""

    size = protected = evictable = 0

    def match(self, ids: list[int]) -> tuple[list[int], None]:
        return [], None

    def unlock(self, node: None) -> None:
        pass

    def insert(self, ids: list[int], slots: list[int], shared: int = 0) -> list[int]:
        return slots

    def evict(self, n: int) -> list[int]:
        return []

    def nodes(self) -> list[Node]:
        return []


def _common(edge: list[int], ids: list[int], start: int) -> int:
    """How many tokens of `edge` equal those of `ids` from `start` on."""
    low, high = 1, min(len(edge), len(ids) - start)
    if edge[:high] == ids[start : start + high]:
        return high
    while low < high:  # the first `low` agree, the first `high` do not
        middle = (low + high + 1) // 2
        if edge[low:middle] == ids[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low
