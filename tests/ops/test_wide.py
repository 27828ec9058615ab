import pytest
import torch

import lite_llm.ops.triton as kernels
from lite_llm.engine import memory
from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.launch import LAST, WAITED, pdl
from lite_llm.ops.triton.tuning import Choice
from lite_llm.ops.triton.wide import MOST_PARTIAL, Tile, default, fits, wide
from lite_llm.ops.triton.wide_qkv import wide_qkv
from tests.close import DEVICE, DTYPES
from tests.ops import matmuls
from tests.ops.matmuls import EPS, each, heads, rand, weights

TMA = DEVICE == "cpu" or pdl(torch.device(DEVICE))  # the interpreter has it too
KINDS = DTYPES[DEVICE == "cuda" :]  # the ops give it no fp32, and on a GPU tiles need not fit in fp32
SMALL = Tile(64, 32, 32, 4, 2)
TILES = [
    SMALL, SMALL._replace(splits=2), SMALL._replace(splits=3, columns=64), SMALL._replace(splits=8),
    Tile(128, 64, 64, 8, 3, release=WAITED), Tile(64, 128, 32, 8, 3, 4, release=LAST),
]  # fmt: skip
TILES += [tile._replace(tma=True) for tile in TILES] * TMA


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@each(TILES)
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 128), (8, 16)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_linear(width, rows, gated, tile, dtype):
    x, (weight, bias, norm) = rand(70, width, dtype=dtype, scale=3.0), weights(width, rows, dtype)
    for b, n in [(None, None), (bias, norm)]:
        matmuls.check_linear(wide, tile, x, weight, b, n, gated, ahead=weight)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@each(TILES)
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 64)])
def test_add_goes_into_the_residual(width, rows, tile, dtype):
    matmuls.check_add(wide, tile, 67, width, rows, dtype)


@pytest.mark.parametrize("tokens", [1, 64, 65, 129, 1200])
@pytest.mark.parametrize("splits", [1, 2])
def test_any_number_of_tokens(tokens, splits):
    """Also more than the programs of one group compute."""
    x, (weight, bias, norm) = rand(tokens, 136, dtype=torch.float16), weights(136, 96, torch.float16)
    tile = SMALL._replace(splits=splits, tma=TMA)
    for gated in (False, True):
        matmuls.check_linear(wide, tile, x, weight, bias, norm, gated)


