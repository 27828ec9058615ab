"""LLaVA 1.5 and 1.6: features of a CLIP tower, through two layers, stand in a Llama's prompt as embeddings.

1.5 shows the tower a picture as one tile. 1.6 (LLaVA-NeXT) shows it that and a grid of tiles (`tiling.py`), and lays
their features out in rows, each with a newline behind it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lite_llm import ops
from lite_llm.batch import Batch, KVPool
from lite_llm.config import HFConfig, ModelConfig, VisionConfig
from lite_llm.errors import UnsupportedModel, shown
from lite_llm.layers import LayerFactory
from lite_llm.models import clip, llama, tiling
from lite_llm.weights.rules import Rules, Target, fill


def _rules() -> Rules:
    """Files name the text `language_model.model.` or, since transformers 4.52, `model.language_model.`, and the tower
    with or without `vision_model.`.
    """

    def within(module: str, target: Target) -> Target:
        if isinstance(target, tuple):
            return f"{module}.{target[0]}", target[1]
        return target and f"{module}.{target}"

    rules: Rules = {}
    for name, target in llama.RULES.items():
        inner = name.removeprefix("model.")
        old, new = f"language_model.{name}", name if inner == name else f"model.language_model.{inner}"
        rules |= dict.fromkeys((old, new), within("text", target))
    for outer in ("", "model."):
        for tower in ("vision_tower.vision_model.", "vision_tower."):
            rules |= {f"{outer}{tower}{name}": within("vision", target) for name, target in clip.RULES.items()}
        rules |= {
            f"{outer}multi_modal_projector.linear_1.{{w}}": "projector.up.{w}",
            f"{outer}multi_modal_projector.linear_2.{{w}}": "projector.down.{w}",
            f"{outer}image_newline": "projector.newline",
        }
    return rules


RULES: Rules = _rules()

_TEXTS = {  # model_type -> architecture, and the defaults of transformers: published files state what differs from them
    "llama": ("LlamaForCausalLM", {"intermediate_size": 11008, "max_position_embeddings": 2048, "vocab_size": 32000}),
    "mistral": (
        "MistralForCausalLM",
        {"intermediate_size": 14336, "max_position_embeddings": 1 << 17, "vocab_size": 32000, "num_key_value_heads": 8},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "intermediate_size": 22016,
            "max_position_embeddings": 1 << 15,
            "vocab_size": 151936,
            "num_key_value_heads": 32,
        },
    ),
}
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_RESOLUTIONS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def parse(hf: HFConfig) -> ModelConfig:
    """The facts of a config.json of this family. UnsupportedModel names the setting that we would compute wrongly."""
    architecture = hf.get(list, "architectures")[0]
    next_ = architecture.startswith("LlavaNext")
    hf.expect("model_type", "llava_next" if next_ else "llava")
    hf.expect("projector_hidden_act", "gelu")
    hf.expect("use_image_newline_parameter", True)
    # The class token's feature has no place in a grid: transformers cannot lay it out either.
    hf.expect("vision_feature_select_strategy", *(("default",) if next_ else ("default", "full")))
    hf.expect("dtype|torch_dtype", "float32", "bfloat16", "float16")
    for name in ("image_seq_length", "ignore_index"):
        hf.get(object, name, None)  # for processors, which ask the tower's sizes too; of training
    text = _parse_text(hf)
    hf.expect("vocab_size", text.vocab)
    tower = clip.parse_tower(hf, "vision_config")
    vision = VisionConfig(
        **tower,
        feature_layers=_feature_layers(hf, tower["num_layers"]),
        class_token=hf.get(str, "vision_feature_select_strategy", "default") == "full",
        projector_bias=hf.get(bool, "multimodal_projector_bias", True),
        image_token=hf.agree(int, "image_token_index", "image_token_id", 32000),
        resolutions=_resolutions(hf) if next_ else (),
    )
    tied = hf.get(bool, "tie_word_embeddings", False)  # either place counts; what the file ties wrongly, loading finds
    return dataclasses.replace(
        text,
        architecture=architecture,
        tied_head=text.tied_head or tied,
        dtype=hf.get(str, "dtype|torch_dtype", text.dtype),
        vision=vision,
    )


def _parse_text(hf: HFConfig) -> ModelConfig:
    kind = hf.get(str, "text_config.model_type", "llama")
    if kind not in _TEXTS:
        raise UnsupportedModel(
            f"config.json: text_config.model_type = {shown(kind)}; supported: {', '.join(map(repr, _TEXTS))}"
        )
    architecture, sizes = _TEXTS[kind]
    hf.expect("text_config.architectures", [architecture])
    text = hf.section("text_config", _SIZES | sizes, model_type=kind, architectures=[architecture])
    cfg = llama.parse(text)
    text.finish()
    return cfg


def _feature_layers(hf: HFConfig, layers: int) -> tuple[int, ...]:
    """Which of the tower's states, the embedding before them, are the features; negative ones count from the last."""
    given = hf.get(object, "vision_feature_layer", -2)
    chosen = given if isinstance(given, list) else [given]
    if not chosen or any(type(layer) is not int or not -layers - 1 <= layer <= layers for layer in chosen):
        raise UnsupportedModel(
            f"config.json: vision_feature_layer = {shown(given)}; expected one or more of {-layers - 1} to {layers}"
        )
    return tuple(layer % (layers + 1) for layer in chosen)


