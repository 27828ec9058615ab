"""What config.json files of LLaVA mean: the facts of public ones, defaults of transformers, refusals by name."""

import copy
import dataclasses
import json

import pytest
import transformers

from lite_llm.config import HFConfig, ModelConfig
from lite_llm.errors import UnsupportedModel
from lite_llm.models import registry, tiling
from tests.models.test_llava import FACTS, LLAVA, NEXT, REAL_GRID


def parse(raw: dict, **change) -> ModelConfig:
    """`vision_config__hidden_act="relu"` changes the nested key."""
    raw = copy.deepcopy(raw)
    for name, value in change.items():
        *path, key = name.split("__")
        place = raw
        for part in path:
            place = place[part]
        place[key] = value
    return registry.parse(HFConfig(raw))


@pytest.mark.parametrize("raw, change, message", [
    (LLAVA, dict(projector_hidden_act="relu"), "projector_hidden_act = 'relu'; supported: 'gelu'"),
    (LLAVA, dict(vision_feature_select_strategy="cls"), "vision_feature_select_strategy = 'cls'"),
    (NEXT, dict(vision_feature_select_strategy="full"), "strategy = 'full'; supported: 'default'"),
    (LLAVA, dict(vision_feature_layer=4), "vision_feature_layer = 4; expected one or more of -4 to 3"),
    (LLAVA, dict(vision_feature_layer=[-2, "x"]), "vision_feature_layer"),
    (LLAVA, dict(vision_feature_layer=[]), "vision_feature_layer"),
    (LLAVA, dict(vision_feature_layer=True), "vision_feature_layer"),
    (LLAVA, dict(image_token_index=640), "image_token_index = 640; the vocabulary has 640 tokens"),
    (LLAVA, dict(image_token_id=7), "image_token_index = 200, but image_token_id = 7"),
    (LLAVA, dict(vocab_size=32000), "vocab_size = 32000; supported: 640"),
    (LLAVA, dict(mystery=3), "mystery = 3 is not known"),
    (LLAVA, dict(image_grid_pinpoints=[[24, 24]]), "image_grid_pinpoints"),
    (LLAVA, dict(model_type="vipllava"), "model_type = 'vipllava'"),
    (LLAVA, dict(text_config__model_type="gemma"), "text_config.model_type = 'gemma'; supported: 'llama'"),
    (LLAVA, dict(text_config__mystery=3), "text_config.mystery = 3 is not known"),
    (LLAVA, dict(text_config__hidden_act="gelu"), "text_config.hidden_act = 'gelu'; supported: 'silu'"),
    (LLAVA, dict(text_config__architectures=["PhiForCausalLM"]), "text_config.architectures"),
    (LLAVA, dict(text_config__hidden_size="64"), "text_config.hidden_size = '64' is a str; expected int"),
    (LLAVA, dict(vision_config__model_type="siglip_vision_model"), "vision_config.model_type = 'siglip_vision_model'"),
    (LLAVA, dict(vision_config__hidden_act="relu"), "vision_config.hidden_act = 'relu'; supported: 'quick_gelu'"),
    (LLAVA, dict(vision_config__num_channels=1), "vision_config.num_channels = 1"),
    (LLAVA, dict(vision_config__num_attention_heads=5), "num_attention_heads = 5 does not divide its hidden_size = 32"),
    (LLAVA, dict(vision_config__patch_size=7), "patch_size = 7 does not divide its image_size = 24"),
    (LLAVA, dict(vision_config__image_size=[24, 24]), "vision_config.image_size"),
    (LLAVA, dict(vision_config__mystery=3), "vision_config.mystery = 3 is not known"),
    (NEXT, dict(image_grid_pinpoints=[[24, 40]]), "image_grid_pinpoints has [24, 40]; expected multiples of 24"),
    (NEXT, dict(image_grid_pinpoints=[]), "image_grid_pinpoints = []; expected a list of [height, width]"),
    (NEXT, dict(image_grid_pinpoints=[[24]]), "image_grid_pinpoints"),
    (NEXT, dict(use_image_newline_parameter=False), "use_image_newline_parameter = False"),
])  # fmt: skip
def test_what_we_would_compute_wrongly_is_refused_by_name(raw, change, message):
    with pytest.raises(UnsupportedModel) as caught:
        parse(raw, **change)
    assert message in caught.value.message


