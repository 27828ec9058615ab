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
    """A whole checkpoint for a Llama, Mistral, Qwen2 or Qwen3 config.json, under its Hugging Face names.

    Norms are near 1, biases small, matrices of deviation 1 / sqrt(inputs); drawn in float32 on `device`, then rounded.
    """
    for name, shape in hf_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.float32, device=device)
        _fill_(tensor, name, seed)
        yield name, tensor.to(dtype)


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors that a config.json of the Llama family stands for."""
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


def _fill_(tensor: Tensor, name: str, seed: int) -> None:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    random = torch.Generator(tensor.device).manual_seed(key)
    if name.endswith("bias"):
        tensor.normal_(0.0, 0.05, generator=random)
    elif tensor.dim() == 1:  # a norm: not exactly 1, or a norm that is skipped would go unseen
        tensor.normal_(1.0, 0.1, generator=random)
    else:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=random)
