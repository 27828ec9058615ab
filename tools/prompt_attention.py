"""Attention of prompts beside cuDNN's, for bench_prompts.py: the work, what of it is checked, and the time it takes."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite_llm import ops
from lite_llm.ops.triton import attention
from tools.bench_ops import DEVICE, randn, timed

TURNS = 5  # of each kernel: clocks change from one second to the next
CHECKED, OFF = 48, 0.01  # rows of a result that are computed in fp32; how far they may be off, relatively


class Work(NamedTuple):
    """`new` tokens of each request behind `old` cached ones, in slots of random order or in a row."""

    name: str
    new: Sequence[int]
    old: Sequence[int]
    heads: tuple[int, int]  # of queries, of keys and values
    head_dim: int
    scattered: bool = False
    causal: bool = True
    reach: float | None = None  # of cuDNN's rate

    @property
    def flops(self) -> int:
        pairs = sum(n * (n + o) - (n * (n - 1) // 2 if self.causal else 0) for n, o in zip(self.new, self.old))
        return 4 * pairs * self.heads[0] * self.head_dim


GQA = (32, 8)
WORKS = (
    Work("4 x 2,048", [2048] * 4, [0] * 4, GQA, 128, reach=1.0),
    Work("8,192", [8192], [0], GQA, 128, reach=1.05),
    Work("16,384", [16384], [0], GQA, 128, reach=1.05),
    Work("4 x 4,096", [4096] * 4, [0] * 4, GQA, 64, reach=1.0),
    Work("8,192, 32 heads over 32", [8192], [0], (32, 32), 128),
    Work("8,192, not causal", [8192], [0], GQA, 128, causal=False),
    Work("8,192, random slots", [8192], [0], GQA, 128, scattered=True),
    Work("4 x 4,096, random slots", [4096] * 4, [0] * 4, GQA, 64, scattered=True),
    Work("64 prompts of 32 to 2,048", [32 + 32 * i for i in range(64)], [0] * 64, GQA, 128),
    Work("2,048 over 30,720", [2048], [30720], GQA, 128),
    Work("2,048 over 30,720, random slots", [2048], [30720], GQA, 128, scattered=True),
    Work("8 x 577, not causal", [577] * 8, [0] * 8, (16, 16), 64, scattered=True, causal=False),
    Work("512", [512], [0], GQA, 128),
    Work("1,024", [1024], [0], GQA, 64),
)


class Made(NamedTuple):
    q: Tensor
    pools: tuple[Tensor, Tensor]
    table: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor

    def args(self) -> tuple:
        return self.q, *self.pools, self.table, self.rows, self.q_start, self.kv_len, 0, self.q.shape[2] ** -0.5


def make(work: Work) -> Made:
    lengths = [n + o for n, o in zip(work.new, work.old)]
    ints = dict(dtype=torch.int32, device=DEVICE)
    order = 1 + (torch.randperm if work.scattered else torch.arange)(sum(lengths), **ints)
    table = torch.zeros(len(lengths), max(lengths), **ints)
    for row, part in zip(table, order.split(lengths)):
        row[: len(part)] = part
    heads, kv_heads = work.heads
    pools = tuple(randn(sum(lengths) + 1, kv_heads, work.head_dim) for _ in "kv")
    start = torch.tensor([0, *work.new], device=DEVICE).cumsum(0).int()
    q = randn(sum(work.new), heads, work.head_dim)
    return Made(q, pools, table, torch.arange(len(lengths), **ints), start, torch.tensor(lengths, **ints))


def portable(made: Made, causal: bool) -> Tensor:
    out = torch.empty_like(made.q)
    attention.attend_flash(*made.args()[:3], out, *made.args()[3:], None, causal)
    return out


def off(made: Made, causal: bool, out: Tensor) -> float:
    """How far some rows are from plain torch in fp32, as a share of their size."""
    group = made.q.shape[1] // made.pools[0].shape[1]
    got, want = [], []
    for token in torch.randint(len(out), (CHECKED,)).tolist():
        b = int((made.q_start <= token).sum()) - 1
        length = int(made.kv_len[b])
        seen = length - (int(made.q_start[b + 1]) - 1 - token) if causal else length
        slots = made.table[b, :seen].long()
        k, v = (pool[slots].float().repeat_interleave(group, 1) for pool in made.pools)
        weights = (torch.einsum("hd,khd->hk", made.q[token].float(), k) * made.q.shape[2] ** -0.5).softmax(-1)
        got.append(out[token].float())
        want.append(torch.einsum("hk,khd->hd", weights, v))
    got, want = torch.stack(got), torch.stack(want)
    return ((got - want).norm() / want.norm()).item()


def cudnn(made: Made, causal: bool) -> list[Callable[[Made], object]]:
    """Two ways to share heads, on the same keys and values, dense: those that it does not refuse."""
    batch, group = len(made.rows), made.q.shape[1] // made.pools[0].shape[1]
    q = made.q.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
    k, v = (pool[1:].unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for pool in made.pools)
    found = []
    for kv, more in (
        ((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)), {}),
        ((k, v), {"enable_gqa": True}),
    ):

        def way(_: Made, kv=kv, more=more) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, *kv, is_causal=causal, **more)

        try:
            way(made)
        except RuntimeError:
            continue
        found.append(way)
    return found


def attentions() -> Iterator[dict]:
    for work in WORKS:
        made = make(work)
        ours = lambda made, c=work.causal: ops.attend(*made.args(), None, c)  # noqa: E731
        others = lambda made, c=work.causal: portable(made, c)  # noqa: E731
        wrong = max(off(made, work.causal, call(made)) for call in (ours, others))
        alike = len(set(work.new)) == 1 and not any(work.old) and not work.scattered
        ways = [ours, others, *(cudnn(made, work.causal) if alike else [])]
        times = [[timed(way, [made]) for way in ways] for _ in range(TURNS)]
        own, plain, *theirs = (work.flops / statistics.median(column) / 1e12 for column in zip(*times))
        yield {
            "work": work.name, "heads": work.heads, "head_dim": work.head_dim, "reach": work.reach, "off": wrong,
            "tflop_s": own, "portable_tflop_s": plain, "cudnn_tflop_s": max(theirs, default=None),
        }  # fmt: skip
