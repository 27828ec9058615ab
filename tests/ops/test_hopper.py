"""The Hopper kernel of prompt attention: schedule, barriers and masks without a GPU, and what it computes on one."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lite_llm.ops.triton
from lite_llm.ops.triton import attention, tuning
from lite_llm.ops.triton.decode import LOG2E
from lite_llm.ops.triton.hopper import readable
from lite_llm.ops.triton.partial import LOWEST
from tests.close import DEVICE, assert_close
from tests.ops import gluon
from tests.ops.attention import Case, case, exact
from tests.ops.tables import fresh_tables

GPU = pytest.mark.gpu
SOURCES = [Path(lite_llm.ops.triton.__file__).parent / f"{name}.py" for name in ("hopper_multiply", "hopper")]


def emulated(
    c: Case, programs: int = 3, keys: int = 16, stages: int = 2, seed: int = 0, in_l2: int = 8 << 20
) -> Tensor:  # fmt: skip
    """What the kernel's source writes where warp groups are threads; blocks are small, so that few keys are many."""
    names = {"LOG2E": LOG2E.value, "LOWEST": np.float32(LOWEST.value), "_IN_L2": in_l2}
    kernel = gluon.load(SOURCES, "_hopper_kernel", seed, **names)
    tensors = (c.q, c.k_pool, c.v_pool, c.table, c.rows, c.q_start, c.kv_len)
    q, k, v, table, rows, q_start, kv_len = (t.cpu().numpy() for t in tensors)
    out, counters = np.full_like(q, np.nan), np.zeros(2, np.int32)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    boxes = [gluon.Boxes(pool.reshape(len(pool), -1), [keys, dim]) for pool in (k, v)]
    rest = [gluon.Pointer(t) for t in (k, v, out, table, rows, q_start, kv_len, counters)]
    kernel(
        gluon.Pointer(q), *boxes, *rest, table.shape[1], c.decodes, len(rows) - c.decodes, tokens, c.scale,
        c.window or 0, programs=programs, KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=dim,
        WINDOWED=c.window is not None, CAUSAL=c.causal, GROUPS=2, KEYS=keys, STAGES=stages, REGISTERS=0,
    )  # fmt: skip
    assert not counters.any(), "counters are left as they were found"
    return torch.from_numpy(out)


def in_runs(c: Case) -> Case:
    """The same keys and values with every request's slots in one run, and NaN in all others."""
    size = int(c.kv_len.sum()) + 20
    pools = torch.full((2, size, *c.k_pool.shape[1:]), float("nan"), dtype=c.k_pool.dtype, device=c.k_pool.device)
    table, at = c.table.clone(), 3
    for row, length in zip(c.rows.tolist(), c.kv_len.tolist(), strict=True):
        old = c.table[row, :length].long()
        pools[0, at : at + length], pools[1, at : at + length] = c.k_pool[old], c.v_pool[old]
        table[row, :length] = torch.arange(at, at + length, device=table.device)
        at += length
    return replace(c, k_pool=pools[0], v_pool=pools[1], table=table)


def with_pads(c: Case, rows: int) -> Case:
    return replace(c, q=torch.cat([c.q, c.q.new_ones(rows, *c.q.shape[1:])]))


def schedule(c: Case, **how) -> None:
    """NaN lies in every slot that is nobody's, and in every row of the output."""
    got, want, begin = emulated(c, **how), exact(c).cpu(), int(c.q_start[c.decodes])
    assert got[begin:].isfinite().all(), "a row that nobody wrote, or a foreign slot that was read"
    assert got[:begin].isnan().all(), "rows of the decodes were written"
    assert (got[begin:] - want[begin:]).abs().max() < 1e-4


def any_case(seed: int) -> tuple[Case, dict]:
    r = random.Random(seed)
    causal, requests = r.random() < 0.7, r.choice([1, 2, 3, 5, 9])
    new = [r.choice([1, 2, 5, 16, 31, 32, 33, 64, 100]) for _ in range(requests)]
    lengths = [max(0, n + r.choice([0, 0, 1, 15, 16, 17, 200, 500, -2, -n])) for n in new]
    decodes = r.randint(0, requests - 1) if causal and r.random() < 0.3 else 0
    new[:decodes], lengths[:decodes] = [1] * decodes, [9] * decodes
    kv_heads, group = r.choice([1, 2, 3, 4, 6]), r.choice([1, 2, 3, 4, 7, 8])
    window = r.choice([None, None, 1, 7, 16, 40, 300]) if causal else None
    c = case(lengths, new, group * kv_heads, kv_heads, 16, window=window, decodes=decodes)
    c = replace(c, causal=causal)
    if r.random() < 0.4:
        c = in_runs(c)
    how = {"programs": r.choice([1, 2, 5]), "stages": r.choice([2, 3, 4]), "in_l2": r.choice([1, 1 << 14, 8 << 20])}
    return c, how | {"keys": r.choice([16, 32]), "seed": seed}


