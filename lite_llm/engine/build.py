"""From a config to a running engine: choose device and dtype, plan memory, build, fill, allocate the pool."""

import dataclasses
import gc
import os
from collections.abc import Callable

import torch
from torch import nn

from lite_llm.batch import KVPool
from lite_llm.config import EngineConfig, ModelConfig
from lite_llm.engine.engine import Engine
from lite_llm.engine.memory import MemoryPlan, free_memory, plan_memory
from lite_llm.errors import DoesNotFit, EnvironmentProblem, UnsupportedModel
from lite_llm.layers import LayerFactory
from lite_llm.models.registry import find
from lite_llm.ops.reference.attention import HEAD_DIMS, MAX_GROUP

_SMALL = 128 << 20
"""Bytes of weights up to which one CPU thread is fastest: threads that wait for a busy core cost 80 times the work."""

_AHEAD = 2
"""Steps that a GPU may have before it when another is launched: so much may the CPU be late."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(config: EngineConfig) -> torch.device:
    """The device that `config` names; "auto": a GPU if torch can use one. EnvironmentProblem if it cannot be used."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EnvironmentProblem(f"device = {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentProblem(f"device = {name!r}; supported: cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentProblem(
                f"device = {name!r}, but this torch ({torch.__version__}) cannot use a GPU", gpu_advice()
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise EnvironmentProblem(f"device = {name!r}; this machine has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", device.index or 0)
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise EnvironmentProblem(
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; supported: 8.0 (Ampere) and newer",
                "use --device cpu",
            )
    return device


def gpu_advice() -> str:
    """Why torch sees no GPU, as far as this machine tells; "" where it has none."""
    if not os.path.exists("/proc/driver/nvidia/version"):
        return "no NVIDIA driver was found; use --device cpu"
    if torch.version.cuda is None:
        return "an NVIDIA driver is here but torch is a CPU build; install a CUDA build of torch"
    return (
        f"torch was built for CUDA {torch.version.cuda}; the driver may be older: run nvidia-smi and update the driver"
    )


def pick_dtype(config: EngineConfig, cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: on a GPU the checkpoint's, on a CPU float32, unless `config` names one."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if cfg.dtype not in _DTYPES:
        raise UnsupportedModel(f"config.json: dtype = {cfg.dtype!r}; supported: {', '.join(_DTYPES)}")
    return _DTYPES[cfg.dtype] if device.type == "cuda" else torch.float32


def _require_kernels(cfg: ModelConfig, device: torch.device) -> None:
    group = cfg.heads // cfg.kv_heads
    if device.type == "cuda" and (cfg.head_dim not in HEAD_DIMS or group > MAX_GROUP):
        raise UnsupportedModel(
            f"config.json: head_dim = {cfg.head_dim}, {group} query heads per KV head; the GPU kernels support "
            f"head_dim {', '.join(map(str, HEAD_DIMS))} and up to {MAX_GROUP} heads",
            "use --device cpu",
        )
    if device.type == "cuda" and cfg.vision is not None and cfg.vision.head_dim not in HEAD_DIMS:
        raise UnsupportedModel(
            f"config.json: the vision tower's head_dim = {cfg.vision.head_dim}; the GPU kernels support "
            f"{', '.join(map(str, HEAD_DIMS))}",
            "use --device cpu",
        )


class Blueprint:
    """A model that is planned but not loaded: what it needs and whether it fits is known, nothing is allocated."""

    def __init__(self, cfg: ModelConfig, config: EngineConfig):
        """Raises DoesNotFit, UnsupportedModel or EnvironmentProblem."""
        self.config = config
        self.device = pick_device(config)
        self.dtype = pick_dtype(config, cfg, self.device)
        _require_kernels(cfg, self.device)
        _, self._model = find(cfg.architecture)
        shadow = self._model(LayerFactory(self.dtype, "meta"), dataclasses.replace(cfg, max_len=1))
        weights = sum(p.numel() * p.element_size() for p in shadow.parameters())
        self.plan: MemoryPlan = plan_memory(cfg, config, self.device, self.dtype, weights)
        self.cfg = dataclasses.replace(cfg, max_len=self.plan.context)

    def build(self, fill: Callable[[nn.Module], None], usable_vocab: int | None = None) -> Engine:
        """Allocate the weights, let `fill` load them, and give the rest of the plan to the KV pool."""
        threads = self.config.threads
        if self.device.type == "cpu" and (threads or self.plan.weights < _SMALL):
            torch.set_num_threads(threads or 1)
        model = self._model(LayerFactory(self.dtype, self.device), self.cfg).eval()
        fill(model)
        gc.collect()
        return Engine(
            model,
            self.cfg,
            self._pool(),
            max_requests=self.config.max_requests,
            step_tokens=self.config.step_tokens,
            max_slowdown=self.config.max_slowdown,
            prefix_cache=self.config.prefix_cache,
            usable_vocab=usable_vocab,
            ahead=_AHEAD if self.device.type == "cuda" else 0,
            graphs=self.device.type == "cuda" and self.config.cuda_graphs,
            drafts=self.config.drafts,
        )

    def _pool(self) -> KVPool:
        plan, slots = self.plan, self.plan.kv_tokens + 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            room = (free_memory(self.device) - (plan.free - plan.limit) - plan.workspace) // plan.kv_token
            if room < plan.context + 1:
                raise DoesNotFit(
                    f"{self.device}: after loading {room:,} KV tokens fit; the plan was {plan.kv_tokens:,}",
                    "another program took memory meanwhile: stop it, or lower --context",
                )
            slots = min(slots, room)
        shape = (self.cfg.num_layers, slots, self.cfg.kv_heads, self.cfg.head_dim)
        return KVPool(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
