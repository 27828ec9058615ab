import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES, assert_close

FAR = 2**17
POSITIONS = [0, 1, 5, 2**15, FAR - 1]
SHAPES = [(16, 16), (64, 64), (80, 80), (80, 32), (96, 96), (112, 112), (128, 128), (256, 64), (256, 256)]


def tables(rotary, length=FAR, base=1e4):
    """fp32 tables, from angles in float64; only the rows that POSITIONS name are filled, the others are NaN."""
    cos, sin = torch.full((2, length, rotary // 2), float("nan"))
    at = torch.tensor([p for p in POSITIONS if p < length])
    angles = at.double()[:, None] * base ** -(torch.arange(0, rotary, 2).double() / rotary)
    cos[at], sin[at] = angles.cos().float(), angles.sin().float()
    return cos.to(DEVICE), sin.to(DEVICE)


def exact_rope(x, positions, cos, sin):
    half, x = cos.shape[1], x.double()
    c, s = cos.double()[positions][:, None], sin.double()[positions][:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, rotary", SHAPES)
def test_rope(head_dim, rotary, dtype):
    positions, (cos, sin) = torch.tensor(POSITIONS, device=DEVICE), tables(rotary)
    x = torch.randn(len(POSITIONS), 7, head_dim).to(DEVICE, dtype)
    exact, want = exact_rope(x, positions, cos, sin), reference.rope_(x.clone(), positions, cos, sin)
    got = x.clone()
    assert kernels.rope_(got, positions, cos, sin) is got
    assert_close(got, want, exact)
    assert torch.equal(got[..., rotary:], x[..., rotary:])


def test_turning_back_gives_the_input_and_the_other_layout_does_not():
    positions, (cos, sin) = torch.tensor(POSITIONS, device=DEVICE), tables(64)
    x = torch.randn(len(POSITIONS), 4, 64, device=DEVICE)
    turned = kernels.rope_(x.clone(), positions, cos, sin)
    assert_close(kernels.rope_(turned.clone(), positions, cos, -sin), x)
    interleaved = torch.stack(x.unflatten(-1, (2, 32)).unbind(-2), -1).flatten(-2)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(kernels.rope_(interleaved, positions, cos, sin), turned)


def test_rope_writes_into_a_slice():
    qkv = torch.randn(5, 8 * 16, device=DEVICE)
    positions, (cos, sin), before = torch.tensor(POSITIONS, device=DEVICE), tables(16), qkv.clone()
    k = qkv[:, 64:96].unflatten(-1, (2, 16))
    want = reference.rope_(k.clone(), positions, cos, sin)
    kernels.rope_(k, positions, cos, sin)
    assert_close(qkv[:, 64:96].unflatten(-1, (2, 16)), want)
    assert torch.equal(qkv[:, :64], before[:, :64]) and torch.equal(qkv[:, 96:], before[:, 96:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("head_dim, rotary", SHAPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (7, 1), (6, 3)])
def test_rope_store_kv(heads, kv_heads, head_dim, rotary, norm, dtype):
    tokens = len(POSITIONS)
    positions, (cos, sin) = torch.tensor(POSITIONS, device=DEVICE), tables(rotary)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(DEVICE, dtype)
    norms = [(torch.randn(head_dim) + 1).to(DEVICE, dtype) if norm else None for _ in range(2)]
    pools = torch.randn(2, 12, kv_heads, head_dim).to(DEVICE, dtype)
    slots, expected, before = torch.tensor([7, 3, 11, 1, 8], device=DEVICE), pools.clone(), qkv.clone()
    want = reference.rope_store_kv_(*expected, qkv, positions, slots, cos, sin, *norms, 1e-6)
    got = kernels.rope_store_kv_(*pools, qkv, positions, slots, cos, sin, *norms, 1e-6)

    q, k, _ = qkv.unflatten(-1, (-1, head_dim)).double().split([heads, kv_heads, kv_heads], 1)
    if norm:
        q, k = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * w.double() for t, w in zip((q, k), norms))
    assert_close(got, want, exact_rope(q, positions, cos, sin), "q")
    assert_close(pools[0][slots], expected[0][slots], exact_rope(k, positions, cos, sin), "k")
    assert torch.equal(pools[1], expected[1])
    others = torch.tensor([0, 2, 4, 5, 6, 9, 10], device=DEVICE)
    assert torch.equal(pools[:, others], expected[:, others]) and torch.equal(qkv, before)


def test_values_pass_bit_by_bit_even_inf_and_nan():
    positions, (cos, sin) = torch.tensor([1, 5], device=DEVICE), tables(16, 8)
    qkv = torch.randn(2, 3 * 16, device=DEVICE)
    qkv[0, 32], qkv[0, 40], qkv[1, 33] = float("inf"), float("nan"), -float("inf")
    pools = torch.zeros(2, 4, 1, 16, device=DEVICE)
    ones = torch.ones(16, device=DEVICE)
    got = kernels.rope_store_kv_(*pools, qkv, positions, torch.tensor([2, 1], device=DEVICE), cos, sin, ones, ones)
    torch.testing.assert_close(pools[1, [2, 1]].flatten(1), qkv[:, 32:], rtol=0, atol=0, equal_nan=True)
    assert got.isfinite().all() and pools[0].isfinite().all()


def test_a_token_does_not_depend_on_its_batch():
    positions, (cos, sin) = torch.tensor(POSITIONS, device=DEVICE), tables(64)
    qkv, ones = torch.randn(5, 5 * 64).to(DEVICE, torch.float16), torch.ones(64, device=DEVICE).half()
    whole, alone = torch.zeros(2, 2, 6, 1, 64, device=DEVICE).half()
    slots = torch.arange(1, 6, device=DEVICE)
    q = kernels.rope_store_kv_(*whole, qkv, positions, slots, cos, sin, ones, ones)
    for n in range(5):
        one = slice(n, n + 1)
        assert torch.equal(
            kernels.rope_store_kv_(*alone, qkv[one], positions[one], slots[one], cos, sin, ones, ones), q[one]
        )
    assert torch.equal(whole, alone)


def test_nothing_gives_nothing():
    none, (cos, sin) = torch.zeros(0, dtype=torch.int64, device=DEVICE), tables(16, 8)
    pools = torch.zeros(2, 4, 1, 16, device=DEVICE)
    assert kernels.rope_store_kv_(*pools, torch.zeros(0, 64, device=DEVICE), none, none, cos, sin).shape == (0, 2, 16)
    assert kernels.rope_(torch.zeros(0, 2, 16, device=DEVICE), none, cos, sin).shape == (0, 2, 16)


def test_wrong_arguments_are_named():
    (cos, sin), ones = tables(16, 8), torch.ones(16, device=DEVICE)
    pool, qkv = torch.zeros(4, 1, 16, device=DEVICE), torch.zeros(3, 48, device=DEVICE)
    at, wide = torch.tensor([0, 1, 5], device=DEVICE), torch.zeros(8, 9, device=DEVICE)
    for wrong, match in [
        ((pool, pool[:3], qkv, at, at, cos, sin), "v_pool: shape"),
        ((pool, pool, qkv[:, :40], at, at, cos, sin), "qkv: width 40"),
        ((pool, pool, qkv[:, :32], at, at, cos, sin), "qkv: width 32"),
        ((pool, pool, qkv.half(), at, at, cos, sin), "qkv: torch.float16"),
        ((pool, pool, qkv.T.contiguous().T, at, at, cos, sin), "qkv: strides"),
        ((pool, pool, qkv, at[:2], at, cos, sin), "positions: shape"),
        ((pool, pool, qkv, at, at.float(), cos, sin), "slots: torch.float32"),
        ((pool, pool, qkv, at, at, cos.half(), sin), "cos: torch.float16"),
        ((pool, pool, qkv, at, at, cos, sin[:4]), "sin: shape"),
        ((pool, pool, qkv, at, at, wide, wide), "cos: shape"),
        ((pool, pool, qkv, at, at, cos, sin, ones), "k_norm"),
        ((pool, pool, qkv, at, at, cos, sin, ones, ones[:8]), "k_norm: shape"),
        ((pool, pool, qkv.to("meta"), at, at, cos, sin), "qkv: on meta"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.rope_store_kv_(*wrong)
    with pytest.raises(ValueError, match="x: strides"):
        kernels.rope_(torch.zeros(3, 16, 2, device=DEVICE).mT, at, cos, sin)
