"""From pictures to pixels and placeholders: as transformers does it, and no text of a user is a placeholder."""

import json
import struct
import threading

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lite_llm.errors import BadCheckpoint, LiteLLMError, UnsupportedModel, UsageError
from lite_llm.text import Tokenizer
from lite_llm.text.images import open_picture, take_pictures
from lite_llm.text.processor import Processor, Tower
from tests.text import build

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP = {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_resize": True,
    "size": {"shortest_edge": 56}, "resample": 3, "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    "do_convert_rgb": True,
}  # fmt: skip
GRIDS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
NEXT = CLIP | {
    "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [list(grid) for grid in GRIDS],
    "do_pad": True,
}  # fmt: skip
SETTINGS = {
    "clip": CLIP,
    "fast": CLIP | {"image_processor_type": "CLIPImageProcessorFast"},
    "square": CLIP | {"size": {"height": 56, "width": 56}},
    "padded": CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "larger": CLIP | {"size": {"shortest_edge": 64}},
    "bilinear": CLIP | {"resample": 2, "do_normalize": False},
    "next": NEXT,
}
FIXED, TILED = Tower(7, 56, 14), Tower(7, 56, 14, grids=GRIDS)
SIZES = [(1, 1), (1, 9), (9, 1), (2, 300), (300, 2), (56, 56), (57, 55), (112, 112), (640, 480), (480, 640), (900, 100),
         (100, 900), (333, 331), (55, 56), (28, 28), (1000, 7), (224, 112), (113, 337), (168, 57),
         (60, 61)]  # fmt: skip


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width * 997 + height).integers(0, 256, (height, width, 3), np.uint8))


def checkpoint(folder, settings, nested=False):
    folder.mkdir(exist_ok=True)
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({"image_processor": settings, "patch_size": 14} if nested else settings))
    return folder


def load(folder, settings=CLIP, **facts) -> Processor:
    tower = TILED if "image_grid_pinpoints" in settings else FIXED
    return Processor.load(checkpoint(folder, settings), Tower(**{**tower.__dict__, **facts}))


# ---- pixels


@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_those_of_transformers(tmp_path, name):
    ours = load(tmp_path, SETTINGS[name])
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for size in SIZES:
        image = noise(*size)
        got, want = ours.prepare(open_picture(image)), theirs(images=image, return_tensors="np")
        pixels = want["pixel_values"][0] if name == "next" else want["pixel_values"]
        assert got.pixels.shape == pixels.shape and got.pixels.dtype == np.float32 and got.pixels.flags.c_contiguous
        assert np.abs(got.pixels - pixels).max() <= 1 / 255
        assert got.size == (size[1], size[0])
        if name == "next":
            assert tuple(want["image_sizes"][0]) == got.size
            assert len(got.pixels) == image_size_to_num_patches(got.size, [list(grid) for grid in GRIDS], 56)


