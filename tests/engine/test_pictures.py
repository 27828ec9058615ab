"""Pictures in prompts under disorder: every answer is that to the pictures that were meant (IMG-06, IMG-07)."""

import dataclasses
import random
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lite_llm.config import VisionConfig
from lite_llm.engine import vision
from lite_llm.engine.request import Request, Tiles
from lite_llm.errors import UsageError
from lite_llm.models import tiling
from lite_llm.models.llava import Llava
from tests.engine.models import HashModel, Rig, alone, ask, tiny_config
from tests.engine.test_engine import disorder
from tests.engine.test_sampling import WISHES

PLACE, NEWLINE = 3, 77
TOWER = VisionConfig(
    num_layers=1, hidden=4, ffn=4, heads=1, image_size=4, patch_size=2, norm_eps=1e-5, quick_gelu=True,
    feature_layers=(0,), class_token=False, projector_bias=True, image_token=PLACE,
)  # fmt: skip
FIXED = dataclasses.replace(tiny_config(16, 64), vision=TOWER)
TILED = dataclasses.replace(FIXED, vision=dataclasses.replace(TOWER, resolutions=((4, 8), (8, 4))))


class SeeingModel(HashModel):
    """Takes the features of a picture for its tokens; a feature is its tile's first pixel and its place in the tile."""

    arrange = Llava.arrange

    def __init__(self, cfg, hook=None):
        super().__init__(cfg.vocab, hook)
        self.cfg, self.hidden, self.encoded = cfg.vision, cfg.hidden, []
        self.projector = SimpleNamespace(newline=torch.full((cfg.hidden,), NEWLINE, dtype=torch.float64))

    def encode_tiles(self, pixels):
        assert len(pixels) <= vision.MOST_TILES and pixels.dtype == torch.float64
        self.encoded += pixels[:, 0, 0, 0].tolist()
        features = 1000 + 10 * pixels[:, :1, 0, :1] + torch.arange(self.cfg.tile_features)[None, :, None]
        return features.expand(-1, -1, self.hidden).contiguous()

    def forward(self, batch, kv):
        if batch.features is not None:
            assert batch.pictured.dtype == torch.bool and len(batch.pictured) == len(batch.features)
            assert (batch.tokens[batch.pictured] == PLACE).all()
            numbers = batch.features[:, 0]
            assert (batch.features == numbers[:, None])[batch.pictured].all()
            tokens = torch.where(batch.pictured, numbers.int(), batch.tokens)
            batch = dataclasses.replace(batch, tokens=tokens)
        return super().forward(batch, kv)


def picture(cfg, first: int, size: tuple[int, int] = (4, 4), digest: str = "") -> Tiles:
    """Tiles whose first pixels are `first`, `first` + 1, ..."""
    count = tiling.tiles(cfg.vision, size)
    pixels = np.zeros((count, 3, 4, 4), np.float32) + first + np.arange(count, dtype=np.float32)[:, None, None, None]
    return Tiles(pixels, size, tiling.tokens(cfg.vision, size), digest)


def numbers(cfg, tiles: Tiles) -> list[int]:
    """What the model sees of a picture."""
    whole = [1000 + 10 * int(pixels[0, 0, 0]) + i for pixels in tiles.pixels for i in range(4)]
    if not cfg.vision.resolutions:
        return whole
    return [[*whole, NEWLINE][i] for i in tiling.order(cfg.vision, tiles.size).tolist()]


def illustrated(cfg, prompt: Sequence[int | Tiles], **wishes) -> tuple[Request, list[int]]:
    """A request, and what the model sees of its prompt."""
    ids, seen, pictures = [], [], []
    for item in prompt:
        if isinstance(item, Tiles):
            pictures.append((len(ids), item))
        ids += [PLACE] * item.tokens if isinstance(item, Tiles) else [item]
        seen += numbers(cfg, item) if isinstance(item, Tiles) else [item]
    request = ask(ids, **wishes)
    request.pictures = tuple(pictures)
    return request, seen


def rig_of(cfg, **sizes) -> Rig:
    return Rig(cfg=cfg, oracle=SeeingModel(cfg), **sizes)


def check(pairs: list[tuple[Request, list[int]]]) -> None:
    for request, seen in pairs:
        tokens, reason = alone(request, 16, seen=seen)
        if request.finish_reason == "abort":
            assert request.output == tokens[: request.output_len]
        else:
            assert (request.output, request.finish_reason) == (tokens, reason)


