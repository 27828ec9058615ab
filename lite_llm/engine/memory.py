"""What fits: a plan made before anything is loaded. All sizes in bytes unless a name says tokens."""

import os
from dataclasses import dataclass

import torch

from lite_llm.config import EngineConfig, ModelConfig
from lite_llm.engine import vision
from lite_llm.engine.runner import PROMPTS, shapes, verifying
from lite_llm.engine.scheduler import MOST_REVEALED
from lite_llm.errors import DoesNotFit, UsageError

GIB = 1 << 30
_RESERVE = {"cuda": 400 << 20, "cpu": 64 << 20}  # library workspaces, modules, fragmentation
_LEAST_TOKENS = 16
_NODES, _TOWER_NODES, _NODE = 9, 16, 8 << 10
"""Kernels of a layer in a CUDA graph, at most, and the driver's memory for each, a guess on the safe side: 66 graphs of
Llama-3.2-1B took 458 MiB of an H200, the activations that they share included."""

_MOST_OWNERS = 1 << 16
"""Requests times KV heads: flash-decoding takes a ticket for each, from a buffer that all kernels share."""
_SEGMENT, _SPLITS, _FEW = 64, 8, 128
"""Keys in flash-decoding's smallest segment; ways that a matmul's input is split at most; tokens up to which it is.
tools/tune.py tries no more ways. A vocabulary fills any GPU: its matmul is split less, and needs no more than these."""


@dataclass(frozen=True)
class MemoryPlan:
    device: str
    free: int  # before loading
    limit: int  # what the engine may take of it
    weights: int
    workspace: int  # activations, logits, tables and library workspaces
    kv_token: int  # one token's keys and values in all layers
    kv_tokens: int  # tokens that the pool will hold
    context: int  # longest prompt + answer, in tokens
    wanted: int  # the context that was asked for, or that the checkpoint is made for, in tokens

    @property
    def kv(self) -> int:
        return self.kv_tokens * self.kv_token

    @property
    def left(self) -> int:
        return self.free - self.weights - self.workspace - self.kv

    def __str__(self) -> str:
        cut = f" ({self.wanted:,} do not fit)" if self.context < self.wanted else ""
        return (
            f"{self.device}: {size(self.free)} free = {size(self.weights)} weights + {size(self.workspace)} workspace"
            f" + {size(self.kv)} KV ({self.kv_tokens:,} tokens of {self.kv_token / 1024:g} KiB)"
            f" + {size(self.left)} left; context {self.context:,} tokens{cut}"
        )


def size(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if abs(n) >= GIB // 10 else f"{n / (1 << 20):.1f} MiB"


def plan_memory(
    cfg: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype, weights: int
) -> MemoryPlan:
    """Divide the device's free memory. DoesNotFit, with the numbers, if the wishes in `config` cannot be met."""
    owners = _MOST_OWNERS // cfg.kv_heads  # the last block decodes max_requests and min(PROMPTS, max_requests) prompts
    if config.max_requests > (allowed := max(owners - PROMPTS, owners // 2)):
        raise UsageError(
            f"max_requests = {config.max_requests}; with the {cfg.kv_heads} KV heads of this model at most "
            f"{allowed} can advance together",
            "lower max_requests",
        )
    free, item = free_memory(device), dtype.itemsize
    limit = int(free * config.memory_fraction)
    kv_token = 2 * cfg.num_layers * cfg.kv_heads * cfg.head_dim * item
    wanted = config.context or cfg.max_len
    if wanted > cfg.max_len:
        raise UsageError(f"context = {wanted}; this model is made for at most {cfg.max_len} tokens", "lower context")

    def workspace(context: int) -> int:
        """Activations of a full step, logits in fp32 with the sampler's copies, tables, partial sums, CUDA graphs."""
        wide = 5 * cfg.hidden + 2 * (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim + 3 * cfg.ffn
        rows = config.max_requests + 1
        drafted = verifying(config.max_requests, config.drafts)
        most = max((shape.requests for shape in drafted), default=0)  # each has logits, and its own keys in attention
        # A step may hold as many prompts as decodes.
        logits = max(2 * rows, most) * cfg.vocab * (2 * item + 4 * 2)
        logits += (config.max_requests * item + MOST_REVEALED * (item + 4 * 2)) * cfg.vocab
        tables = rows * (4 * context + 8 * cfg.vocab + cfg.vocab // 8) + 4 * context * cfg.rope.rotary
        tokens = max(config.step_tokens + config.max_requests, most)
        # In the last block prompts are decodes too, of their last tokens.
        together = max(config.max_requests + min(PROMPTS, config.max_requests), most)
        partial = partial_sums(cfg, together, context) if device.type == "cuda" else 0
        pictures = vision.workspace(cfg, item, tokens) if cfg.vision is not None else 0
        graphs = 0
        if device.type == "cuda" and config.cuda_graphs:
            steps = 2 * len(shapes(config.max_requests, config.step_tokens)) + len(drafted)
            nodes = steps * (_NODES * cfg.num_layers + 16)
            if cfg.vision is not None:
                nodes += vision.MOST_TILES * (_TOWER_NODES * cfg.vision.num_layers + 32)
            graphs = nodes * _NODE
        return tokens * wide * item + logits + tables + partial + pictures + graphs + _RESERVE[device.type]

    if config.kv_tokens and config.context and config.context > config.kv_tokens:
        raise DoesNotFit(f"context = {config.context} is more than the pool will hold: kv_tokens = {config.kv_tokens}")
    room = (limit - weights - workspace(wanted)) // kv_token - 1  # one slot is the pad slot
    least = config.kv_tokens or config.context or min(_LEAST_TOKENS, wanted)
    if room < least:
        need = weights + workspace(wanted) + (least + 1) * kv_token
        raise DoesNotFit(
            f"{device}: needs {size(need)} ({size(weights)} weights, {size(workspace(wanted))} workspace, "
            f"{size(least * kv_token)} for {least:,} KV tokens); {size(limit)} of {size(free)} free may be used",
            "free memory, choose a smaller model, or lower context, kv_tokens, max_requests or step_tokens",
        )
    useful = config.max_requests * wanted
    if device.type == "cpu":  # the machine has other uses for its memory
        useful = min(useful, max(4 * wanted, 1 << 15), max(room // 2, least))
    tokens = config.kv_tokens or min(useful, room)
    context = min(wanted, tokens)
    return MemoryPlan(str(device), free, limit, weights, workspace(context), kv_token, tokens, context, wanted)


def partial_sums(cfg: ModelConfig, requests: int, context: int) -> int:
    """What programs on a GPU that share a result hand to each other, in fp32; one layer's at a time.

    Of each head of each decoding request, for each segment of its keys: head_dim sums, their weight and the highest
    score. More KV heads fill a GPU with fewer segments (`max_segments` in ops/triton/decode.py). Of a matmul of few
    tokens: its outputs, once for each split, and for every 16 of them or more a sum of squares (`workspace` in
    ops/triton/skinny.py).
    """
    most = min(max(1 << (256 // cfg.kv_heads - 1).bit_length(), 16), 64)
    segments = min(-(-context // _SEGMENT), most)
    widest = max(cfg.hidden, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, 2 * cfg.ffn)
    matmul = _SPLITS * _FEW * (widest + -(-widest // 16))
    return 4 * (requests * cfg.heads * segments * (cfg.head_dim + 2) + matmul)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: on a GPU by the driver's count, on a CPU what Linux calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
