"""The LLaVA that the vision demo is trained with, and how it becomes a Hugging Face directory.

The tower is as lean as the chat demo's Llama, which is the text. A second loss teaches the tower directly what lies
where; without it the text alone takes far longer to make the tower see anything.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tools.demo_model import DemoLlama, llama_config
from tools.demo_vision_draw import COLOURS, PLACES, SHAPES
from tools.demo_vision_lessons import IGNORE
from tools.demo_vision_text import BOS, CONTEXT, END, IMAGE, PATCH, SIDE, VOCAB


def config(layers: int = 5, hidden: int = 256) -> LlavaConfig:
    """`layers` and `hidden` of the text; the tower has one layer more and is three quarters as wide."""
    text = llama_config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden * 3 // 4,
        intermediate_size=hidden * 3,
        projection_dim=hidden * 3 // 4,
        num_hidden_layers=layers + 1,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )


class TowerLayer(nn.Module):
    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.heads, width = cfg.num_attention_heads, cfg.hidden_size
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in _PROJECTIONS})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, cfg.intermediate_size), "fc2": nn.Linear(cfg.intermediate_size, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in _PROJECTIONS[:3])
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Tower(nn.Module):
    """CLIP's vision transformer with Hugging Face's names; nothing uses `post_layernorm` in a LLaVA."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        width, patches = cfg.hidden_size, (cfg.image_size // cfg.patch_size) ** 2
        self.side = cfg.image_size // cfg.patch_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, cfg.patch_size, cfg.patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding(1 + patches, width)
        self.pre_layrnorm = nn.LayerNorm(width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * cfg.num_hidden_layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.2)  # no less than patches: half is about where

    def forward(self, pixels: Tensor) -> Tensor:
        """[pictures, 1 + patches, hidden] of [pictures, side, side, 3], scaled; the class token is first."""
        kernel = self.embeddings.patch_embedding.weight
        size = kernel.shape[2]
        patches = pixels.unflatten(2, (self.side, size)).unflatten(1, (self.side, size)).permute(0, 1, 3, 5, 2, 4)
        x = F.linear(patches.flatten(3).flatten(1, 2), kernel.flatten(1))  # a matmul needs no search for an algorithm
        first = self.embeddings.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + self.embeddings.position_embedding.weight.to(x.dtype)
        x = self.pre_layrnorm(x).to(x.dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Projector(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class DemoLlava(nn.Module):
    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        width = cfg.text_config.hidden_size
        self.tower = Tower(cfg.vision_config)
        self.projector = Projector(cfg.vision_config.hidden_size, width)
        self.text = DemoLlama(cfg.text_config)
        self.teacher = nn.Linear(width, sum(_FIELD))
        self.ground_teacher = nn.Linear(width, len(COLOURS))
        line = ((torch.arange(3) + 0.5) / 3 * self.tower.side).long()
        self.register_buffer("places", torch.arange(len(PLACES)), persistent=False)
        self.register_buffer("middles", (line[:, None] * self.tower.side + line).flatten(), persistent=False)

    @property
    def layers(self) -> list[nn.Module]:
        """What most of the time goes into; each of the two kinds is worth compiling."""
        return [*self.tower.encoder.layers, *self.text.model.layers]

    def features(self, pixels: Tensor) -> Tensor:
        """[pictures, patches, hidden] of uint8 pixels [pictures, side, side, 3]."""
        return self.projector(self.tower(pixels.float() / 127.5 - 1)[:, 1:])

    def look(self, features: Tensor, fields: Tensor, grounds: Tensor) -> Tensor:
        """Mean cross-entropy of what lies in each of the nine fields and of the background, by linear teachers.

        All of a field, where it is too, is read from the one token in its middle, so that the text finds it in one.
        `fields` [pictures, 9, 2] holds kinds and colours counted from 1, or 0; `grounds` [pictures] colours from 0.
        """
        middles = features[:, self.middles]
        kinds, colours, places = self.teacher(middles).float().flatten(0, 1).split(_FIELD, 1)
        ground = self.ground_teacher(middles.mean(1)).float()
        return (
            F.cross_entropy(kinds, fields[..., 0].flatten().long())
            + F.cross_entropy(colours, fields[..., 1].flatten().long())
            + F.cross_entropy(places, self.places.repeat(len(features)))
            + F.cross_entropy(ground, grounds.long()) / len(PLACES)
        )

    def read(self, features: Tensor, ids: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' tokens.

        `ids` and `targets` are [rows, width], a target being the next token or IGNORE; `places` are the flat indices
        in `ids` of the pictures' tokens, in their order.
        """
        x = self.text.model.embed_tokens(ids.long()).to(features.dtype)
        x = x.flatten(0, 1).index_copy(0, places.long(), features.flatten(0, 1)).view_as(x)
        cos, sin = (t[: ids.shape[1]] for t in (self.text.cos, self.text.sin))
        for layer in self.text.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.text.model.norm(x), self.text.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=IGNORE)


_FIELD = (1 + len(SHAPES), 1 + len(COLOURS), len(PLACES))


def save_model(model: DemoLlava, cfg: LlavaConfig, folder: Path) -> None:
    """Writes config.json, generation_config.json (greedy) and model.safetensors, in bfloat16."""
    out = LlavaForConditionalGeneration(cfg)
    for part, ours in (
        (out.model.vision_tower, model.tower),
        (out.model.multi_modal_projector, model.projector),
        (out.model.language_model, model.text.model),
    ):
        prefix = next(iter(part.state_dict())).partition("embeddings.")[0] if ours is model.tower else ""
        part.load_state_dict({prefix + name: p.detach().cpu() for name, p in ours.state_dict().items()})
    out.tie_weights()
    out = out.to(torch.bfloat16)
    assert out.lm_head.weight is out.model.language_model.embed_tokens.weight
    out.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS, eos_token_id=END, pad_token_id=END, max_new_tokens=256
    )
    out.save_pretrained(folder)
