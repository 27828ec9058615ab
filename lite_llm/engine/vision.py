"""Pictures on the device: the tower encodes each once, and steps read its features from one buffer.

Features are kept for a while, the last used ones longest. Nobody holds them: a step that needs some which are gone
encodes the picture again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lite_llm.config import ModelConfig, VisionConfig
from lite_llm.engine.graphs import record
from lite_llm.engine.request import Part, Request, Tiles
from lite_llm.errors import UsageError, shown
from lite_llm.models import tiling
from lite_llm.ops.warm import Say

MOST_TILES = 8
"""Tiles in one call of the tower; on a GPU each number up to this has a graph."""

_KEPT_TILES = 32
"""How many tiles' features are kept, or those of the largest picture if it has more."""


class Encoder:
    """From pixels to the embeddings that stand for them in a prompt. All its work is on the caller's current stream."""

    def __init__(self, model: nn.Module, cfg: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype):
        """`model` has `encode_tiles` and `arrange`, as `Llava` does; `tokens` is how many a step has at most."""
        self.model, self.cfg, self.device, self.dtype = model, cfg.vision, device, dtype
        self.features = torch.zeros(tokens, cfg.hidden, dtype=dtype, device=device)  # what the next step reads
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # by digest, [tokens, hidden]; used longest ago first
        self._room = kept_bytes(cfg, dtype.itemsize)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pixels = self._made = torch.empty(0)  # what graphs read and write

    def show_(self, parts: Sequence[Part]) -> None:
        """Fill `features` where the parts of a step's pictures belong."""
        for number, part in enumerate(parts):
            if part.tiles.digest not in self._kept:
                self._encode(self._group(other.tiles for other in parts[number:]))
            self._kept.move_to_end(part.tiles.digest)
            found = self._kept[part.tiles.digest][part.first : part.first + part.count]
            self.features[part.at : part.at + part.count].copy_(found)

    def rehearse(self) -> None:
        """Run the tower on every number of tiles; afterwards no kernel is new."""
        for tiles in range(MOST_TILES, 0, -1):
            self.model.encode_tiles(self._blank(tiles))

    def capture(self, pool: tuple[int, int], say: Say) -> None:
        """Record the tower for every number of tiles."""
        self._pixels = self._blank(MOST_TILES)
        self._made = self.model.encode_tiles(self._pixels)
        for tiles in range(MOST_TILES, 0, -1):
            say("capturing graphs of pictures", MOST_TILES - tiles, MOST_TILES)
            pixels, made = self._pixels[:tiles], self._made[:tiles]
            self._graphs[tiles] = record(lambda: made.copy_(self.model.encode_tiles(pixels)), pool)  # noqa: B023
        say("capturing graphs of pictures", MOST_TILES, MOST_TILES)

    def _group(self, wanted: Iterable[Tiles]) -> list[Tiles]:
        """The first picture, and those after it that are not kept either, as far as one call takes them."""
        group: dict[str, Tiles] = {}
        for tiles in wanted:
            known = tiles.digest in self._kept or tiles.digest in group
            if not known and (not group or sum(map(len, group.values())) + len(tiles) <= MOST_TILES):
                group[tiles.digest] = tiles
        return list(group.values())

    def _encode(self, group: list[Tiles]) -> None:
        parts = self._upload(group).split(MOST_TILES)
        features = self.model.arrange(torch.cat([self._run(part) for part in parts]), [tiles.size for tiles in group])
        while self._kept and sum(kept.nbytes for kept in (*self._kept.values(), *features)) > self._room:
            self._kept.popitem(last=False)
        for tiles, own in zip(group, features, strict=True):
            self._kept[tiles.digest] = own.clone()  # not a view that keeps its neighbours alive

    def _upload(self, group: list[Tiles]) -> Tensor:
        count, pinned = sum(map(len, group)), self.device.type == "cuda"
        staged = torch.empty(count, *group[0].pixels.shape[1:], dtype=torch.float32, pin_memory=pinned)
        np.concatenate([tiles.pixels for tiles in group], out=staged.numpy())
        return staged.to(self.device, non_blocking=True).to(self.dtype)

    def _run(self, pixels: Tensor) -> Tensor:
        graph = self._graphs.get(len(pixels))
        if graph is None:
            return self.model.encode_tiles(pixels)
        self._pixels[: len(pixels)].copy_(pixels)
        graph.replay()
        return self._made[: len(pixels)].clone()

    def _blank(self, tiles: int) -> Tensor:
        side = self.cfg.image_size
        return torch.zeros(tiles, 3, side, side, dtype=self.dtype, device=self.device)


def check_pictures(cfg: ModelConfig, request: Request) -> None:
    """UsageError if a picture is not one that this model takes, or does not lie on its placeholders."""
    if request.pictures and cfg.vision is None:
        raise UsageError("this model takes text only", "load a vision model, or send no pictures")
    end = 0
    for start, tiles in request.pictures:
        _check(cfg.vision, tiles)
        ids = request.ids[start : start + tiles.tokens]
        if start < end or ids != [cfg.vision.image_token] * tiles.tokens:
            raise UsageError(
                f"the picture at token {start} needs {tiles.tokens} placeholders of its own there, of token id "
                f"{cfg.vision.image_token}"
            )
        end = start + tiles.tokens


def _check(cfg: VisionConfig, tiles: Tiles) -> None:
    if not all(type(side) is int and side > 0 for side in tiles.size):
        raise UsageError(f"a picture has the size {shown(tiles.size)}; expected its height and width in pixels")
    want = tiling.tiles(cfg, tiles.size), 3, cfg.image_size, cfg.image_size
    if tuple(tiles.pixels.shape) != want:
        raise UsageError(
            f"a picture of {tiles.size[0]} x {tiles.size[1]} pixels (height x width) has prepared pixels of shape "
            f"{shown(list(tiles.pixels.shape))}; expected {list(want)}"
        )
    if tiles.tokens != tiling.tokens(cfg, tiles.size):
        raise UsageError(f"a picture has {tiles.tokens} tokens; expected {tiling.tokens(cfg, tiles.size)}")


def kept_bytes(cfg: ModelConfig, item: int) -> int:
    """Most that the features of pictures take between steps, at `item` bytes a number."""
    return max(_KEPT_TILES, _largest(cfg.vision)) * _tile_bytes(cfg, item)


def workspace(cfg: ModelConfig, item: int, tokens: int) -> int:
    """Bytes for pictures, beside the weights, of an engine whose steps have at most `tokens` tokens."""
    v = cfg.vision
    seen = MOST_TILES * (1 + v.side**2)
    layers = len(v.feature_layers)
    widest = max(3 * v.patch_size**2, 6 * v.hidden, 2 * v.ffn, layers * v.hidden + 3 * cfg.hidden)
    wide = (3 + layers) * v.hidden + widest
    activations = 2 * seen * wide * item  # graphs have memory of their own
    buffers = tokens * cfg.hidden * item + MOST_TILES * (_tile_bytes(cfg, item) + 3 * v.image_size**2 * (item + 4))
    arranged = 4 * max(MOST_TILES, _largest(v)) * _tile_bytes(cfg, item)
    return activations + buffers + arranged + kept_bytes(cfg, item)


def _largest(cfg: VisionConfig) -> int:
    """Tiles of the largest picture."""
    return max((tiling.tiles(cfg, size) for size in cfg.resolutions), default=1)


def _tile_bytes(cfg: ModelConfig, item: int) -> int:
    """Of a tile's features, with as many newlines as it has rows."""
    return (cfg.vision.tile_features + cfg.vision.side) * cfg.hidden * item
