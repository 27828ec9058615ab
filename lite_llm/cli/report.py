"""Numbers and settings in words: what stands beside the answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lite_llm.engine.request import SamplingParams

if TYPE_CHECKING:
    from lite_llm.outputs import Output

ALMOST_FULL = 0.8
_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_SHOWN = ("temperature", *_NEUTRAL)
_MINE = ("presence_penalty", "frequency_penalty", "max_tokens", "min_tokens", "seed", "stop")


def statistics(output: "Output", used: int, context: int | None) -> str:
    """The line after an answer."""
    usage, timings = output.usage, output.timings
    cached = "" if usage.cached_tokens is None else f" ({usage.cached_tokens} cached)"
    prompt = f"{usage.prompt_tokens} prompt tokens{cached}" if usage.prompt_tokens else "prompt not counted"
    drafted = f" ({usage.drafted_tokens} drafted)" if usage.drafted_tokens else ""
    speed = f", {timings.tokens_per_second:.1f} tok/s" if timings.tokens_per_second else ""
    first = _seconds(timings.first_token)
    return f"{prompt}, {usage.completion_tokens} answer{drafted}{speed}, first token {first}, {meter(used, context)}"


def ending(output: "Output", context: int | None) -> str | None:
    """Why an answer ended, if that needs saying."""
    reason, usage = output.finish_reason, output.usage
    if reason == "abort":
        return "stopped; the part said so far is kept"
    if reason != "length":
        return None
    if usage.completion_tokens == output.params.max_tokens:
        return f"cut at max_tokens = {usage.completion_tokens}; /set max_tokens N allows more"
    if context is None or usage.prompt_tokens + usage.completion_tokens < context:
        return f"cut by the server after {usage.completion_tokens} tokens; /set max_tokens N may allow more"
    return (
        f"cut: the context is full ({usage.prompt_tokens} prompt + {usage.completion_tokens} answer = {context} "
        "tokens); /undo takes the last turn back, /clear starts anew"
    )


def fullness(used: int, context: int | None) -> str | None:
    """The warning that the context is almost full."""
    if context is None or used < ALMOST_FULL * context or used >= context:
        return None
    return f"{used} of {context} context tokens are used ({used / context:.0%}); /undo and /clear make room"


def meter(used: int, context: int | None) -> str:
    return _kilo(used) if context is None else f"{_kilo(used)}/{_kilo(context)}"


def in_force(params: SamplingParams, generation_config: Mapping[str, object] | None) -> SamplingParams:
    """With the model's defaults; as they are, if only a server knows those."""
    return params if generation_config is None else params.resolved(generation_config)


def greedy(params: SamplingParams, generation_config: Mapping[str, object] | None) -> bool:
    """Whether it is known that the same settings give the same answer."""
    used = in_force(params, generation_config)
    return used.temperature is not None and used.greedy


def sampling(params: SamplingParams, generation_config: Mapping[str, object] | None) -> str:
    """The sampling in force, and where it is from."""
    mine = [name for name in (*_SHOWN, *_MINE) if getattr(params, name) != getattr(SamplingParams(), name)]
    if generation_config is None:
        words = [*(f"{name} {getattr(params, name)}" for name in mine), "else " * bool(mine) + "as the server has it"]
        return f"sampling: {', '.join(words)}"
    used = params.resolved(generation_config)
    if used.greedy:
        words = ["greedy (temperature 0)"]
        words += [
            f"{n} {used.repetition_penalty:g}" for n in _NEUTRAL if "penalty" in n and used.repetition_penalty != 1
        ]
    else:
        words = [f"{n} {getattr(used, n):g}" for n in _SHOWN if getattr(used, n) != _NEUTRAL.get(n)]
    words += [f"{name} {getattr(used, name)}" for name in _MINE if name in mine]
    given = any(generation_config.get(name) is not None for name in ("do_sample", *_SHOWN))
    source = "generation_config.json" if given else "neutral defaults"
    return f"sampling: {', '.join(words)} ({source}{' and ' + ', '.join(mine) + ' as you set' if mine else ''})"


def _kilo(tokens: int) -> str:
    if tokens < 100 * 1024:
        text = f"{tokens / 1024:.1f}"
        return (text.removesuffix(".0") if tokens and tokens % 1024 == 0 else text) + "k"
    return f"{tokens / 1024:.0f}k"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