LLAVA_7B = dict(  # as published: sizes that are transformers' defaults are left out
    architectures=["LlavaForConditionalGeneration"], ignore_index=-100, image_token_index=32000, model_type="llava",
    pad_token_id=32001, projector_hidden_act="gelu", tie_word_embeddings=False, torch_dtype="float16",
    text_config=dict(
        _name_or_path="lmsys/vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], max_position_embeddings=4096,
        model_type="llama", rms_norm_eps=1e-05, torch_dtype="float16", vocab_size=32064,
    ),
    transformers_version="4.36.0.dev0", vision_feature_layer=-2, vision_feature_select_strategy="default",
    vocab_size=32064,
    vision_config=dict(
        hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
        num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000,
    ),
)  # fmt: skip
NEXT_MISTRAL = LLAVA_7B | dict(
    architectures=["LlavaNextForConditionalGeneration"], model_type="llava_next", image_grid_pinpoints=REAL_GRID,
    use_image_newline_parameter=True, vocab_size=None, torch_dtype="bfloat16",
    text_config=dict(
        _name_or_path="mistralai/Mistral-7B-Instruct-v0.2", architectures=["MistralForCausalLM"],
        intermediate_size=14336, max_position_embeddings=32768, model_type="mistral", num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, torch_dtype="bfloat16", vocab_size=32064,
    ),
)  # fmt: skip


def test_the_facts_of_public_files():
    cfg = parse(LLAVA_7B)
    assert (cfg.num_layers, cfg.hidden, cfg.ffn, cfg.heads, cfg.kv_heads, cfg.head_dim) == (
        32,
        4096,
        11008,
        32,
        32,
        128,
    )
    assert (cfg.vocab, cfg.max_len, cfg.norm_eps, cfg.rope.theta, cfg.dtype) == (32064, 4096, 1e-5, 1e4, "float16")
    vision = cfg.vision
    assert (vision.num_layers, vision.head_dim, vision.side, vision.tile_features) == (24, 64, 24, 576)
    assert (vision.feature_layers, vision.image_token, vision.quick_gelu) == ((23,), 32000, True)
    assert tiling.tokens(vision, (480, 640)) == 576
    cfg = parse(NEXT_MISTRAL)
    assert (cfg.num_layers, cfg.hidden, cfg.ffn, cfg.heads, cfg.kv_heads, cfg.windows[0]) == (
        32,
        4096,
        14336,
        32,
        8,
        None,
    )
    assert (cfg.max_len, cfg.rope.theta, cfg.dtype) == (32768, 1e6, "bfloat16")
    assert tiling.tiles(cfg.vision, (480, 640)) == 5 and tiling.tokens(cfg.vision, (480, 640)) == 576 + 36 * 49
    bare = parse(dict(architectures=["LlavaForConditionalGeneration"], model_type="llava", image_token_index=5))
    theirs = transformers.LlavaConfig()
    assert (bare.ffn, bare.max_len, bare.vocab) == (11008, 2048, 32000)
    assert (bare.vision.hidden, bare.vision.ffn, bare.vision.num_layers) == (1024, 4096, 24)
    assert bare.max_len == theirs.text_config.max_position_embeddings
    small = parse(LLAVA | dict(vision_config=dict(model_type="clip_vision_model"))).vision
    assert (small.hidden, small.ffn, small.num_layers, small.heads, small.image_size) == (768, 3072, 12, 12, 224)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_sizes_left_out_are_those_of_transformers(kind):
    theirs = transformers.AutoConfig.for_model(kind)
    cfg = parse(LLAVA | dict(text_config=dict(model_type=kind)))
    assert (cfg.hidden, cfg.ffn, cfg.num_layers, cfg.heads, cfg.kv_heads, cfg.vocab, cfg.max_len, cfg.norm_eps) == (
        theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads, theirs.vocab_size, theirs.max_position_embeddings, theirs.rms_norm_eps,
    )  # fmt: skip
    assert (
        cfg.windows[0] == getattr(theirs, "sliding_window", None)
        and cfg.rope.theta == theirs.rope_parameters["rope_theta"]
    )


def test_what_transformers_saves_is_read_back_alike(tmp_path):
    for raw in FACTS.values():
        kind = getattr(transformers, raw["architectures"][0])
        config = kind.config_class(**{k: v for k, v in copy.deepcopy(raw).items() if k != "architectures"})
        config.architectures = raw["architectures"]
        config.save_pretrained(tmp_path)
        again = json.loads((tmp_path / "config.json").read_text())
        assert dataclasses.replace(parse(again), dtype="") == dataclasses.replace(parse(raw), dtype="")
