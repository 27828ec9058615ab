"""What a decode step must cost at least, from the sizes of a model and what this machine's memory and matmuls measure.

A byte counts if it has to come from memory: weights once per step, keys and values once per token. What kernels hand to
each other (activations, logits) may stay in the cache, so the floor leaves it out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lite_llm.config import ModelConfig
from lite_llm.engine.memory import free_memory, size
from lite_llm.errors import DoesNotFit

_COPY = {"cuda": 4 << 30, "cpu": 128 << 20}  # bytes of each of the two buffers
_LEAST_COPY = 64 << 20
_WIDTH = {"cuda": 8192, "cpu": 768}  # of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in simple loops, now."""

    copy: float  # bytes read and written per second
    matmul: float  # floating-point operations per second

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, most: int = 4 << 30) -> "Ceilings":
        """Takes and gives back two buffers of `most` bytes, or of what is free. DoesNotFit if that is too little."""
        with torch.inference_mode():
            found = cls(copy_rate(device, most), matmul_rate(device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found


@dataclass(frozen=True)
class Cost:
    """One class of kernels in a step, all layers together."""

    name: str
    kernels: int  # runs per step, at the least
    bytes: int
    flops: int

    def floor(self, roof: Ceilings) -> float:
        """Seconds."""
        return max(self.bytes / roof.copy, self.flops / roof.matmul)


def step_costs(cfg: ModelConfig, itemsize: int, requests: int, context: int, wanted: int | None = None) -> list[Cost]:
    """The classes of a step in which `requests` advance by one token that sees `context` tokens, in their order.

    `wanted`: of how many of these tokens logits are needed, if not of all; within a prompt they are of none. Of the
    others the last layer must make keys and values alone. (It makes their queries too, which counts for nothing here.)
    """
    layers, hidden, q, kv = cfg.num_layers, cfg.hidden, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    passed = layers - (wanted == 0)  # layers of which more is needed than keys and values
    wanted = requests if wanted is None else wanted
    tokens = (layers - 1) * requests + wanted  # counted once for each layer that they pass as a whole
    *before, last = (min(context, window or context) for window in cfg.windows)
    seen = requests * sum(before) + wanted * last

    def matmul(name: str, runs: int, tokens: int, inputs: int, outputs: int, others: int = 0) -> Cost:
        return Cost(name, runs, runs * (inputs * outputs + others) * itemsize, 2 * inputs * outputs * tokens)

    qk_norm, bias = cfg.head_dim * cfg.qk_norm, cfg.qkv_bias
    keys_values = matmul("k and v", layers, layers * requests, hidden, 2 * kv, hidden + qk_norm + 2 * kv * bias)
    queries = matmul("q", passed, tokens, hidden, q, qk_norm + q * bias)
    return [
        Cost("state", 2, 0, 0),
        Cost("embed", 1, requests * hidden * itemsize, 0),
        Cost("qkv", layers, keys_values.bytes + queries.bytes, keys_values.flops + queries.flops),
        Cost("attention", passed, 2 * kv * itemsize * seen, 4 * q * seen),
        matmul("out", passed, tokens, q, hidden, hidden * cfg.out_bias),
        matmul("gate_up", passed, tokens, hidden, 2 * cfg.ffn, hidden + 2 * cfg.ffn * cfg.mlp_bias),
        matmul("down", passed, tokens, cfg.ffn, hidden, hidden * cfg.mlp_bias),
        matmul("head", int(passed == layers), wanted, hidden, cfg.vocab, hidden),
        Cost("sampling", 2, 0, 0),
    ]


def floor(costs: list[Cost], roof: Ceilings) -> float:
    """Seconds of a step at the limit: classes run one after the other, each at the ceiling that it meets first."""
    return sum(cost.floor(roof) for cost in costs)


def copy_rate(device: torch.device | str = "cuda", most: int | None = None) -> float:
    """Bytes read and written per second by the faster of two copies: the library's and a kernel's.

    The buffers have `most` bytes each, fewer where less is free; on a CPU as many threads as torch uses now.
    """
    device = torch.device(device)
    count = min(most or _COPY[device.type], _COPY[device.type], free_memory(device) // 4)
    if count < _LEAST_COPY:
        raise DoesNotFit(f"{device}: measuring its memory needs {size(4 * _LEAST_COPY)} free", "free some memory")
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.numel() * 4 / min(seconds(copy, device) for copy in copies)


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matmul of random numbers."""
    device = torch.device(device)
    width = _WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * width**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median of a call that lasts long enough for its launch not to matter."""
    times = [(_cuda_time if device.type == "cuda" else _wall_time)(call) for _ in range(repeats + 2)]
    return sorted(times[2:])[repeats // 2]


def _cuda_time(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _wall_time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
