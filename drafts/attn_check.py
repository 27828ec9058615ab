"""python .gpu/attn_check.py [quick]: is the Hopper kernel of prompt attention right, and how fast beside cuDNN."""

import statistics
import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, ".")
from lite_llm.ops.triton import attention, hopper
from lite_llm.ops.triton.compile import ahead_of_time
from lite_llm.ops.triton.hopper import Plan
from tests.close import DEVICE, assert_close
from tests.ops.attention import case, exact

START, BF16, F16 = time.time(), torch.bfloat16, torch.float16
PLANS = {
    128: [
        Plan(2, 128, 2, True, 224), Plan(2, 128, 2, False, 224), Plan(2, 128, 2, True, 232), Plan(2, 64, 4, True, 224),
        Plan(2, 64, 5, False, 224),
    ],
    64: [
        Plan(2, 128, 4, True, 208), Plan(2, 128, 4, False, 208), Plan(2, 128, 4, True, 224), Plan(3, 64, 6, True, 136),
        Plan(3, 64, 6, False, 136), Plan(3, 128, 4, True, 160), Plan(3, 128, 4, False, 160),
    ],
}  # fmt: skip


def say(*words):
    print(f"[{time.time() - START:5.1f}]", *words, flush=True)


def runs(c):
    """The same keys and values, every request's slots in one run, NaN everywhere else."""
    size = int(c.kv_len.sum()) + 20
    pools = torch.full((2, size, *c.k_pool.shape[1:]), float("nan"), dtype=c.k_pool.dtype, device=DEVICE)
    table, at = c.table.clone(), 3
    for row, length in zip(c.rows.tolist(), c.kv_len.tolist()):
        old = c.table[row, :length].long()
        pools[0, at : at + length], pools[1, at : at + length] = c.k_pool[old], c.v_pool[old]
        table[row, :length] = torch.arange(at, at + length, device=DEVICE)
        at += length
    return replace(c, k_pool=pools[0], v_pool=pools[1], table=table)


def kernel(c, plan=None, advance=hopper.attend_hopper, fill=True):
    out = torch.empty_like(c.q)
    if fill:
        out.fill_(float("nan"))
    more = {"plan": plan} if plan else {}
    advance(c.q, c.k_pool, c.v_pool, out, c.table, c.rows, c.q_start, c.kv_len, c.decodes, c.scale, c.window, c.causal,
            **more)  # fmt: skip
    return out


def small():
    """(what, case), smallest first."""
    for dim in (64, 128):
        make = lambda *a, d=dim, **k: case(*a, head_dim=d, **{"dtype": BF16, "decodes": 0} | k)  # noqa: E731
        yield f"D{dim} one token", make([1], [1], 4, 1)
        yield f"D{dim} one block of a run", runs(make([128], [32], 4, 1))
        yield f"D{dim} one gathered block", make([128], [32], 4, 1)
        yield f"D{dim} two blocks", runs(make([256], [64], 4, 1))
        yield f"D{dim} 700 in a run", runs(make([700], [700], 8, 2))
        yield f"D{dim} 700 scattered", make([700], [700], 8, 2)
        new, old = [1, 2, 31, 32, 33, 127, 128, 129, 300, 64], [0, 1000, 97, 0, 31, 1, 128, 5, 3000, 64]
        for group in (1, 4, 7, 8):
            c = make([n + o for n, o in zip(new, old)], new, 2 * group, 2)
            yield f"D{dim} ragged, group {group}", c
            yield f"D{dim} ragged in runs, group {group}", runs(c)
        yield f"D{dim} window 300", replace(runs(make([2000, 450, 129], [900, 450, 129], 8, 2)), window=300)
        yield f"D{dim} window 7, scattered", replace(make([700, 450, 129], [300, 450, 129], 8, 2), window=7)
        yield f"D{dim} all see all", replace(make([577] * 5, [577] * 5, 4, 4), causal=False)
        yield f"D{dim} all see all, runs", replace(runs(make([577, 20, 0, 128], [577, 1, 2, 300], 4, 4)), causal=False)
        c = make([0, 300, 0, 40, 2], [1, 300, 4, 30, 5], 8, 2)
        yield f"D{dim} no keys and pads", replace(c, q=torch.cat([c.q, c.q[:77]]))
        yield f"D{dim} behind decodes", make([70, 5, 300, 129], [1, 1, 300, 100], 8, 2, decodes=2)
        yield f"D{dim} fp16", make([700, 129], [700, 100], 8, 1, dtype=F16)
        yield f"D{dim} 300 requests", make([1 + b % 90 for b in range(300)], [1 + b % 40 if b % 90 >= b % 40 else 1
                                           for b in range(300)], 4, 4)  # fmt: skip


