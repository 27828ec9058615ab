"""What `ops/triton/compile.py` offers, for callers that also run where Triton is not installed."""

import contextlib
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Protocol

import torch

Say = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


class Counter(Protocol):
    compiled: list[str]
    loaded: list[str]

    @property
    def count(self) -> int: ...


def prepare(device: torch.device) -> threading.Thread | None:
    """On a GPU, begin in a thread what the first kernel would wait for, compiled or loaded."""
    if device.type != "cuda":
        return None
    thread = threading.Thread(target=_prepare, name="lite_llm-kernels")  # waited for at the end
    thread.start()
    return thread


def ahead_of_time(device: torch.device, say: Say) -> AbstractContextManager[None]:
    """On a GPU, kernels launched inside do not run but are compiled, on leaving at the latest."""
    return _compile().ahead_of_time(say) if device.type == "cuda" else contextlib.nullcontext()


def counting() -> AbstractContextManager[Counter]:
    """Counts the kernels that are compiled or loaded from the cache on disk inside. Needs Triton."""
    return _compile().CompileCounter()


def cache_directory() -> str:
    """Where compiled kernels are kept between processes. Needs Triton."""
    return _compile().cache_directory()


def _prepare() -> None:
    with contextlib.suppress(Exception):  # the first kernel says what is wrong
        _compile().read_compiler()


def _compile() -> ModuleType:
    return importlib.import_module("lite_llm.ops.triton.compile")
