"""Tiny random LLaVA checkpoints give the logits of transformers, with pictures of any shape in prompts cut anyhow."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from lite_llm import ops
from lite_llm.batch import Batch, KVPool
from lite_llm.config import HFConfig, ModelConfig
from lite_llm.errors import BadCheckpoint
from lite_llm.layers import LayerFactory
from lite_llm.models import registry, tiling
from lite_llm.weights import load_weights, open_checkpoint
from tests.close import DEVICE, assert_close, exact_float32
from tests.models.test_parity import one_thread, our_logits

__all__ = ["one_thread"]  # a fixture that holds for this file too

PICTURE, FIRST = 200, 256  # the placeholder; for our model, the first of the ids that stand for features here
TEXT = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=640, max_position_embeddings=512, rms_norm_eps=1e-2, rope_theta=500.0,
)  # fmt: skip
VISION = dict(
    model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    image_size=24, patch_size=8, layer_norm_eps=1e-2, projection_dim=16,
)  # fmt: skip
LLAVA = dict(
    architectures=["LlavaForConditionalGeneration"], model_type="llava", image_token_index=PICTURE, text_config=TEXT,
    vision_config=VISION,
)  # fmt: skip
NEXT = LLAVA | dict(
    architectures=["LlavaNextForConditionalGeneration"], model_type="llava_next",
    image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]],
)  # fmt: skip
MISTRAL = TEXT | dict(model_type="mistral", sliding_window=9)
QWEN2 = TEXT | dict(model_type="qwen2", tie_word_embeddings=True)
FACTS = {
    "class token dropped": LLAVA,
    "class token kept": LLAVA | dict(vision_feature_select_strategy="full"),
    "last layer": LLAVA | dict(vision_feature_layer=-1),
    "a layer and the embedding": LLAVA | dict(vision_feature_layer=[2, 0]),
    "several layers": LLAVA | dict(vision_feature_layer=[-1, 1, -2]),
    "several layers with class token": LLAVA | dict(vision_feature_layer=[1, 2], vision_feature_select_strategy="full"),
    "exact gelu": LLAVA | dict(vision_config=VISION | dict(hidden_act="gelu")),
    "projector without biases": LLAVA | dict(multimodal_projector_bias=False),
    "mistral": LLAVA | dict(text_config=MISTRAL),
    "qwen2 with a tied head": LLAVA | dict(text_config=QWEN2),
    "next": NEXT,
    "next on mistral, several layers": NEXT | dict(text_config=MISTRAL, vision_feature_layer=[-2, -1]),
}
SIZES = {  # height, width
    "square": [(48, 48)],
    "tall": [(300, 41)],
    "wide": [(41, 300)],
    "nearly square": [(67, 61)],
    "one pixel": [(1, 1)],
    "a line": [(3, 1000)],
    "two": [(50, 31), (20, 90)],
    "three": [(24, 24), (1, 500), (640, 480)],
}


def their_model(raw: dict) -> transformers.PreTrainedModel:
    """With random weights in float32; no bias is 0 and no norm is 1."""
    torch.manual_seed(0)
    kind = getattr(transformers, raw["architectures"][0])
    config = kind.config_class(**{k: v for k, v in copy.deepcopy(raw).items() if k != "architectures"})
    theirs = kind._from_config(config, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return theirs


def ours_from(
    directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.nn.Module, ModelConfig]:
    cfg = registry.parse(HFConfig.load(directory))
    module, cls = registry.find(cfg.architecture)
    ours = cls(LayerFactory(dtype, device), cfg)
    load_weights(ours, open_checkpoint(directory), module.RULES)
    return ours, cfg


def saved(directory: Path, raw: dict) -> transformers.PreTrainedModel:
    theirs = their_model(raw)
    theirs.save_pretrained(directory)
    return theirs


def tiles_of(raw: dict, sizes: list[tuple[int, int]]) -> int:
    if "image_grid_pinpoints" not in raw:
        return len(sizes)
    return sum(image_size_to_num_patches(s, raw["image_grid_pinpoints"], VISION["image_size"]) for s in sizes)


def draw_pixels(raw: dict, sizes: list[tuple[int, int]]) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(tiles_of(raw, sizes), 3, VISION["image_size"], VISION["image_size"])


def prompt_of(counts: list[int], image_token: int | None) -> Tensor:
    """Text, and between it pictures of so many tokens; those of ours are numbered through."""
    torch.manual_seed(1)
    parts, done = [torch.randint(0, PICTURE, (3,))], FIRST
    for count in counts:
        numbers = torch.arange(done, done + count)
        parts += [numbers if image_token is None else torch.full((count,), image_token)]
        parts += [torch.randint(0, PICTURE, (4,))]
        done += count
    return torch.cat(parts)


class WithPictures:
    """Our model as the tests of text call it: ids from FIRST on are rows of `features`. All other rows are NaN."""

    def __init__(self, ours: torch.nn.Module, features: Tensor):
        self.ours, self.features, self.parameters = ours, features, ours.parameters

    def __call__(self, batch: Batch, kv: KVPool) -> Tensor:
        pictured = batch.tokens >= FIRST
        rows = self.features[(batch.tokens - FIRST).clamp(min=0)].where(pictured[:, None], float("nan"))
        tokens = batch.tokens.where(~pictured, PICTURE)
        return self.ours(dataclasses.replace(batch, tokens=tokens, features=rows, pictured=pictured), kv)


@torch.no_grad()
def picture_error(theirs, ours, cfg: ModelConfig, raw: dict, sizes: list[tuple[int, int]], device: str = "cpu"):
    """The largest difference of a logit, over a prompt with pictures and another of text alone."""
    pixels = draw_pixels(raw, sizes).to(device)
    features = ours.encode(pixels, sizes)
    counts = [len(part) for part in features]
    assert counts == [tiling.tokens(cfg.vision, size) for size in sizes]
    more = dict(image_sizes=torch.tensor(sizes)) if cfg.vision.resolutions else {}
    plain = prompt_of([], None).to(device)
    asked = prompt_of(counts, PICTURE).to(device)
    want = [theirs(asked[None], pixel_values=pixels, **more).logits[0], theirs(plain[None]).logits[0]]
    prompts = [prompt_of(counts, None).to(device), plain]
    got = our_logits(WithPictures(ours, torch.cat(features)), cfg, prompts)
    want, got = torch.cat(want), torch.cat(got)
    assert 1 < want.abs().max() < 30, "logits too small or too large for the tolerance to mean anything"
    return (got - want).abs().nan_to_num(nan=float("inf")).max().item()


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("fact", FACTS)
def test_logits_match_transformers(fact, pictures, tmp_path):
    theirs = saved(tmp_path, FACTS[fact])
    assert picture_error(theirs, *ours_from(tmp_path), FACTS[fact], [(30, 50), (24, 24)][:pictures]) <= 1e-4


@pytest.mark.parametrize("sizes", SIZES)
def test_pictures_of_any_size_match(sizes, tmp_path):
    theirs = saved(tmp_path, NEXT)
    assert picture_error(theirs, *ours_from(tmp_path), NEXT, SIZES[sizes]) <= 1e-4


NAMINGS = {  # what files begin names with: the text's layers, its head, the tower
    "as transformers 5.23 saves": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "before 4.52": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model."),
    "since 4.52": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model."),
    "modules of 5.23": ("model.language_model.", "lm_head.", "model.vision_tower."),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("raw", [LLAVA, NEXT], ids=["llava", "next"])
def test_all_namings_of_a_checkpoint_are_one_model(raw, naming, tmp_path):
    saved(tmp_path, raw)
    want, _ = ours_from(tmp_path)
    usual, prefixes = NAMINGS["as transformers 5.23 saves"], NAMINGS[naming]
    tensors = {"vision_tower.embeddings.position_ids": torch.arange(10)[None]}
    tensors |= load_file(tmp_path / "model.safetensors")
    for name in list(tensors):
        before, after = next(
            (pair for pair in zip(usual, prefixes) if name.startswith(pair[0])),
            ("", "model." if prefixes[2].startswith("model.") else ""),
        )
        tensors[after + name.removeprefix(before)] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    got, _ = ours_from(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))


def test_a_missing_tensor_is_named(tmp_path):
    saved(tmp_path, NEXT)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="lacks 1 tensors of the model: image_newline"):
        ours_from(tmp_path)


def test_kernels_match_transformers(tmp_path):
    """In Triton's interpreter where there is no GPU."""
    theirs = saved(tmp_path, NEXT).to(DEVICE)
    ours, cfg = ours_from(tmp_path, device=DEVICE)
    pixels = draw_pixels(NEXT, [(20, 70)]).to(DEVICE)
    with torch.no_grad(), ops.use("triton"):
        (got,) = ours.encode(pixels, [(20, 70)])
        want = theirs.get_image_features(pixels, torch.tensor([[20, 70]])).pooler_output[0]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()
