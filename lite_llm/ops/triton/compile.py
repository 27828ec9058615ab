"""Compile kernels before they are needed, side by side, and count what is compiled.

Triton compiles a kernel at its first launch with new types, constants or alignments, one after the other, for half a
second or more each. `ahead_of_time` turns launches into orders to compile, which threads carry out: LLVM works without
Python's lock and ptxas is a process (24 kernels on 4 cores: 13.0 s in turn, 5.6 s with 4 threads). What was compiled
stays in Triton's own cache on disk, by source, options and versions.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

from lite_llm.ops.warm import Say

_MOST_WORKERS = 16


def read_compiler() -> None:
    """Triton's files are part of each kernel's key: 0.5 GB, which it reads and hashes once, without Python's lock."""
    triton_key()


@contextlib.contextmanager
def ahead_of_time(say: Say) -> Iterator[None]:
    """Inside, this thread's launches run nothing but order their kernels; on leaving all are compiled and loaded.

    What a kernel should have written is garbage then, so only work that decides nothing by values may run here.
    RuntimeError, with the kernel's name, if one does not compile. `say` is called on this thread.
    """
    workers, here = min(len(os.sched_getaffinity(0)), _MOST_WORKERS), driver.active.get_current_device()
    with ThreadPoolExecutor(workers, "compile", driver.active.set_current_device, (here,)) as pool:
        orders = _Orders(pool, say)
        # Errors wait for `raise_first`: Triton 3.6 would stay in this mode, and no version says which kernel it was.
        with triton.AsyncCompileMode(orders, ignore_errors=True):
            try:
                with orders.instead_of_launches():
                    yield
                orders.wait()
            except BaseException:
                orders.stopped = True
                raise
    orders.raise_first()


class _Orders:
    """The executor that Triton hands its compilations to."""

    def __init__(self, pool: ThreadPoolExecutor, say: Say):
        self.pool, self.say = pool, say
        self.stopped = False
        self._futures: dict[Future, str] = {}  # and the kernel's name
        self._name = ""

    @contextlib.contextmanager
    def instead_of_launches(self) -> Iterator[None]:
        run, thread = JITFunction.run, threading.get_ident()

        def order(kernel: JITFunction, *args, warmup: bool, **kwargs) -> Any:
            if threading.get_ident() != thread:
                return run(kernel, *args, warmup=warmup, **kwargs)
            self._name = kernel.__name__
            ordered = run(kernel, *args, warmup=True, **kwargs)
            future = ordered.future if isinstance(ordered, triton.FutureKernel) else None
            if future is not None and future.done() and future.exception() is None:
                ordered.result()  # Triton 3.6 would compute the kernel's key again for each launch until the end
            return ordered

        JITFunction.run = order
        try:
            yield
        finally:
            JITFunction.run = run

    def submit(self, work: Callable[[], Any]) -> Future:
        future = self.pool.submit(self._ready, work)
        self._futures[future] = self._name
        self.say("compiling kernels", sum(order.done() for order in self._futures), len(self._futures))
        return future

    def _ready(self, work: Callable[[], Any]) -> Any:
        if self.stopped:
            raise RuntimeError("no longer wanted")
        kernel = work()
        # Builds the launcher (Triton 3.6 runs a C compiler for each signature) and loads the binary.
        kernel.run  # noqa: B018
        return kernel

    def wait(self) -> None:
        for done, _ in enumerate(as_completed(self._futures), 1):
            self.say("compiling kernels", done, len(self._futures))

    def raise_first(self) -> None:
        for future, name in self._futures.items():
            error = future.exception()
            if error is not None:
                raise RuntimeError(f"{name} does not compile: {type(error).__name__}: {error}") from error


class CompileCounter:
    """While entered, counts the kernels that this process compiles, and those that it loads from the cache on disk."""

    def __init__(self):
        self.compiled: list[str] = []  # names, in the order of completion
        self.loaded: list[str] = []

    @property
    def count(self) -> int:
        return len(self.compiled) + len(self.loaded)

    def __enter__(self) -> "CompileCounter":
        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._listen
        return self

    def __exit__(self, *_) -> None:
        knobs.compilation.listener = self._before

    def _listen(self, *, src: Any, cache_hit: bool, **facts: Any) -> None:
        (self.loaded if cache_hit else self.compiled).append(src.name)  # append: called by several threads at once
        if self._before is not None:
            self._before(src=src, cache_hit=cache_hit, **facts)


def cache_directory() -> str:
    """Where Triton keeps compiled kernels: TRITON_CACHE_DIR, or ~/.triton/cache."""
    return knobs.cache.dir
