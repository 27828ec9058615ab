"""The matmul ops by every route: gemv up to 4 tokens, skinny up to 64, cuBLAS beyond, for fp32 and for odd widths."""

import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops.triton import gemv
from lite_llm.ops.triton.gemv import Tile
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED
from lite_llm.ops.triton.norm import MAX_WIDTH
from tests.close import DEVICE, DTYPES, assert_close
from tests.ops.matmuls import check_qkv, exact

GPU = DEVICE == "cuda"
HALVES = DTYPES[1:]  # what the kernels of our own take
TOKENS = [1, 2, 3, 4, 5, 17, 64, 65]
SIZES = [(896, 100), (2048, 33), (40, 7)] + [(4864, 896), (3584, 5000), (18944, 130), (4096, 4096)] * GPU


def tensors(*shapes, dtype):
    """Of the size they have in a model: weights a fan-in's root, norms about 1."""
    return [(torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).to(DEVICE, dtype) for shape in shapes]


def check_linear(tokens, in_features, out_features, dtype, bias, norm, gated, run=kernels.linear):
    x, weight, b, n = tensors(
        (tokens, in_features), (out_features * (2 if gated else 1), in_features),
        (out_features * (2 if gated else 1),), (in_features,), dtype=dtype,
    )  # fmt: skip
    x *= in_features**0.5
    args = (x, weight, b if bias else None, 1 + n / 4 if norm else None, 1e-5, gated)
    assert_close(run(*args), reference.linear(*args), exact(*args))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, tokens):
    check_linear(tokens, 104, 50, dtype, bias=False, norm=False, gated=False)
    check_linear(tokens, 104, 50, dtype, bias=True, norm=True, gated=False)
    check_linear(tokens, 104, 25, dtype, bias=False, norm=True, gated=True)
    check_linear(tokens, 104, 25, dtype, bias=True, norm=False, gated=True)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_of_models(size, tokens):
    for dtype in HALVES:
        norm = size[0] <= MAX_WIDTH  # what is wider is an output of the MLP, and never normalised
        check_linear(tokens, *size, dtype, bias=True, norm=norm, gated=False)
        check_linear(tokens, *size, dtype, bias=False, norm=norm, gated=True)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("width", [1, 7, 8, 12])
def test_a_width_that_is_no_multiple_of_8(width, tokens):
    check_linear(tokens, width, 10, torch.float16, bias=True, norm=True, gated=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear_add(with_bias, dtype, tokens):
    x, weight, bias, residual = tensors((tokens, 520), (50, 520), (50,), (tokens, 50), dtype=dtype)
    x, bias = x * 20, bias if with_bias else None
    want, true = residual.clone(), residual.double() + exact(x, weight, bias)
    reference.linear_add_(want, x, weight, bias)
    assert kernels.linear_add_(residual, x, weight, bias) is residual
    assert_close(residual, want, true)


TILES = [
    Tile(1, 256, 1), Tile(2, 512, 2, True), Tile(4, 512, 1, False, WAITED), Tile(16, 256, 4, False, LAST),
    Tile(8, 1024, 4), Tile(4, 64, 1), Tile(2, 2048, 8, True, WAITED, 256, 4096), Tile(4, 256, 2, False, AT_ONCE, 512),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, map(int, tile))))
def test_every_tile_of_gemv_gives_the_same_sums(tile, tokens):
    """Rows and columns that the tile does not divide, one tile or several, any release, any prefetch."""
    ahead = torch.zeros(100, 64, dtype=torch.float16, device=DEVICE)

    def run(x, weight, bias, norm, eps, gated):
        return gemv.gemv(x, weight, bias, norm, eps, gated, None, ahead, tile)

    for dtype in HALVES:
        check_linear(tokens, 1096, 37, dtype, bias=True, norm=True, gated=True, run=run)
        check_linear(tokens, 1024, 40, dtype, bias=False, norm=False, gated=False, run=run)


