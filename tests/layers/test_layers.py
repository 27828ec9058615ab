"""Each layer against its formula, written out; shapes and dtypes of what it owns."""

import dataclasses

import pytest
import torch

from lite_llm.batch import Batch, KVPool
from lite_llm.config import ModelConfig
from lite_llm.errors import BadCheckpoint
from lite_llm.layers import Attention, Embedding, GatedMLP, Head, LayerFactory, RMSNorm, RopeTable
from lite_llm.rope import Rope

MAKE = LayerFactory(torch.float32)
CFG = ModelConfig(
    architecture="LlamaForCausalLM", num_layers=2, hidden=24, ffn=40, heads=6, kv_heads=2, head_dim=8, vocab=32,
    norm_eps=1e-2, max_len=16, rope=Rope(100.0, 8), windows=(None, 3),
)  # fmt: skip


def filled(layer):
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


def test_rms_norm():
    norm, x = filled(RMSNorm(MAKE, 24, 1e-2)), torch.randn(5, 24)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want)


def test_embedding_and_head_are_each_others_transpose():
    embed, head = Embedding(MAKE, 32, 24), Head(MAKE, 32, 24)
    weight = torch.randn(32, 24)
    assert embed.load("weight", weight) == head.load("weight", weight) == 32 * 24
    tokens = torch.tensor([0, 31, 7])
    assert torch.equal(embed(tokens), weight[tokens])
    norm = filled(RMSNorm(MAKE, 24, 1e-2))
    torch.testing.assert_close(head(embed(tokens), norm), norm(weight[tokens]) @ weight.T)


@pytest.mark.parametrize("layer", [RMSNorm(MAKE, 24, 1e-2), Embedding(MAKE, 32, 24)], ids=lambda x: type(x).__name__)
def test_a_weight_of_another_shape_is_refused(layer):
    with pytest.raises(BadCheckpoint, match=r"the checkpoint has shape \(3, 3\)"):
        layer.load("weight", torch.ones(3, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp(bias):
    mlp, norm, x = filled(GatedMLP(MAKE, 24, 40, bias)), filled(RMSNorm(MAKE, 24, 1e-2)), torch.randn(5, 24)
    gate, up = (norm(x) @ mlp.gate_up.weight.T + (mlp.gate_up.bias if bias else 0)).split(40, dim=1)
    want = (torch.nn.functional.silu(gate) * up) @ mlp.down.weight.T + (mlp.down.bias if bias else 0)
    torch.testing.assert_close(mlp.add_(x.clone(), norm, ahead=mlp.down), x + want, atol=1e-3, rtol=1e-5)


def test_rope_tables_stay_fp32_and_out_of_the_checkpoint():
    table = RopeTable(LayerFactory(torch.bfloat16), CFG.rope, 16)
    assert table.cos.dtype == table.sin.dtype == torch.float32 and table.cos.shape == (16, 4)
    assert not table.state_dict() and not list(table.parameters())


def attention_inputs(length):
    """One request whose slots run backwards through the pool."""
    slots = torch.arange(length, 0, -1)
    kv = KVPool(*torch.full((2, 2, length + 1, CFG.kv_heads, CFG.head_dim), float("nan")))
    batch = Batch(
        tokens=torch.zeros(length, dtype=torch.int64), positions=torch.arange(length), slots=slots,
        q_start=torch.tensor([0, length]).int(), kv_len=torch.tensor([length]).int(), table=slots[None].int(),
        rows=torch.zeros(1).int(), logits_at=None, decodes=0,
    )  # fmt: skip
    return batch, kv


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "window"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention(layer, qk_norm):
    cfg = dataclasses.replace(CFG, qk_norm=qk_norm, qkv_bias=True, out_bias=True)
    attention, rope = filled(Attention(MAKE, cfg, layer)), RopeTable(MAKE, cfg.rope, cfg.max_len)
    batch, kv = attention_inputs(length := 7)
    norm, x = filled(RMSNorm(MAKE, cfg.hidden, 1e-2)), torch.randn(length, cfg.hidden)
    q = attention.project_(kv, x, norm, batch, rope)
    got = attention.add_(x.clone(), q, batch, kv, ahead=attention.out) - x

    qkv = (norm(x) @ attention.qkv.weight.T + attention.qkv.bias).view(length, -1, 8)
    q, k, v = qkv.split([6, 2, 2], dim=1)
    if qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    turn = torch.polar(torch.ones(length, 1, 4), torch.arange(length)[:, None, None] * 100.0 ** (-torch.arange(4) / 4))
    q, k = (torch.view_as_real(torch.complex(*t.split(4, dim=2)) * turn).mT.flatten(2) for t in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, dim=1)) / 8**0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (cfg.windows[layer] or length))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    o = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(3, dim=1)).flatten(1)
    torch.testing.assert_close(got, o @ attention.out.weight.T + attention.out.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kv.k[layer, batch.slots], k)
    torch.testing.assert_close(kv.v[layer, batch.slots], v)


def test_attention_writes_to_its_own_layer_only():
    attention, rope = filled(Attention(MAKE, CFG, 1)), RopeTable(MAKE, CFG.rope, CFG.max_len)
    batch, kv = attention_inputs(4)
    norm = filled(RMSNorm(MAKE, CFG.hidden, 1e-2))
    x = torch.randn(4, CFG.hidden)
    attention.add_(x, attention.project_(kv, x, norm, batch, rope), batch, kv, ahead=attention.out)
    assert kv.k[0].isnan().all() and kv.v[0].isnan().all()
    assert kv.k[1, 0].isnan().all() and kv.k[1, 1:].isfinite().all()  # slot 0 is the pad slot


def test_the_factory_gives_parameters_that_never_train():
    parameter = LayerFactory(torch.float16).empty(2, 3)
    assert parameter.dtype == torch.float16 and not parameter.requires_grad
    assert MAKE.empty(2, dtype=torch.int8).dtype == torch.int8
