"""The least time that a work could take on this machine: measured copy and matmul rates, and what must be done.

Prompts are matmuls: their flops at the matmul rate. Decoding is reading: the weights once for as many tokens as may
advance together, the keys and values once for every token that sees them, at the copy rate (or flops, where they take
longer). Prompts of some may be computed while others decode, so the longer of the two counts; no engine can be faster.
"""

from dataclasses import dataclass

from lite_llm.config import ModelConfig
from lite_llm.engine.roofline import Ceilings, floor, step_costs
from tools.benchmark.work import Work


@dataclass(frozen=True)
class Limit:
    seconds: float
    name: str  # "memory" or "matmul", whichever takes most of them

    def share(self, seconds: float) -> dict:
        """For `Row.limit` and `spread`: how much of a measured time the limit explains."""
        return {"name": self.name, "of_limit": self.seconds / seconds}


def step_limit(cfg: ModelConfig, itemsize: int, requests: int, context: int, roof: Ceilings) -> Limit:
    """One decode step of `requests` requests that each see `context` tokens."""
    costs = step_costs(cfg, itemsize, requests, context)
    memory = sum(cost.bytes / roof.copy >= cost.flops / roof.matmul for cost in costs if cost.bytes) * 2 > len(costs)
    return Limit(floor(costs, roof), "memory" if memory else "matmul")


def prompt_limit(cfg: ModelConfig, tokens: int, roof: Ceilings) -> Limit:
    """A prompt of so many tokens, up to its first new token."""
    return Limit(prompt_flops(cfg, tokens) / roof.matmul, "matmul")


def prompt_flops(cfg: ModelConfig, tokens: int) -> int:
    """Of its matmuls and its attention. Of all tokens but the last one the last layer makes keys and values alone."""
    *before, last = cfg.windows
    seen = sum(_pairs(tokens, window) for window in before) + min(tokens, last or tokens)
    matmuls = sum(cost.flops for cost in step_costs(cfg, 0, tokens, 0, wanted=1))
    return matmuls + 4 * cfg.heads * cfg.head_dim * seen


def alone_limits(cfg: ModelConfig, itemsize: int, prompt: int, new: int, roof: Ceilings) -> tuple[Limit, Limit, Limit]:
    """A request that has the machine to itself: its first token, each of the others, and all of them.

    Whatever else runs, none of its times can be shorter. A prompt reads the weights once, however short it is.
    """
    read, matmul = step_limit(cfg, itemsize, 1, 0, roof), prompt_limit(cfg, prompt, roof)
    first = max(read, matmul, key=lambda limit: limit.seconds)
    step = step_limit(cfg, itemsize, 1, prompt + (new + 1) // 2, roof)
    rest = step.seconds * (new - 1)
    return first, step, Limit(first.seconds + rest, (first if first.seconds > rest else step).name)


def work_limit(cfg: ModelConfig, itemsize: int, work: Work, most: int, roof: Ceilings) -> Limit:
    """All prompts and all answers, at most `most` requests at a time."""
    prompts = sum(prompt_flops(cfg, len(ask.ids)) for ask in work.asks) / roof.matmul
    tokens = sum(ask.new - 1 for ask in work.asks)  # a prompt gives the first one
    decode = 0.0
    if tokens:
        steps = max(max(ask.new for ask in work.asks) - 1, -(-tokens // most))
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        seen = sum(_seen(len(ask.ids), ask.new, window) for ask in work.asks for window in cfg.windows)
        attention = max(2 * kv * itemsize * seen / roof.copy, 4 * q * seen / roof.matmul)
        decode = steps * floor(step_costs(cfg, itemsize, tokens / steps, 0), roof) + attention
    return Limit(max(prompts, decode), "memory" if decode >= prompts else "matmul")


def _seen(prompt: int, new: int, window: int | None) -> int:
    """Cached tokens that the decode steps of an answer see, all together."""
    first, last = prompt + 1, prompt + new - 1
    if window is None or window >= last:
        return (first + last) * (last - first + 1) // 2
    full = max(min(window, last) - first + 1, 0)
    return (first + first + full - 1) * full // 2 + (last - first + 1 - full) * window


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