def qkv_case(tokens, dtype, heads=3, kv_heads=1, head_dim=16, rotary=None, bias=False, head_norm=False, width=72):
    outputs = (heads + 2 * kv_heads) * head_dim
    x, weight, b, norm, q_norm, k_norm = tensors(
        (tokens, width), (outputs, width), (outputs,), (width,), (head_dim,), (head_dim,), dtype=dtype
    )
    pools = torch.randn(2, tokens + 5, kv_heads, head_dim).to(DEVICE, dtype)
    slots, positions = torch.randperm(tokens + 4)[:tokens] + 1, torch.randint(0, 300, (tokens,))
    half = (rotary or head_dim) // 2
    angles = torch.arange(300)[:, None] * 100.0 ** -(torch.arange(half) / half)
    tables = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    norms = (1 + q_norm / 4, 1 + k_norm / 4) if head_norm else (None, None)
    return pools, (
        x, weight, b if bias else None, 1 + norm / 4, 1e-5, positions.to(DEVICE), slots.to(DEVICE), *tables, *norms
    )  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_qkv(dtype, tokens):
    check_qkv(kernels.project_qkv_, *qkv_case(tokens, dtype))
    check_qkv(kernels.project_qkv_, *qkv_case(tokens, dtype, heads=2, kv_heads=2, bias=True))


@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_dims(head_dim, tokens):
    for dtype in HALVES:
        check_qkv(kernels.project_qkv_, *qkv_case(tokens, dtype, head_dim=head_dim, bias=True))


@pytest.mark.parametrize("tokens", [1, 4, 8, 65])
def test_norms_of_heads(tokens):
    check_qkv(kernels.project_qkv_, *qkv_case(tokens, torch.float16, head_norm=True))


@pytest.mark.parametrize("tokens", [1, 8])
def test_heads_that_turn_in_part(tokens):
    check_qkv(kernels.project_qkv_, *qkv_case(tokens, torch.float16, head_dim=32, rotary=16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize(
    "sizes",
    [(14, 2, 64, 896, True), (32, 8, 64, 2048, False), (28, 4, 128, 3584, True), (32, 8, 128, 4096, False)],
    ids=str,
)
def test_project_qkv_of_models(sizes, tokens):
    heads, kv_heads, head_dim, width, bias = sizes
    for dtype in HALVES:
        check_qkv(kernels.project_qkv_, *qkv_case(tokens, dtype, heads, kv_heads, head_dim, bias=bias, width=width))


@pytest.mark.parametrize("tile", TILES[:5], ids=lambda tile: "-".join(map(str, map(int, tile))))
def test_every_tile_of_gemv_gives_the_same_heads(tile):
    def run(*args):
        return gemv.gemv_qkv(*args[:11], None, tile)

    for dtype in HALVES:
        check_qkv(run, *qkv_case(3, dtype, heads=4, kv_heads=2, head_dim=24, bias=True, width=1096))


@pytest.mark.parametrize("tokens", [2, 4, 8, 64])
def test_a_broken_token_stays_alone(tokens):
    x, weight, norm = tensors((tokens, 200), (30, 200), (200,), dtype=torch.float16)
    residual = torch.zeros(tokens, 30, dtype=torch.float16, device=DEVICE)
    for bad in (float("nan"), float("inf")):
        whole, whole_sum = kernels.linear(x, weight, None, norm, 1e-5), kernels.linear_add_(residual.clone(), x, weight)
        broken = x.clone()
        broken[1, 100] = bad
        got, got_sum = kernels.linear(broken, weight, None, norm, 1e-5), residual.clone()
        kernels.linear_add_(got_sum, broken, weight)
        rest = torch.arange(tokens, device=DEVICE) != 1
        assert torch.equal(got[rest], whole[rest]) and torch.equal(got_sum[rest], whole_sum[rest])
        assert not got[1].isfinite().any() and not got_sum[1].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 3, 8, 64])
def test_two_runs_give_the_same_bits_and_the_weight_ahead_changes_none(tokens):
    x, weight, ahead = tensors((tokens, 1096), (90, 1096), (64, 4096), dtype=torch.float16)
    first = kernels.linear(x, weight, gated=True)
    for _ in range(3):
        assert torch.equal(kernels.linear(x, weight, gated=True, ahead=ahead), first)