@pytest.mark.parametrize("cfg", [FIXED, TILED], ids=["fixed", "tiled"])
@pytest.mark.parametrize("ahead, padded", [(0, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize("seed", range(20))
def test_disorder_changes_no_answer(seed, ahead, padded, cfg):
    draw = random.Random(seed)
    rows = draw.randint(1, 5)
    cache = draw.random() < 0.8
    rig = rig_of(
        cfg, slots=draw.randint(60, 90), rows=rows, step_tokens=rows + draw.randint(0, 20), prefix_cache=cache,
        ahead=ahead, padded=padded, drafts=seed % 4,
    )  # fmt: skip
    if draw.random() < 0.5:  # hardly anything is kept
        rig.engine.runner.encoder._room = 2 * vision._tile_bytes(cfg, 8)
    known = [picture(cfg, first, size) for first in (1, 5, 9) for size in ((4, 4), (4, 8), (9, 2))]
    pairs = []
    for _ in range(10):
        prompt = [draw.choice((0, 1, draw.choice(known))) for _ in range(draw.randint(1, 4))]
        while sum(item.tokens if isinstance(item, Tiles) else 1 for item in prompt) > 50:
            prompt.pop()
        wish = {"max_tokens": draw.randint(1, 8), **WISHES[draw.choice(list(WISHES))]}
        pairs.append(illustrated(cfg, prompt, **wish))
    disorder(rig, draw, [request for request, _ in pairs])
    check(pairs)
    prefix = rig.scheduler.prefix
    assert prefix.protected == 0 and prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity


@pytest.mark.parametrize("ahead, padded", [(0, False), (2, True)])
def test_a_picture_that_another_request_showed_is_neither_encoded_nor_computed_again(ahead, padded):
    rig, seen = rig_of(TILED, slots=120, step_tokens=30, ahead=ahead, padded=padded), picture(TILED, 1, (4, 8))
    first, again, elsewhere = (
        illustrated(TILED, prompt) for prompt in ([1, seen, 0], [1, picture(TILED, 1, (4, 8)), 2], [0, seen, 1])
    )
    for request, _ in (first, again, elsewhere):
        rig.answers(request)
    check([first, again, elsewhere])
    assert again[0].prefix_hit == 1 + seen.tokens and elsewhere[0].prefix_hit == 0
    assert rig.model.encoded == [1, 2, 3], "three tiles, once"


def test_pictures_of_one_step_are_encoded_together():
    rig = rig_of(FIXED, slots=200, rows=4, step_tokens=100)
    calls, encode = [], rig.model.encode_tiles
    rig.model.encode_tiles = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    shown = [picture(FIXED, first) for first in range(12)]
    pairs = [illustrated(FIXED, [1, *shown[3 * i : 3 * i + 3], *shown[:2]]) for i in range(4)]
    for request, _ in pairs:
        rig.add(request)
    rig.step()
    assert calls == [8, 4] and sorted(rig.model.encoded) == list(range(12))
    rig.run()
    check(pairs)


def test_what_is_kept_is_bounded_and_the_last_used_stay():
    rig = rig_of(FIXED, slots=60, max_len=60, prefix_cache=False)
    encoder = rig.engine.runner.encoder
    encoder._room = 3 * 4 * FIXED.hidden * 8  # of three pictures
    for first, encoded in ((1, 1), (2, 1), (3, 1), (1, 0), (4, 1), (1, 0), (2, 1)):
        before = len(rig.model.encoded)
        pair = illustrated(FIXED, [picture(FIXED, first), 1], max_tokens=2)
        rig.answers(pair[0])
        check([pair])
        assert len(rig.model.encoded) - before == encoded
    pair = illustrated(FIXED, [1, *(picture(FIXED, first) for first in (5, 6, 7)), 1], max_tokens=2)
    rig.answers(pair[0])
    check([pair])
    assert len(encoder._kept) == 3
    assert sum(kept.untyped_storage().nbytes() for kept in encoder._kept.values()) <= encoder._room


def test_a_picture_of_more_tiles_than_one_call_takes():
    wide = dataclasses.replace(FIXED, vision=dataclasses.replace(TOWER, resolutions=((4, 4 * 19),)))
    rig, shown = rig_of(wide, slots=300, step_tokens=8, max_len=300), picture(wide, 1, (4, 4 * 19))
    pair = illustrated(wide, [1, shown, 0])
    rig.answers(pair[0])
    check([pair])
    assert len(shown) == 20 and rig.model.encoded == list(range(1, 21)), "each once, although it took many steps"


def test_swapped_pictures_are_another_prompt():
    """IMG-07."""
    rig, (red, blue) = rig_of(FIXED, slots=80), (picture(FIXED, 1), picture(FIXED, 2))
    pairs = [illustrated(FIXED, prompt) for prompt in ([0, red, 1, blue, 0], [0, blue, 1, red, 0], [0, red, 1, red])]
    for request, _ in pairs:
        rig.answers(request)
    check(pairs)
    assert [request.prefix_hit for request, _ in pairs] == [0, 1, 6]
    assert len({tuple(request.output) for request, _ in pairs}) == 3


def test_the_same_pixels_in_another_shape_are_another_picture():
    """IMG-07: their digests would differ; and where none is given, it follows from pixels and size."""
    rig = rig_of(TILED, slots=120, step_tokens=40)
    tall, wide = (Tiles(np.ones((3, 3, 4, 4), np.float32), size, 14, "") for size in ((4, 8), (5, 10)))
    assert tall.digest != wide.digest and tall.digest == Tiles(tall.pixels.copy(), (4, 8), 14).digest
    pairs = [illustrated(TILED, [1, tiles, 1]) for tiles in (tall, wide, tall)]
    for request, _ in pairs:
        rig.answers(request)
    assert [request.prefix_hit for request, _ in pairs] == [0, 1, 15]
    assert set(tall.keys).isdisjoint(wide.keys) and min(*tall.keys, *wide.keys) >= 1 << 32


def test_a_prompt_that_ends_in_a_picture_and_is_cached_but_for_its_last_token():
    """That token's embedding is a feature, which the device does not hold."""
    rig, shown = rig_of(FIXED), picture(FIXED, 4)
    for _ in range(3):
        pair = illustrated(FIXED, [1, shown])
        rig.answers(pair[0])
        check([pair])
    assert pair[0].prefix_hit == 4


def test_a_placeholder_without_a_picture_and_one_that_was_sampled_are_tokens_like_others():
    rig = rig_of(FIXED, slots=60)
    bare, pair = illustrated(FIXED, [1, PLACE, PLACE, 0]), illustrated(FIXED, [1, picture(FIXED, 1), 0])
    forced = illustrated(FIXED, [1, picture(FIXED, 1), 2], logit_bias={PLACE: 1000.0}, max_tokens=5)
    for request, _ in (bare, pair, forced):
        rig.add(request)
    rig.step(), rig.step()
    rig.preempt(forced[0])
    rig.run()
    check([bare, pair, forced])
    assert forced[0].output == [PLACE] * 5 and bare[0].output != pair[0].output


def test_a_picture_that_cannot_be_encoded_ends_its_step_and_nothing_else(monkeypatch):
    rig = rig_of(FIXED, slots=60)
    encode = rig.model.encode_tiles
    bad, good = illustrated(FIXED, [1, picture(FIXED, 1), 0]), illustrated(FIXED, [1, picture(FIXED, 1), 0])
    monkeypatch.setattr(rig.model, "encode_tiles", lambda pixels: 1 / 0)
    rig.add(bad[0])
    with pytest.raises(ZeroDivisionError):
        rig.step()
    assert bad[0].finish_reason == "error" and rig.engine.idle
    monkeypatch.setattr(rig.model, "encode_tiles", encode)
    rig.answers(good[0])
    check([good])


GOOD = picture(TILED, 1, (4, 8))
BAD = {
    "text in its place": ([0] * 15, [(1, GOOD)], "token 1 needs 14 placeholders of its own there, of token id 3"),
    "too few": ([PLACE] * 13, [(0, GOOD)], "token 0 needs 14"),
    "two in one place": ([PLACE] * 20, [(0, GOOD), (6, GOOD)], "token 6 needs 14"),
    "before the prompt": ([PLACE] * 20, [(-1, GOOD)], "token -1 needs 14"),
    "tiles": ([PLACE] * 14, [(0, dataclasses.replace(GOOD, pixels=GOOD.pixels[:2]))], r"\[2, 3, 4, 4\]; expected \[3,"),
    "pixels": ([PLACE] * 14, [(0, dataclasses.replace(GOOD, pixels=GOOD.pixels[..., 1:]))], r"expected \[3, 3, 4, 4\]"),
    "tokens": ([PLACE] * 13, [(0, dataclasses.replace(GOOD, tokens=13))], "13 tokens; expected 14"),
    "size": ([PLACE] * 14, [(0, dataclasses.replace(GOOD, size=(0, 8)))], r"size \(0, 8\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_pictures_that_do_not_fit_are_refused(name):
    ids, pictures, said = BAD[name]
    rig, request = rig_of(TILED), ask(ids)
    request.pictures = tuple(pictures)
    with pytest.raises(UsageError, match=said):
        rig.add(request)
    assert rig.engine.idle


def test_a_text_model_takes_no_pictures():
    rig, request = Rig(), ask([PLACE] * 14)
    request.pictures = ((0, GOOD),)
    with pytest.raises(UsageError, match="takes text only"):
        rig.add(request)


def test_parts_and_keys_of_a_prompt():
    tiles = picture(FIXED, 1)
    request, _ = illustrated(FIXED, [1, tiles, 2, tiles])
    keys = list(tiles.keys)
    for end in range(11):
        assert request.keys(end) == [1, *keys, 2, *keys][:end]
        for first in range(end):
            cut = [(part.at + i, part.first + i) for part in request.parts(first, end) for i in range(part.count)]
            want = [(at - first, (at - 1) % 5) for at in range(first, end) if at not in (0, 5)]
            assert cut == want
    salted = dataclasses.replace(request, salt="ada")
    assert salted.keys(0) == [] and salted.keys(8)[1:] == request.keys(8)[1:]
    assert salted.keys(1)[0] > max(request.keys(8))
