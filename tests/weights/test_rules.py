"""LDR-07: every tensor has its place, every element is filled once, what is wrong is named as the checkpoint has it."""

import pytest
import torch

from lite_llm.config import HFConfig
from lite_llm.errors import BadCheckpoint
from lite_llm.layers import LayerFactory
from lite_llm.models import registry
from lite_llm.models.llama import RULES
from lite_llm.weights.rules import load, place
from tests.weights.tiny import config_of, tensors_of

K = "model.layers.0.self_attn.k_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def model_of(config, dtype=torch.bfloat16):
    cfg = registry.parse(HFConfig(config))
    return registry.find(cfg.architecture)[1](LayerFactory(dtype), cfg)


def refused(config, change):
    tensors = tensors_of(config)
    change(tensors)
    with pytest.raises(BadCheckpoint) as error:
        load(model_of(config), RULES, tensors.items())
    return str(error.value)


@pytest.mark.parametrize("shape", ["tiny-llama-3.2-1b", "tiny-llama-2-7b", "tiny-qwen2.5-7b", "tiny-qwen3-8b"])
def test_every_part_lies_where_the_model_reads_it(shape):
    config = config_of(shape)
    model, tensors = model_of(config), tensors_of(config)
    load(model, RULES, tensors.items())
    q, k, v = (tensors[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(model.blocks[0].attn.qkv.weight, torch.cat([q, k, v]))
    assert torch.equal(model.blocks[0].mlp.gate_up.weight[-len(tensors[UP]) :], tensors[UP])
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_missing_part_of_a_fused_parameter_is_named():
    assert refused(config_of(), lambda t: t.pop(K)).endswith(f"lacks 1 tensors of the model: {K}")


@pytest.mark.parametrize("shape", ["tiny-llama-3.2-1b", "tiny-qwen2.5-7b", "tiny-qwen3-8b"])
def test_each_missing_tensor_is_named(shape):
    config = config_of(shape)
    for name in tensors_of(config):
        assert refused(config, lambda t, name=name: t.pop(name)).endswith(f": {name}")


def test_many_missing_tensors_are_counted():
    message = refused(config_of(), lambda t: t.clear())
    assert "lacks 11 tensors" in message and message.endswith("and 3 more")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.99.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.mlp.sideways_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.norm.load",
        "transformer.wte.weight",
    ],
)
def test_a_tensor_without_a_place_is_named(name):
    assert name in refused(config_of(), lambda t: t.update({name: torch.ones(2, 2)}))


def test_a_transposed_tensor_is_named_with_both_shapes():
    message = refused(config_of(), lambda t: t.update({UP: t[UP].T}))
    assert UP in message and "(128, 512)" in message and "(512, 128)" in message


def test_a_tensor_delivered_twice_is_refused():
    tensors = tensors_of(config_of())
    with pytest.raises(BadCheckpoint, match=f"{K} is stored there already"):
        load(model_of(config_of()), RULES, [*tensors.items(), (K, tensors[K])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_unless_allowed(bad):
    assert f"{UP}: 1 of" in refused(config_of(), lambda t: t[UP][3, 5].fill_(bad))
    tensors = tensors_of(config_of())
    tensors[UP][3, 5] = bad
    load(model_of(config_of()), RULES, tensors.items(), allow_nonfinite=True)


def test_a_number_beyond_the_models_dtype_is_refused():
    tensors = tensors_of(config_of())
    tensors[UP][3, 5] = 1e5
    with pytest.raises(BadCheckpoint, match="beyond float16"):
        load(model_of(config_of(), torch.float16), RULES, tensors.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_numbers_that_need_scales_are_refused(dtype):
    assert UP in refused(config_of(), lambda t: t.update({UP: t[UP].to(dtype)}))


def test_tied_weights_may_come_twice_if_they_are_equal():
    tensors = tensors_of(config_of(tie_word_embeddings=True))
    embed = tensors["model.embed_tokens.weight"]
    for order in ({"lm_head.weight": embed, **tensors}, {**tensors, "lm_head.weight": embed}):
        model = model_of(config_of(tie_word_embeddings=True))
        load(model, RULES, order.items())
        assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, embed)


def test_tied_but_different_is_a_contradiction():
    config = config_of(tie_word_embeddings=True)
    message = refused(config, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight" in message and "tie_word_embeddings" in message
    assert "shape" in refused(config, lambda t: t.update({"lm_head.weight": torch.ones(3, 128)}))


def test_an_untied_head_must_come():
    assert "lm_head.weight" in refused(config_of(tie_word_embeddings=False), lambda t: t.pop("lm_head.weight"))


def test_a_cut_names_the_parameters_of_its_pieces():
    rules = {"h.{i}.c_attn.{w}": ("blocks.{i}.qkv[{part}].{w}", lambda t: dict(zip("qkv", t.chunk(3))))}
    pieces = place("h.7.c_attn.weight", torch.ones(6, 2), rules)
    assert [str(piece) for piece in pieces] == [f"blocks.7.qkv[{p}].weight" for p in "qkv"]
    assert all(piece.tensor.shape == (2, 2) for piece in pieces)
