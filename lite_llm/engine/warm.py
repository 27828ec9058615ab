"""Fills the cache of compiled kernels on disk for a model, without its weights: what `lite-llm warmup` does."""

import contextlib
import gc
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from lite_llm.engine.build import Blueprint
from lite_llm.ops import warm
from lite_llm.ops.warm import Counter, Say, prepare


@dataclass(frozen=True)
class Warmth:
    """What getting one engine ready took. Where there is no GPU nothing is compiled, and there is no directory."""

    max_requests: int
    compiled: int  # kernels that no cache had
    loaded: int  # kernels from the cache on disk
    seconds: float
    directory: str | None


@torch.inference_mode()
def warm_up(blueprint: Blueprint, usable_vocab: int | None, say: Say) -> Warmth:
    """Build the engine with weights of zero, get it ready, and free it again."""
    start, most = time.perf_counter(), blueprint.config.max_requests
    if blueprint.device.type == "cpu":
        return Warmth(most, 0, 0, 0.0, None)
    prepare(blueprint.device)
    try:
        with warm.counting() as counter:
            blueprint.build(_zero, usable_vocab).warm(say)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    spent = time.perf_counter() - start
    return Warmth(most, len(counter.compiled), len(counter.loaded), spent, warm.cache_directory())


def counting(device: torch.device) -> AbstractContextManager[Counter]:
    """Counts the kernels that are compiled, or loaded from the cache on disk, inside; on a CPU there are none."""
    return warm.counting() if device.type == "cuda" else contextlib.nullcontext(_NoKernels())


@dataclass
class _NoKernels:
    compiled: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    count = 0


def _zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()
