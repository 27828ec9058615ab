"""/why: how fast the last answer was against what this machine's memory allows, and where the rest of the time went."""

from typing import TYPE_CHECKING

import torch

from lite_llm.config import ModelConfig
from lite_llm.engine.memory import MemoryPlan
from lite_llm.engine.roofline import Ceilings, Cost, floor, step_costs

if TYPE_CHECKING:
    from lite_llm.outputs import Output

_BUFFER = 1 << 30  # bytes: large enough for the ceiling, small enough to be free beside a KV pool
_SHORT = 4  # tokens: an answer below says little


def why(cfg: ModelConfig, plan: MemoryPlan, last: "Output") -> str:
    """Measures the ceilings (a second or less) and explains the last answer. The engine is left alone."""
    device = torch.device(plan.device)
    dtype = torch.bfloat16 if _itemsize(cfg, plan) == 2 else torch.float32
    return explanation(cfg, plan, last, Ceilings.measure(device, dtype, _BUFFER))


def explanation(cfg: ModelConfig, plan: MemoryPlan, last: "Output", roof: Ceilings) -> str:
    usage, timings = last.usage, last.timings
    if not timings.tokens_per_second or usage.completion_tokens < _SHORT:
        return "the last answer is too short to say; ask for a longer one"
    context = usage.prompt_tokens + usage.completion_tokens // 2
    costs = step_costs(cfg, _itemsize(cfg, plan), requests=1, context=context)
    later = usage.completion_tokens - 1  # tokens after the first, of which alone the rate tells
    each = later / (later - usage.drafted_tokens)  # tokens that a step gave
    step, least = each / timings.tokens_per_second, floor(costs, roof)
    unit, gave = ("step", _gave(each, usage.drafted_tokens)) if usage.drafted_tokens else ("token", "")
    moved = sum(cost.bytes for cost in costs)
    lines = [
        f"last answer: {timings.tokens_per_second:,.1f} tok/s, {_time(step)} a {unit}{gave}",
        f"the limit:   {each / least:,.1f} tok/s, {_time(least)} a {unit}: each one reads {_amount(moved, 'B')}",
        f"reached:     {least / step:.0%} of the limit",
        f"measured:    this {'GPU' if 'cuda' in plan.device else 'CPU'}'s memory copies {_amount(roof.copy, 'B')}/s, "
        f"its matmuls do {_amount(roof.matmul, 'FLOP')}/s, now",
        "",
        *_table(costs, roof, step, unit),
        "",
        _rest(plan, costs, step - least),
        _prompt(cfg, costs, last, roof),
    ]
    return "\n".join(lines)


def _gave(each: float, drafted: int) -> str:
    stood = "1 token was a draft" if drafted == 1 else f"{drafted} tokens were drafts"
    return f" of {each:.3g} tokens: {stood} that stood"


def _table(costs: list[Cost], roof: Ceilings, step: float, unit: str) -> list[str]:
    shown = [cost for cost in costs if cost.bytes * 1000 > max(other.bytes for other in costs)]
    rows = [(f"a {unit} reads", "bytes", "at least", "of its time")]
    rows += [
        (_WORDS[cost.name], _amount(cost.bytes, "B"), _time(cost.floor(roof)), f"{cost.floor(roof) / step:.1%}")
        for cost in shown
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{n}}" for cell, n in zip(row[1:], widths[1:])) for row in rows
    ]


_WORDS = {
    "embed": "embedding",
    "qkv": "queries, keys, values",
    "attention": "keys and values so far",
    "out": "attention's output",
    "gate_up": "MLP, gate and up",
    "down": "MLP, down",
    "head": "head",
}


def _rest(plan: MemoryPlan, costs: list[Cost], rest: float) -> str:
    if rest <= 0:
        return "faster than memory allows: part of the weights stays in the cache"
    if "cuda" not in plan.device:
        return f"the rest, {_time(rest)}: arithmetic, and Python between the operations"
    kernels = sum(cost.kernels for cost in costs)
    return (
        f"the rest, {_time(rest)}: starting and ending {kernels} kernels ({_time(rest / kernels)} each if they take "
        "all of it), the time between steps, and this terminal; tools/roofline.py measures every kernel"
    )


def _prompt(cfg: ModelConfig, costs: list[Cost], last: "Output", roof: Ceilings) -> str:
    """What the first token waited for; the shortest prompt costs what a token does."""
    fresh = last.usage.prompt_tokens - last.usage.cached_tokens
    work = sum(cost.flops for cost in step_costs(cfg, 0, fresh, context=0, wanted=1))
    least = max(work / roof.matmul, floor(costs, roof))
    return (
        f"first token: {_time(last.timings.first_token)}; the {fresh} prompt tokens that were not cached take "
        f"{_time(least)} at least"
    )


def _itemsize(cfg: ModelConfig, plan: MemoryPlan) -> int:
    """Bytes of a number, by the KV pool's size."""
    return plan.kv_token // (2 * cfg.num_layers * cfg.kv_heads * cfg.head_dim)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 0.1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _amount(n: float, unit: str) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if n >= 0.1 * factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n / 1e3:.3g} k{unit}"
