"""How much of the time of some steps the GPU runs nothing, from torch's profiler."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def kernels(step: Callable[[], object], steps: int) -> list[tuple[float, float, int]]:
    """Start and end of everything that ran on the GPU in some steps, in us, and the number of its launch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return [
        (event["ts"], event["ts"] + event["dur"], event["args"]["correlation"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def idle_shares(ran: Sequence[tuple[float, float, int]]) -> dict:
    """Share of the time in which nothing runs, and of that between two launches: graphs, or kernels where none is one.

    The first tenth is left out: a profile begins while the GPU waits for it. None where a profiler saw nothing.
    """
    ran = sorted(ran)[len(ran) // 10 :]
    if not ran:
        return {"idle": None, "idle_between_launches": None}
    begin, end, launch = ran[0]
    idle = between = 0.0
    for start, stop, number in ran:
        gap = max(start - end, 0.0)
        idle += gap
        between += gap * (number != launch)
        end, launch = max(end, stop), number
    return {"idle": idle / (end - begin), "idle_between_launches": between / (end - begin)}
