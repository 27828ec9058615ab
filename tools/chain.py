"""A few layers of a model with random weights, as tools/tune.py times them: each part runs as it is told to."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_llm import ops
from lite_llm.config import ModelConfig
from lite_llm.ops import reference
from lite_llm.ops.triton import decode, gemv, hopper_gated, skinny, skinny_qkv, wide, wide_qkv
from lite_llm.ops.triton.gpu import capability
from lite_llm.ops.triton.tuning import Choice

PARTS = {"gate_up": "gated", "down": "add", "head": "linear", "qkv": "qkv", "out": "add"}  # to ops; most bytes first
COLD = 256 << 20  # bytes of weights in a chain: several times the L2 cache, if not what address caches cover


class Weights:
    """Random weights of a few layers of a model, enough to leave nothing in the L2 cache, and of its head."""

    def __init__(self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, cold: int = COLD):
        self.cfg, self.device, self.dtype = cfg, device, dtype
        sizes = {part: self.key(part)[:0:-1] for part in PARTS}  # (rows, columns)
        self.head = self.random(*sizes.pop("head"), scale=0.02)
        self.bytes = sum(math.prod(size) for size in sizes.values()) * dtype.itemsize  # of a layer
        self.layers = [
            {part: self.random(*size, scale=0.02) for part, size in sizes.items()}
            for _ in range(min(max(-(-cold // self.bytes), 2), cfg.num_layers))
        ]
        self.norm = 1 + self.random(cfg.hidden, scale=0.1)
        self.bias = self.random(self.key("qkv")[2]) if cfg.qkv_bias else None
        self.head_norm = 1 + self.random(cfg.head_dim, scale=0.1) if cfg.qk_norm else None
        self.cos, self.sin = (table.to(device) for table in cfg.rope.tables(1024))

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def key(self, part: str) -> tuple[str, int, int]:
        """(op, inputs, rows of the weight)"""
        cfg = self.cfg
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        sizes = {
            "qkv": (cfg.hidden, q + 2 * kv), "out": (q, cfg.hidden), "gate_up": (cfg.hidden, 2 * cfg.ffn),
            "down": (cfg.ffn, cfg.hidden), "head": (cfg.hidden, cfg.vocab),
        }  # fmt: skip
        return PARTS[part], *sizes[part]

    def least(self, part: str) -> int:
        """The smallest number of tokens that the table is asked for: gemv has no norm of heads."""
        return gemv.MOST_TOKENS + 1 if part == "qkv" and self.cfg.qk_norm else 1


class Chain:
    """A decode step of some layers for requests of equal context; each part runs as its choice says.

    Attention is a part that need not be named: Choice("decode", tiles), or Choice("none", None) to leave it out. How
    many programs it gets depends on the `width` of the table, which is that of an engine's longest request.
    """

    def __init__(self, weights: Weights, tokens: int, context: int, width: int | None = None):
        self.weights, self.tokens, self.context = weights, tokens, min(context, len(weights.cos))
        cfg, device = weights.cfg, weights.device
        self.device = device
        slots, ints = tokens * self.context + 1, dict(dtype=torch.int32, device=device)
        self.pools = [
            tuple(weights.random(slots, cfg.kv_heads, cfg.head_dim) for _ in range(2)) for _ in weights.layers
        ]
        self.table = torch.zeros(tokens, max(width or 0, self.context), **ints)
        self.table[:, : self.context] = torch.arange(1, slots, **ints).view(tokens, self.context)
        self.rows, self.q_start = torch.arange(tokens, **ints), torch.arange(tokens + 1, **ints)
        self.kv_len = torch.full((tokens,), self.context, **ints)
        self.positions, self.slots = self.kv_len.long() - 1, self.table[:, self.context - 1].long()
        self.start = weights.random(tokens, cfg.hidden)
        self.x = self.start.clone()
        self.wide = {part: weights.random(tokens, weights.key(part)[1]) for part in ("out", "down")}

    def run(self, choices: dict[str, Choice], head: bool) -> None:
        weights = self.weights
        x = self.x.copy_(self.start)
        for i, layer in enumerate(weights.layers):
            q = self.qkv(choices["qkv"], x, i)
            seen = self.attend(choices.get("attention"), q, i)
            self.matmul("out", choices["out"], seen.flatten(1), layer["out"], layer["gate_up"], residual=x)
            y = self.matmul("gate_up", choices["gate_up"], x, layer["gate_up"], layer["down"])
            last = i + 1 == len(weights.layers)
            ahead = weights.head if head and last else weights.layers[(i + 1) % len(weights.layers)]["qkv"]
            self.matmul("down", choices["down"], y, layer["down"], ahead, residual=x)
        if head:
            self.matmul("head", choices["head"], x, weights.head, None)

    def once(self, part: str, choice: Choice) -> Tensor:
        """One part by itself, on the first layer's weights; what it adds to or writes is scratch."""
        layer, start = self.weights.layers[0], self.start
        if part == "qkv":
            return self.qkv(choice, start, 0)
        if part == "attention":
            return self.attend(choice, self._queries(), 0)
        if part == "head":
            return self.matmul(part, choice, start, self.weights.head, None)
        x, residual = (start, None) if part == "gate_up" else (self.wide[part], start.clone())
        following = {"out": "gate_up", "gate_up": "down", "down": "qkv"}[part]
        return self.matmul(part, choice, x, layer[part], layer[following], residual)

    def qkv(self, choice: Choice, x: Tensor, i: int) -> Tensor:
        weights, layer = self.weights, self.weights.layers[i]
        norm, eps, heads = weights.norm, weights.cfg.norm_eps, (weights.head_norm,) * 2
        where = (self.positions, self.slots, weights.cos, weights.sin)
        if choice.kernel == "gemv":
            return gemv.gemv_qkv(
                *self.pools[i], x, layer["qkv"], weights.bias, norm, eps, *where, layer["out"], choice.tile
            )
        if choice.kernel in ("skinny", "wide"):
            project = skinny_qkv.skinny_qkv if choice.kernel == "skinny" else wide_qkv.wide_qkv
            return project(
                *self.pools[i], x, layer["qkv"], weights.bias, norm, eps, *where, *heads, layer["out"], choice.tile
            )
        y = F.linear(ops.rms_norm(x, norm, eps), layer["qkv"], weights.bias)
        return ops.rope_store_kv_(*self.pools[i], y, *where, *heads, eps)

    def attend(self, choice: Choice | None, q: Tensor, i: int) -> Tensor:
        scale, pools = self.weights.cfg.head_dim**-0.5, self.pools[i]
        if choice is None:
            return ops.attend(q, *pools, self.table, self.rows, self.q_start, self.kv_len, self.tokens, scale)
        if choice.kernel == "none":
            return q
        out = torch.empty_like(q)
        decode.decode(
            q, *pools, out, self.table, self.rows, self.kv_len, self.tokens, scale, window=None, shape=choice.tile
        )
        return out

    def _queries(self) -> Tensor:
        return self.wide["out"].view(self.tokens, self.weights.cfg.heads, self.weights.cfg.head_dim)

    def matmul(
        self, part: str, choice: Choice, x: Tensor, weight: Tensor, ahead: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        gated, eps = part == "gate_up", self.weights.cfg.norm_eps
        norm = self.weights.norm if residual is None else None
        if choice.kernel == "hopper":
            return hopper_gated.hopper_gated(x, weight, norm, eps)
        if choice.kernel != "cublas":
            call = {"gemv": gemv.gemv, "skinny": skinny.skinny, "wide": wide.wide}[choice.kernel]
            return call(x, weight, None, norm, eps, gated, residual, ahead, choice.tile)
        if residual is not None:
            return residual.addmm_(x, weight.T)
        y = F.linear(ops.rms_norm(x, norm, eps), weight)
        return ops.silu_mul(y) if gated else y

    def possible(self, part: str, choice: Choice) -> bool:
        op, inputs, outputs = self.weights.key(part)
        if choice.kernel == "gemv":
            enough = self.tokens >= self.weights.least(part)
            return enough and gemv.fits(choice.tile, inputs, self.tokens, op in ("gated", "qkv"))
        if choice.kernel == "cublas":
            return True
        if choice.kernel == "hopper":
            return op == "gated" and hopper_gated.serves(inputs, outputs, capability(self.weights.device))
        family, gpu = skinny if choice.kernel == "skinny" else wide, capability(self.weights.device)
        return family.fits(choice.tile, inputs, outputs, self.tokens, 2, op == "gated", gpu)

    def right(self, part: str, choice: Choice) -> bool:
        """Whether a part computes what plain torch does in fp32, with room for the worst of millions of roundings."""
        expected = self._expected(part)
        poison = torch.full_like(expected[0], float("nan"), dtype=self.weights.dtype)
        del poison  # the allocator gives the same memory to the kernel's output
        found = [self.once(part, choice)]
        if part == "qkv":
            found += [pool[self.slots] for pool in self.pools[0]]
        return all(
            bool(((got.float() - want).abs() <= 0.08 * want.std() + 0.02 * want.abs()).all())
            for got, want in zip(found, expected, strict=True)
        )

    def _expected(self, part: str) -> list[Tensor]:
        weights, norm, eps = self.weights, self.weights.norm.float(), self.weights.cfg.norm_eps
        layer, start = self.weights.layers[0], self.start.float()
        if part == "attention":
            floats = [t.float() for t in (self._queries(), *self.pools[0])]
            where = (self.table, self.rows, self.q_start, self.kv_len)
            return [reference.attend(*floats, *where, self.tokens, self.weights.cfg.head_dim**-0.5)]
        if part in ("out", "down"):
            return [reference.linear_add_(start.clone(), self.wide[part].float(), layer[part].float())]
        if part != "qkv":
            weight = (weights.head if part == "head" else layer[part]).float()
            return [reference.linear(start, weight, None, norm, eps, part == "gate_up")]
        pools = [torch.zeros(self.tokens + 1, *self.pools[0][0].shape[1:], device=weights.device) for _ in range(2)]
        bias = weights.bias.float() if weights.bias is not None else None
        heads = (weights.head_norm.float() if weights.head_norm is not None else None,) * 2
        slots = torch.arange(1, self.tokens + 1, device=weights.device)
        where = (self.positions, slots, weights.cos, weights.sin)
        q = reference.project_qkv_(*pools, start, layer["qkv"].float(), bias, norm, eps, *where, *heads)
        return [q, *(pool[1:] for pool in pools)]