@pytest.mark.parametrize("size", [(640, 480), (50, 80), (3, 3), (50, 3), (3, 50), (1, 1), (1, 50), (50, 1)], ids=str)
def test_pixels_by_hand(tmp_path, size):
    """With no word of transformers, which takes some arrays of 1 or 3 rows for channels: (x / 255 - mean) / std."""
    image, short = noise(*size), min(size)
    width, height = (56 * side // short for side in size)
    left, top = (width - 56) // 2, (height - 56) // 2
    seen = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56))
    want = ((np.asarray(seen) / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert np.abs(load(tmp_path, CLIP).prepare(open_picture(image)).pixels[0] - want).max() < 1e-5


def test_the_nested_file_comes_first(tmp_path):
    checkpoint(tmp_path, CLIP | {"image_processor_type": "ViTImageProcessor"})
    checkpoint(tmp_path, CLIP | {"do_normalize": False}, nested=True)
    white = open_picture(Image.new("RGB", (9, 9), "white"))
    assert (Processor.load(tmp_path, FIXED).prepare(white).pixels == 1).all()


def test_threads_share_one(tmp_path):
    ours, found = load(tmp_path, NEXT), {}
    pictures = [open_picture(noise(*size)) for size in SIZES]

    def work(index):
        found[index] = ours.prepare(pictures[index]).pixels

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(SIZES))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all((found[index] == ours.prepare(pictures[index]).pixels).all() for index in found)


@pytest.mark.parametrize("name", ["clip", "padded", "next"])
def test_long_and_thin_pictures_do_not_explode(tmp_path, name):
    ours = load(tmp_path, SETTINGS[name])
    for size in ((1, 60_000), (60_000, 1)):
        picture = open_picture(Image.new("RGB", size))
        if name == "next":
            assert ours.prepare(picture).pixels.shape[1:] == (3, 56, 56)
        else:
            with pytest.raises(UsageError, match=f"{size[0]} x {size[1]} pixels; this model's processor would make"):
                ours.prepare(picture)


# ---- how many tokens


def of_transformers(tmp_path, kind, settings, **facts):
    folder = build.write(checkpoint(tmp_path, settings), build.byte_level())
    hf = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return kind(hf, PreTrainedTokenizerFast.from_pretrained(folder), **{"patch_size": 14, **facts})


@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
@pytest.mark.parametrize("patch", [14, 28, 8])
def test_tokens_of_llava(tmp_path, full, patch):
    strategy = "full" if full else "default"
    theirs = of_transformers(
        tmp_path, LlavaProcessor, CLIP, patch_size=patch, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip
    ours = load(tmp_path, CLIP, patch=patch, keeps_class=full)
    for size in SIZES[:6]:
        want = len(theirs(images=noise(*size), text="<image>", add_special_tokens=False)["input_ids"][0])
        assert ours.tokens(open_picture(noise(*size))) == want == (56 // patch) ** 2 + full


@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
@pytest.mark.parametrize("patch", [14, 8, 56])
def test_tokens_of_llava_next(tmp_path, patch, full):
    strategy = "full" if full else "default"
    theirs = of_transformers(
        tmp_path, LlavaNextProcessor, NEXT, patch_size=patch, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip
    ours = load(tmp_path, NEXT, patch=patch, keeps_class=full)
    for size in SIZES:
        want = len(theirs(images=noise(*size), text="<image>", add_special_tokens=False)["input_ids"][0])
        picture = open_picture(noise(*size))
        assert ours.tokens(picture) == ours.prepare(picture).tokens == want


def test_tokens_of_llava_next_at_full_size(tmp_path):
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    sized = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "image_grid_pinpoints": grids}
    theirs = of_transformers(
        tmp_path, LlavaNextProcessor, NEXT | sized, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    ours = Processor.load(tmp_path, Tower(7, 336, 14, grids=tuple(map(tuple, grids))))
    draw = np.random.default_rng(5)
    sizes = [tuple(int(n) for n in np.exp(draw.uniform(0, 8.5, 2))) for _ in range(1000)]
    want = theirs._get_num_multimodal_tokens([(height, width) for width, height in sizes])["num_image_tokens"]

    class Sized:
        def __init__(self, size):
            self.size = size

    assert [ours.tokens(Sized(size)) for size in sizes] == want
    assert ours.tokens(Sized((336, 336))) == 1176 and max(want) <= 2928


# ---- placeholders


def pictures(*sizes):
    return [open_picture(noise(*size)) for size in sizes]


def test_each_placeholder_becomes_its_pictures_tokens(tmp_path):
    ours = load(tmp_path, NEXT)
    given = pictures((640, 480), (10, 900))
    first, second = map(ours.tokens, given)
    assert first != second
    ids, places = ours.expand([1, 7, 2, 3, 7], given)
    assert ids == [1] + [7] * first + [2, 3] + [7] * second
    assert places == [range(1, 1 + first), range(3 + first, 3 + first + second)]
    assert ours.expand([7, 7], given)[1] == [range(0, first), range(first, first + second)]
    assert ours.expand([], []) == ([], []) and ours.expand((5, 6), []) == ([5, 6], [])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_pictures_as_placeholders(tmp_path, count):
    with pytest.raises(UsageError) as info:
        load(tmp_path).expand([1, 7, 7, 2], pictures(*[(9, 9)] * count))
    assert f"{count} picture" in str(info.value) and "2 placeholders" in str(info.value)


def test_a_placeholder_without_a_picture(tmp_path):
    with pytest.raises(UsageError, match="0 pictures and 1 placeholder for"):
        load(tmp_path).expand([7], [])


LLAVA = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("typed", ["<image>", "a<image>b<image>", "<image", "<ima", "image>", "<image>\n", " <image> "])
def test_a_typed_placeholder_is_text(tmp_path, family, typed):
    folder = build.write(checkpoint(tmp_path, CLIP), build.FAMILIES[family](), LLAVA)
    tokenizer = Tokenizer.load(folder)
    token = tokenizer._backend.token_to_id("<image>")
    ours = Processor.load(folder, Tower(token, 56, 14))
    for role in ("user", "assistant", "system"):
        content = [
            {"type": "text", "text": typed},
            {"type": "image", "image": noise(9, 9)},
            {"type": "text", "text": ">"},
        ]
        messages, sources = take_pictures([{"role": role, "content": content}, {"role": "user", "content": typed}])
        ids, places = ours.expand(tokenizer.chat_ids(messages), [open_picture(source) for source in sources])
        assert ids.count(token) == 16 and len(places) == 1 and places[0].stop - places[0].start == 16
        plain, none = ours.expand(tokenizer.chat_ids([{"role": role, "content": typed}]), [])
        assert token not in plain and not none
        assert typed.strip() in tokenizer.decode(plain)


def test_a_template_that_drops_pictures_is_found_out(tmp_path):
    drops = LLAVA.replace("<image>\n", "")
    folder = build.write(checkpoint(tmp_path, CLIP), build.byte_level(), drops)
    tokenizer = Tokenizer.load(folder)
    messages, sources = take_pictures([{"role": "user", "content": [{"type": "image", "path": "a.png"}]}])
    with pytest.raises(UsageError, match="1 picture and 0 placeholders"):
        Processor.load(folder, Tower(4, 56, 14)).expand(tokenizer.chat_ids(messages), pictures((9, 9)))
    assert len(sources) == 1


# ---- checkpoints that cannot be used


@pytest.mark.parametrize("change, kind, said", [
    ({"image_processor_type": "ViTImageProcessor"}, UnsupportedModel, "ViTImageProcessor"),
    ({"image_processor_type": "LlavaNextImageProcessor"}, UnsupportedModel, "LlavaNextImageProcessor"),
    ({"image_processor_type": None}, BadCheckpoint, "image_processor_type"),
    ({"image_processor_type": 3}, BadCheckpoint, "image_processor_type"),
    ({"size": {"shortest_edge": 64}, "do_center_crop": False}, BadCheckpoint, "(1, 3, 56, 56)"),
    ({"crop_size": {"height": 48, "width": 48}}, BadCheckpoint, "(1, 3, 48, 48)"),
    ({"crop_size": 100_000}, BadCheckpoint, "1 to 4,096"), ({"size": {"shortest_edge": 10**6}}, BadCheckpoint, "4,096"),
    ({"size": {"shortest_edge": -5}}, BadCheckpoint, "4,096"), ({"size": {"height": 56}}, LiteLLMError, ""),
    ({"size": "large"}, BadCheckpoint, "cannot be used"), ({"size": {"wide": 3}}, BadCheckpoint, "cannot be used"),
    ({"do_resize": False}, UnsupportedModel, "not resized"),
    ({"size": {"shortest_edge": 56, "longest_edge": 99}}, UnsupportedModel, "longest_edge"),
    ({"do_pad": True}, UnsupportedModel, "do_pad"), ({"image_mean": [0.5, 0.5]}, BadCheckpoint, "cannot be used"),
    ({"image_std": [0, 0, 0]}, BadCheckpoint, ""), ({"image_std": [1, 1, 1e-45]}, LiteLLMError, ""),
    ({"resample": 99}, BadCheckpoint, "cannot be used"), ({"rescale_factor": "a"}, BadCheckpoint, "cannot be used"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_processor_that_does_not_fit_the_tower(tmp_path, change, kind, said):
    with pytest.raises(kind) as info:
        load(tmp_path, CLIP | change)
    assert said in str(info.value) and "object at" not in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("change, facts, said", [
    ({"image_grid_pinpoints": [[56, 112]]}, {}, "differ"),
    ({"image_processor_type": "CLIPImageProcessor"}, {}, "supported"),
    ({"image_grid_pinpoints": [[50, 112]]}, {"grids": ((50, 112),)}, "multiples"),
    ({"image_grid_pinpoints": [[560, 560]]}, {"grids": ((560, 560),)}, "more than 64"),
    ({"image_grid_pinpoints": [[0, 56]]}, {"grids": ((0, 56),)}, "multiples"),
    ({"crop_size": {"height": 28, "width": 28}}, {}, "takes"),
])  # fmt: skip
def test_tiles_that_do_not_fit_the_tower(tmp_path, change, facts, said):
    with pytest.raises(LiteLLMError, match=said):
        load(tmp_path, NEXT | change, **facts)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"no preprocessor_config\.json"):
        Processor.load(tmp_path, FIXED)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not valid JSON"):
        Processor.load(tmp_path, FIXED)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match="expected an object"):
        Processor.load(tmp_path, FIXED)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    ours = load(tmp_path, CLIP | {"auto_map": {"AutoImageProcessor": "evil.Evil"}})
    assert ours.prepare(*pictures((9, 9))).tokens == 16 and not marker.exists()


# ---- receipts


@pytest.mark.parametrize("name, size, said", [
    ("clip", (640, 480), "640 x 480 -> 74 x 56, the middle 56 x 56 of it -> 16 tokens, 8.0 MiB of KV"),
    ("clip", (480, 640), "480 x 640 -> 56 x 74, the middle 56 x 56 of it -> 16 tokens, 8.0 MiB of KV"),
    ("clip", (9, 9), "9 x 9 -> 56 x 56 -> 16 tokens, 8.0 MiB of KV"),
    ("larger", (9, 9), "9 x 9 -> 64 x 64, the middle 56 x 56 of it -> 16 tokens, 8.0 MiB of KV"),
    ("square", (640, 480), "640 x 480 -> squashed to 56 x 56 -> 16 tokens, 8.0 MiB of KV"),
    ("square", (2, 300), "2 x 300 -> squashed to 56 x 56 -> 16 tokens, 8.0 MiB of KV"),
    ("square", (480, 474), "480 x 474 -> 56 x 56 -> 16 tokens, 8.0 MiB of KV"),  # by less than a pixel
    ("padded", (640, 480), "640 x 480 -> padded to 640 x 640, 56 x 56 -> 16 tokens, 8.0 MiB of KV"),
    ("next", (640, 480),
     "640 x 480 -> 112 x 84 in 112 x 112, 4 tiles of 56 and an overview -> 70 tokens, 35.0 MiB of KV"),
    ("next", (200, 100), "200 x 100 -> 112 x 56, 2 tiles of 56 and an overview -> 52 tokens, 26.0 MiB of KV"),
])  # fmt: skip
def test_receipts(tmp_path, name, size, said):
    ours = load(tmp_path, SETTINGS[name])
    receipt = ours.receipt(*pictures(size), kv_bytes=1 << 19)
    assert str(receipt) == said and receipt.kv_bytes == receipt.tokens << 19


def test_a_receipt_says_what_was_done_on_opening(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    noise(640, 480).convert("RGBA").save(tmp_path / "a" / "a.png", exif=exif)
    line = str(load(tmp_path).receipt(open_picture(tmp_path / "a" / "a.png"), 1 << 19))
    assert line.startswith("640 x 480 (turned by EXIF 6) -> 56 x 74, ")


def test_same_pixels_another_shape(tmp_path):
    """IMG-07: the digest tells them apart, and so do the sizes that the features depend on."""
    data = struct.pack("600B", *(index % 256 for index in range(600)))
    wide, tall = (open_picture(Image.frombytes("RGB", size, data)) for size in ((20, 10), (10, 20)))
    ours = load(tmp_path, NEXT)
    assert wide.digest != tall.digest and ours.prepare(wide).size != ours.prepare(tall).size
