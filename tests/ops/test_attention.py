"""Attention kernels against float64: any length, any batch, any slot; foreign slots hold poison and change no bit."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lite_llm.ops import reference
from lite_llm.ops.triton import attention, launch
from tests.close import DEVICE, DTYPES, assert_close
from tests.ops.attention import GPU, INF, NAN, case, check, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_new_token_at_lengths_around_every_tile_edge(dtype):
    check(case([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129], dtype=dtype))


@GPU
@pytest.mark.parametrize("window", [None, 4096, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_new_token_at_great_lengths(dtype, window):
    check(case([1000, 4097, 1, 20000, 129, 8192], heads=8, head_dim=128, dtype=dtype, window=window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_over_any_prefix(dtype):
    """Also that a chunk is the last rows of full attention: the reference knows nothing of chunks."""
    new, prefix = [2, 16, 17, 129, 1, 40], [0, 1, 15, 63, 64, 200]
    check(case([n + p for n, p in zip(new, prefix)], new, dtype=dtype))


@GPU
@pytest.mark.parametrize("prefix", [0, 1, 15, 16, 17, 63, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_chunk_over_every_prefix(dtype, prefix):
    new = [1, 2, 16, 17, 129, 1000]
    check(case([n + prefix for n in new], new, heads=8, head_dim=64, dtype=dtype, decodes=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_every_token_sees_all_keys_without_causal(head_dim, dtype):
    """As many new tokens as keys, fewer, more, one, none; with lengths around the tiles' edges."""
    for heads, kv_heads in ((2, 2), (4, 2)):
        lengths, new = [1, 16, 17, 64, 65, 130, 40, 9, 0, 3], [1, 16, 17, 64, 65, 130, 7, 1, 2, 5]
        c = case(lengths, new, heads, kv_heads, head_dim, dtype, decodes=0)
        c.causal = False
        check(c)


def test_a_request_is_the_same_to_the_bit_in_any_batch_without_causal():
    c = replace(case([65, 3, 130, 1], [65, 3, 130, 1], decodes=0), causal=False)
    got = c.run()
    for b in range(4):
        assert torch.equal(got[c.q_start[b] : c.q_start[b + 1]], c.alone(b).run()), b


@GPU
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_pictures_of_577_patches(head_dim):
    for dtype in DTYPES:
        check(replace(case([577] * 5, [577] * 5, 4, 4, head_dim, dtype, decodes=0), causal=False))


def test_without_causal_there_is_neither_a_window_nor_a_decode():
    c = replace(case([9, 8]), causal=False)
    for wrong, name in ((c, "decodes"), (replace(c, decodes=0, window=4), "window")):
        with pytest.raises(ValueError, match=name):
            wrong.run()


@pytest.mark.parametrize("window", [1, 5, 16, 33, 64, 1000])
def test_window(window):
    new, prefix = [1, 1, 1, 7, 70, 2], [0, 66, 150, 100, 30, 64]
    check(case([n + p for n, p in zip(new, prefix)], new, window=window))


@pytest.mark.parametrize(
    "heads, kv_heads", [(2, 2), (2, 1), (3, 1), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1), (16, 1), (14, 2)]
)
def test_query_heads_share_kv_heads(heads, kv_heads):
    check(case([40, 3, 35, 20], [1, 1, 30, 3], heads, kv_heads, head_dim=16))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_head_dims(head_dim):
    for dtype in DTYPES:
        check(case([40, 3, 35, 20], [1, 1, 30, 3], 2, 1, head_dim, dtype))