@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(24))
def test_every_tile_of_any_batch_is_done_right(seed):
    c, how = any_case(seed)
    schedule(with_pads(c, seed % 3 * 50), **how)


@pytest.mark.cpu
@pytest.mark.parametrize("requests", [127, 128, 129, 300])
def test_more_requests_than_one_look_at_their_starts(requests):
    new = [1 + b % 3 for b in range(requests)]
    schedule(with_pads(case([n + b % 20 for b, n in enumerate(new)], new, 2, 2, 16, decodes=0), 5))


@pytest.mark.cpu
def test_blocks_of_the_size_that_the_gpu_gets():
    c = case([700, 260, 128], [300, 130, 128], 8, 2, 64, decodes=0)
    schedule(c, keys=128, programs=4)
    schedule(in_runs(c), keys=128, programs=4)


@pytest.mark.cpu
def test_many_tiles_of_one_block_each():
    """The groups that multiply get as far apart as barriers let them, and facts of four tiles are about."""
    for seed in range(6):
        c = case([5] * 60, [5] * 60, 2, 2, 16, decodes=0)
        schedule(c, programs=1, seed=seed)


def begun(monkeypatch, c: Case, **how) -> np.ndarray:
    """The (token, head) pairs that tiles begin with, counted through, as one program takes them."""
    found = []

    class Noted(gluon.Pointer):
        def read(self, mask, other):
            if len(self.memory) == len(c.q) and np.ndim(self.at) == 2:
                found.append(int(np.asarray(self.at)[0, 0]) // c.q.shape[2])
            return super().read(mask, other)

    monkeypatch.setattr(gluon, "Pointer", Noted)
    emulated(c, programs=1, **how)
    return np.array(found[::2])  # of the two warp groups' halves of a tile


@pytest.mark.cpu
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_as_many_heads_are_begun_together_as_l2_holds_the_keys_of(monkeypatch, heads):
    c = in_runs(case([700, 300], [700, 300], 4, 4, 16, decodes=0))
    group = begun(monkeypatch, c, in_l2=1000 * heads * 16) % 4 // heads
    assert (np.diff(group) >= 0).all() and len(group) == 4 * (6 + 3)


@pytest.mark.cpu
def test_the_longest_tiles_are_begun_first(monkeypatch):
    """Whoever asks next gets a tile of the highest level that is left: a sixteenth of the longest request's keys."""
    lengths = [2000, 900, 40, 1300, 1999]
    starts = np.cumsum([0, *lengths])
    firsts = begun(monkeypatch, in_runs(case(lengths, lengths, 1, 1, 16, decodes=0)), keys=128)
    ends = firsts - starts[np.searchsorted(starts, firsts, "right") - 1] + 128
    levels = np.minimum(ends // (max(lengths) // 16 + 1), 15)
    assert len(ends) == sum(-(-n // 128) for n in lengths) and (np.diff(levels) <= 0).all()


@pytest.mark.cpu
def test_a_barrier_that_nobody_completes_is_called_a_deadlock(monkeypatch):
    """The machine itself: were it too kind, the tests above would prove nothing."""
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    source = SOURCES[1].read_text().replace("mbarrier.arrive(ready, count=1)", "pass")
    monkeypatch.setattr(
        type(SOURCES[1]), "read_text", lambda path: source if path == SOURCES[1] else path.open().read()
    )
    with pytest.raises((TimeoutError, RuntimeError)):
        emulated(case([40], [40], 1, 1, 16, decodes=0))


@pytest.mark.parametrize("gpu", [80, 89, 90, 100, 120])
def test_other_gpus_types_and_head_dims_go_to_the_portable_kernel(monkeypatch, gpu):
    monkeypatch.setattr(tuning, "capability", lambda device: gpu)
    with fresh_tables():
        for itemsize, dim in ((2, 128), (4, 128), (2, 64), (2, 112), (2, 256)):
            kernel = tuning.choose_attend(torch.device(DEVICE), dim, itemsize, False, 512, False).kernel
            assert (kernel == "hopper") == (gpu == 90 and itemsize == 2 and dim == 128), (dim, itemsize)


def test_pointers_between_16_bytes_are_not_readable_and_a_cpu_has_no_such_kernel():
    q = torch.zeros(2, 2, 128, dtype=torch.float16, device=DEVICE)
    odd = torch.zeros(2 * 2 * 128 + 1, dtype=torch.float16, device=DEVICE)[1:].view(2, 2, 128)
    assert readable(q, q, q) == (DEVICE == "cuda")
    assert not any((readable(odd, q, q), readable(q, odd, q), readable(q, q, odd)))


@pytest.mark.parametrize("kernel", ["flash", "hopper"])
@pytest.mark.parametrize("lies_right", [True, False])
def test_prompts_go_where_the_table_says_if_they_can_be_read(monkeypatch, kernel, lies_right):
    called = []
    for name in ("attend_hopper", "attend_flash"):
        monkeypatch.setattr(attention, name, lambda *args, name=name: called.append(name))
    monkeypatch.setattr(attention, "readable", lambda *tensors: lies_right)
    monkeypatch.setattr(tuning, "choose_attend", lambda *what: tuning.Choice(kernel, None))
    case([40, 9], [40, 9], 1, 1, 128, torch.float16, decodes=0).run()
    assert called == ["attend_hopper" if kernel == "hopper" and lies_right else "attend_flash"]


def right(c: Case) -> Tensor:
    got, want = c.run(), exact(c)
    assert_close(got, want.to(got.dtype), want)
    return got


NEW = [1, 2, 31, 32, 33, 127, 128, 129, 300, 64]
CACHED = [0, 1000, 97, 0, 31, 1, 128, 5, 3000, 64]


@GPU
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_prompts_over_cached_prefixes(dtype, group):
    lengths = [n + cached for n, cached in zip(NEW, CACHED, strict=True)]
    c = case(lengths, NEW, 2 * group, 2, 128, dtype, decodes=0)
    assert torch.equal(right(c), right(in_runs(c))), "runs and single slots give the same bits"


@GPU
@pytest.mark.parametrize("window", [1, 7, 128, 300, 5000])
def test_windows(window):
    c = case([2000, 450, 129, 70], [900, 450, 129, 3], 8, 2, 128, torch.bfloat16, window, decodes=0)
    assert torch.equal(right(c), right(in_runs(c)))


@GPU
def test_pads_requests_without_keys_and_decodes():
    c = case([70, 0, 300, 0, 40, 2], [1, 1, 300, 4, 30, 5], 8, 2, 128, torch.bfloat16, decodes=2)
    got = right(with_pads(c, 77))
    assert not got[302:306].any() and not got[-77:].any()


@GPU
def test_all_see_all():
    c = case([577, 20, 0, 128, 1], [577, 1, 2, 300, 1], 4, 4, 128, torch.bfloat16, decodes=0)
    c = replace(c, causal=False)
    assert torch.equal(right(c), right(in_runs(c)))


@GPU
def test_foreign_slots_change_no_bit_of_a_prompt():
    got = []
    for poison in (0.0, float("nan"), float("inf"), 1e30):
        torch.manual_seed(1)
        c = case([700, 129, 70, 333], [500, 129, 70, 33], 8, 2, 128, torch.bfloat16, poison=poison, decodes=0)
        got.append(right(c))
    assert all(torch.equal(got[0], other) for other in got[1:])


@GPU
def test_a_prompt_is_the_same_to_the_bit_in_any_batch_and_in_chunks():
    lengths = [700, 129, 1500, 64, 5]
    c = case(lengths, lengths, 8, 2, 128, torch.bfloat16, decodes=0)
    got = c.run()
    for b in range(len(lengths)):
        mine = got[c.q_start[b] : c.q_start[b + 1]]
        assert torch.equal(mine, c.alone(b).run()), b
        one = c.alone(b)
        for begin, end in ((0, 3), (3, lengths[b])):
            ints = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([0, end - begin], [end])]
            part = replace(one, q=one.q[begin:end].clone(), q_start=ints[0], kv_len=ints[1])
            assert torch.equal(part.run(), mine[begin:end]), (b, begin)


@GPU
def test_two_hundred_launches_give_one_result():
    c = case([3000, 1, 700, 129, 200], [1000, 1, 700, 129, 150], 8, 2, 128, torch.bfloat16, decodes=0)
    want = c.run()
    assert all(torch.equal(c.run(), want) for _ in range(200))


@GPU
def test_a_graph_of_prompts_replays_with_other_lengths():
    c = case([900, 40, 300, 1], [500, 40, 200, 1], 8, 2, 128, torch.bfloat16, poison=0.0, decodes=0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        c.run()
        with torch.cuda.graph(graph, stream=stream):
            out = c.run()
    for lengths, new in (([400, 700, 30, 2], [300, 300, 30, 1]), ([0, 741, 0, 0], [0, 741, 0, 0])):
        c.q_start.copy_(torch.tensor([0, *new]).cumsum(0))
        c.kv_len.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        want = exact(c)
        assert_close(out, want.to(out.dtype), want)