def check_half_precision(dtype: torch.dtype, device: str, directory: Path) -> None:
    """Features of the tower and the projector, against their float64."""
    theirs = saved(directory, NEXT).to(device)
    sizes = [(20, 70), (50, 50)]
    pixels = draw_pixels(NEXT, sizes).to(device, dtype)
    ours, _ = ours_from(directory, dtype, device)
    same, exact = (
        torch.cat(theirs.to(kind).get_image_features(pixels.to(kind), torch.tensor(sizes)).pooler_output)
        for kind in (dtype, torch.float64)
    )
    assert_close(torch.cat(ours.encode(pixels, sizes)), same, exact, "features")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_that_of_transformers(dtype, tmp_path):
    check_half_precision(dtype, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_that_of_transformers_on_a_gpu(dtype, tmp_path):
    check_half_precision(dtype, "cuda", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("fact", FACTS)
def test_logits_match_transformers_on_a_gpu(fact, tmp_path):
    theirs = saved(tmp_path, FACTS[fact]).to("cuda")
    ours, cfg = ours_from(tmp_path, device="cuda")
    with exact_float32():
        assert picture_error(theirs, ours, cfg, FACTS[fact], [(30, 50), (24, 24)], "cuda") <= 1e-4


@pytest.mark.gpu
def test_encoding_can_be_replayed_as_a_graph(tmp_path):
    saved(tmp_path, NEXT)
    ours, _ = ours_from(tmp_path, torch.bfloat16, "cuda")
    first, other = (torch.randn(3, 3, 24, 24, device="cuda") for _ in range(2))
    with torch.no_grad():
        want, pixels = ours.encode_tiles(other), first.clone()
        ours.encode_tiles(pixels)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ours.encode_tiles(pixels)
        pixels.copy_(other)
        graph.replay()
    assert torch.equal(got, want)


def odd_sizes(n: int) -> list[tuple[int, int]]:
    draw = torch.Generator().manual_seed(4)
    return [tuple(max(1, int(4000 ** float(torch.rand((), generator=draw)))) for _ in "hw") for _ in range(n)]


REAL_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.mark.parametrize("patch", [14, 8, 112])
def test_features_are_laid_out_as_transformers_does(patch):
    """Their own packing, of features that are numbers, for 500 sizes of picture."""
    raw = NEXT | dict(image_grid_pinpoints=REAL_GRID, vision_config=VISION | dict(image_size=336, patch_size=patch))
    cfg = registry.parse(HFConfig(raw)).vision
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=336, patch_size=patch), image_grid_pinpoints=REAL_GRID
        )
    )
    for size in [(1, 1), (336, 336), (672, 672), (1008, 336), (337, 335), *odd_sizes(500 if patch > 14 else 60)]:
        assert tiling.best_resolution(size, cfg.resolutions) == select_best_resolution(size, REAL_GRID)
        tiles = tiling.tiles(cfg, size)
        assert tiles == image_size_to_num_patches(size, REAL_GRID, 336)
        numbers = torch.arange(tiles * cfg.tile_features).view(tiles, cfg.tile_features, 1)
        (want,), lengths = LlavaNextModel.pack_image_features(
            model, [numbers], [size], "default", image_newline=torch.tensor([-1])
        )
        assert torch.equal(tiling.order(cfg, size), want[:, 0]), size
        assert tiling.tokens(cfg, size) == lengths.item()