@GPU
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_every_shape_of_model(head_dim, group, window):
    for dtype in DTYPES:
        check(case([700, 1, 130, 300, 257, 1], [1, 1, 1, 300, 129, 1], 2 * group, 2, head_dim, dtype, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foreign_slots_change_no_bit(dtype):
    """Slots of no request, and all that the table names behind a request's length, hold NaN, Inf, or 1e30."""
    got = []
    for poison in (0.0, NAN, INF, 1e30 if dtype != torch.float16 else 6e4):
        torch.manual_seed(1)
        got.append(check(case([65, 1, 129, 70, 33], [1, 1, 1, 50, 33], dtype=dtype, poison=poison)))
    assert all(torch.equal(got[0], other) for other in got[1:])


def test_requests_without_keys_and_pad_rows_get_zeros():
    c = case([0, 20, 0, 30, 0], [1, 1, 1, 10, 4])
    c.q = torch.cat([c.q, c.q[:5]])  # five rows that no request owns
    got = check(c)
    assert not got[[0, 2, *range(13, 22)]].any()
    c = case([0, 0])
    c.q = torch.cat([c.q, c.q])
    assert not check(c).any()


def test_a_token_before_the_first_key_gets_zeros():
    """Two keys for five new tokens: the first three stand before position 0 and see nothing."""
    c = case([2, 40], [5, 40], decodes=0)
    got = c.run()
    assert not got[:3].any()
    want = exact(c)
    assert_close(got, want.to(got.dtype), want)


def test_a_request_is_the_same_to_the_bit_in_any_batch():
    lengths, new = [300, 5, 64, 129, 90, 33, 1], [1, 1, 1, 1, 70, 33, 1]
    for window in (None, 50):
        c = case(lengths, new, window=window)
        got = c.run()
        for b in range(len(lengths)):
            assert torch.equal(got[c.q_start[b] : c.q_start[b + 1]], c.alone(b).run()), b


@GPU
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16, 31, 32, 64, 128])
def test_a_request_is_the_same_to_the_bit_in_a_batch_of_any_size(size):
    ones = size // 2 + 1
    lengths, new = (
        torch.randint(200, 3000, (size,)).tolist(),
        [1] * ones + torch.randint(2, 200, (size - ones,)).tolist(),
    )
    c = case(lengths, new, heads=8, head_dim=128, dtype=torch.bfloat16)
    got = c.run()
    for b in {0, size // 2, size - 1}:
        assert torch.equal(got[c.q_start[b] : c.q_start[b + 1]], c.alone(b).run()), b


def test_a_prompt_in_chunks_is_the_same_to_the_bit():
    whole = case([150], [150])
    want = whole.run()
    for cuts in ([0, 64, 150], [0, 17, 100, 150]):
        for begin, end in zip(cuts, cuts[1:]):
            ints = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([0, end - begin], [end])]
            part = replace(whole, q=whole.q[begin:end].clone(), q_start=ints[0], kv_len=ints[1])
            assert torch.equal(part.run(), want[begin:end])


def test_scores_of_any_size_give_no_nan():
    c = case([70, 40], [1, 40])
    check(replace(c, scale=1e-6))
    assert replace(c, q=c.q * 1e4, scale=300.0).run().isfinite().all()


def test_decodes_only_chooses_the_kernel():
    c = case([65, 20, 129, 40], [1, 1, 1, 7])
    for decodes in range(4):
        check(replace(c, decodes=decodes))


def test_where_all_decode_nobody_needs_to_say_which_token_is_whose():
    c = case([40, 3, 0, 70])
    want = c.run()
    for attend in (attention.attend, reference.attend):
        assert_close(replace(c, q_start=None).run(attend), want)
    for other in (case([40, 3], [1, 2]), replace(c, q=torch.cat([c.q, c.q]))):
        with pytest.raises(ValueError, match="^q_start: None; expected where all decode"):
            replace(other, q_start=None).run()


def test_prompts_and_decodes_run_on_two_streams_and_what_comes_next_waits_for_both(monkeypatch):
    """The streams here are lists of what they were told; the kernels say where they were launched."""

    class Stream(list):
        cuda_stream = 1

        def wait_stream(self, other):
            self.append(("waits", other))

    here, there, current, ran = Stream(), Stream(), [], []
    monkeypatch.setattr(launch, "_aside", lambda device, stream: there)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def kernel(name):
        return lambda *args: ran.append((name, bool(current), [*here], [*there]))

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(attention, "aside", lambda device, needed: launch.aside(torch.device("cuda"), needed))
    monkeypatch.setattr(attention, "decode", kernel("decode"))
    monkeypatch.setattr(attention, "attend_flash", kernel("prompts"))
    waits = [("waits", here)]
    for c, launched in (
        (case([5, 9, 7], [1, 1, 4], dtype=torch.float32), [("prompts", True, [], waits), ("decode", False, [], waits)]),
        (case([5, 9], dtype=torch.float32), [("decode", False, [], [])]),
        (case([5, 9], [3, 4], dtype=torch.float32), [("prompts", False, [], [])]),
    ):
        attention.attend(c.q, c.k_pool, c.v_pool, c.table, c.rows, c.q_start, c.kv_len, c.decodes, 1.0)
        assert ran == launched and here == ([("waits", there)] if len(launched) > 1 else [])
        for told in (ran, here, there):
            told.clear()


