"""The Llama that the demos are trained with, and how it becomes a Hugging Face directory.

Parameters carry Hugging Face's names, so the state dict needs no renaming; this one is lean and
trains about twice as fast as the library's, which checks and serves it afterwards.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def llama_config(**facts: int) -> LlamaConfig:
    """Of these sizes and tokens; the rest is the same in all demos."""
    return LlamaConfig(
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=None,
        **facts,
    )


class Attention(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, width, _ = x.shape
        q = _rotate(self.q_proj(x).view(rows, width, self.heads, self.head_dim), cos, sin)
        k = _rotate(self.k_proj(x).view(rows, width, self.kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(x).view(rows, width, self.kv_heads, self.head_dim)
        group = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, width, -1))


class MLP(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(cfg.hidden_size)), cfg.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg)


class DemoLlama(nn.Module):
    """Tied embedding and head; weights start as normal(0, 0.02), residual outputs smaller."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.model = Backbone(cfg)
        rate = cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
        angle = torch.arange(cfg.max_position_embeddings).float()[:, None] * rate
        self.register_buffer("cos", angle.cos().repeat(1, 2)[:, None], persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2)[:, None], persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * cfg.num_hidden_layers) ** 0.5 if residual else 0.02)

    def loss(self, ids: Tensor, spots: Tensor) -> Tensor:
        """Mean cross-entropy of predicting the tokens at the flat indices `spots` of ids [rows, width]."""
        x = self.model.embed_tokens(ids)
        dtype = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else x.dtype
        x = x.to(dtype)
        cos, sin = (t[: ids.shape[1]] for t in (self.cos, self.sin))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x.flatten(0, 1)[spots - 1])
        return F.cross_entropy(F.linear(x, self.model.embed_tokens.weight).float(), ids.flatten()[spots])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)  # the tables are float32


def save_model(model: DemoLlama, cfg: LlamaConfig, dtype: torch.dtype, folder: Path, max_new_tokens: int) -> None:
    """Writes config.json, generation_config.json (greedy) and model.safetensors."""
    out = LlamaForCausalLM(cfg).to(dtype)
    state = {name: p.detach().to("cpu", dtype) for name, p in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    out.load_state_dict(state)
    out.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=cfg.bos_token_id,
        eos_token_id=cfg.eos_token_id,
        pad_token_id=cfg.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    out.save_pretrained(folder)
