"""Models that know the right answer, and rigs around the scheduler and the engine that recount everything each step.

The next token is a hash of all tokens before it, and every slot of the pool remembers the hash of the prefix that it
stands for. So a wrong slot, row, position, table entry or leaked prefix ends in a wrong token or a broken row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lite_llm.batch import PAD_SLOT, Batch, KVPool
from lite_llm.config import ModelConfig
from lite_llm.engine.engine import Engine
from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.request import Request, SamplingParams
from lite_llm.engine.scheduler import Plan, Scheduler
from lite_llm.engine.slots import SlotPool
from lite_llm.ops.reference.sampling import sample
from lite_llm.rope import Rope

NAN = float("nan")
_PRIME, _FACTOR = (1 << 31) - 1, 1_103_515_245


def prefix_hash(tokens: Iterable[int], start: int = 12345) -> int:
    for token in tokens:
        start = (start * _FACTOR + token + 1) % _PRIME
    return start


def logits_of(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """A shuffle of 0.5, 1.0, ... around 0: any two logits are at least 0.5 apart."""
    x = np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(prefix_hash(tokens))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))).argsort().argsort() - vocab // 2).astype(np.float32) / 2


def next_token(tokens: Sequence[int], vocab: int) -> int:
    return (prefix_hash(tokens) >> 7) % vocab


class Watched(Request):
    """A request that may end once only."""

    def end(self, reason: str) -> None:
        assert self.finish_reason is None, f"ended as {self.finish_reason} and again as {reason}"
        assert reason in ("stop", "length", "timeout", "abort", "grammar", "error")
        super().end(reason)


def ask(ids: Sequence[int], stop_ids: Iterable[int] = (), **params) -> Watched:
    """A request for `ids`; `max_tokens` is 8 if nothing else is said."""
    wish = SamplingParams(**{"max_tokens": 8, "seed": 7, **params}).resolved({})
    stops = frozenset(stop_ids) | frozenset(wish.stop_token_ids)
    return Watched(list(ids), wish, stops, max_len=len(ids) + wish.max_tokens)


class Bounded(Scheduler):
    """Fails instead of preempting for ever."""

    left = 100

    def plan(self) -> Plan:
        self.left = 100
        return super().plan()

    def _preempt(self, request: Request) -> None:
        self.left -= 1
        assert self.left, "no end in sight"
        super()._preempt(request)


class Simulation:
    """A scheduler over a pool of plain Python: what a slot holds is the hash of the prefix that was written to it."""

    def __init__(
        self, slots: int = 16, rows: int = 3, step_tokens: int = 6, cache: bool = True, vocab: int = 4, full: int = 1
    ):
        """Tokens of prompts are computed in multiples of `full`, once there are as many."""
        pool = SlotPool(slots)
        prefix = PrefixCache(pool.mark) if cache else NoPrefix()
        self.scheduler = Bounded(pool, rows, step_tokens, prefix, rows, fill=lambda _, n: n // full * full or n)
        self.full = full
        self.vocab, self.pool, self.steps = vocab, {}, 0

    def add(self, ids: Sequence[int], answer: int = 8, stop_ids: Iterable[int] = ()) -> Watched:
        request = ask(ids, stop_ids, max_tokens=answer)
        self.scheduler.add(request)
        self.scheduler.check()
        return request

    def step(self) -> Plan:
        scheduler, before = self.scheduler, list(self.scheduler.running)
        queue = list(scheduler.waiting)
        plan = scheduler.plan()
        self._check_plan(plan, before, queue)
        sampled = []
        for request, n in plan:
            assert len(request.slots) >= request.cached + n and PAD_SLOT not in request.slots
            for position in range(request.cached):
                held = self.pool.get(request.slots[position])
                assert held == prefix_hash(request.ids[: position + 1]), f"position {position} reads a foreign slot"
            if n == request.pending:
                sampled.append(next_token(request.ids, self.vocab))
        for request, n in plan:
            for position in range(request.cached, request.cached + n):
                self.pool[request.slots[position]] = prefix_hash(request.ids[: position + 1])
        caught_up = [request for request, n in plan if n == request.pending]
        scheduler.launched(plan)
        scheduler.commit(caught_up, [[token] for token in sampled])
        self.after()
        self.steps += 1
        return plan

    def after(self) -> None:
        """Recount, and forget what is in free slots."""
        self.scheduler.check()
        for slot in [slot for slot in self.pool if self.scheduler.slots.is_free(slot)]:
            del self.pool[slot]
        for request in self.scheduler.running:
            assert len(request.slots) >= request.cached and request.finish_reason is None

    def preempt(self, request: Request) -> None:
        self.scheduler._preempt(request)
        self.after()

    def cancel(self, request: Request, reason: str = "abort") -> None:
        self.scheduler.cancel(request, reason)
        self.after()

    def run(self, limit: int = 10_000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.step(), "nothing was planned although requests wait"
            assert self.steps < limit, "no end in sight"

    def _check_plan(self, plan: Plan, before: list[Request], queue: list[Request]) -> None:
        scheduler = self.scheduler
        planned = [request for request, _ in plan]
        tokens = sum(n for request, n in plan if not request.decoding)
        assert all(n >= 1 for _, n in plan) and tokens <= scheduler.step_tokens
        assert tokens < self.full or tokens % self.full == 0
        assert sorted(plan, key=lambda e: not e[0].decoding) == plan, "those that decode come first"
        assert len(set(map(id, planned))) == len(planned)
        left = [r for r in scheduler.running if r not in planned]
        readers = [r for r in scheduler.running if not r.decoding]
        assert left == readers[len(readers) - len(left) :], "somebody was left out who decodes, or began earlier"
        assert not left or self.full > 1, "somebody was left out"
        evicted = [r for r in before if r not in scheduler.running]
        again = [r for r in before if r in scheduler.running]
        assert before[: len(again)] == again, "an older request gave way to a younger one"
        assert not before or before[0] in planned, "the oldest request did not advance"
        line = evicted + queue
        assert list(scheduler.waiting) == line[len(line) - len(scheduler.waiting) :], "somebody jumped the queue"


def answer_of(request: Request, prompt: Sequence[int], vocab: int) -> list[int]:
    """What a request in a Simulation must say if nobody cancels it."""
    ids = list(prompt)
    while len(ids) < request.max_len:
        ids.append(next_token(ids, vocab))
        if ids[-1] in request.stop_ids:
            break
    return ids[len(prompt) :]


Hook = Callable[[int, Batch, Tensor], None]
"""Called with the number of the forward pass, its batch and its logits, which it may change; or it may raise."""


class HashModel(nn.Module):
    """Keeps (token, position) as K and the prefix's hash as V; reads all of them back, through the table."""

    def __init__(self, vocab: int, hook: Hook | None = None, memory: int = 1 << 30):
        """What it says follows from the last `memory` tokens alone: if these are few it soon repeats itself."""
        super().__init__()
        self.vocab, self.hook, self.calls, self.memory = vocab, hook, 0, memory

    def forward(self, batch: Batch, kv: KVPool) -> Tensor:
        check_batch(batch, kv)
        self.calls += 1
        k, v = kv.k[0, :, 0], kv.v[0, :, 0]
        k[batch.slots] = torch.stack([batch.tokens, batch.positions], 1).double()
        histories: list[list[int] | None] = []  # of each token of the batch
        for b, length in enumerate(batch.kv_len.tolist()):
            new = int(batch.q_start[b + 1] - batch.q_start[b])
            if not length:  # a pad
                histories += [None] * new
                continue
            slots = batch.table[batch.rows[b].item(), :length].long()
            tokens, positions = k[slots].T.tolist()
            sane = positions == list(range(length))
            hashes, h = [], prefix_hash(())
            for token in tokens:
                h = prefix_hash([int(token)], h) if token == token else -1
                hashes.append(float(h))
            v[slots[length - new :]] = torch.tensor(hashes[length - new :], dtype=torch.float64)[:, None]
            sane &= -1.0 not in hashes and v[slots].T[0].tolist() == hashes
            whole = [int(token) for token in tokens] if sane else []
            histories += [whole[: i + 1] if sane else None for i in range(length - new, length)]
        histories += [None] * (len(batch.tokens) - len(histories))
        rows = histories if batch.logits_at is None else [histories[t] for t in batch.logits_at.tolist()]
        broken = np.full(self.vocab, NAN, dtype=np.float32)
        logits = np.array([broken if row is None else logits_of(row[-self.memory :], self.vocab) for row in rows])
        out = torch.from_numpy(logits.astype(np.float32).reshape(len(rows), self.vocab))
        if self.hook:
            self.hook(self.calls, batch, out)
        return out