def check(what, c, plan=None):
    got, want, d = kernel(c, plan), exact(c), c.decodes
    torch.cuda.synchronize()
    try:
        assert_close(got[d:], want[d:].to(got.dtype), want[d:], what)
        return True
    except AssertionError as error:
        say("WRONG", what, plan or "", str(error).splitlines()[0][:150])
        return False


def replays():
    """One graph, other lengths, slots and rows: what the graph computes is what a launch does."""
    c = case([900, 40, 300, 1], [500, 40, 200, 1], 8, 2, 128, BF16, decodes=0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel(c)
        with torch.cuda.graph(graph, stream=stream):
            out = kernel(c)
    good = True
    for lengths, new in (([400, 700, 30, 2], [300, 300, 30, 1]), ([0, 741, 0, 0], [0, 741, 0, 0]), ([1] * 4, [1] * 4)):
        other = case([max(n, 1) for n in lengths], [max(n, 1) for n in new], 8, 2, 128, BF16, decodes=0)
        c.q_start.copy_(torch.tensor([0, *new]).cumsum(0))
        c.kv_len.copy_(torch.tensor(lengths))
        c.table[:, : other.table.shape[1]].copy_(other.table[: len(c.table), : c.table.shape[1]])
        c.rows.copy_(other.rows)
        c.k_pool.nan_to_num_()
        c.v_pool.nan_to_num_()
        c.table.clamp_(0, len(c.k_pool) - 1)
        graph.replay()
        torch.cuda.synchronize()
        total = sum(new)
        try:
            want = exact(c)[:total]
            assert_close(out[:total], want.to(out.dtype), want, "replay")
            assert not out[total:].any()
        except AssertionError as error:
            good = False
            say("WRONG replay", lengths, str(error).splitlines()[0][:150])
    return good


def timed(run, count=15):
    """Seconds, median of replays of a graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
        times = []
        for _ in range(count + 3):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            a.record()
            graph.replay()
            b.record()
            stream.synchronize()
            times.append(a.elapsed_time(b) / 1e3)
    return statistics.median(times[3:])


def big(new, old, heads, kv_heads, dim, scattered=False, causal=True):
    slots = sum(new) + sum(old) + 1
    ints = dict(dtype=torch.int32, device=DEVICE)
    order = 1 + (torch.randperm if scattered else torch.arange)(slots - 1, **ints)
    lengths = [n + o for n, o in zip(new, old)]
    table = torch.zeros(len(new), max(lengths), **ints)
    for row, part in enumerate(order.split(lengths)):
        table[row, : len(part)] = part
    make = lambda *s: torch.randn(*s, device=DEVICE, dtype=BF16)  # noqa: E731
    pools = make(slots, kv_heads, dim), make(slots, kv_heads, dim)
    start = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    c = case([1], [1], heads, kv_heads, dim, BF16)
    return replace(c, q=make(sum(new), heads, dim), k_pool=pools[0], v_pool=pools[1], table=table,
                   rows=torch.arange(len(new), **ints), q_start=start, kv_len=torch.tensor(lengths, **ints), decodes=0,
                   causal=causal)  # fmt: skip


def flops(c):
    total = 0
    for n, length in zip((c.q_start[1:] - c.q_start[:-1]).tolist(), c.kv_len.tolist()):
        total += n * length - (n * (n - 1) // 2 if c.causal else 0)
    return 4 * total * c.q.shape[1] * c.q.shape[2]


def cudnn(c):
    """Seconds of torch's attention with cuDNN on the same keys and values, dense; the faster of two ways to do GQA."""
    batch, heads = len(c.rows), c.q.shape[1]
    q = c.q.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
    k, v = (p[1:].unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for p in (c.k_pool, c.v_pool))
    group, best, out = heads // k.shape[1], None, None
    wide = [t.repeat_interleave(group, 1) for t in (k, v)]
    for args, more in ((wide, {}), ((k, v), {"enable_gqa": True})):
        run = lambda a=args, m=more: F.scaled_dot_product_attention(q, *a, is_causal=c.causal, **m)  # noqa: E731
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out, seconds = run(), timed(run)
            best = seconds if best is None else min(best, seconds)
        except RuntimeError as error:
            say("   cuDNN", list(more), "refuses:", str(error).splitlines()[0][:100])
    return best, None if out is None else out.transpose(1, 2).reshape(c.q.shape)


BIG = [  # what, new, old, (heads, kv_heads), dim, scattered, causal, against cuDNN
    ("D128 4 x 2k", [2048] * 4, [0] * 4, (32, 8), 128, False, True, True),
    ("D128 8k", [8192], [0], (32, 8), 128, False, True, True),
    ("D128 16k", [16384], [0], (32, 8), 128, False, True, True),
    ("D64 4 x 4k", [4096] * 4, [0] * 4, (32, 8), 64, False, True, True),
    ("D128 8k, MHA", [8192], [0], (32, 32), 128, False, True, True),
    ("D128 8k, all see all", [8192], [0], (32, 8), 128, False, False, True),
    ("D128 8k scattered", [8192], [0], (32, 8), 128, True, True, False),
    ("D64 4 x 4k scattered", [4096] * 4, [0] * 4, (32, 8), 64, True, True, False),
    ("D128 64 ragged", [32 + 32 * i for i in range(64)], [0] * 64, (32, 8), 128, False, True, False),
    ("D128 2k over 30k, runs", [2048], [30720], (32, 8), 128, False, True, False),
    ("D128 2k over 30k, scattered", [2048], [30720], (32, 8), 128, True, True, False),
    ("D64 8 pictures of 577", [577] * 8, [0] * 8, (16, 16), 64, True, False, False),
    ("D128 1 x 32", [32], [0], (32, 8), 128, False, True, False),
    ("D128 1 x 128", [128], [0], (32, 8), 128, False, True, False),
    ("D128 1 x 512", [512], [0], (32, 8), 128, False, True, True),
    ("D64 1 x 128", [128], [0], (32, 8), 64, False, True, False),
    ("D64 1 x 1k", [1024], [0], (32, 8), 64, False, True, True),
    ("D128 64 x 4 over 1k", [4] * 64, [1024] * 64, (32, 8), 128, False, True, False),
    ("D128 16 x 32", [32] * 16, [0] * 16, (32, 8), 128, False, True, False),
]
ADVANCES = hopper.attend_hopper, attention._advance
VARIANTS = ("D128 4 x 2k", "D128 8k", "D64 4 x 4k")


def everything(cases):
    """One launch of each configuration that is used below."""
    for _, c in cases:
        kernel(c)
    for dim, plans in PLANS.items():
        c = case([300], [300], 32, 8, dim, BF16, decodes=0)
        for plan in plans:
            kernel(c, plan)
    for heads, dim, causal in {(heads, dim, causal) for _, _, _, heads, dim, _, causal, _ in BIG}:
        c = replace(case([300], [300], *heads, dim, BF16, decodes=0), causal=causal)
        kernel(c)
        kernel(c, advance=attention._advance)


@torch.inference_mode()
def main():
    quick = "quick" in sys.argv
    torch.manual_seed(0)
    say(torch.cuda.get_device_name(), torch.__version__)
    cases = list(small())
    say(len(cases), "small cases made")
    try:
        with ahead_of_time(lambda *a: None):
            everything(cases)
    except Exception as error:
        say("compiling ahead of time failed, each is compiled when needed:", repr(error)[:300])
    torch.cuda.synchronize()
    say("compiled")
    good = True
    for what, c in cases:
        say("   ", what)
        good &= check(what, c)
    good &= replays()
    for dim, plans in PLANS.items():
        c = case([900, 40, 300, 577], [500, 40, 200, 577], 32, 8, dim, BF16, decodes=0)
        for plan in plans:
            say("   ", dim, tuple(plan))
            good &= check(f"D{dim}", c, plan) and check(f"D{dim}", runs(c), plan)
    c = case([900, 40, 300, 577], [500, 40, 200, 577], 32, 8, 128, BF16, decodes=0)
    want = kernel(c)
    same = all(torch.equal(kernel(c), want) for _ in range(200))
    say("all right" if good else "SOMETHING IS WRONG", "| 200 runs give the same bits:", same)
    if quick:
        return
    for what, new, old, heads, dim, scattered, causal, rival in BIG:
        c = big(new, old, *heads, dim, scattered, causal)
        rate = flops(c) / 1e12
        ours, portable = (timed(lambda c=c, a=a: kernel(c, None, a, False)) for a in ADVANCES)
        line = f"{what:28} hopper {rate / ours:4.0f} TF {1e6 * ours:7.1f} us, portable {rate / portable:4.0f}"
        out = kernel(c)
        theirs = kernel(c, advance=attention._advance)
        line += f", differ {((out - theirs).float().norm() / theirs.float().norm()).item():.4f}"
        if rival:
            seconds, theirs = cudnn(c)
            if seconds:
                off = ((out - theirs).float().norm() / theirs.float().norm()).item()
                line += f", cuDNN {rate / seconds:4.0f}: {seconds / ours:.3f}, {seconds / portable:.3f} (off {off:.4f})"
        say(line)
        if what in VARIANTS:
            for plan in PLANS[dim]:
                seconds = timed(lambda c=c, p=plan: kernel(c, p, fill=False), 11)
                say(f"      {str(tuple(plan)):28} {rate / seconds:4.0f} TF")


if __name__ == "__main__":
    main()