def test_a_picture_is_the_same_in_any_company(tmp_path):
    saved(tmp_path, NEXT)
    ours, _ = ours_from(tmp_path)
    sizes = [(30, 50), (90, 24), (24, 24)]
    pixels = draw_pixels(NEXT, sizes)
    together, at = ours.encode(pixels, sizes), 0
    for size, want in zip(sizes, together):
        tiles = tiles_of(NEXT, [size])
        (alone,) = ours.encode(pixels[at : at + tiles], [size])
        torch.testing.assert_close(alone, want, rtol=1e-5, atol=1e-5)
        at += tiles
    assert ours.encode(pixels[:0], []) == []


def test_pixels_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path, NEXT)
    ours, _ = ours_from(tmp_path)
    with pytest.raises(ValueError, match=r"pixels: 2 tiles; expected 3 for pictures of \[\(24, 48\)\]"):
        ours.encode(torch.zeros(2, 3, 24, 24), [(24, 48)])
    with pytest.raises(ValueError, match=r"pixels: shape \[3, 3, 24, 25\]; expected \[tiles, 3, 24, 24\]"):
        ours.encode(torch.zeros(3, 3, 24, 25), [(24, 48)])


def with_config(**change):
    def plant(patch, ours):
        ours.vision.cfg = dataclasses.replace(ours.vision.cfg, **change)

    return plant


