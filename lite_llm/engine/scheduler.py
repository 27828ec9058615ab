"""Who advances by how many tokens this step. Policy only: no tensors, so it tests on any laptop.

Every slot of the pool is at any time the pad slot, free, owned by the prefix cache, or held by one running request.
"""

from collections import deque

from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.request import Request
from lite_llm.engine.slots import SlotPool
from lite_llm.errors import ContextExceeded

Plan = list[tuple[Request, int]]
"""Requests and by how many tokens each advances; those that advance by one come first."""


class Scheduler:
    """Every step spends a token budget, oldest request first.

    One token is kept back for each running request, so no decode ever waits for a prompt; the rest goes to prompts.
    Chunked prompts and mixed batches need no code of their own. When the pool is full, the youngest running request
    gives its slots up and is computed again later.
    """

    def __init__(self, slots: SlotPool, max_requests: int, step_tokens: int, prefix: PrefixCache | NoPrefix):
        assert step_tokens >= max_requests, "every running request must fit in a step"
        self.slots, self.prefix, self.step_tokens = slots, prefix, step_tokens
        self.max_requests = max_requests
        self.free_rows = list(range(max_requests))[::-1]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission, oldest first

    @property
    def capacity(self) -> int:
        """Tokens that the pool can hold at most."""
        return self.slots.total - 1

    def add(self, request: Request) -> None:
        """Queue a request. ContextExceeded if its prompt and one token could never fit."""
        request.max_len = min(request.max_len, self.capacity + 1)  # the last token sampled is never cached
        if request.prompt_len >= request.max_len:
            raise ContextExceeded(
                f"the prompt has {request.prompt_len} tokens; with at least one for the answer {request.max_len} fit",
                "shorten the prompt, or raise the context if the model and the memory allow",
            )
        self.waiting.append(request)

    def plan(self) -> Plan:
        plan: Plan = []
        spare = self.step_tokens - len(self.running)
        for request in list(self.running):
            if request.row is None:
                continue  # preempted for an older one this step
            n = self._grow(request, 1 + spare)
            if n:
                plan.append((request, n))
                spare -= n - 1
        while self.waiting and self.free_rows and spare > 0 and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            n = self._grow(request, spare)
            plan.append((request, n))
            spare -= n
        return sorted(plan, key=lambda entry: entry[1] > 1)

    def commit(self, plan: Plan, sampled: list[int]) -> None:
        """Record the step: `sampled` has one token for each planned request that has computed all its tokens."""
        caught_up = [request for request, n in plan if n == request.pending]
        for request, n in plan:
            request.cached += n
        for request, token in zip(caught_up, sampled, strict=True):
            request.append(token)
            if request.finish_reason:
                self._leave(request)

    def cancel(self, request: Request, reason: str) -> None:
        """End a request wherever it is, queued or not; nothing happens if it has ended."""
        if request.finish_reason is None:
            request.end(reason)
            if request.row is not None:
                self._leave(request)
            elif request in self.waiting:
                self.waiting.remove(request)

    def fail(self, plan: Plan, reason: str) -> None:
        """A step that was planned did not happen: its requests end, and what it would have computed is given back."""
        for request, _ in plan:
            self.slots.free(request.slots[max(request.cached, request.shared) :])
            del request.slots[max(request.cached, request.shared) :]
            self.cancel(request, reason)

    def check(self) -> None:
        """Recount every slot from its owners. AssertionError if one is lost or owned twice."""
        cached = [slot for node in self.prefix.nodes() for slot in node.slots]
        held = [slot for request in self.running for slot in request.slots[request.shared :]]
        free = [slot for slot in range(1, self.slots.total) if self.slots.is_free(slot)]
        assert len(free) == self.slots.free_count, "the count of free slots is off"
        assert sorted(cached + held + free) == list(range(1, self.slots.total)), "a slot is lost or owned twice"
        assert len(cached) == self.prefix.size
        assert sum(len(node.slots) for node in self.prefix.nodes() if node.locks) == self.prefix.protected
        rows = [request.row for request in self.running] + self.free_rows
        assert sorted(rows) == list(range(self.max_requests)), "a table row is lost or given twice"
        assert all(len(request.slots) >= request.cached for request in self.running)
        assert all(request.row is None and not request.slots for request in self.waiting)

    def _admit(self, request: Request) -> bool:
        """Start the first waiting request if all it must compute fits, with one token for each running one."""
        slots, node = self.prefix.match(request.ids[:-1])  # at least one token is left to compute
        need = len(request.ids) - len(slots) + len(self.running)
        if need > self.slots.free_count + self.prefix.evictable and self.running:
            self.prefix.unlock(node)
            return False
        request.slots, request.shared, request.cached, request.node = list(slots), len(slots), len(slots), node
        if not request.preemptions:
            request.prefix_hit = len(slots)
        request.row, request.written = self.free_rows.pop(), 0
        self.running.append(request)
        return True

    def _grow(self, request: Request, limit: int) -> int:
        """Give a request slots for its next tokens, at most `limit`; returns how many, 0 if it had to give way."""
        while not self.slots.free_count and not self.prefix.evictable:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return 0
        n = min(request.pending, limit, self.slots.free_count + self.prefix.evictable)
        if n > self.slots.free_count:
            self.slots.free(self.prefix.evict(n - self.slots.free_count))
        request.slots += self.slots.alloc(n, after=request.slots[-1] if request.slots else None)
        return n

    def _preempt(self, request: Request) -> None:
        request.preemptions += 1
        self._leave(request)
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Take a request off its row. What it has computed goes to the prefix cache; slots beyond are freed."""
        spare = request.slots[request.cached :]
        if request.finish_reason == "error":  # its K and V may be damaged
            mine = request.slots[request.shared : request.cached]
        else:
            mine = self.prefix.insert(request.ids[: request.cached], request.slots[: request.cached])
        self.slots.free(spare + mine)
        self.prefix.unlock(request.node)
        self.running.remove(request)
        self.free_rows.append(request.row)
        request.slots, request.shared, request.cached, request.node, request.row = [], 0, 0, None, None
