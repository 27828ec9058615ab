"""Fills the cache of compiled kernels on disk for a model, without its weights: what `lite-llm warmup` does."""

import gc
import time
from dataclasses import dataclass

import torch
from torch import nn

from lite_llm.engine.build import Blueprint
from lite_llm.ops import warm
from lite_llm.ops.warm import Say


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
    try:
        with warm.counting() as counter:
            blueprint.build(_zero, usable_vocab).warm(say)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    spent = time.perf_counter() - start
    return Warmth(most, len(counter.compiled), len(counter.loaded), spent, warm.cache_directory())


def _zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()
