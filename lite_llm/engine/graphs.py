"""One way to record CUDA graphs, for steps and for pictures."""

from collections.abc import Callable

import torch


def record(work: Callable[[], object], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """`work` as a graph on the current stream, after running it once as it is. What it leaves in memory of its own is
    gone with the next graph of `pool`: results belong in buffers."""
    work()
    graph = torch.cuda.CUDAGraph()
    # Plainer than torch.cuda.graph, which collects garbage each time.
    torch.cuda.current_stream().synchronize()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        work()
    finally:
        graph.capture_end()
    graph.replay()  # the first one uploads it
    return graph