def check_batch(batch: Batch, kv: KVPool) -> None:
    """Everything that `Batch` promises."""
    starts, lengths = batch.q_start.tolist(), batch.kv_len.tolist()
    counts = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert starts[0] == 0 and starts[-1] <= len(batch.tokens) == len(batch.slots) == len(batch.positions)
    assert len(counts) == len(lengths) == len(batch.rows) and set(counts[: batch.decodes]) <= {1}
    real = [b for b, length in enumerate(lengths) if length]
    ends: dict[int, int] = {}  # of each row
    for b in real:
        follows = b < batch.decodes and ends.get(batch.rows[b].item(), -1) == lengths[b] - 1  # as drafts do
        assert follows or batch.rows[b].item() not in ends, "two requests in one row"
        ends[batch.rows[b].item()] = lengths[b]
    slots = batch.slots.tolist()
    used = [slot for b in real for slot in slots[starts[b] : starts[b + 1]]]
    assert len(set(used)) == len(used) and PAD_SLOT not in used and max(used, default=0) < kv.k.shape[1]
    assert all(slot in (PAD_SLOT, *used) for slot in slots), "a pad writes to somebody's slot"
    for b in real:
        start, n, length = starts[b], counts[b], lengths[b]
        assert n >= 1 and batch.positions[start : start + n].tolist() == list(range(length - n, length))
        assert batch.table[batch.rows[b].item(), length - n : length].tolist() == slots[start : start + n]
    if batch.logits_at is not None:
        assert [batch.logits_at[b].item() for b in real] == [starts[b + 1] - 1 for b in real]


