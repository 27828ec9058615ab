import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from tests.close import DEVICE, DTYPES

SLOTS = {
    "random": lambda: torch.randperm(63)[:17] + 1,
    "reversed": lambda: torch.arange(63, 46, -1),
    "single": lambda: torch.tensor([9]),
    "empty": lambda: torch.zeros(0, dtype=torch.int64),
    "ends": lambda: torch.tensor([63, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("heads, head_dim", [(1, 16), (3, 80), (8, 128), (2, 1)])
def test_only_the_named_slots_change(heads, head_dim, slots, dtype):
    slots = SLOTS[slots]().to(DEVICE)
    k, v = torch.randn(2, slots.numel(), heads, head_dim).to(DEVICE, dtype)
    pools = torch.randn(2, 2, 64, heads, head_dim).to(DEVICE, dtype)  # a layer on either side is the canary
    expected = pools.clone()
    kernels.store_kv_(pools[0, 1], pools[1, 0], k, v, slots)
    reference.store_kv_(expected[0, 1], expected[1, 0], k, v, slots)
    assert torch.equal(pools, expected)


def test_slices_of_a_fused_projection():
    qkv = torch.randn(5, 4 * 16, device=DEVICE)
    k, v = (qkv[:, at : at + 16].unflatten(-1, (2, 8)) for at in (32, 48))
    pools = torch.zeros(2, 9, 2, 8, device=DEVICE)
    kernels.store_kv_(*pools, k, v, torch.arange(1, 6, device=DEVICE, dtype=torch.int32))
    assert torch.equal(pools[0, 1:6], k) and torch.equal(pools[1, 1:6], v)


def test_the_pad_slot_may_repeat():
    """Slots of one call are distinct, the pad slot excepted; which of its writes stays is nobody's business."""
    k, v = torch.randn(2, 4, 2, 8, device=DEVICE)
    pools = torch.zeros(2, 6, 2, 8, device=DEVICE)
    kernels.store_kv_(*pools, k, v, torch.tensor([0, 3, 0, 5], device=DEVICE))
    assert torch.equal(pools[0, [3, 5]], k[[1, 3]]) and not pools[:, [1, 2, 4]].any()


@pytest.mark.gpu  # the interpreter would copy the whole pool
def test_a_slot_past_int32():
    """Slots 2**29 elements apart: the last one lies past 2**31."""
    stride, rows = 1 << 29, 6
    pool = torch.zeros(stride * (rows - 1) + 16, dtype=torch.float16, device=DEVICE)
    pool = pool.as_strided((rows, 2, 8), (stride, 8, 1))
    k, v = torch.randn(2, 2, 2, 8).to(DEVICE, torch.float16)
    v_pool = torch.zeros(rows, 2, 8, dtype=torch.float16, device=DEVICE)
    kernels.store_kv_(pool, v_pool, k, v, torch.tensor([5, 1], device=DEVICE))
    assert torch.equal(pool[[5, 1]], k) and torch.equal(v_pool[[5, 1]], v)
    assert not pool[[0, 2, 3, 4]].any()


def test_wrong_arguments_are_named():
    pool, k = torch.zeros(6, 2, 8, device=DEVICE), torch.zeros(3, 2, 8, device=DEVICE)
    slots = torch.arange(3, device=DEVICE)
    for wrong, match in [
        ((pool, pool[:5], k, k, slots), "v_pool: shape"),
        ((pool, pool.half(), k, k, slots), "v_pool: torch.float16"),
        ((pool, pool, k[:2], k, slots), "k: shape"),
        ((pool, pool, k, k.half(), slots), "v: torch.float16"),
        ((pool, pool, k.mT.contiguous().mT, k, slots), "k: strides"),
        ((pool, pool, k, k, slots.float()), "slots: torch.float32"),
        ((pool, pool, k, k, slots.to("meta")), "slots: on meta"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.store_kv_(*wrong)
