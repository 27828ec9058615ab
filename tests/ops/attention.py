"""Ragged batches for the tests of attention: any length, any slot; foreign slots hold poison."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lite_llm.ops import reference
from lite_llm.ops.triton.attention import attend
from tests.close import DEVICE, assert_close

GPU = pytest.mark.gpu
NAN, INF = float("nan"), float("inf")


@dataclass
class Case:
    """A ragged batch: `new` tokens of each request, the last at position `lengths` - 1, in random slots of a pool."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    table: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    decodes: int
    scale: float
    window: int | None
    causal: bool = True

    def run(self, op=attend) -> Tensor:
        return op(**vars(self))

    def alone(self, b: int) -> "Case":
        mine = slice(int(self.q_start[b]), int(self.q_start[b + 1]))
        start = torch.tensor([0, mine.stop - mine.start], dtype=torch.int32, device=DEVICE)
        rows, kv_len = self.rows[b : b + 1].clone(), self.kv_len[b : b + 1].clone()
        return replace(
            self, q=self.q[mine].clone(), rows=rows, q_start=start, kv_len=kv_len, decodes=int(b < self.decodes)
        )


def case(
    lengths: list[int], new: list[int] | None = None, heads: int = 4, kv_heads: int = 2, head_dim: int = 32,
    dtype: torch.dtype = torch.float32, window: int | None = None, poison: float = NAN, decodes: int | None = None,
) -> Case:  # fmt: skip
    new = [1] * len(lengths) if new is None else new
    if decodes is None:
        decodes = next((b for b, n in enumerate(new) if n != 1), len(new))
    used, width = sum(lengths), max(lengths, default=0) + 3
    order = torch.randperm(used + 16)
    pools = torch.full((2, used + 16, kv_heads, head_dim), poison)
    pools[:, order[:used]] = torch.randn(2, used, kv_heads, head_dim)
    table = torch.full((len(lengths) + 2, width), int(order[-1]), dtype=torch.int32)  # foreign behind each length
    rows = torch.randperm(len(lengths) + 2)[: len(lengths)]
    for row, slots in zip(rows.tolist(), order[:used].split(lengths) if lengths else []):
        table[row, : len(slots)] = slots.int()
    q = torch.randn(sum(new), heads, head_dim)
    start = torch.tensor([0, *new]).cumsum(0)
    ints = [t.to(DEVICE, torch.int32) for t in (table, rows, start, torch.tensor(lengths))]
    floats = [t.to(DEVICE, dtype) for t in (q, pools[0], pools[1])]
    return Case(*floats, *ints, decodes, head_dim**-0.5, window)


def exact(c: Case) -> Tensor:
    """The reference's formula in float64; tokens before position 0, and tokens of no request, get zeros."""
    out = torch.zeros(c.q.shape, dtype=torch.float64, device=c.q.device)
    for b, length in enumerate(c.kv_len.tolist()):
        begin, end = c.q_start[b : b + 2].tolist()
        slots = c.table[c.rows[b], :length].long()
        k, v = (
            pool[slots].double().repeat_interleave(c.q.shape[1] // pool.shape[1], 1) for pool in (c.k_pool, c.v_pool)
        )
        scores = torch.einsum("qhd,khd->hqk", c.q[begin:end].double(), k) * c.scale
        key = torch.arange(length, device=c.q.device)
        query = torch.arange(length - (end - begin), length, device=c.q.device)[:, None]
        seen = (key <= query) & (key > query - (c.window or length + 1)) | (not c.causal)
        weights = scores.masked_fill(~seen, -INF).softmax(-1).nan_to_num(0.0)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def check(c: Case) -> Tensor:
    got = c.run()
    assert_close(got, c.run(reference.attend), exact(c))
    return got
