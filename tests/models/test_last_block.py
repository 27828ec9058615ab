"""The last block computes no more than the tokens whose logits are wanted, and these as if it computed all.

A step as the engine has them: requests that decode, pieces of prompts with and without something cached, pads.
"""

import dataclasses

import pytest
import torch

from lite_llm import ops
from lite_llm.batch import PAD_SLOT, Batch, KVPool
from lite_llm.config import ModelConfig
from tests.close import DEVICE, exact_float32
from tests.models.test_parity import FAMILIES, one_thread, our_model, their_model

__all__ = ["one_thread"]  # a fixture that holds for this file too

DECODES, PIECES = ((9, 1), (1, 1), None), ((0, 7), (5, 6), (12, 1), (0, 1), None)
"""Cached tokens and new ones; None: a pad."""
FREE, WIDTH = 3, 16  # tokens behind all requests, and of a row of the table


def step(cfg: ModelConfig, device: str) -> tuple[Batch, KVPool]:
    """Keys and values of what is cached are random, those of nobody NaN."""
    requests = [*DECODES, *PIECES]
    order = 1 + torch.randperm(len(requests) * WIDTH).view(-1, WIDTH)
    table = torch.full((len(requests) + 1, WIDTH), PAD_SLOT, dtype=torch.int32)
    rows = torch.randperm(len(requests)).int()
    kv = torch.full((2, cfg.num_layers, order.numel() + 1, cfg.kv_heads, cfg.head_dim), torch.nan)
    positions, slots, q_start, logits_at = [], [], [0], []
    for b, request in enumerate(requests):
        cached, new = request or (0, int(b < len(DECODES)))  # one that decodes has a token, even as a pad
        mine = order[b, : cached + new].tolist() if request else [PAD_SLOT] * new
        rows[b] = rows[b] if request else len(requests)
        table[rows[b], : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        kv[:, :, mine[:cached]] = torch.randn(2, cfg.num_layers, cached, cfg.kv_heads, cfg.head_dim)
        positions += range(cached, cached + new)
        slots += mine[cached:]
        q_start.append(q_start[-1] + new)
        logits_at.append(q_start[-1] - 1 if new else 0)
    ints = dict(dtype=torch.int32, device=device)
    batch = Batch(
        tokens=torch.randint(0, cfg.vocab, (len(slots) + FREE,)).to(**ints),
        positions=torch.tensor(positions + [0] * FREE, **ints),
        slots=torch.tensor(slots + [PAD_SLOT] * FREE, **ints),
        q_start=torch.tensor(q_start, **ints),
        kv_len=torch.tensor([sum(request) if request else 0 for request in requests], **ints),
        table=table.to(device),
        rows=rows.to(device),
        logits_at=torch.tensor(logits_at, **ints),
        decodes=len(DECODES),
    )
    return batch, KVPool(*kv.to(device))


@torch.no_grad()
def check(family: str, device: str) -> None:
    ours, cfg = our_model(FAMILIES[family], their_model(FAMILIES[family]).to(device))
    batch, kv = step(cfg, device)
    whole = KVPool(kv.k.clone(), kv.v.clone())
    want = ours(dataclasses.replace(batch, logits_at=None), whole)[batch.logits_at]
    got = ours(batch, kv)
    real = batch.kv_len > 0
    assert got.shape == (len(DECODES) + len(PIECES), cfg.vocab) and want[real].isfinite().all()
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-5)
    assert want[real].std(0).min() > 0.1, "rows that are alike tell nothing"
    for pool, other in ((kv.k, whole.k), (kv.v, whole.v)):
        torch.testing.assert_close(pool[:, 1:], other[:, 1:], atol=0, rtol=0, equal_nan=True)  # 0 is the pads'
        used = [s for row, n in zip(batch.rows, batch.kv_len) for s in batch.table[row, :n].tolist()]
        assert pool[:, used].isfinite().all() and len(set(used)) == batch.kv_len.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_last_tokens_have_the_logits_that_they_have_among_all_and_every_key_is_stored(family):
    check(family, "cpu")


@pytest.mark.parametrize("family", ["llama-mlp-bias", "mistral-window", "qwen3-listed-windows"])
def test_so_they_have_by_the_kernels(family):
    with ops.use("triton"), exact_float32():
        check(family, DEVICE)


def rows_seen(family: str, monkeypatch, wanted: bool) -> list[dict[str, int]]:
    """Of each block: tokens whose keys, attention and MLP are computed."""
    ours, cfg = our_model(FAMILIES[family], their_model(FAMILIES[family]))
    batch, kv = step(cfg, "cpu")
    seen = [{} for _ in ours.blocks]
    for counts, block in zip(seen, ours.blocks, strict=True):
        block.register_forward_pre_hook(lambda _, given, c=counts: c.update(keys=len(given[0])))
        block.mlp.gate_up.register_forward_pre_hook(lambda _, given, c=counts: c.update(mlp=len(given[0])))
    attend, queries = ops.attend, []
    monkeypatch.setattr(ops, "attend", lambda q, *rest: queries.append(len(q)) or attend(q, *rest))
    with torch.no_grad():
        ours(batch if wanted else dataclasses.replace(batch, logits_at=None), kv)
    for counts, n in zip(seen, queries, strict=True):
        counts.update(attention=n)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2-late-windows"])
def test_other_tokens_pass_the_last_block_as_keys_and_values_alone(family, monkeypatch):
    tokens, requests = sum(r[1] for r in (*DECODES, *PIECES) if r) + 1 + FREE, len(DECODES) + len(PIECES)
    every = dict(keys=tokens, attention=tokens, mlp=tokens)
    *before, last = rows_seen(family, monkeypatch, wanted=True)
    assert before == [every] * len(before) and last == every | dict(attention=requests, mlp=requests)
    assert rows_seen(family, monkeypatch, wanted=False) == [every] * (len(before) + 1)
