"""The config.json of well-known models, by name, to run at their true size with random weights.

`tiny-NAME` keeps what makes a model different (head_dim, GQA group, biases, tying, kind of rope, window against
context) and shrinks the rest.
"""

from typing import Any

from lite_llm.errors import UsageError

Config = dict[str, Any]


def shape_config(name: str) -> Config:
    """The config.json of a model of this shape. UsageError lists the names."""
    plain = name.removeprefix("tiny-")
    base = _ALIASES.get(plain, plain)
    if base not in _SHAPES:
        raise UsageError(f"shape {name!r} is not known", f"known, also with tiny- before: {', '.join(_SHAPES)}")
    config = {**_SHAPES[base]}
    return config if plain == name else _tiny(config)


def shape_names() -> list[str]:
    return [*_SHAPES, *(f"tiny-{name}" for name in _SHAPES)]


def _tiny(config: Config) -> Config:
    """Two layers, 128 to 256 wide, at most two KV heads, 512 tokens and 1,024 positions; tiles of 16 patches."""
    if "text_config" in config:
        vision = config["vision_config"]
        head_dim, grid = vision["hidden_size"] // vision["num_attention_heads"], 4 * vision["patch_size"]
        small = {"hidden_size": 2 * head_dim, "intermediate_size": 8 * head_dim, "num_attention_heads": 2}
        small |= {"num_hidden_layers": 3, "image_size": grid}
        tiny = {**config, "text_config": _tiny(config["text_config"]), "vision_config": {**vision, **small}}
        shrunk = {"image_token_index": 2, "image_seq_length": 16}
        if "image_grid_pinpoints" in config:
            sizes = [[side // vision["image_size"] * grid for side in size] for size in config["image_grid_pinpoints"]]
            shrunk["image_grid_pinpoints"] = sizes
        return {**tiny, **shrunk}
    heads, kv_heads, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    few, positions = min(kv_heads, 2), 1024
    step = 16 * few * (heads // kv_heads)  # transformers wants a multiple of the heads, kernels one of 16
    width = -(-128 // step) * step
    shrink = config["max_position_embeddings"] // positions
    tiny = {
        **config,
        "head_dim": config.get("head_dim") or hidden // heads,
        "hidden_size": width,
        "intermediate_size": round(config["intermediate_size"] / hidden * width / 16) * 16,
        "num_attention_heads": few * (heads // kv_heads),
        "num_key_value_heads": few,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if config.get("sliding_window"):
        tiny["sliding_window"] = max(config["sliding_window"] // shrink, 1)
    if "max_window_layers" in config:
        tiny["max_window_layers"] = 2
    if config.get("rope_scaling"):
        original = config["rope_scaling"]["original_max_position_embeddings"] // shrink
        tiny["rope_scaling"] = {**config["rope_scaling"], "original_max_position_embeddings": original}
    return tiny


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **facts: Any) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
        **facts,
    }


def _llama3_rope(factor: float) -> Config:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **facts: Any) -> Config:
    old = {
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float16",
    }
    return _llama(layers, hidden, ffn, heads, kv_heads, **{**old, **facts})


def _mistral(vocab: int, theta: float, window: int | None) -> Config:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": vocab,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "sliding_window": window,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def _qwen2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **facts: Any) -> Config:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": layers,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
        **facts,
    }


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **facts: Any) -> Config:
    own = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "rope_scaling": None,
        "sliding_window": None,
    }
    return _qwen2(layers, hidden, ffn, heads, kv_heads, **{**own, **facts})


def _llava(text: Config, **facts: Any) -> Config:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 768,
        },
        "image_token_index": 32000,
        "image_seq_length": 576,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "dtype": text["dtype"],
        **facts,
    }


def _llava_next(text: Config) -> Config:
    return _llava(
        text,
        architectures=["LlavaNextForConditionalGeneration"],
        model_type="llava_next",
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


_ALIASES = {"tinyllama": "tinyllama-1.1b", "mistral-7b": "mistral-7b-v0.3"}

_SHAPES: dict[str, Config] = {
    "llama-3.2-1b": _llama(
        16, 2048, 8192, 32, 8, head_dim=64, rope_scaling=_llama3_rope(32.0), tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        28, 3072, 8192, 24, 8, head_dim=128, rope_scaling=_llama3_rope(32.0), tie_word_embeddings=True
    ),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8, rope_scaling=_llama3_rope(8.0)),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, max_position_embeddings=8192),
    "llama-2-7b": _llama2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama2(40, 5120, 13824, 40, 40),
    "tinyllama-1.1b": _llama2(22, 2048, 5632, 32, 4, max_position_embeddings=2048, dtype="bfloat16"),
    "mistral-7b-v0.1": _mistral(32000, 10000.0, 4096),
    "mistral-7b-v0.3": _mistral(32768, 1000000.0, None),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2, max_window_layers=21),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2, max_window_layers=21),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2, max_window_layers=70),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, 8),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, 8),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 8, tie_word_embeddings=False),
    "llava-1.5-7b": _llava(_llama2(32, 4096, 11008, 32, 32)),
    "llava-1.5-13b": _llava(_llama2(40, 5120, 13824, 40, 40)),
    "llava-1.6-mistral-7b": _llava_next(_mistral(32064, 1000000.0, None)),
}