QKV = [
    Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2, 3), Tile(64, 128, 64, 8, 2, tma=TMA),
    Tile(64, 128, 64, 4, 2, 2, release=LAST), Tile(128, 32, 32, 8, 2, tma=TMA),
]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@each(QKV)
@pytest.mark.parametrize("shape", [(64, 4, 2, 64), (96, 3, 1, 32), (72, 2, 1, 80), (64, 2, 1, 128)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_heads_on_their_way_to_attention(shape, norm, tile, dtype):
    """Heads of 80 features, and those longer than a tile, are turned by a second kernel."""
    pools, args = heads(66, *shape, dtype, norm=norm, bias=not norm)
    matmuls.check_qkv(wide_qkv, pools, args, args[1], tile)


def test_heads_that_turn_in_part():
    matmuls.check_like_reference(wide_qkv, SMALL, *heads(66, 64, 2, 1, 32, torch.float32, turned=16), 66)


def test_pad_tokens_may_share_a_slot():
    pools, args = heads(66, 64, 2, 1, 32, torch.float32)
    args[6][60:] = 0
    matmuls.check_like_reference(wide_qkv, SMALL, pools, args, 60)


@each(TILES)
def test_a_token_does_not_depend_on_its_batch(tile):
    matmuls.check_parts(wide, tile, 130, (slice(3, 4), slice(5, 112), slice(0, 130)))


@each(TILES)
def test_nan_and_inf_stay_in_their_token(tile):
    matmuls.check_nan_and_inf(wide, tile, 70, torch.float16, inf=69)


def test_memory_that_begins_anywhere():
    """The tensor memory accelerator wants addresses that are multiples of 16 bytes."""
    x, (weight, _, _) = rand(65, 96, dtype=torch.float16), weights(96, 64, torch.float16)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(65, 96)
    assert odd.data_ptr() % 16
    tile = SMALL._replace(tma=TMA)
    got = wide(odd, weight, None, None, EPS, False, None, None, tile)
    assert torch.equal(got, wide(x, weight, None, None, EPS, False, None, None, tile))


def test_the_table_may_choose_it(monkeypatch):
    """By every route of the ops, with the same result as without a table."""
    monkeypatch.setattr(tuning, "choose", lambda *_: Choice("wide", SMALL._replace(splits=2)))
    x, (weight, bias, norm) = rand(66, 96, dtype=torch.float16), weights(96, 64, torch.float16)
    for gated in (False, True):
        got = kernels.linear(x, weight, bias, norm, EPS, gated)
        assert torch.equal(got, wide(x, weight, bias, norm, EPS, gated, None, None, SMALL._replace(splits=2)))
    residual = rand(66, 64, dtype=torch.float16)
    want = wide(x, weight, bias, None, 0.0, False, residual.clone(), None, SMALL._replace(splits=2))
    assert torch.equal(kernels.linear_add_(residual, x, weight, bias), want)
    pools, args = heads(66, 64, 2, 1, 32, torch.float16)
    expected = pools.clone()
    want = wide_qkv(*expected, *args, None, SMALL._replace(splits=2))
    assert torch.equal(kernels.project_qkv_(*pools, *args), want)
    assert torch.equal(pools[:, args[6].long()], expected[:, args[6].long()])


def test_the_default_fits_every_gpu():
    sizes = [(2048, 3072), (896, 9728), (8, 2), (18944, 3584), (4096, 128256), (2048, 2048), (4096, 28672), (4864, 896)]
    matmuls.check_default(default, fits, sizes, (1, 64, 65, 128, 200, 256, 512, 1024, 1025, 8192))


def test_what_does_not_fit():
    good = Tile(128, 128, 64, 8, 3)
    matmuls.check_fits(fits, good, 256, [
        {"tokens": 32}, {"tokens": 96}, {"rows": 48}, {"rows": 512}, {"columns": 16}, {"columns": 256}, {"warps": 2},
        {"splits": 0}, {"splits": 8}, {"own": 32}, {"own": 96}, {"release": 3}, {"stages": 0}, {"stages": 4},
        {"tma": True}, {"rows": 256, "stages": 2, "warps": 4},
    ])  # fmt: skip
    assert fits(good._replace(stages=6, tma=True), 2048, 3072, 256, 2, False, 90)
    assert fits(good._replace(splits=4), 2048, 3072, 256, 2, False, 90)
    assert not fits(good._replace(splits=4), 2048, 3072, 257, 2, False, 90)
    assert not fits(good._replace(rows=256), 2048, 6144, 256, 2, True, 90)
    assert not fits(good, 2050, 3072, 256, 2, False, 90)
    assert not fits(good, 2048, 3072, 1 << 15, 2, False, 90)


def test_partial_sums_have_room_in_the_memory_plan():
    assert MOST_PARTIAL <= memory._SPLITS * memory._FEW


@pytest.mark.gpu
@pytest.mark.parametrize("width, rows", matmuls.REAL_SIZES)
def test_real_sizes_twice(width, rows):
    def others(tile, tokens):
        most = max(min(MOST_PARTIAL // tokens, 4), 1)
        return tile._replace(tma=False, ahead=1 << 20), tile._replace(splits=most)

    gpu = tuning.capability(torch.device(DEVICE))
    matmuls.check_real_sizes(wide, default, others, fits, width, rows, (65, 128, 200, 256, 512, 1024, 2100), gpu)
