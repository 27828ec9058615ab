"""What kernels of one chain share: programmatic dependent launch, prefetches into L2, and arrival tickets.

With programmatic dependent launch (PDL; Hopper and newer) a kernel may start while the one before it still runs. It
calls `wait`, which returns when that one has ended and its writes are visible, outside of any loop, on every path.
Before, it writes nothing and reads nothing but weights; flash-decoding also lengths and slots, which the one before it
does not write, and the kernels that do have ended: that one releases behind its own wait (`decode.py`). So whatever a
kernel can see when it goes on is finished, all the way back, and buffers may be reused.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as _cuda

TICKETS = 1 << 16
_LINE = tl.constexpr(128)  # bytes that one prefetch brings
AT_ONCE, WAITED, LAST = 0, 1, 2
"""When a program calls `release`: at its start, behind its wait, behind its loop. A field of the tiles."""


def pdl(device: torch.device) -> bool:
    """Whether kernels are launched as dependents here (`launch_pdl=True, PDL=True`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def tickets(n: int, device: torch.device) -> Tensor:
    """n zeros (int32) with which programs count who arrives last; whoever does sets them back to zero.

    One buffer serves all kernels of a stream, for these run one after the other; kernels on two streams at the same
    time must not share it.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if n > TICKETS:
        raise ValueError(f"{n} tickets; there are {TICKETS}")
    return _tickets(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _tickets(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)


@contextlib.contextmanager
def aside(device: torch.device, needed: bool = True) -> Iterator[Callable[[], None]]:
    """What is launched within may run at the same time as what is launched behind it, until the function that this
    gives is called: what comes then waits for both. Where it is not `needed`, and on a CPU, all is as without it.
    """
    if not needed or device.type != "cuda":
        yield lambda: None
        return
    here = torch.cuda.current_stream(device)
    there = _aside(device, here.cuda_stream)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        yield lambda: here.wait_stream(there)


@functools.cache
def _aside(device: torch.device, stream: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def share(ahead: Tensor | None, most: int, programs: int, warps: int) -> tuple[Tensor | None, int, int]:
    """A weight of which `programs` programs prefetch `most` bytes, how many lines that is, and how many of them one
    program takes (0: none are prefetched).
    """
    if ahead is None or not most or not pdl(ahead.device) or not ahead.is_contiguous():
        return None, 0, 0
    lines = min(most, ahead.numel() * ahead.element_size()) // _LINE.value
    return ahead, lines, max(triton.next_power_of_2(triton.cdiv(lines, programs)), 32 * warps)


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on everything that earlier kernels wrote is visible."""
    if PDL:
        _cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start once every program of this one has come here. It orders no memory."""
    if PDL:
        _cuda.gdc_launch_dependents()


@triton.jit
def prefetch(at):
    """Ask for the cache lines (128 bytes) at a block of pointers to come to L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_share(ahead, lines, program, LINES: tl.constexpr):
    """Prefetch the lines of a weight that are one program's, as `share` deals them out."""
    if LINES > 0:
        first = program * LINES
        if first < lines:
            line = tl.minimum(first + tl.arange(0, LINES), lines - 1).to(tl.int64)
            prefetch(ahead.to(tl.pointer_type(tl.uint8)) + line * _LINE)


@triton.jit
def prefetch_rows(rows, first, last, COLUMNS: tl.constexpr):
    """Prefetch COLUMNS columns from `first` on, but none behind `last`, of the rows that these pointers begin."""
    STEP: tl.constexpr = _LINE // (rows.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(rows[:, None] + tl.minimum(first + tl.arange(0, COLUMNS // STEP) * STEP, last)[None, :])
