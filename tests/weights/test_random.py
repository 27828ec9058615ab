"""Shapes are models that others know too; random weights are the same everywhere and keep logits of order one."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lite_llm.config import HFConfig
from lite_llm.errors import UsageError
from lite_llm.llm import LLM
from lite_llm.models import registry
from lite_llm.models.shapes import shape_config, shape_names
from lite_llm.weights import load_weights, open_checkpoint
from lite_llm.weights.random import hf_shapes, random_hf_tensors
from tests.weights.tiny import bits, build, config_of, same, write

TINY = [name for name in shape_names() if name.startswith("tiny-")]
TEXTS = [name for name in TINY if "llava" not in name]
PARAMETERS = {  # in millions, as the model cards state them
    "llama-3.2-1b": 1236,
    "llama-3.2-3b": 3213,
    "llama-3.1-8b": 8030,
    "llama-3-8b": 8030,
    "llama-2-7b": 6738,
    "llama-2-13b": 13016,
    "tinyllama-1.1b": 1100,
    "mistral-7b-v0.1": 7242,
    "mistral-7b-v0.3": 7248,
    "qwen2.5-0.5b": 494,
    "qwen2.5-1.5b": 1544,
    "qwen2.5-3b": 3086,
    "qwen2.5-7b": 7616,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-4b": 4022,
    "qwen3-8b": 8191,
    "llava-1.5-7b": 7063,
    "llava-1.5-13b": 13351,
    "llava-1.6-mistral-7b": 7567,
}


@pytest.mark.parametrize("name", shape_names())
def test_every_shape_is_a_config_that_we_read(name):
    config, cfg = shape_config(name), registry.parse(HFConfig(shape_config(name)))
    assert (cfg.num_layers, cfg.hidden, cfg.vocab) == tuple(
        config.get("text_config", config)[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_shape_has_the_size_of_its_model(name):
    total = sum(torch.Size(shape).numel() for shape in hf_shapes(shape_config(name)).values())
    assert round(total / 1e6) == PARAMETERS[name]


def test_every_shape_has_its_size_checked():
    assert PARAMETERS.keys() == {name for name in shape_names() if not name.startswith("tiny-")}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_shape_keeps_what_makes_the_model_different(name):
    tiny, full = (registry.parse(HFConfig(shape_config(n))) for n in (name, name.removeprefix("tiny-")))
    facts = "head_dim qkv_bias out_bias mlp_bias qk_norm tied_head norm_eps architecture"
    for fact in facts.split():
        assert getattr(tiny, fact) == getattr(full, fact)
    assert tiny.heads // tiny.kv_heads == full.heads // full.kv_heads
    assert tiny.rope.theta == full.rope.theta and type(tiny.rope.scaling) is type(full.rope.scaling)
    assert (tiny.windows[0] is None) == (full.windows[0] is None)


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(UsageError, match="llama-3.2-1b.*qwen3-8b"):
        shape_config("gpt-5")


@pytest.mark.parametrize("name", TEXTS)
def test_transformers_loads_what_we_make_up(name, tmp_path):
    directory = write(tmp_path / "model", shape_config(name))
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    logits = model(torch.arange(100)[None]).logits
    assert logits.isfinite().all() and 0.3 < logits.std() < 3
    ours, rules = build(directory, model.dtype)
    load_weights(ours, open_checkpoint(directory), rules)
    assert torch.equal(ours.head.weight, model.lm_head.weight)
    assert torch.equal(ours.blocks[1].mlp.down.weight, model.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("name", [name for name in TINY if name not in TEXTS])
def test_transformers_loads_what_we_make_up_of_pictures(name, tmp_path):
    config = shape_config(name)
    directory = write(tmp_path / "model", config)
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    size = config["vision_config"]["image_size"]
    ours, rules = build(directory, torch.float32)
    load_weights(ours, open_checkpoint(directory), rules)
    pixels, sizes = torch.randn(3, 3, size, size), [(2 * size, size)] if "1.6" in name else [(size, size)] * 3
    with torch.no_grad():
        got = torch.cat(ours.encode(pixels, sizes))
        more = {"image_sizes": torch.tensor(sizes)} if "1.6" in name else {}
        want = torch.cat(model.float().get_image_features(pixels, **more).pooler_output)
    assert 0.1 < want.std() < 3 and (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-8b"])
def test_logits_stay_of_order_one_through_all_layers(name):
    config = {**shape_config(f"tiny-{name}"), "num_hidden_layers": shape_config(name)["num_hidden_layers"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.load_state_dict(dict(random_hf_tensors(config)), strict=False)
    logits = model(torch.arange(100)[None]).logits
    assert logits.isfinite().all() and 0.3 < logits.std() < 3


def test_weights_depend_on_the_seed_and_the_name_alone():
    one, two = (dict(random_hf_tensors(config_of(num_hidden_layers=n), 3)) for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = dict(random_hf_tensors(config_of(), 4))
    assert not any(torch.equal(one[name], other[name]) for name in one)
    kinds = {tuple(tensor.flatten()[:4].tolist()) for tensor in one.values()}
    assert len(kinds) == len(one)


def test_norms_and_biases_are_not_those_that_could_be_left_out():
    tensors = dict(random_hf_tensors(config_of("tiny-qwen2.5-7b"), 5))
    bias, norm = tensors["model.layers.0.self_attn.q_proj.bias"], tensors["model.norm.weight"]
    assert 0 < bias.abs().mean() < 0.1 and 0.5 < norm.mean() < 1.5 and norm.std() > 0.05


@pytest.mark.parametrize("name", ["tiny-llama-3.2-1b", "tiny-qwen2.5-7b", "tiny-qwen3-8b"])
def test_a_shape_is_the_checkpoint_of_its_seed(name, tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = dict(random_hf_tensors(shape_config(name), 5, torch.bfloat16, device))
    assert {(t.device.type, t.dtype) for t in tensors.values()} == {(device, torch.bfloat16)}
    directory = write(tmp_path / "model", shape_config(name), tensors)
    model, rules = build(directory, device=device)
    load_weights(model, open_checkpoint(directory), rules)
    options = dict(random_weights=True, dtype="bfloat16", device=device, max_requests=2, cuda_graphs=False)
    with LLM(shape=name, seed=5, **options) as llm:
        assert same(bits(llm.engine.model), bits(model))
    with LLM(shape=name, seed=6, **options) as llm:
        assert not same(bits(llm.engine.model), bits(model))
