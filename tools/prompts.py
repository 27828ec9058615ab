"""Prompts' attention by itself, as tools/tune_attention.py times it: one prompt in a call, of one length or another."""

from typing import NamedTuple

import torch
from torch import Tensor

from lite_llm.config import ModelConfig
from lite_llm.ops import reference
from lite_llm.ops.triton import attention, hopper
from lite_llm.ops.triton.tuning import Choice
from tools.bench_ops import timed
from tools.chain import COLD

CHECKED = (700, 129, 64, 1, 33, 577), (0, 300, 1000, 450, 0, 31)
"""New tokens of the requests that a tile is checked with, and how many are cached before them."""
OFF = 0.02  # how far what a token and head get may be off, as a share of its size


class Inputs(NamedTuple):
    """As of `attend`."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    table: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor


class Prompts:
    """A model's attention, in place of the chain that a Timer asks. Prompts lie in runs of slots, as they mostly do.

    A run takes about as long for each length, so that none decides alone which tile is the fastest, and reads `cold`
    bytes or more, so that none of it waits in the L2 cache for the next one.
    """

    def __init__(
        self, cfg: ModelConfig, lengths: list[int], device: torch.device, dtype: torch.dtype, cold: int = COLD
    ):
        self.cfg, self.device, self.dtype, self.tokens = cfg, device, dtype, max(lengths)
        self.window = next((window for window in cfg.windows if window is not None), None)
        self.checked = self._inputs(*CHECKED, scattered=True)
        counts = {n: round((self.tokens / n) ** 1.5) for n in sorted(set(lengths))}  # about what time grows with
        each = 2 * (cfg.heads + cfg.kv_heads) * cfg.head_dim * dtype.itemsize  # bytes of a token, what is written too
        rounds = -(-cold // sum(count * n * each for n, count in counts.items()))
        self.inputs = {n: [self._inputs([n], [0]) for _ in range(count * rounds)] for n, count in counts.items()}

    def run(self, choices: dict[str, Choice], head: bool) -> None:
        [choice] = choices.values()
        for inputs in self.inputs.values():
            for one in inputs:
                self.attend(choice, one)

    def once(self, part: str, choice: Choice) -> Tensor:
        return self.attend(choice, self.checked)

    def attend(self, choice: Choice, inputs: Inputs) -> Tensor:
        q, k_pool, v_pool, *where = inputs
        out, rest = torch.empty_like(q), (*where, 0, self.cfg.head_dim**-0.5, self.window, True)
        if choice.kernel == "hopper":
            hopper.attend_hopper(q, k_pool, v_pool, out, *rest)
        else:
            attention.attend_flash(q, k_pool, v_pool, out, *rest, shape=choice.tile)
        return out

    def right(self, part: str, choice: Choice) -> bool:
        """Whether every token and head of some ragged prompts get what the reference computes in fp32."""
        q, k_pool, v_pool, *where = self.checked
        floats = [t.float() for t in (q, k_pool, v_pool)]
        want = reference.attend(*floats, *where, 0, self.cfg.head_dim**-0.5, self.window)
        poison = torch.full_like(q, float("nan"))
        del poison  # the allocator gives the same memory to the kernel's output
        got = self.once(part, choice).float()
        return bool(((got - want).norm(dim=-1) <= OFF * want.norm(dim=-1)).all())

    def seconds(self, choice: Choice) -> dict[int, float]:
        """By length, of one call."""
        return {n: timed(lambda one: self.attend(choice, one), inputs) for n, inputs in self.inputs.items()}

    def flops(self, n: int) -> int:
        """Of what the mask leaves of a prompt of n tokens."""
        seen = min(n, self.window or n)
        return 4 * (seen * (seen + 1) // 2 + (n - seen) * seen) * self.cfg.heads * self.cfg.head_dim

    def _inputs(self, new: list[int], cached: list[int], scattered: bool = False) -> Inputs:
        lengths = [n + before for n, before in zip(new, cached, strict=True)]
        ints = dict(dtype=torch.int32, device=self.device)
        slots = 1 + (torch.randperm if scattered else torch.arange)(sum(lengths), **ints)
        table = torch.zeros(len(lengths), max(lengths), **ints)
        for row, mine in zip(table, slots.split(lengths)):
            row[: len(mine)] = mine
        heads, kv_heads = self.cfg.heads, self.cfg.kv_heads
        sizes = ((sum(new), heads), (sum(lengths) + 1, kv_heads), (sum(lengths) + 1, kv_heads))
        floats = [torch.randn(*size, self.cfg.head_dim, device=self.device).to(self.dtype) for size in sizes]
        starts = torch.tensor([0, *new], device=self.device).cumsum(0).int()
        return Inputs(*floats, table, torch.arange(len(lengths), **ints), starts, torch.tensor(lengths, **ints))
