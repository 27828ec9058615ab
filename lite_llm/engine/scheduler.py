"""Who advances by how many tokens this step. Policy only: no tensors, so it tests on any laptop.

Every slot of the pool is at any time the pad slot, free, owned by the prefix cache, or held by one running request.
"""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable

from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.request import Request
from lite_llm.engine.slots import SlotPool
from lite_llm.errors import ContextExceeded

Plan = list[tuple[Request, int]]
"""Requests and by how many tokens each advances; those whose token the device holds come first."""

RUN = 64
"""Slots that a decoding request gets at a time, while there are plenty: the device hears of them once."""

FEW = 8
"""Most requests in a step with drafts: verifying some tokens of each costs little while a step takes as long as reading
the weights does, and with more of them it does not."""

MOST_REVEALED = 64
"""Most tokens of prompts in a step whose logits are all wanted: each takes a row as wide as the vocabulary."""


class Scheduler:
    """Every step spends a budget of prompts' tokens, oldest request first; each request that decodes advances beside.

    No decode ever waits for a prompt, and of the prompts that were begun the oldest always gets on. Chunked prompts and
    mixed batches need no code of their own. When the pool is full, the youngest running request gives its slots up and
    is computed again later; but first all give up what they do not need yet.
    """

    def __init__(
        self,
        slots: SlotPool,
        max_requests: int,
        step_tokens: int,
        prefix: PrefixCache | NoPrefix,
        prompts: int,
        beside: Callable[[int], int] | None = None,
        fill: Callable[[int, int], int] | None = None,
        drafts: int = 0,
        spread: Callable[[int], int] | None = None,
    ):
        """`step_tokens`: most tokens of a step that the device does not hold; `prompts`: of how many requests.

        `beside` says how many such tokens a step may have, by the number of requests that decode in it; None: all that
        fit. `fill` says how many of a step's tokens are better computed in it, and not in the next one, by the numbers
        of requests that decode in it and of such tokens; None: all. `drafts`: most drafted tokens of a request.
        `spread` says how many such tokens a step should have in which so many requests decode, unless it takes more for
        all to be read in the steps that take place anyway; None: all that fit.
        """
        assert step_tokens >= max_requests, "every running request must fit in a step"
        self.prompts, self.beside, self.fill, self.drafts, self.spread = prompts, beside, fill, drafts, spread
        self.slots, self.prefix, self.step_tokens = slots, prefix, step_tokens
        self.max_requests = max_requests
        self.free_rows = list(range(max_requests))[::-1]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission, oldest first
        self.made = 0  # tokens of all answers since the start
        self._deadlines: list[tuple[float, int, Request]] = []  # heap; some of the requests have ended
        self._order = itertools.count()

    @property
    def capacity(self) -> int:
        """Tokens that the pool can hold at most."""
        return self.slots.total - 1

    @property
    def taken(self) -> int:
        """Slots that running requests hold, each counted once; the prefix cache may hold more, but gives them up."""
        return self.capacity - self.slots.free_count - self.prefix.evictable

    @property
    def fills_a_step(self) -> bool:
        """Whether those that wait have as many tokens as a step takes."""
        return any(tokens >= self.step_tokens for tokens in itertools.accumulate(r.pending for r in self.waiting))

    def add(self, request: Request) -> None:
        """Queue a request. ContextExceeded if its prompt and one token could never fit."""
        request.max_len = min(request.max_len, self.capacity + 1)  # the last token sampled is never cached
        if request.prompt_len >= request.max_len:
            raise ContextExceeded(
                f"the prompt has {request.prompt_len} tokens; with at least one for the answer {request.max_len} fit",
                ("send fewer pictures, " if request.pictures else "")
                + "shorten the prompt, or raise the context if the model and the memory allow",
            )
        self.waiting.append(request)
        if request.deadline is not None:
            if len(self._deadlines) > 64 + 4 * (len(self.waiting) + len(self.running)):
                self._deadlines = [entry for entry in self._deadlines if entry[2].finish_reason is None]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, next(self._order), request))

    def expire(self, now: float) -> list[Request]:
        """End all requests whose deadline has come, wherever they are; returns them."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.finish_reason is None:
                self.cancel(request, "timeout")
                ended.append(request)
        return ended

    def plan(self) -> Plan:
        decodes: Plan = []
        prompts: Plan = []
        spare = self._spare()
        for request in list(self.running):
            if request.row is None or request.satisfied or request.unread:
                continue  # preempted for an older one this step, or done but for its last token, or not now
            if request.decoding:
                if self._grow(request, 1):
                    decodes.append((request, 1))
            elif len(prompts) < self.prompts and (n := self._grow(request, 1 + spare)):
                prompts.append((request, n))
                spare -= n - 1
        while self.waiting and self.free_rows and spare > 0 and len(prompts) < self.prompts:
            if not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            n = self._grow(request, spare)
            (decodes if request.decoding else prompts).append((request, n))
            spare -= n
        decodes.sort(key=lambda entry: -entry[0].cached)  # flash-decoding deals them out in this order
        if self.drafts and not prompts and len(decodes) <= FEW:
            decodes = self._drafted(decodes)
        if any(len(request.slots) > request.written for request in self.running):
            self._stock()
        return decodes + self._filled(prompts, len(decodes))

    def launched(self, plan: Plan) -> None:
        """The step is on its way. It will bring a token to each request that has then computed all its tokens."""
        for request, n in plan:
            caught_up = n == request.pending
            request.cached += n
            if caught_up:
                request.flying += 1
                request.held = request.cached

    def commit(self, requests: list[Request], tokens: list[list[int]]) -> None:
        """A step has come back, with a token for each of these requests, and more where drafts stood; those that have
        ended take no more."""
        for request, own in zip(requests, tokens, strict=True):
            request.flying -= 1
            if request.finish_reason is None:
                for token in own:
                    request.append(token)
                    self.made += token >= 0
                    if request.finish_reason:
                        break
                if request.drafts:
                    self._verified(request, len(own) - 1)
                if request.finish_reason:
                    self._remove(request)

    def cancel(self, request: Request, reason: str) -> None:
        """End a request wherever it is, queued or not; nothing happens if it has ended."""
        if request.finish_reason is None:
            request.end(reason)
            self._remove(request)

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
        kept = [slot for node in self.prefix.nodes() if not node.locks for slot in node.slots]
        marked = [slot for slot in range(self.slots.total) if self.slots.is_kept(slot)]
        assert marked == sorted(kept), "a slot is wrongly marked as kept, or wrongly not"
        rows = [request.row for request in self.running] + self.free_rows
        assert sorted(rows) == list(range(self.max_requests)), "a table row is lost or given twice"
        assert all(len(request.slots) >= request.cached for request in self.running)
        assert all(request.row is None and not request.slots for request in self.waiting)

    def _spare(self) -> int:
        """Tokens of a step beyond one for each running request."""
        reading = [r for r in self.running if not r.decoding]
        decodes, spare = len(self.running) - len(reading), self.step_tokens - len(reading)
        if decodes and (reading or self.waiting):
            if self.beside is not None:
                spare = min(spare, max(self.beside(decodes) - len(reading), 0))
            if self.spread is not None:
                enough = max(self.spread(decodes), self._due(reading))
                spare = min(spare, max(enough - len(reading), 0))
        if any(r.revealing for r in itertools.chain(reading, itertools.islice(self.waiting, self.prompts))):
            spare = min(spare, max(MOST_REVEALED - len(reading), 0))
        return spare

    def _due(self, reading: list[Request]) -> int:
        """Tokens of prompts in each step, if all for which there is a row are to be read in the steps that the answers
        under way take anyway, and in no more steps than there are requests.

        Weights are read in each of these, so a token of a prompt costs least where no step has many of them. With few
        requests that gains little, and a long prompt would wait long.
        """
        prompts = [*reading, *itertools.islice(self.waiting, len(self.free_rows))]
        left = [r.max_len - len(r.ids) - r.flying for r in self.running if r.decoding]
        steps = min(max(*left, 1), len(left) + len(prompts))
        return -(-sum(r.pending for r in prompts) // steps)

    def _filled(self, prompts: Plan, decodes: int) -> Plan:
        """Without those of the last tokens that `fill` leaves to the next step; their slots are kept."""
        tokens = sum(n for _, n in prompts)
        excess = tokens - self.fill(decodes, tokens) if tokens and self.fill else 0
        while excess:
            request, n = prompts.pop()
            if n > excess:
                prompts.append((request, n - excess))
            excess -= min(n, excess)
        return prompts

    def _drafted(self, decodes: Plan) -> Plan:
        """With drafts behind the tokens of those whose text repeats itself, and these last.

        What follows is looked up from the last token. So who may have something to draft waits until the CPU knows it;
        who has not goes on. No draft shares a step with a request whose logits are adjusted: that would be another
        graph for each shape.
        """
        if any(request.adjusted for request, _ in decodes):
            return decodes
        plain, drafted = [], []
        for request, _ in decodes:
            most = min(self.drafts, request.max_len - len(request.ids) - request.flying - 1)
            guess = request.lookup.guess(request.ids, most, request.flying)
            if request.flying and guess:
                continue
            request.drafts = guess
            n = self._grow(request, request.pending)  # it has a slot for its own token
            del request.drafts[n - 1 :]
            (drafted if request.drafts else plain).append((request, n))
        return plain + drafted

    def _verified(self, request: Request, stood: int) -> None:
        """Forget its drafts. K and V of those that did not stand are overwritten by the tokens that come instead."""
        request.drafts, request.stood = [], request.stood + stood
        if not stood:
            request.lookup.pause(request.ids)
        if request.row is not None:
            request.cached = request.held = len(request.ids) - 1

    @property
    def _full(self) -> bool:
        return not self.slots.free_count and not self.prefix.evictable

    def _admit(self, request: Request) -> bool:
        """Start the first waiting request if all it must compute fits, with one token for each running one."""
        if request.flying:
            return False  # preempted a moment ago: its last token is still on its way
        known = 0 if request.revealing else len(request.ids) - 1  # at least one token is left to compute
        slots, node = self.prefix.match(request.keys(known))
        need = len(request.ids) - len(slots) + len(self.running)
        if need > self.slots.free_count + self.prefix.evictable and self.running:
            self.prefix.unlock(node)
            return False
        request.slots, request.shared, request.cached, request.node = list(slots), len(slots), len(slots), node
        if not request.preemptions:
            request.prefix_hit, request.admitted = len(slots), time.monotonic()
        request.row, request.written = self.free_rows.pop(), 0
        sent = request.pending > 1 or request.parts(request.cached, len(request.ids))  # the device holds no picture
        request.held = -1 if sent else request.cached
        self.running.append(request)
        return True

    def _grow(self, request: Request, limit: int) -> int:
        """Give a request slots for its next tokens, at most `limit`; returns how many, 0 if it had to give way."""
        have, wanted = len(request.slots) - request.cached, min(request.pending, limit)
        if wanted <= have:
            return wanted
        if not have and self._full:
            self._unstock()
        while not have and self._full:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return 0
        n = min(wanted, have + self.slots.free_count + self.prefix.evictable)
        need = n - have
        if need > self.slots.free_count:
            self.slots.free(self.prefix.evict(need - self.slots.free_count))
        request.slots += self.slots.alloc(need, after=request.slots[-1] if request.slots else None)
        return n

    def _stock(self) -> None:
        """The device is told of new slots anyway: give all that decode some to go on with, if there are plenty."""
        prompts = [*(r for r in self.running if not r.decoding), *itertools.islice(self.waiting, 1)]
        plenty = (self.slots.free_count - sum(r.pending for r in prompts)) // (4 * len(self.running))
        for request in self.running:
            spare = len(request.slots) - request.cached
            if request.decoding and not request.satisfied and spare < RUN // 2:
                more = min(RUN - spare, plenty, request.max_len - len(request.slots))
                request.slots += self.slots.alloc(max(more, 0), after=request.slots[-1])

    def _unstock(self) -> None:
        """Take back what those that decode got to go on with, but for the slot of the token that comes next.

        No step under way writes there: what it writes counts as cached. The device hears of other slots before it does.
        """
        for request in self.running:
            keep = request.cached + 1
            if request.decoding and len(request.slots) > keep:
                self.slots.free(request.slots[keep:])
                del request.slots[keep:]
                request.written = min(request.written, keep)

    def _preempt(self, request: Request) -> None:
        request.preemptions += 1
        self._leave(request)
        self.waiting.appendleft(request)

    def _remove(self, request: Request) -> None:
        if request.row is not None:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        """Take a request off its row. What it has computed goes to the prefix cache; slots beyond are freed.

        Steps under way may still write to those slots; any later use of them is behind these steps on the device. The
        last token that the CPU knows is not cached: if it ended the request, the device has not computed it.
        """
        cached = min(request.cached, max(len(request.ids) - 1, request.shared))
        spare = request.slots[cached:]
        if request.finish_reason in ("error", "grammar"):  # its K and V may be damaged
            mine = request.slots[request.shared : cached]
        else:
            mine = self.prefix.insert(request.keys(cached), request.slots[:cached], request.shared)
        self.slots.free(spare + mine)
        self.prefix.unlock(request.node)
        self.running.remove(request)
        self.free_rows.append(request.row)
        request.slots, request.shared, request.cached, request.node, request.row = [], 0, 0, None, None
