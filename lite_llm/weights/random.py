"""Random weights that behave: activations and logits stay of order one in every dtype, at every size.

Every tensor has its own stream, keyed by (seed, name): order, sharding and the number of layers do not change it. The
streams of a CPU and of a GPU differ.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def random_hf_tensors(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """A whole checkpoint for a Llama, Mistral, Qwen2, Qwen3 or LLaVA config.json, under its Hugging Face names.

    Norms are near 1, biases and embeddings small, matrices of deviation 1 / sqrt(inputs); drawn in float32 on `device`,
    then rounded.
    """
    for name, shape in hf_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.float32, device=device)
        _fill_(tensor, name, seed)
        yield name, tensor.to(dtype)


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors that a config.json of the Llama family, or of LLaVA on top of it, stands for."""
    return _llava_shapes(config) if "vision_config" in config else _text_shapes(config)


def _text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind = config["model_type"]
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": (q, hidden, attention_bias or kind == "qwen2"),
        "self_attn.k_proj": (kv, hidden, attention_bias or kind == "qwen2"),
        "self_attn.v_proj": (kv, hidden, attention_bias or kind == "qwen2"),
        "self_attn.o_proj": (hidden, q, attention_bias),
        "mlp.gate_proj": (ffn, hidden, mlp_bias),
        "mlp.up_proj": (ffn, hidden, mlp_bias),
        "mlp.down_proj": (hidden, ffn, mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, (outputs, inputs, bias) in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = (outputs,)
        for name, width in norms.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _llava_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision, text = config["vision_config"], config["text_config"]["hidden_size"]
    hidden, ffn, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tower = "vision_tower.vision_model."
    linears = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]

    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.class_embedding": (hidden,),
        f"{tower}embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}embeddings.position_embedding.weight": (1 + (vision["image_size"] // patch) ** 2, hidden),
    }
    weights = {"multi_modal_projector.linear_1": (text, hidden), "multi_modal_projector.linear_2": (text, text)}
    for layer in range(vision["num_hidden_layers"]):
        here = f"{tower}encoder.layers.{layer}."
        weights |= {here + name: shape for name, shape in linears.items()}
        norms += [f"{here}layer_norm1", f"{here}layer_norm2"]
    for name, shape in [*weights.items(), *((norm, (hidden,)) for norm in norms)]:
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if config["model_type"] == "llava_next":
        shapes["image_newline"] = (text,)
    return shapes | {f"language_model.{name}": shape for name, shape in _text_shapes(config["text_config"]).items()}


def _fill_(tensor: Tensor, name: str, seed: int) -> None:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    random = torch.Generator(tensor.device).manual_seed(key)
    if name.endswith("bias"):
        tensor.normal_(0.0, 0.05, generator=random)
    elif name.endswith(("class_embedding", "image_newline")):
        tensor.normal_(0.0, tensor.shape[0] ** -0.5, generator=random)
    elif tensor.dim() == 1:  # a norm: not exactly 1, or a norm that is skipped would go unseen
        tensor.normal_(1.0, 0.1, generator=random)
    else:
        tensor.normal_(0.0, tensor.shape[1:].numel() ** -0.5, generator=random)