def causal(patch, ours):
    attend = ops.attend
    patch.setattr(ops, "attend", lambda *args, causal=True, **named: attend(*args, **named))


def values_for_keys(patch, ours):
    attend = ops.attend
    patch.setattr(
        ops, "attend", lambda q, k, v, *args, **named: attend(q, *((k, k) if named else (k, v)), *args, **named)
    )


def exact_gelu(patch, ours):
    gelu = ops.gelu
    patch.setattr(ops, "gelu", lambda x, quick=False: gelu(x, False))


def columns_first(patch, ours):
    order = tiling._unpadded
    patch.setattr(tiling, "_unpadded", lambda grid, size: order(grid.flip(1), size))


def no_positions(patch, ours):
    ours.vision.positions.data.zero_()


def newline_forgotten(patch, ours):
    ours.projector.newline.data.zero_()


def patches_transposed(patch, ours):
    weight = ours.vision.patch.weight
    weight.data = weight.data.view(-1, 3, 8, 8).mT.reshape(weight.shape).contiguous()


def norm_before_forgotten(patch, ours):
    patch.setattr(ours.vision.norm, "forward", lambda x: x)


def pictures_in_turn(patch, ours):
    encode = ours.encode
    patch.setattr(ours, "encode", lambda pixels, sizes: encode(pixels.flip(0), sizes))


BUGS = dict(
    another_layer=with_config(feature_layers=(3,)), causal=causal, values_for_keys=values_for_keys,
    exact_gelu=exact_gelu, columns_first=columns_first, no_positions=no_positions,
    newline_forgotten=newline_forgotten, patches_transposed=patches_transposed,
    norm_before_forgotten=norm_before_forgotten, pictures_in_turn=pictures_in_turn,
)  # fmt: skip


@pytest.fixture(scope="module")
def next_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("next")
    return directory, saved(directory, NEXT)


@pytest.mark.parametrize("bug", BUGS)
def test_the_parity_check_fails_for(bug, monkeypatch, next_directory):
    directory, theirs = next_directory
    ours, cfg = ours_from(directory)
    BUGS[bug](monkeypatch, ours)
    assert picture_error(theirs, ours, cfg, NEXT, [(30, 50)]) > 1e-3


def test_padding_kept_would_be_seen(monkeypatch, next_directory):
    directory, theirs = next_directory
    ours, cfg = ours_from(directory)
    monkeypatch.setattr(tiling, "_unpadded", lambda grid, size: grid)
    with pytest.raises(Exception, match="Image features and image tokens do not match"):
        picture_error(theirs, ours, cfg, NEXT, [(24, 300)])
