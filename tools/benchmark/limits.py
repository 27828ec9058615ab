"""The least time that a work could take on this machine: measured copy and matmul rates, and what must be done.

Prompts are matmuls: their flops at the matmul rate. Decoding is reading: at every step, the weights once and the keys
and values of all requests that are still there, at the copy rate (or its flops, where they take longer). Nothing
overlaps, no step costs anything else, and requests that arrive later wait for nobody: no engine can be faster.
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
    """A prompt of so many tokens, up to its first new token; the head is needed for the last one only."""
    return Limit(_prompt_flops(cfg, tokens) / roof.matmul, "matmul")


def work_limit(cfg: ModelConfig, itemsize: int, work: Work, most: int, roof: Ceilings) -> Limit:
    """All prompts, then all answers, `most` requests at a time at the most, the longest first."""
    prompts = sum(_prompt_flops(cfg, len(ask.ids)) for ask in work.asks) / roof.matmul
    steps = 0.0
    for group in _groups(work, most):
        done = 1  # a prompt gives the first token
        for last in sorted({ask.new for ask in group}):  # between two ends the same requests decode
            if last > done:
                there = [ask for ask in group if ask.new >= last]
                seen = sum(len(ask.ids) for ask in there) / len(there) + (done + last) / 2
                steps += (last - done) * floor(step_costs(cfg, itemsize, len(there), round(seen)), roof)
                done = last
    late = max(ask.at for ask in work.asks)  # no request ends before it has come
    return Limit(max(prompts + steps, late), "memory" if steps >= prompts else "matmul")


def _groups(work: Work, most: int) -> list[list]:
    """Requests of like length run together: more in a group only makes its steps dearer than one step of all."""
    asks = sorted(work.asks, key=lambda ask: -ask.new)
    return [asks[i : i + most] for i in range(0, len(asks), most)]


def _prompt_flops(cfg: ModelConfig, tokens: int) -> float:
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    layer = cfg.hidden * (q + 2 * kv) + q * cfg.hidden + 3 * cfg.hidden * cfg.ffn
    seen = [_pairs(tokens, window) for window in cfg.windows]
    return 2.0 * cfg.num_layers * layer * tokens + sum(4.0 * q * pairs for pairs in seen) + 2.0 * cfg.hidden * cfg.vocab


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
