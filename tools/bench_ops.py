"""Time every kernel on this GPU against what the memory or the matrix units allow, as measured in the same run.

    python tools/bench_ops.py [--shape llama-3.1-8b] [--json docs/results/ops.json]

Each figure is the median of many launches replayed in a CUDA graph over rotating inputs larger than the L2 cache.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import ops
from lite_llm.config import HFConfig, ModelConfig
from lite_llm.engine.roofline import copy_rate, matmul_rate
from lite_llm.engine.runner import Runner
from lite_llm.models import registry, shapes
from tools.environment import environment

DTYPE, ITEM, DEVICE = torch.bfloat16, 2, "cuda"
COLD = 256 << 20  # bytes of inputs to rotate over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    cfg = registry.parse(HFConfig(shapes.shape_config(args.shape)))
    roofs = {"copy_tb_s": copy_rate(DEVICE) / 1e12, "matmul_tflop_s": matmul_rate(DEVICE, DTYPE) / 1e12}
    rows = [measure(*case, roofs) for case in cases(cfg)]
    table = Table(title=f"{args.shape} on {torch.cuda.get_device_name()}: copy {roofs['copy_tb_s']:.2f} TB/s, "
                  f"matmul {roofs['matmul_tflop_s']:.0f} TFLOP/s")  # fmt: skip
    for name in ("op", "case", "us", "TB/s", "TFLOP/s", "% of limit"):
        table.add_column(name, justify="left" if name in ("op", "case") else "right")
    for row in rows:
        table.add_row(
            row["op"], row["case"], f"{row['us']:.1f}", f"{row['tb_s']:.2f}", f"{row['tflop_s']:.0f}",
            f"{100 * row['of_limit']:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps(environment() | roofs | {"shape": args.shape, "rows": rows}, indent=1) + "\n")
    return 0


def cases(cfg: ModelConfig):
    """(op, case, function of a variant, variants, bytes moved, floating-point operations)"""
    heads, kv_heads, dim = cfg.heads, cfg.kv_heads, cfg.head_dim
    for tokens in (1, 64, 8192):
        x, residual = randn(tokens, cfg.hidden), randn(tokens, cfg.hidden)
        w = randn(cfg.hidden)
        size = 4 * x.numel() * ITEM
        yield (
            "add_rms_norm_",
            f"{tokens} tokens",
            lambda a, r=residual, w=w: ops.add_rms_norm_(r, a, w, 1e-5),
            copies(x),
            size,
            0,
        )
        gate_up = randn(tokens, 2 * cfg.ffn)
        yield "silu_mul", f"{tokens} tokens", ops.silu_mul, copies(gate_up), 3 * tokens * cfg.ffn * ITEM, 0
        qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
        pools = [randn(tokens + 1, kv_heads, dim) for _ in range(2)]
        at = torch.arange(tokens, device=DEVICE)
        cos, sin = (torch.randn(tokens, dim // 2, device=DEVICE) for _ in range(2))
        rotate = lambda q, p=pools, at=at, c=cos, s=sin: ops.rope_store_kv_(p[0], p[1], q, at, at + 1, c, s)  # noqa: E731
        yield "rope_store_kv_", f"{tokens} tokens", rotate, copies(qkv), 2 * qkv.numel() * ITEM, 0
    for requests, length in ((1, 512), (1, 32768), (8, 4096), (64, 4096), (256, 1024)):
        moved = 2 * requests * length * kv_heads * dim * ITEM
        yield "attend", f"decode {requests} x {length}", *attention(cfg, [1] * requests, length), moved, 0
    scattered = attention(cfg, [1] * 64, 4096, scattered=True)
    yield "attend", "decode 64 x 4096, scattered slots", *scattered, 2 * 64 * 4096 * kv_heads * dim * ITEM, 0
    for new, cached, count in ((2048, 0, 4), (8192, 0, 1), (2048, 30720, 1)):
        flops = 4 * count * heads * dim * (new * cached + new * (new + 1) // 2)
        yield "attend", f"prompt {count} x {new} over {cached}", *attention(cfg, [new] * count, new + cached), 0, flops
    for requests in (1, 64, 256):
        logits = torch.randn(requests, cfg.vocab, device=DEVICE).to(DTYPE)
        full = [torch.full((requests,), v, device=DEVICE) for v in (0.7, 0.8, 0.0)]
        keys, rows = (torch.arange(requests, device=DEVICE, dtype=kind) for kind in (torch.int64, torch.int32))
        for what, heat, k in (("greedy", 0.0, 0), ("temperature", 0.7, 0), ("top-k 20, top-p 0.8", 0.7, 20)):
            hot, top_k = full[0] * (heat / 0.7), torch.full((requests,), k, dtype=torch.int32, device=DEVICE)
            settings = (rows, rows, hot, top_k, full[1] if k else torch.ones_like(full[1]), full[2], keys, cfg.vocab)
            draw = lambda x, rest=settings: ops.sample(x, *rest)  # noqa: E731
            yield "sample", f"{requests} rows, {what}", draw, copies(logits), logits.numel() * ITEM, 0


def attention(cfg: ModelConfig, counts: list[int], length: int, scattered: bool = False) -> tuple[Callable, list]:
    requests, tokens = len(counts), sum(counts)
    slots = requests * length + 1
    pool = lambda: randn(slots, cfg.kv_heads, cfg.head_dim)  # noqa: E731
    pools = [(pool(), pool()) for _ in range(max(1, min(4, COLD // (2 * slots * cfg.kv_heads * cfg.head_dim * ITEM))))]
    order = torch.randperm if scattered else torch.arange
    table = (1 + order(slots - 1, device=DEVICE, dtype=torch.int32)).view(requests, length)
    ints = dict(dtype=torch.int32, device=DEVICE)
    rows, kv_len = torch.arange(requests, **ints), torch.full((requests,), length, **ints)
    q_start = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    q = randn(tokens, cfg.heads, cfg.head_dim)
    decodes = requests if counts[0] == 1 else 0
    call = lambda kv: ops.attend(q, *kv, table, rows, q_start, kv_len, decodes, cfg.head_dim**-0.5)  # noqa: E731
    return call, pools


def measure(op: str, case: str, call: Callable, variants: list, moved: int, flops: int, roofs: dict) -> dict:
    seconds = timed(call, variants)
    floor = max(moved / (roofs["copy_tb_s"] * 1e12), flops / (roofs["matmul_tflop_s"] * 1e12))
    return {
        "op": op, "case": case, "us": seconds * 1e6, "tb_s": moved / seconds / 1e12, "tflop_s": flops / seconds / 1e12,
        "of_limit": floor / seconds,
    }  # fmt: skip


def timed(call: Callable, variants: list, repeats: int = 15) -> float:
    """Median seconds of one call, launches excluded: a graph of enough calls to last about a millisecond."""
    for variant in variants:
        call(variant)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(variants[0])
    end.record()
    torch.cuda.synchronize()
    rounds = max(1, int(2 / max(start.elapsed_time(end), 0.02) / len(variants)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for variant in variants:
                call(variant)
    times = []
    for _ in range(repeats + 3):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / rounds / len(variants))
    return sorted(times[3:])[repeats // 2]


@contextlib.contextmanager
def timed_steps(runner: Runner) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Events before and behind each step that runs meanwhile, on its stream. A profiler would slow steps down."""
    run, marks = runner.run, []

    def marked(*given, **more) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*given, **more)
        end.record()
        marks.append((start, end))

    runner.run = marked
    try:
        yield marks
    finally:
        del runner.run


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(DTYPE)


def copies(x: torch.Tensor) -> list[torch.Tensor]:
    return [x] + [x.clone() for _ in range(min(COLD // (x.numel() * x.element_size()), 31))]


if __name__ == "__main__":
    sys.exit(main())
