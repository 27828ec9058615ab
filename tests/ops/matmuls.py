"""What the tests of the matmul ops and kernels check alike, with their arguments and the same sums in float64.

`kernel` stands for `skinny` or `wide`, or, where heads come out, for `skinny_qkv`, `wide_qkv` or the op itself.
"""

import pytest
import torch

import lite_llm.ops.reference as reference
from lite_llm.ops.triton.aot import SHARED
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED
from tests.close import DEVICE, assert_close

EPS = 1e-5
REAL_SIZES = [(2048, 16384), (896, 9728), (3584, 4608), (8192, 2048), (4864, 896)]  # as models have them


def each(tiles):
    return pytest.mark.parametrize("tile", tiles, ids=lambda tile: "-".join(str(int(field)) for field in tile))


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def weights(width, rows, dtype, bias=True):
    norm = (torch.randn(width) + 1).to(DEVICE, dtype)
    return rand(rows, width, dtype=dtype, scale=width**-0.5), rand(rows, dtype=dtype) if bias else None, norm


def heads(tokens, width, heads, kv_heads, head_dim, dtype, norm=False, bias=True, turned=None):
    """Pools for project_qkv_, full of NaN where they will be written, and its other arguments."""
    x = rand(tokens, width, dtype=dtype)
    weight, bias, scale = weights(width, (heads + 2 * kv_heads) * head_dim, dtype, bias)
    angles = torch.rand(50, (turned or head_dim) // 2, device=DEVICE) * 6
    slots = torch.randperm(tokens + 3)[:tokens].to(DEVICE, torch.int32) + 1
    pools = rand(2, tokens + 5, kv_heads, head_dim, dtype=dtype)
    pools[:, slots.long()] = float("nan")
    positions = torch.randint(0, 50, (tokens,)).to(DEVICE, torch.int32)
    norms = [(torch.randn(head_dim) + 1).to(DEVICE, dtype) if norm else None for _ in range(2)]
    return pools, (x, weight, bias, scale, EPS, positions, slots, angles.cos(), angles.sin(), *norms)


def normed(x, norm, eps):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()


def exact(x, weight, bias=None, norm=None, eps=EPS, gated=False):
    y = (x.double() if norm is None else normed(x, norm, eps)) @ weight.double().T
    y = y if bias is None else y + bias.double()
    gate, up = y.chunk(2, -1) if gated else (y, y)
    return torch.nn.functional.silu(gate) * up if gated else y


def exact_qkv(x, weight, bias, norm, eps, positions, slots, cos, sin, q_norm, k_norm, kv_heads, head_dim):
    y = exact(x, weight, bias, norm, eps).unflatten(-1, (-1, head_dim))
    q, k, v = y.split([y.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q, k = normed(q, q_norm, eps), normed(k, k_norm, eps)
    half, c, s = cos.shape[1], cos.double()[positions][:, None], sin.double()[positions][:, None]

    def turned(t):
        a, b, rest = t.tensor_split([half, 2 * half], -1)
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    return turned(q), turned(k), v


def check_linear(kernel, tile, x, weight, bias, norm, gated=False, ahead=None):
    args = x, weight, bias, norm, EPS, gated
    got = kernel(*args, None, ahead, tile)
    assert_close(got, reference.linear(*args), exact(*args))
    return got


def check_add(kernel, tile, tokens, width, rows, dtype):
    """The sum goes into the residual itself."""
    x, (weight, bias, _) = rand(tokens, width, dtype=dtype), weights(width, rows, dtype)
    for b in (None, bias):
        residual = rand(tokens, rows, dtype=dtype)
        want, true = residual.clone(), residual.double() + exact(x, weight, b)
        reference.linear_add_(want, x, weight, b)
        assert kernel(x, weight, b, None, 0.0, False, residual, None, tile) is residual
        assert_close(residual, want, true)


def check_qkv(kernel, pools, args, *more):
    """Of a kernel that takes `more` than project_qkv_ does; no slot but those of the tokens is written."""
    before, expected, slots = pools.clone(), pools.clone(), args[6].long()
    want = reference.project_qkv_(*expected, *args)
    got = kernel(*pools, *args, *more)
    q, k, v = exact_qkv(*args, *pools.shape[2:])
    assert_close(got, want, q, "q")
    assert_close(pools[0][slots], expected[0][slots], k, "k")
    assert_close(pools[1][slots], expected[1][slots], v, "v")
    others = [slot for slot in range(pools.shape[1]) if slot not in slots.tolist()]
    assert torch.equal(pools[:, others], before[:, others])


def check_like_reference(kernel, tile, pools, args, tokens):
    """All queries, and the keys and values of the first `tokens`, are the reference's."""
    expected, slots = pools.clone(), args[6][:tokens].long()
    want = reference.project_qkv_(*expected, *args)
    assert_close(kernel(*pools, *args, None, tile), want)
    assert_close(pools[:, slots], expected[:, slots])


def check_parts(kernel, tile, tokens, parts):
    """A part of a batch gets the bits that it gets in the whole."""
    x, (weight, bias, norm) = rand(tokens, 96, dtype=torch.float16), weights(96, 64, torch.float16)
    whole = kernel(x, weight, bias, norm, EPS, True, None, None, tile)
    for some in parts:
        assert torch.equal(kernel(x[some], weight, bias, norm, EPS, True, None, None, tile), whole[some])


def check_nan_and_inf(kernel, tile, tokens, dtype, inf):
    """NaN in token 2 and infinity in token `inf` stay there."""
    x, (weight, _, norm) = rand(tokens, 96, dtype=dtype), weights(96, 64, dtype)
    clean = kernel(x, weight, None, norm, EPS, False, None, None, tile)
    x[2, 5], x[inf, 90] = float("nan"), float("inf")
    got = kernel(x, weight, None, norm, EPS, False, None, None, tile)
    hurt = torch.tensor([2, inf])
    assert got[hurt].isnan().all()
    rest = [n for n in range(tokens) if n not in hurt]
    assert torch.equal(got[rest], clean[rest])


def check_default(default, fits, sizes, counts):
    """It fits every GPU, and one that we have never heard of."""
    for op in ("linear", "gated", "add", "qkv"):
        for width, rows in sizes:
            for tokens in counts:
                for gpu in (*SHARED, 75):
                    tile = default(op, width, rows, tokens, gpu)
                    assert fits(tile, width, rows, tokens, 2, op == "gated", gpu), (op, width, rows, tokens, gpu, tile)


def check_fits(fits, good, tokens, wrong):
    """The good tile does, whenever it releases; with any of the wrong fields it does not."""
    for release in (good.release, AT_ONCE, WAITED, LAST):
        assert fits(good._replace(release=release), 2048, 3072, tokens, 2, False, 86), release
    for fields in wrong:
        assert not fits(good._replace(**fields), 2048, 3072, tokens, 2, False, 86), fields


def check_real_sizes(kernel, default, others, fits, width, rows, counts, gpu):
    """In bf16, by the default tile and those of `others(tile, tokens)`; the second run gives the same bits."""
    weight, bias, norm = weights(width, rows, torch.bfloat16)
    for tokens in counts:
        x = rand(tokens, width, dtype=torch.bfloat16)
        for op, gated in (("linear", False), ("gated", True)):
            want, true = reference.linear(x, weight, bias, norm, EPS, gated), exact(x, weight, bias, norm, EPS, gated)
            tile = default(op, width, rows, tokens, gpu)
            for t in (tile, *others(tile, tokens)):
                if fits(t, width, rows, tokens, 2, gated, gpu):
                    got = kernel(x, weight, bias, norm, EPS, gated, None, weight, t)
                    assert_close(got, want, true)
                    assert torch.equal(got, kernel(x, weight, bias, norm, EPS, gated, None, weight, t))
