import pytest
import torch

import lite_llm.ops.reference as reference
from lite_llm.ops.triton.aot import SHARED
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED
from lite_llm.ops.triton.skinny import Tile, default, fits, skinny
from lite_llm.ops.triton.skinny_qkv import skinny_qkv
from tests.close import DEVICE, DTYPES, assert_close

SMALL = Tile(16, 32, 32)
TILES = [
    SMALL, SMALL._replace(splits=2), SMALL._replace(splits=3), SMALL._replace(splits=8), SMALL._replace(rows=64),
    SMALL._replace(columns=64, splits=4, fuse_norm=False), Tile(8, 16, 64, 4, 2, 2), Tile(32, 128, 32, 8, 3, 8),
]  # fmt: skip
EPS = 1e-5
tiles = pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(str(int(field)) for field in tile))
few_tiles = pytest.mark.parametrize("tile", TILES[:6], ids=lambda tile: "-".join(str(int(field)) for field in tile))


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def weights(width, rows, dtype, bias=True):
    norm = (torch.randn(width) + 1).to(DEVICE, dtype)
    return rand(rows, width, dtype=dtype, scale=width**-0.5), rand(rows, dtype=dtype) if bias else None, norm


def normed(x, norm, eps=EPS):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()


def exact(x, weight, bias=None, norm=None, gated=False):
    y = (x.double() if norm is None else normed(x, norm)) @ weight.double().T
    y = y if bias is None else y + bias.double()
    gate, up = y.chunk(2, -1) if gated else (y, y)
    return torch.nn.functional.silu(gate) * up if gated else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tiles
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 128), (8, 16)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_linear(width, rows, gated, tile, dtype):
    x, (weight, bias, norm) = rand(5, width, dtype=dtype, scale=3.0), weights(width, rows, dtype)
    for b, n in [(None, None), (bias, norm), (None, norm)]:
        got = skinny(x, weight, b, n, EPS, gated, None, weight, tile)
        assert_close(got, reference.linear(x, weight, b, n, EPS, gated), exact(x, weight, b, n, gated))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tiles