def test_more_requests_than_one_look_at_their_starts():
    lengths = [1 + b % 3 for b in range(130)]
    check(case(lengths, lengths, heads=1, kv_heads=1, head_dim=16, decodes=0))


def test_no_tokens():
    assert case([], []).run().shape == (0, 4, 32)


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda t: t.double()),
        ("q", lambda t: t.mT.contiguous().mT),
        ("q", lambda t: t[0]),
        ("q", lambda t: t[:, :3].clone()),
        ("k_pool", lambda t: t.half()),
        ("v_pool", lambda t: t.repeat_interleave(2, 0)[::2]),
        ("v_pool", lambda t: t[:-1]),
        ("k_pool", lambda t: t.to("meta")),
        ("table", lambda t: t.long()),
        ("table", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        ("rows", lambda t: t.repeat_interleave(2)[::2]),
        ("q_start", lambda t: t[1:]),
        ("kv_len", lambda t: t.float()),
        ("decodes", lambda n: 3),
        ("window", lambda n: 0),
        ("scale", lambda x: -x),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_by_name(name, change):
    c = case([9, 8])
    with pytest.raises(ValueError, match=name):
        replace(c, **{name: change(getattr(c, name))}).run()


def test_head_dims_and_groups_that_have_no_kernel_are_refused():
    with pytest.raises(ValueError, match=r"head_dim = 48; supported: 16, 32, 64"):
        case([9], head_dim=48).run()
    with pytest.raises(ValueError, match=r"17 heads for 1 KV heads; supported: 1 to 16"):
        case([9], heads=17, kv_heads=1).run()


def test_rows_of_a_wider_table():
    c = case([40, 30], [1, 30])
    wide = torch.cat([c.table, c.table.flip(0)], dim=1)
    check(replace(c, table=wide[:, : c.table.shape[1]]))


FAR = """
import torch
from lite_llm.ops import reference
from lite_llm.ops.triton import attention, launch
from lite_llm.ops.triton.attention import attend
from tests.close import assert_close
kv_heads, head_dim = 8, 128
slots = 2**31 // (kv_heads * head_dim) + 64
pools = [torch.empty(slots, kv_heads, head_dim) for _ in "kv"]  # committed where it is written
own = torch.cat([torch.arange(20), torch.arange(slots - 20, slots)])[torch.randperm(40)]
for pool in pools:
    pool[own] = torch.randn(40, kv_heads, head_dim)
table = own[None].int()
one = lambda *values: torch.tensor(values, dtype=torch.int32)
for new, decodes in ((1, 1), (3, 0)):
    args = torch.randn(new, 8, head_dim), *pools, table, one(0), one(0, new), one(40), decodes, 0.1
    assert_close(attend(*args), reference.attend(*args))
print("right")
"""


@pytest.mark.cpu
def test_pool_of_more_than_2_to_the_31_elements():
    """In a child: an int32 offset would end the process. Both ends of the pool are read; nothing else exists."""
    import os

    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == "right\n", (done.returncode, done.stderr[-2000:])


@GPU
def test_pool_of_two_million_slots():
    slots, kv_heads, head_dim = 2_200_000, 8, 128
    c = case([1500, 33, 400], [1, 1, 300], 32, kv_heads, head_dim, torch.bfloat16)
    top = slots - len(c.k_pool)
    for name in ("k_pool", "v_pool"):
        pool = torch.empty(slots, kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
        pool[top:] = getattr(c, name)
        setattr(c, name, pool)
    c.table += top
    check(c)


@GPU
def test_two_hundred_runs_give_one_result():
    c = case([3000, 1, 700, 129, 200], [1, 1, 1, 129, 150], 8, 2, 128, torch.bfloat16)
    other = case([400, 900], [1, 300], 4, 4, 64, torch.bfloat16)
    want = c.run()
    for _ in range(200):
        other.run()
        assert torch.equal(c.run(), want)


@GPU
@pytest.mark.parametrize(
    ("longest", "new", "others"),
    [
        ([600, 70, 300, 140], [1, 1, 1, 60], ([3, 70, 0, 61], [129, 1, 256, 60])),
        ([131072, 131072], [1, 1], ([1, 70000],)),
    ],
)
def test_a_graph_replays_with_other_lengths(longest, new, others):
    """The kernels read every length on the device, so one capture serves all."""
    c = case(longest, new, 8, 2, 128, torch.bfloat16)
    c.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = c.run()
    for lengths in (longest, *others):
        c.kv_len.copy_(torch.tensor(lengths))
        graph.replay()
        assert_close(got, c.run(reference.attend), exact(c))