def _resolutions(hf: HFConfig) -> tuple[tuple[int, int], ...]:
    given = hf.get(list, "image_grid_pinpoints", _RESOLUTIONS)
    pairs = all(isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size) for size in given)
    if not given or not pairs:
        raise UnsupportedModel(
            f"config.json: image_grid_pinpoints = {shown(given)}; expected a list of [height, width]"
        )
    return tuple((height, width) for height, width in given)


class Projector(nn.Module):
    """From the tower's features to the text's embeddings; also the embedding behind each row of a grid."""

    def __init__(self, make: LayerFactory, cfg: ModelConfig):
        super().__init__()
        inputs, bias = cfg.vision.hidden * len(cfg.vision.feature_layers), cfg.vision.projector_bias
        self.up = make.linear(inputs, cfg.hidden, split="out", bias=bias)
        self.down = make.linear(cfg.hidden, cfg.hidden, split="out", bias=bias)
        self.register_parameter("newline", make.empty(cfg.hidden) if cfg.vision.resolutions else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))

    def load(self, name: str, tensor: Tensor, part: str = "") -> int:
        return fill(getattr(self, name), tensor)


class Llava(nn.Module):
    def __init__(self, make: LayerFactory, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg.vision
        self.vision = clip.Tower(make.whole(), cfg.vision)
        self.projector = Projector(make.whole(), cfg)
        self.text = llama.Llama(make, cfg)

    def forward(self, batch: Batch, kv: KVPool) -> Tensor:
        """Logits as `Llama.forward` has them; `batch.features` brings what `encode` has made of pictures."""
        return self.text(batch, kv)

    def encode(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Embeddings [n, hidden] of each picture's n tokens, in their order.

        `pixels` holds the tiles of all pictures, one picture after the other, as the checkpoint's processor cuts and
        normalizes them; `sizes` is the original height and width of each picture, in pixels.
        """
        tiles = sum(tiling.tiles(self.cfg, size) for size in sizes)
        if len(pixels) != tiles:
            raise ValueError(f"pixels: {len(pixels)} tiles; expected {tiles} for pictures of {list(sizes)}")
        return self.arrange(self.encode_tiles(pixels), sizes) if tiles else []

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Embeddings [tiles, tile_features, hidden] of `pixels`; no size depends on anything but their number."""
        features = self.vision(pixels)
        return self.projector(features.flatten(0, 1)).view(*features.shape[:2], -1)

    def arrange(self, features: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Each picture's part of what `encode_tiles` gives, as it stands in a prompt; the last step of `encode`."""
        if not self.cfg.resolutions:
            return list(features)
        parts = features.split([tiling.tiles(self.cfg, size) for size in sizes])
        return [
            torch.cat([part.flatten(0, 1), self.projector.newline[None]])[_sent(tiling.order(self.cfg, size), part)]
            for size, part in zip(sizes, parts, strict=True)
        ]


def _sent(numbers: Tensor, to: Tensor) -> Tensor:
    """`numbers` of the CPU on the device of `to`, without waiting for what it has to do."""
    if to.device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(to.device, non_blocking=True)
