"""File bytes to a GPU: threads read ahead into pinned buffers, and each buffer is copied without waiting for it."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lite_llm.errors import BadCheckpoint

CHUNK = 32 << 20
BUFFERS = 6


@dataclass(frozen=True)
class Range:
    """`dest.numel()` bytes from byte `start` of `file`, to go to the uint8 tensor `dest`."""

    name: str
    file: Path
    start: int
    dest: Tensor


class _Buffer:
    def __init__(self, size: int, device: torch.device):
        self.device, gpu = device, device.type == "cuda"
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=gpu)
        self.copied = torch.cuda.Event() if gpu else None

    def read(self, file: int, start: int, count: int) -> None:
        self.wait()
        view, done = memoryview(self.bytes.numpy())[:count], 0
        while done < count:
            got = os.preadv(file, [view[done:]], start + done)
            if not got:
                raise BadCheckpoint(f"the file ended at byte {start + done} while it was read")
            done += got

    def copy_to(self, dest: Tensor) -> None:
        dest.copy_(self.bytes[: dest.numel()], non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Until the last copy from this buffer has been made."""
        if self.copied is not None:
            self.copied.synchronize()


def stream(ranges: Iterable[Range], device: torch.device, chunk: int = CHUNK) -> Iterator[str]:
    """Fill every range in order; yields its name once its last copy is queued on the current stream, and
    ends when all copies are made."""
    buffers: list[_Buffer] = []
    free: deque[_Buffer] = deque()
    waiting: deque[tuple[Range, int, int, _Buffer, Future]] = deque()

    def land() -> Iterator[str]:
        item, first, last, buffer, read = waiting.popleft()
        try:
            read.result()
        except (OSError, BadCheckpoint) as error:
            raise BadCheckpoint(f"{item.file}: tensor {item.name!r} cannot be read: {error}") from None
        buffer.copy_to(item.dest[first:last])
        free.append(buffer)
        if last == item.dest.numel():
            yield item.name

    with ExitStack() as stack, ThreadPoolExecutor(BUFFERS) as pool:  # the pool ends before its files are closed
        files: dict[Path, int] = {}
        for item in ranges:
            if item.file not in files:
                files[item.file] = os.open(item.file, os.O_RDONLY)
                stack.callback(os.close, files[item.file])
            for first in range(0, item.dest.numel(), chunk):
                if not free and len(buffers) < BUFFERS:
                    buffers.append(_Buffer(chunk, device))
                    free.append(buffers[-1])
                elif not free:
                    yield from land()
                buffer, last = free.popleft(), min(first + chunk, item.dest.numel())
                read = pool.submit(buffer.read, files[item.file], item.start + first, last - first)
                waiting.append((item, first, last, buffer, read))
        while waiting:
            yield from land()
        for buffer in buffers:
            buffer.wait()
