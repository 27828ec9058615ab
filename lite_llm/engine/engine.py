"""The loop: plan, build a batch, run the model, sample, commit. Token ids in, token ids out."""

import itertools

import numpy as np
import torch
from torch import nn

from lite_llm.batch import Batch, KVPool
from lite_llm.config import ModelConfig
from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.request import Request
from lite_llm.engine.sampler import Sampler
from lite_llm.engine.scheduler import Plan, Scheduler
from lite_llm.engine.slots import SlotPool
from lite_llm.errors import UsageError


class Engine:
    """Continuous batching over one model and one KV pool. Every client, offline or online, calls `step`."""

    def __init__(
        self,
        model: nn.Module,
        cfg: ModelConfig,
        kv: KVPool,
        *,
        max_requests: int,
        step_tokens: int,
        prefix_cache: bool = True,
        usable_vocab: int | None = None,
    ):
        """`cfg.max_len` is the context: no request grows longer. `usable_vocab`: ids from there on are padding."""
        self.model, self.cfg, self.kv = model, cfg, kv
        self.device = kv.k.device
        prefix = PrefixCache() if prefix_cache else NoPrefix()
        self.scheduler = Scheduler(SlotPool(kv.k.shape[1]), max_requests, step_tokens, prefix)
        self.table = torch.zeros(max_requests, cfg.max_len, dtype=torch.int32, device=self.device)
        self.sampler = Sampler(max_requests, cfg.vocab, usable_vocab or cfg.vocab, self.device)

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def add(self, request: Request) -> None:
        """Queue a request. UsageError for token ids that the model does not have; ContextExceeded if it cannot fit."""
        biased = request.params.logit_bias
        for name, ids in (("prompt", request.ids), ("logit_bias", biased), ("stop_token_ids", request.stop_ids)):
            for token in ids:
                if type(token) is not int or not 0 <= token < self.cfg.vocab:
                    raise UsageError(f"{name} has token id {token!r}; expected 0 to {self.cfg.vocab - 1}")
        if not request.ids:
            raise UsageError("the prompt is empty; expected at least one token")
        request.max_len = min(request.max_len, self.cfg.max_len)
        self.scheduler.add(request)

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request at once and free its slots; nothing happens if it has ended."""
        self.scheduler.cancel(request, reason)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Advance every planned request once. Returns those that got a token or ended."""
        plan = self.scheduler.plan()
        if not plan:
            return []
        sampling = [request for request, n in plan if n == request.pending]
        try:
            logits = self.model(self._batch(plan), self.kv)
            tokens = self.sampler(logits, sampling)
        except BaseException:
            self.scheduler.fail(plan, "error")
            raise
        self.scheduler.commit(plan, tokens)
        return sampling

    def _batch(self, plan: Plan) -> Batch:
        self._write_table(plan)
        counts = np.array([n for _, n in plan])
        q_start = np.concatenate([[0], counts.cumsum()])
        pieces = {
            "tokens": list(itertools.chain.from_iterable(r.ids[r.cached : r.cached + n] for r, n in plan)),
            "slots": list(itertools.chain.from_iterable(r.slots[r.cached : r.cached + n] for r, n in plan)),
            "positions": np.concatenate([np.arange(r.cached, r.cached + n) for r, n in plan]),
            "q_start": q_start,
            "kv_len": [r.cached + n for r, n in plan],
            "rows": [r.row for r, _ in plan],
            "logits_at": [q_start[i + 1] - 1 for i, (r, n) in enumerate(plan) if n == r.pending],
        }
        t = self._to_device(pieces)
        return Batch(
            tokens=t["tokens"],
            positions=t["positions"],
            slots=t["slots"],
            q_start=t["q_start"].int(),
            kv_len=t["kv_len"].int(),
            table=self.table,
            rows=t["rows"].int(),
            logits_at=t["logits_at"],
            decodes=int((counts == 1).sum()),
        )

    def _write_table(self, plan: Plan) -> None:
        """Tell the device the slots that it does not know yet, and the sampler the requests."""
        rows, positions, slots = [], [], []
        for request, _ in plan:
            if request.written == 0:
                self.sampler.join(request)
            end = len(request.slots)
            rows += [request.row] * (end - request.written)
            positions += range(request.written, end)
            slots += request.slots[request.written : end]
            request.written = end
        t = self._to_device({"rows": rows, "positions": positions, "slots": slots})
        self.table[t["rows"], t["positions"]] = t["slots"].int()

    def _to_device(self, pieces: dict[str, list[int] | np.ndarray]) -> dict[str, torch.Tensor]:
        """int64 vectors, in one transfer."""
        arrays = [np.asarray(piece, dtype=np.int64) for piece in pieces.values()]
        flat = torch.from_numpy(np.concatenate(arrays)).to(self.device)
        return dict(zip(pieces, flat.split([len(a) for a in arrays]), strict=True))
