import pytest
import torch

import lite_llm.ops.reference as reference
from lite_llm.ops.triton.skinny import Tile, default, fits, skinny
from lite_llm.ops.triton.skinny_qkv import skinny_qkv
from tests.close import DEVICE, DTYPES, assert_close
from tests.ops import matmuls
from tests.ops.matmuls import each, exact_qkv, heads, rand, weights

SMALL = Tile(16, 32, 32)
TILES = [
    SMALL, SMALL._replace(splits=2), SMALL._replace(splits=3), SMALL._replace(splits=8), SMALL._replace(rows=64),
    SMALL._replace(columns=64, splits=4, fuse_norm=False), Tile(8, 16, 64, 4, 2, 2), Tile(32, 128, 32, 8, 3, 8),
]  # fmt: skip
few_tiles = each(TILES[:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(TILES)
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 128), (8, 16)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_linear(width, rows, gated, tile, dtype):
    x, (weight, bias, norm) = rand(5, width, dtype=dtype, scale=3.0), weights(width, rows, dtype)
    for b, n in [(None, None), (bias, norm), (None, norm)]:
        matmuls.check_linear(skinny, tile, x, weight, b, n, gated, ahead=weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(TILES)
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 64)])
def test_add_goes_into_the_residual(width, rows, tile, dtype):
    matmuls.check_add(skinny, tile, 7, width, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("splits", [1, 4])
def test_any_number_of_tokens(tokens, splits, dtype):
    x, (weight, bias, norm) = rand(tokens, 136, dtype=dtype), weights(136, 96, dtype)
    tile = Tile(max(8 if tokens <= 8 else 16, 1 << (tokens - 1).bit_length()), 32, 64, splits=splits)
    for gated in (False, True):
        matmuls.check_linear(skinny, tile, x, weight, bias, norm, gated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(TILES)
@pytest.mark.parametrize("shape", [(64, 4, 2, 64), (96, 3, 1, 32), (72, 2, 1, 80)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_heads_on_their_way_to_attention(shape, norm, tile, dtype):
    pools, args = heads(6, *shape, dtype, norm=norm, bias=not norm)
    matmuls.check_qkv(skinny_qkv, pools, args, args[1], tile)


@pytest.mark.parametrize("tokens", [1, 16, 33, 128])
def test_heads_of_any_number_of_tokens(tokens):
    pools, args = heads(tokens, 64, 2, 1, 64, torch.float32, norm=True)
    expected = pools.clone()
    want = reference.project_qkv_(*expected, *args)
    got = skinny_qkv(*pools, *args, None, Tile(max(16, 1 << (tokens - 1).bit_length()), 64, 64, splits=2))
    assert_close(got, want, exact_qkv(*args, 1, 64)[0])
    assert_close(pools, expected)


@few_tiles
def test_a_token_does_not_depend_on_its_batch(tile):
    matmuls.check_parts(skinny, tile, 16, (slice(3, 4), slice(5, 12), slice(0, 16)))


@few_tiles
def test_nan_and_inf_stay_in_their_token(tile):
    matmuls.check_nan_and_inf(skinny, tile, 9, torch.float32, inf=4)


def test_large_inputs_in_fp16_are_normed_before_they_overflow():
    x, (weight, _, norm) = torch.full((3, 64), 6e4, device=DEVICE).half(), weights(64, 32, torch.float16)
    assert matmuls.check_linear(skinny, SMALL, x, weight, None, norm * 4).isfinite().all()


def test_pad_tokens_may_share_a_slot():
    pools, args = heads(6, 64, 2, 1, 32, torch.float32)
    args[6][3:] = 0
    matmuls.check_like_reference(skinny_qkv, SMALL, pools, args, 3)


def test_heads_that_turn_in_part_are_refused():
    pools, args = heads(3, 64, 2, 1, 32, torch.float32, turned=16)
    with pytest.raises(ValueError, match="cos: for 16 features"):
        skinny_qkv(*pools, *args, None, SMALL)


def test_the_default_fits_every_gpu():
    sizes = [(2048, 3072), (896, 9728), (8, 2), (18944, 3584), (4096, 128256), (2048, 2048)]
    matmuls.check_default(default, fits, sizes, (1, 4, 5, 8, 16, 17, 32, 64, 65, 128))


def test_what_does_not_fit():
    good = Tile(16, 64, 128, 4, 3)
    matmuls.check_fits(fits, good, 16, [
        {"tokens": 8}, {"tokens": 24}, {"rows": 48}, {"columns": 8}, {"warps": 3}, {"splits": 0}, {"splits": 17},
        {"own": 32}, {"own": 96}, {"release": 3}, {"stages": 0}, {"stages": 6},
    ])  # fmt: skip
    assert fits(good._replace(stages=6), 2048, 3072, 16, 2, False, 90)
    assert not fits(good, 2050, 3072, 16, 2, False, 90)
    assert not fits(good, 2048, 3072, 17, 2, False, 90)


@pytest.mark.gpu
@pytest.mark.parametrize("width, rows", matmuls.REAL_SIZES)
def test_real_sizes_twice(width, rows):
    def others(tile, tokens):
        return tile._replace(splits=4, ahead=1 << 20), tile._replace(fuse_norm=not tile.fuse_norm)

    matmuls.check_real_sizes(skinny, default, others, fits, width, rows, (5, 8, 16, 32, 64, 128), 90)