def tiny_config(vocab: int, max_len: int) -> ModelConfig:
    """Facts of a model with the least of everything; real enough for the engine and for `Llama`."""
    return ModelConfig(
        architecture="LlamaForCausalLM", num_layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocab=vocab,
        norm_eps=1e-5, max_len=max_len, rope=Rope(theta=100.0, rotary=8), windows=(None, None),
    )  # fmt: skip


def fill_(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep logits of order one, for facts that no config.json states."""
    random = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for param in model.parameters():
        param.normal_(*((1.0, 0.1) if param.dim() == 1 else (0.0, param.shape[-1] ** -0.5)), generator=random)


class Rig:
    """An engine over a poisoned pool, recounted after every step; free slots and rows are poisoned again."""

    def __init__(
        self,
        slots: int = 25,
        rows: int = 4,
        step_tokens: int = 8,
        vocab: int = 16,
        max_len: int = 64,
        prefix_cache: bool = True,
        usable_vocab: int | None = None,
        hook: Hook | None = None,
        model: nn.Module | None = None,
        cfg: ModelConfig | None = None,
        oracle: HashModel | None = None,
        ahead: int = 0,
        padded: bool = False,
        drafts: int = 0,
    ):
        """`oracle` or else `model` says the answers. `ahead` and `padded` make the engine work as with CUDA graphs."""
        self.vocab = cfg.vocab if cfg else vocab
        cfg = dataclasses.replace(cfg or tiny_config(vocab, max_len), max_len=max_len)
        shape = (cfg.num_layers, slots, cfg.kv_heads, cfg.head_dim) if model else (1, slots, 1, 2)
        like = next(model.parameters()) if model else torch.zeros(0, dtype=torch.float64)
        self.kv = KVPool(like.new_full(shape, NAN), like.new_full(shape if model else (1, slots, 1, 1), NAN))
        self.model = model or oracle or HashModel(vocab, hook)
        self.engine = Engine(
            self.model, cfg, self.kv, max_requests=rows, step_tokens=step_tokens, prefix_cache=prefix_cache,
            usable_vocab=usable_vocab, ahead=ahead, graphs=padded, drafts=drafts,
        )  # fmt: skip
        self.scheduler, self.steps = self.engine.scheduler, 0

    def add(self, ids: Sequence[int] | Request, stop_ids: Iterable[int] = (), **params) -> Request:
        request = ids if isinstance(ids, Request) else ask(ids, stop_ids, **params)
        self.engine.add(request)
        return request

    def step(self) -> list[Request]:
        try:
            return self.engine.step()
        finally:
            self.steps += 1
            self.after()

    def after(self) -> None:
        self.scheduler.check()
        for request in self.scheduler.running:
            assert len(request.slots) >= request.cached
        free = [PAD_SLOT] + [s for s in range(1, self.scheduler.slots.total) if self.scheduler.slots.is_free(s)]
        with self.engine._on_stream():  # elsewhere it could come behind what the next step writes there
            self.kv.k[:, free] = self.kv.v[:, free] = NAN
            self.engine.state.table[self.scheduler.free_rows] = 1 << 30

    def abort(self, request: Request, reason: str = "abort") -> None:
        self.engine.abort(request, reason)
        self.after()

    def preempt(self, request: Request) -> None:
        self.scheduler._preempt(request)
        self.after()

    def run(self, limit: int = 2000) -> None:
        while not self.engine.idle:
            self.step()
            assert self.steps < limit, "no end in sight"

    def answers(self, *requests: Request) -> list[tuple[list[int], str | None]]:
        """Add, run to the end, and say what came."""
        for request in requests:
            self.add(request)
        self.run()
        return [(request.output, request.finish_reason) for request in requests]


def alone(
    request: Request, vocab: int, usable: int | None = None, seen: Sequence[int] | None = None, memory: int = 1 << 30
) -> tuple[list[int], str]:
    """What the hash model says to a request that nobody disturbs, worked out token by token without an engine.

    `seen` is what it sees of the prompt, if that is not its ids; `memory` is the model's.
    """
    p, ids = request.params, list(request.ids[: request.prompt_len])
    seen = ids if seen is None else seen
    while True:
        done = ids[request.prompt_len :]
        logits = [float(x) for x in logits_of([*seen[: request.prompt_len], *done][-memory:], vocab)]
        for token in set(ids):
            logits[token] = (
                logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
            )
        for token in set(done):
            logits[token] -= p.presence_penalty + p.frequency_penalty * done.count(token)
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        for token in range(vocab):
            if token >= (usable or vocab) or (token in request.stop_ids and len(done) < p.min_tokens):
                logits[token] = -np.inf
        heat = 0.0 if p.greedy else p.temperature
        heat, top_p, min_p = (torch.tensor([x], dtype=torch.float32) for x in (heat, p.top_p, p.min_p))
        row, position, top_k = torch.tensor([[0], [len(ids)], [p.top_k]], dtype=torch.int32)
        seed = torch.tensor([p.seed])
        ids.append(sample(torch.tensor([logits]), row, position, heat, top_k, top_p, min_p, seed, vocab).item())
        if ids[-1] in request.stop_ids and len(done) + 1 > p.min_tokens:
            return ids[request.prompt_len :], "stop"
        if len(ids) >= request.max_len:
            return ids[request.prompt_len :], "length"