@pytest.mark.parametrize("width, rows", [(96, 70), (256, 64)])
def test_add_goes_into_the_residual(width, rows, tile, dtype):
    x, (weight, bias, _) = rand(7, width, dtype=dtype), weights(width, rows, dtype)
    for b in (None, bias):
        residual = rand(7, rows, dtype=dtype)
        want, true = residual.clone(), residual.double() + exact(x, weight, b)
        reference.linear_add_(want, x, weight, b)
        assert skinny(x, weight, b, None, 0.0, False, residual, None, tile) is residual
        assert_close(residual, want, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("splits", [1, 4])
def test_any_number_of_tokens(tokens, splits, dtype):
    x, (weight, bias, norm) = rand(tokens, 136, dtype=dtype), weights(136, 96, dtype)
    tile = Tile(max(8 if tokens <= 8 else 16, 1 << (tokens - 1).bit_length()), 32, 64, splits=splits)
    for gated in (False, True):
        got = skinny(x, weight, bias, norm, EPS, gated, None, None, tile)
        assert_close(got, reference.linear(x, weight, bias, norm, EPS, gated), exact(x, weight, bias, norm, gated))


def heads(tokens, width, heads, kv_heads, head_dim, dtype, norm=False, bias=True):
    """Arguments of project_qkv_, its pools full of NaN where they will be written, and the slots."""
    x, (weight, bias, scale) = (
        rand(tokens, width, dtype=dtype),
        weights(width, (heads + 2 * kv_heads) * head_dim, dtype, bias),
    )
    angles = torch.rand(50, head_dim // 2, device=DEVICE) * 6
    slots = torch.randperm(tokens + 3)[:tokens].to(DEVICE, torch.int32) + 1
    pools = rand(2, tokens + 5, kv_heads, head_dim, dtype=dtype)
    pools[:, slots.long()] = float("nan")
    positions = torch.randint(0, 50, (tokens,)).to(DEVICE, torch.int32)
    norms = [(torch.randn(head_dim) + 1).to(DEVICE, dtype) if norm else None for _ in range(2)]
    return pools, (x, weight, bias, scale, EPS, positions, slots, angles.cos(), angles.sin(), *norms)


def exact_qkv(x, weight, bias, scale, eps, positions, slots, cos, sin, q_norm, k_norm, kv_heads, head_dim):
    y = exact(x, weight, bias, scale).unflatten(-1, (-1, head_dim))
    q, k, v = y.split([y.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q, k = normed(q, q_norm), normed(k, k_norm)
    c, s = cos.double()[positions][:, None], sin.double()[positions][:, None]

    def turned(t):
        a, b = t.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return turned(q), turned(k), v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tiles
@pytest.mark.parametrize("shape", [(64, 4, 2, 64), (96, 3, 1, 32), (72, 2, 1, 80)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_heads_on_their_way_to_attention(shape, norm, tile, dtype):
    pools, args = heads(6, *shape, dtype, norm=norm, bias=not norm)
    expected, slots = pools.clone(), args[6].long()
    want = reference.project_qkv_(*expected, *args)
    got = skinny_qkv(*pools, *args, args[1], tile)
    q, k, v = exact_qkv(*args, *shape[2:])
    assert_close(got, want, q, "q")
    assert_close(pools[0][slots], expected[0][slots], k, "k")
    assert_close(pools[1][slots], expected[1][slots], v, "v")
    others = [slot for slot in range(pools.shape[1]) if slot not in slots.tolist()]
    assert torch.equal(pools[:, others], expected[:, others])


@pytest.mark.parametrize("tokens", [1, 16, 33, 128])
def test_heads_of_any_number_of_tokens(tokens):
    pools, args = heads(tokens, 64, 2, 1, 64, torch.float32, norm=True)
    expected = pools.clone()
    want = reference.project_qkv_(*expected, *args)
    got = skinny_qkv(*pools, *args, None, Tile(max(16, 1 << (tokens - 1).bit_length()), 64, 64, splits=2))
    assert_close(got, want, exact_qkv(*args, 1, 64)[0])
    assert_close(pools[0], expected[0])
    assert_close(pools[1], expected[1])


@few_tiles
def test_a_token_does_not_depend_on_its_batch(tile):
    x, (weight, bias, norm) = rand(16, 96, dtype=torch.float16), weights(96, 64, torch.float16)
    whole = skinny(x, weight, bias, norm, EPS, True, None, None, tile)
    for some in (slice(3, 4), slice(5, 12), slice(0, 16)):
        assert torch.equal(skinny(x[some], weight, bias, norm, EPS, True, None, None, tile), whole[some])


@few_tiles
def test_nan_and_inf_stay_in_their_token(tile):
    x, (weight, _, norm) = rand(9, 96), weights(96, 64, torch.float32)
    clean = skinny(x, weight, None, norm, EPS, False, None, None, tile)
    x[2, 5], x[4, 90] = float("nan"), float("inf")
    got = skinny(x, weight, None, norm, EPS, False, None, None, tile)
    hurt = torch.tensor([2, 4])
    assert got[hurt].isnan().all()
    rest = [n for n in range(9) if n not in hurt]
    assert torch.equal(got[rest], clean[rest])


def test_large_inputs_in_fp16_are_normed_before_they_overflow():
    x, (weight, _, norm) = torch.full((3, 64), 6e4, device=DEVICE).half(), weights(64, 32, torch.float16)
    got = skinny(x, weight, None, norm * 4, EPS, False, None, None, SMALL)
    assert got.isfinite().all()
    assert_close(got, reference.linear(x, weight, None, norm * 4, EPS), exact(x, weight, None, norm * 4))


def test_pad_tokens_may_share_a_slot():
    pools, args = heads(6, 64, 2, 1, 32, torch.float32)
    args[6][3:] = 0
    expected = pools.clone()
    want = reference.project_qkv_(*expected, *args)
    assert_close(skinny_qkv(*pools, *args, None, SMALL), want)
    assert_close(pools[:, args[6][:3].long()], expected[:, args[6][:3].long()])


def test_heads_that_turn_in_part_are_refused():
    pools, args = heads(3, 64, 2, 1, 32, torch.float32)
    args = [t[:, :8].contiguous() if t is args[7] or t is args[8] else t for t in args]
    with pytest.raises(ValueError, match="cos: for 16 features"):
        skinny_qkv(*pools, *args, None, SMALL)


def test_the_default_fits_every_gpu():
    for op in ("linear", "gated", "add", "qkv"):
        for width, rows in [(2048, 3072), (896, 9728), (8, 2), (18944, 3584), (4096, 128256), (2048, 2048)]:
            for tokens in (1, 4, 5, 8, 16, 17, 32, 64, 65, 128):
                for gpu in (*SHARED, 75):
                    tile = default(op, width, rows, tokens, gpu)
                    assert fits(tile, width, rows, tokens, 2, op == "gated", gpu), (op, width, rows, tokens, gpu, tile)


def test_what_does_not_fit():
    good = Tile(16, 64, 128, 4, 3)
    assert fits(good, 2048, 3072, 16, 2, False, 86)
    for wrong in [
        {"tokens": 8}, {"tokens": 24}, {"rows": 48}, {"columns": 8}, {"warps": 3}, {"splits": 0}, {"splits": 17},
        {"own": 32}, {"own": 96}, {"release": 3}, {"stages": 0}, {"stages": 6},
    ]:  # fmt: skip
        assert not fits(good._replace(**wrong), 2048, 3072, 16, 2, False, 86), wrong
    assert all(fits(good._replace(release=r), 2048, 3072, 16, 2, False, 86) for r in (AT_ONCE, WAITED, LAST))
    assert fits(good._replace(stages=6), 2048, 3072, 16, 2, False, 90)
    assert not fits(good, 2050, 3072, 16, 2, False, 90)
    assert not fits(good, 2048, 3072, 17, 2, False, 90)


@pytest.mark.gpu
@pytest.mark.parametrize("width, rows", [(2048, 16384), (896, 9728), (3584, 4608), (8192, 2048), (4864, 896)])
def test_real_sizes_twice(width, rows):
    """As models have them, in bf16; the second run gives the same bits."""
    weight, bias, norm = weights(width, rows, torch.bfloat16)
    for tokens in (5, 8, 16, 32, 64, 128):
        x = rand(tokens, width, dtype=torch.bfloat16)
        for op, gated in (("linear", False), ("gated", True)):
            want, true = reference.linear(x, weight, bias, norm, EPS, gated), exact(x, weight, bias, norm, gated)
            tile = default(op, width, rows, tokens, 90)
            for t in (tile, tile._replace(splits=4, ahead=1 << 20), tile._replace(fuse_norm=not tile.fuse_norm)):
                if fits(t, width, rows, tokens, 2, gated, 90):
                    got = skinny(x, weight, bias, norm, EPS, gated, None, weight, t)
                    assert_close(got, want, true)
                    assert torch.equal(got, skinny(x, weight, bias, norm, EPS, gated, None, weight, t))