def test_columns_of_wider_tensors():
    x, weight = tensors((3, 100), (20, 64), dtype=torch.float16)
    assert_close(kernels.linear(x[:, 8:72], weight), reference.linear(x[:, 8:72], weight))
    residual, want = torch.zeros(2, 3, 40, device=DEVICE).half()
    got = kernels.linear_add_(residual[:, 5:25], x[:, 8:72], weight)
    assert_close(got, reference.linear_add_(want[:, 5:25], x[:, 8:72], weight))
    assert not residual[:, :5].any() and not residual[:, 25:].any()


def test_nothing_gives_nothing():
    x, weight, norm = tensors((0, 64), (48, 64), (64,), dtype=torch.float16)
    assert kernels.linear(x, weight, None, norm, 1e-6, gated=True).shape == (0, 24)
    assert kernels.linear_add_(x.new_zeros(0, 48), x, weight).shape == (0, 48)
    none, tables = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(2, 9, 8, device=DEVICE)
    pools = torch.zeros(2, 4, 1, 16, device=DEVICE).half()
    assert kernels.project_qkv_(*pools, x, weight, None, norm, 1e-6, none, none, *tables).shape == (0, 1, 16)


def test_wrong_arguments_are_named():
    x, weight, bias, norm = (torch.zeros(size, device=DEVICE).half() for size in ((3, 64), (48, 64), (48,), (64,)))
    for args, match in [
        ((x[0], weight), "x: shape"),
        ((x.int(), weight), "x: torch.int32"),
        ((x, weight[0]), "weight: shape"),
        ((x, weight[:, :32]), "weight: shape"),
        ((x, weight.float()), "weight: torch.float32"),
        ((x, weight.to("meta")), "weight: on meta"),
        ((x, weight, bias[:47]), "bias: shape"),
        ((x, weight, bias.float()), "bias: torch.float32"),
        ((x, weight, None, norm[:2], 1e-6), "norm: shape"),
        ((x, weight[:47], None, None, 0.0, True), "weight: 47 rows; expected an even number"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.linear(*args)
    for residual, match in [(x, "residual: shape"), (x.new_zeros(3, 48).float(), "residual: torch.float32")]:
        with pytest.raises(ValueError, match=match):
            kernels.linear_add_(residual, x, weight)


def test_wrong_arguments_of_heads_are_named():
    (k_pool, v_pool), good = qkv_case(3, torch.float16)
    x, weight, bias, norm, eps, positions, slots, cos, sin, q_norm, k_norm = good
    head = torch.ones(16, device=DEVICE).half()
    for args, match in [
        ((k_pool.float(), v_pool.float(), *good), "k_pool: torch.float32"),
        ((k_pool, v_pool[:3], *good), "v_pool: shape"),
        ((k_pool, v_pool, x, weight[:79], *good[2:]), "weight: 79 rows; expected a multiple of head_dim 16"),
        ((k_pool, v_pool, x, weight[:32], *good[2:]), "weight: 32 rows"),
        ((k_pool, v_pool, *good[:5], positions[:2], *good[6:]), "positions: shape"),
        ((k_pool, v_pool, *good[:6], slots.float(), *good[7:]), "slots: torch.float32"),
        ((k_pool, v_pool, *good[:7], cos.half(), *good[8:]), "cos: torch.float16"),
        ((k_pool, v_pool, *good[:8], sin[:4], *good[9:]), "sin: shape"),
        ((k_pool, v_pool, *good[:7], cos.repeat(1, 2), sin.repeat(1, 2)), "cos: shape"),
        ((k_pool, v_pool, *good[:9], head, None), "k_norm"),
        ((k_pool, v_pool, *good[:9], head, head[:8]), "k_norm: shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.project_qkv_(*args)


@pytest.mark.gpu
def test_offsets_past_int32():
    """More than 2**31 weights: the last outputs are right."""
    weight = torch.zeros(270_000, 8192, dtype=torch.bfloat16, device=DEVICE)
    weight[-3:] = torch.randn(3, 8192)
    x = torch.randn(2, 8192, device=DEVICE).bfloat16()
    assert_close(kernels.linear(x, weight)[:, -3:], reference.linear(x, weight[-3:]))
