"""CLIP's vision transformer: pre-norm blocks with biases over the patches of a tile and a class token, nothing masked.

Its last layers are loaded like the others but do not run if no feature is taken from them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lite_llm import ops
from lite_llm.config import HFConfig, VisionConfig
from lite_llm.layers import LayerFactory, LayerNorm
from lite_llm.weights.rules import Rules, fill

RULES: Rules = {
    "embeddings.class_embedding": "first",
    "embeddings.position_embedding.weight": "positions",
    "embeddings.position_ids": None,  # old files store that they are counted from 0
    "embeddings.patch_embedding.weight": ("patch.weight", lambda kernel: {"": kernel.flatten(1)}),
    "pre_layrnorm.{w}": "norm.{w}",
    "encoder.layers.{i}.layer_norm1.{w}": "blocks.{i}.attn_norm.{w}",
    "encoder.layers.{i}.self_attn.out_proj.{w}": "blocks.{i}.out.{w}",
    "encoder.layers.{i}.self_attn.{p}_proj.{w}": "blocks.{i}.qkv[{p}].{w}",
    "encoder.layers.{i}.layer_norm2.{w}": "blocks.{i}.mlp_norm.{w}",
    "encoder.layers.{i}.mlp.fc1.{w}": "blocks.{i}.up.{w}",
    "encoder.layers.{i}.mlp.fc2.{w}": "blocks.{i}.down.{w}",
    "post_layernorm.{w}": None,  # of the pooled output, which LLaVA does not use
}
"""By names within the tower, of checkpoint and module."""

_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_LARGE, _BASE = (1024, 4096, 24, 16, 336, 14), (768, 3072, 12, 12, 224, 32)
"""The defaults of transformers: LLaVA's where config.json says nothing of a tower, CLIP's where it leaves sizes out."""


def parse_tower(hf: HFConfig, key: str) -> dict[str, int | float | bool]:
    """What the object at `key` says of the tower, by the names of `VisionConfig`."""
    defaults = _LARGE if hf.get(dict, key, None) is None else _BASE
    vision = hf.section(key, dict(zip(_NAMES, defaults, strict=True)))
    vision.expect("model_type", "clip_vision_model")
    vision.expect("hidden_act", "quick_gelu", "gelu")
    vision.expect("num_channels", 3)
    for name in ("projection_dim", "vocab_size", "initializer_factor", "dropout"):
        vision.get(object, name, None)  # of CLIP as a whole, or of its training
    facts = dict(
        num_layers=vision.between(int, "num_hidden_layers", 1, 4096),
        hidden=vision.size("hidden_size"),
        ffn=vision.size("intermediate_size"),
        heads=vision.size("num_attention_heads"),
        image_size=vision.size("image_size"),
        patch_size=vision.size("patch_size"),
        norm_eps=vision.get(float, "layer_norm_eps", 1e-5),
        quick_gelu=vision.get(str, "hidden_act", "quick_gelu") == "quick_gelu",
    )
    vision.finish()
    return facts


class Spans(NamedTuple):
    """Where attention finds the tokens of each tile; see `ops.attend`."""

    table: Tensor
    rows: Tensor
    start: Tensor
    length: Tensor

    @classmethod
    def of(cls, tiles: int, tokens: int, device: torch.device) -> "Spans":
        """Of token t the projections q, k and v lie in slots 3t, 3t + 1 and 3t + 2; the table says where k is."""
        slots = torch.arange(1, 3 * tiles * tokens, 3, dtype=torch.int32, device=device)
        starts = torch.arange(0, tiles * tokens + 1, tokens, dtype=torch.int32, device=device)
        rows = torch.arange(tiles, dtype=torch.int32, device=device)
        return cls(slots.view(tiles, tokens), rows, starts, torch.full_like(rows, tokens))


class Block(nn.Module):
    def __init__(self, make: LayerFactory, cfg: VisionConfig):
        super().__init__()
        self.heads, self.head_dim, self.quick = cfg.heads, cfg.head_dim, cfg.quick_gelu
        parts = dict.fromkeys("qkv", cfg.hidden)
        self.attn_norm = LayerNorm(make, cfg.hidden, cfg.norm_eps)
        self.qkv = make.linear(cfg.hidden, parts, split="out", bias=True)
        self.out = make.linear(cfg.hidden, cfg.hidden, split="in", bias=True)
        self.mlp_norm = LayerNorm(make, cfg.hidden, cfg.norm_eps)
        self.up = make.linear(cfg.hidden, cfg.ffn, split="out", bias=True)
        self.down = make.linear(cfg.ffn, cfg.hidden, split="in", bias=True)

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        """Both branches are added to the stream x [T, hidden] in place."""
        pool = self.qkv(self.attn_norm(x)).view(3 * len(x), self.heads, self.head_dim)
        q = pool[::3].contiguous()
        o = ops.attend(
            q, pool[:-1], pool[1:], spans.table, spans.rows, spans.start, spans.length, 0, self.head_dim**-0.5,
            causal=False,
        )  # fmt: skip
        self.out.add_(x, o.flatten(1))
        return self.down.add_(x, ops.gelu(self.up(self.mlp_norm(x)), self.quick))


class Tower(nn.Module):
    def __init__(self, make: LayerFactory, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch = make.linear(3 * cfg.patch_size**2, cfg.hidden, split="in")
        self.first = make.empty(cfg.hidden)
        self.positions = make.empty(1 + cfg.side**2, cfg.hidden)
        self.norm = LayerNorm(make, cfg.hidden, cfg.norm_eps)
        self.blocks = nn.ModuleList(Block(make, cfg) for _ in range(cfg.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [tiles, tile_features, layers * hidden] of normalized pixels [tiles, 3, image_size, image_size]."""
        cfg, tiles, size = self.cfg, len(pixels), self.cfg.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: shape {list(pixels.shape)}; expected [tiles, 3, {size}, {size}]")
        x = self.norm(self._embed(pixels))
        spans = Spans.of(tiles, 1 + cfg.side**2, pixels.device)
        states, last = {}, max(cfg.feature_layers)
        for layer, block in enumerate(self.blocks[:last]):
            if layer in cfg.feature_layers:
                states[layer] = x.clone()
            x = block(x, spans)
        states[last] = x
        features = [states[layer].view(tiles, -1, cfg.hidden) for layer in cfg.feature_layers]
        features = features[0] if len(features) == 1 else torch.cat(features, -1)
        return features if cfg.class_token else features[:, 1:]

    def _embed(self, pixels: Tensor) -> Tensor:
        """[tiles * (1 + patches), hidden]; the class token is one more patch, of zeros, with a bias of its own."""
        tiles, side, size = len(pixels), self.cfg.side, self.cfg.patch_size
        x = self.positions.repeat(tiles, 1, 1)
        x[:, 0] += self.first
        patches = x.new_zeros(tiles, 1 + side**2, 3 * size**2)
        cut = pixels.unflatten(3, (side, size)).unflatten(2, (side, size)).permute(0, 2, 4, 1, 3, 5)
        patches[:, 1:].view(cut.shape).copy_(cut)
        return self.patch.add_(x.flatten(0, 1), patches.flatten(0, 1))

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        return fill(getattr(self, name), tensor)
