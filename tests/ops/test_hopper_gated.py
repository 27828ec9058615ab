"""Gate and up on Hopper: schedule and barriers without a GPU, which tiles it takes, and what it computes on a GPU."""

import functools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops.triton import hopper_gated, tuning
from lite_llm.ops.triton.hopper_gated import NARROW, Deal, deal, readable, serves
from lite_llm.ops.triton.tuning import CUBLAS, Choice
from tests.close import DEVICE
from tests.ops import gluon, matmuls
from tests.ops.matmuls import EPS, rand, weights
from tests.ops.tables import fresh_tables

HOPPER = pytest.mark.hopper


def emulated(x, weight, how, rows, parts, high, columns, stages, together, programs, seed):
    """What the kernel's source writes where groups of warps are threads; tiles are small, so that few rows are many."""
    names = {"functools": functools, "NamedTuple": object, "_COLUMNS": columns}
    names |= {"release": lambda _: None, "wait": lambda _: None}
    kernel = gluon.load([Path(hopper_gated.__file__)], "_hopper_gated_kernel", seed, **names)
    out = np.full((len(x), len(weight) // 2), np.nan, np.float32)
    absent, tiles, (wide, narrow) = [None] * (2 - len(parts)), -(-len(x) // high), how
    kernel(
        gluon.Boxes(x, [high, columns]),
        *(gluon.Boxes(weight, [part, columns]) for part in (rows, *parts)), *absent,
        *(gluon.Boxes(out, [high // 2, part]) for part in (rows, *parts)), *absent,
        out.shape[1], tiles, wide, narrow, -(-x.shape[1] // columns),
        programs=min(programs, tiles * (wide + narrow)),
        PARTS=parts, STAGES=stages, TOGETHER=together, REGISTERS=0, PDL=True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("seed", range(60))
def test_every_output_is_written_once_from_what_it_needs(seed):
    r, make = random.Random(seed), np.random.default_rng(seed)
    tokens, width, outputs = r.choice([1, 3, 8, 9, 31, 70]), r.choice([1, 4, 5, 12, 30]), r.choice([1, 4, 7, 22, 50])
    x = make.standard_normal((tokens, width), np.float32)
    weight = make.standard_normal((2 * outputs, width), np.float32)
    parts, wide = r.choice([(4,), (4, 2), (2, 1)]), r.randint(0, -(-outputs // 8))
    how = wide, -(-max(outputs - 8 * wide, 0) // sum(parts))
    got = emulated(
        x, weight, how, 8, parts, r.choice([4, 8]), 4, r.choice([3, 4, 6]), r.choice([1, 2, 8]), r.choice([1, 2, 3, 5]),
        seed,
    )  # fmt: skip
    gate, up = np.split(x.astype(np.float64) @ weight.astype(np.float64).T, 2, 1)
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("programs", [132, 114, 78])
@pytest.mark.parametrize("outputs", [8, 4864, 8192, 11008, 14336, 18944])
def test_rows_are_dealt_out_so_that_the_busiest_program_is_done_first(outputs, programs):
    for tiles in (1, 2, 3, 4, 6, 16, 64):
        found = deal(tiles, outputs, programs)
        dealt = found.wide * 128 + found.narrow * found.rows
        assert dealt >= outputs and dealt - outputs < (found.rows if found.narrow else 128)
        loads = [0.0] * programs  # one block of a tile after the other goes to the next program
        for number in range(tiles * (found.wide + found.narrow)):
            loads[number % programs] += 1 if number < tiles * found.wide else NARROW[found.rows]
        assert found.time(tiles, programs) == pytest.approx(max(loads))
        alike = {rows: -(-tiles * -(-outputs // rows) // programs) * cost for rows, cost in NARROW.items()}
        assert max(loads) <= min(-(-tiles * -(-outputs // 128) // programs), *alike.values()) + 1e-9


def test_a_last_round_that_would_be_half_empty_has_narrow_tiles():
    assert deal(4, 11008, 132) == (66, 32, 80)  # 2 rounds of 128 rows and one of 80; 128 alone would take 3
    assert deal(2, 8192, 132) == (64, 0, 96)  # 128 programs of 132 are busy
    assert deal(1, 11008, 132) == (0, 115, 96)


def test_a_finished_tile_and_what_is_under_way_fit_in_shared_memory():
    assert hopper_gated._LATE.value < hopper_gated._STAGES, "the block that the second group first waits for"
    for rows in NARROW:
        parts = hopper_gated._parts(rows)
        assert sum(parts) == rows <= 128 and 1 <= len(parts) <= 2
        assert all(64 * part <= 64 * 128 // 2 for part in parts), "each has half of a finished tile's memory"


@pytest.mark.parametrize(
    "shape, capability, served",
    [
        ((2048, 16384), 90, True), ((8, 16), 90, True), ((2048, 16384), 89, False), ((2048, 16384), 100, False),
        ((2052, 16384), 90, False), ((2048, 16392), 90, False), ((0, 16384), 90, False), ((2048, 0), 90, False),
    ],
)  # fmt: skip
def test_shapes_it_serves(shape, capability, served):
    assert serves(*shape, capability) is served


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_table_may_choose_it_where_it_runs(monkeypatch, capability):
    row = tuning.Row("gated", 2048, 16384, 512, Choice("hopper", None))
    monkeypatch.setattr(tuning, "read", lambda path: [row])
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    served = Choice("hopper", None) if capability == 90 else CUBLAS
    with fresh_tables():
        choose = functools.partial(tuning.choose, torch.device(DEVICE), "gated", 2048)
        assert [choose(16384, n) for n in (1, 512, 513)] == [served, served, CUBLAS]
        assert [choose(rows, 512) for rows in (20000, 20004)] == [served, CUBLAS]


@pytest.mark.parametrize("lies_right", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_what_it_cannot_do_is_done_by_others(monkeypatch, lies_right, biased):
    called, linear = [], sys.modules[kernels.linear.__module__]
    x, (weight, bias, norm) = rand(70, 64, dtype=torch.float16), weights(64, 96, torch.float16)
    monkeypatch.setattr(tuning, "choose", lambda *_: Choice("hopper", None))
    monkeypatch.setattr(linear, "readable", lambda *tensors: lies_right)
    monkeypatch.setattr(linear, "hopper_gated", lambda *given: called.append(given))
    got = kernels.linear(x, weight, bias if biased else None, norm, EPS, gated=True)
    if lies_right and not biased:
        ((*tensors, eps),) = called
        assert eps == EPS and all(a is b for a, b in zip(tensors, (x, weight, norm), strict=True))
    else:
        assert not called
        matmuls.assert_close(got, reference.linear(x, weight, bias if biased else None, norm, EPS, gated=True))


def test_a_cpu_has_no_such_kernel_and_pointers_between_16_bytes_are_not_readable():
    x = rand(9, 64, dtype=torch.float16)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(9, 64)
    assert readable(x, x) == (DEVICE == "cuda")
    assert not readable(odd, x) and not readable(x, odd)


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width, outputs", [(8, 8), (64, 16), (72, 40), (128, 200), (200, 136), (2048, 11008)])
def test_any_shape_gives_the_same_bits_however_rows_are_dealt_out(width, outputs, dtype):
    """Rows behind the tokens are NaN."""
    weight, _, norm = weights(width, 2 * outputs, dtype, bias=False)
    some = outputs // 128 * 2 // 3
    hows = [Deal(-(-outputs // 128), 0, 96), *(Deal(0, -(-outputs // rows), rows) for rows in NARROW)]
    hows += [Deal(some, -(-(outputs - 128 * some) // rows), rows) for rows in NARROW if some]
    for tokens in (1, 63, 64, 65, 128, 129, 200, 1100):
        x = torch.cat([rand(tokens, width, dtype=dtype), rand(5, width, dtype=dtype) * float("nan")])[:tokens]
        found = [hopper_gated.hopper_gated(x, weight, norm, EPS, how) for how in (None, *hows)]
        args = x, weight, None, norm, EPS, True
        matmuls.assert_close(found[0], reference.linear(*args), matmuls.exact(*args))
        assert all(torch.equal(found[0], other) for other in found[1:]), tokens


@HOPPER
def test_a_token_does_not_depend_on_its_batch():
    x, (weight, _, norm) = rand(1500, 896, dtype=torch.bfloat16), weights(896, 9728, torch.bfloat16)
    whole = hopper_gated.hopper_gated(x, weight, norm, EPS)
    for some in (slice(3, 4), slice(100, 300), slice(7, 1307)):
        part = hopper_gated.hopper_gated(x[some].clone(), weight, norm, EPS)
        assert torch.equal(part, whole[some])


@HOPPER
def test_nan_and_inf_stay_in_their_token():
    x, (weight, _, _) = rand(300, 256, dtype=torch.bfloat16), weights(256, 512, torch.bfloat16)
    clean = hopper_gated.hopper_gated(x, weight, None, EPS)
    x[130], x[299, 5] = float("nan"), float("inf")
    got = hopper_gated.hopper_gated(x, weight, None, EPS)
    rest = torch.ones(300, dtype=torch.bool, device=DEVICE)
    rest[[130, 299]] = False
    assert torch.equal(got[rest], clean[rest]) and got[130].isnan().all() and not got[299].isfinite().all()


@HOPPER
def test_a_graph_of_it_behind_the_kernel_that_makes_its_input():
    """Its weights are under way before that kernel has ended; its tokens are not."""
    x, (weight, _, norm) = rand(512, 2048, dtype=torch.bfloat16), weights(2048, 2 * 2048, torch.bfloat16)
    layers = [weight.roll(i, 0) for i in range(4)]

    def chain(y):
        for layer in layers:
            y = kernels.add_rms_norm_(y, hopper_gated.hopper_gated(y, layer, norm, EPS), norm, EPS)
        return y

    want = chain(x.clone())
    stream, graph, start = torch.cuda.Stream(), torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        start.copy_(x)
        got = chain(start)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
