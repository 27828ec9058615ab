"""What kernels of one chain share: programmatic dependent launch, prefetches into L2, and arrival tickets.

With programmatic dependent launch (PDL; Hopper and newer) a kernel may start while the one before it still runs. It
may then touch nothing but weights until it has called `wait`, which returns when the kernel before has ended and its
writes are visible. Every kernel of ours that is launched so calls `wait` outside of any loop, before it reads or writes
anything else: so whatever a kernel can see when it goes on is finished, all the way back, and buffers may be reused.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as _cuda

TICKETS = 1 << 16
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
