"""The floor of a decode step: every weight once, every cached key and value once, against measured ceilings."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from lite_llm.config import EngineConfig, HFConfig
from lite_llm.engine import roofline
from lite_llm.engine.build import Blueprint
from lite_llm.engine.roofline import Ceilings, Cost, floor, step_costs
from lite_llm.errors import DoesNotFit
from lite_llm.models import registry, shapes

ROOF = Ceilings(copy=4e12, matmul=800e12)


def config(shape: str):
    return registry.parse(HFConfig(shapes.shape_config(shape)))


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b", "qwen2.5-7b"])
def test_a_step_reads_every_weight_once(shape):
    cfg = config(shape)
    plan = Blueprint(config(f"tiny-{shape}"), EngineConfig(device="cpu", dtype="bfloat16")).plan
    tiny = config(f"tiny-{shape}")
    for facts, weights in ((tiny, plan.weights), (cfg, None)):
        read = sum(cost.bytes for cost in step_costs(facts, 2, requests=0, context=0))
        embedding = 0 if facts.tied_head else facts.vocab * facts.hidden * 2
        assert weights is None or read + embedding == weights
        assert read > 2 * facts.num_layers * 3 * facts.hidden * facts.ffn


def test_known_models_have_known_floors():
    one = step_costs(config("llama-3.2-1b"), 2, requests=1, context=512)
    assert sum(cost.bytes for cost in one) == pytest.approx(2.488e9, rel=1e-3)
    assert floor(one, ROOF) == pytest.approx(2.488e9 / 4e12, rel=1e-3)  # nothing but memory at batch 1
    eight = step_costs(config("llama-3.1-8b"), 2, requests=1, context=0)
    assert sum(cost.bytes for cost in eight) == pytest.approx(15.01e9, rel=1e-3)  # its embedding is not read


def test_keys_and_values_are_read_once_per_request_and_layer():
    cfg = config("llama-3.2-1b")
    costs = {cost.name: cost for cost in step_costs(cfg, 2, requests=64, context=1000)}
    assert costs["attention"].bytes == 64 * 1000 * 16 * 2 * 8 * 64 * 2
    assert costs["gate_up"].bytes == step_costs(cfg, 2, 1, 1)[5].bytes
    assert costs["gate_up"].flops == 64 * 16 * 2 * 2048 * 2 * 8192


def test_a_window_ends_what_attention_reads():
    cfg = config("mistral-7b-v0.1")
    assert cfg.windows[0] == 4096
    near, far = (next(c for c in step_costs(cfg, 2, 1, n) if c.name == "attention") for n in (4096, 30000))
    assert near == far
    free = dataclasses.replace(cfg, windows=(None,) * cfg.num_layers)
    assert next(c for c in step_costs(free, 2, 1, 30000) if c.name == "attention").bytes > near.bytes


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-0.6b"])
def test_of_a_token_without_logits_the_last_layer_makes_keys_and_values(shape):
    """So pieces of a prompt that goes on need no weights of the last layer but those, and no head."""
    cfg = config(shape)
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    every, one, none = (step_costs(cfg, 2, 50, 30, wanted) for wanted in (50, 1, 0))
    assert every == step_costs(cfg, 2, 50, 30)
    less = {"qkv": q * cfg.hidden, "out": q * cfg.hidden, "gate_up": 2 * cfg.ffn * cfg.hidden}
    less |= {"down": cfg.ffn * cfg.hidden, "head": cfg.vocab * cfg.hidden, "attention": 2 * q * 30}
    for a, b, c in zip(every, one, none, strict=True):
        assert a.flops - b.flops == 49 * 2 * less.get(a.name, 0) and b.flops - c.flops == 2 * less.get(a.name, 0)
        assert a.bytes == b.bytes or a.name == "attention"
    whole, rest = (sum(cost.bytes for cost in step_costs(cfg, 2, 1, 0, wanted)) for wanted in (1, 0))
    numbers = cfg.hidden * (2 * q + 3 * cfg.ffn + 1) + q * cfg.qkv_bias + cfg.head_dim * cfg.qk_norm
    assert whole - rest == 2 * (numbers + cfg.hidden * cfg.vocab + cfg.hidden)
    assert none[2].bytes > 2 * cfg.num_layers * 2 * kv * cfg.hidden, "keys and values are made in every layer"


def test_a_class_meets_the_nearer_ceiling():
    assert Cost("head", 1, bytes=4_000_000, flops=800).floor(ROOF) == 1e-6
    assert Cost("head", 1, bytes=4, flops=800_000_000).floor(ROOF) == 1e-6


def test_the_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "_WIDTH", {"cuda": 1024, "cpu": 128})
    found = Ceilings.measure(torch.device("cpu"), torch.float32, most=1 << 26)
    assert found.copy > 1e8 and found.matmul > 1e7


def test_a_copy_reads_and_writes_and_a_multiplication_is_followed_by_an_addition(monkeypatch):
    """By a clock that goes on by 1/4 s whenever it is read: so long every call takes."""
    ticks = itertools.count()
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    monkeypatch.setattr(roofline, "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(roofline, "_WIDTH", {"cpu": 128})
    moved = []
    for name in ("empty_like", "ones"):  # the two buffers, and what the product is written to
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: moved.append(make(*a, **k)) or moved[-1])
    found = Ceilings.measure(torch.device("cpu"), torch.float32, most=1 << 26)
    source, target, product = moved
    assert source.nbytes == target.nbytes == 1 << 26 and product.shape == (128, 128)
    assert found == Ceilings(copy=(source.nbytes + target.nbytes) / 0.25, matmul=(2 * 128**3) / 0.25)


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(roofline, "free_memory", lambda device: 1 << 20)
    with pytest.raises(DoesNotFit, match="free"):
        roofline.copy_rate("cpu")


@pytest.mark.gpu
def test_the_ceilings_of_a_gpu():
    found = Ceilings.measure(torch.device("cuda"), torch.bfloat16, most=1 << 30)
    assert found.copy > 1e11 and found.matmul > 1e13
