"""From a picture to what LLaVA takes: float pixels in tiles, and the placeholders that its features replace.

The pixels come from transformers' own image processor, in its Pillow form: torchvision rounds in another way, and
whether it is installed should not change an answer. How many tokens they become is a fact of the model, so the caller
says what the tower is; a checkpoint whose processor disagrees with its tower is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import BadCheckpoint, EnvironmentProblem, UnsupportedModel, UsageError, shown
from lite_llm.jsonfile import read_object
from lite_llm.text.images import Picture

if TYPE_CHECKING:
    import numpy as np

_FIXED = ("CLIPImageProcessor", "LlavaImageProcessor")
_TILED = ("LlavaNextImageProcessor",)
_MOST_TILES = 64
_MOST_BETWEEN = 1 << 27  # pixels of a picture on its way through the processor; 1 x 20,000 would be enlarged to 2e9


@dataclass(frozen=True)
class Tower:
    """What the vision tower takes and gives, as config.json has it."""

    image_token: int  # the id of the placeholder
    side: int  # pixels of a tile
    patch: int
    keeps_class: bool = False  # whether the class token is one of its features (select strategy "full")
    grids: tuple[tuple[int, int], ...] = ()  # (height, width) of LLaVA-NeXT's image_grid_pinpoints; LLaVA-1.5 has none


@dataclass(frozen=True, eq=False)
class Prepared:
    """`pixels` is float32 [tiles, 3, side, side]; `size` is (height, width) of the picture, as LLaVA-NeXT wants it."""

    pixels: "np.ndarray"
    size: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Receipt:
    """What becomes of a picture; as a string, one line for the user."""

    stored_size: tuple[int, int]  # width, height as it was sent
    notes: tuple[str, ...]  # what was done to it when it was opened
    seen: str  # what the processor makes of it
    tokens: int
    kv_bytes: int  # of these tokens

    def __str__(self) -> str:
        sent = _by(self.stored_size) + (f" ({', '.join(self.notes)})" if self.notes else "")
        return f"{sent} -> {self.seen} -> {self.tokens:,} tokens, {self.kv_bytes / (1 << 20):,.1f} MiB of KV"


class Processor:
    """The image processor of one checkpoint. `prepare` may be called from several threads."""

    def __init__(self, hf: Any, tower: Tower):
        self.tower, self._hf = tower, hf

    @classmethod
    def load(cls, path: Path | str, tower: Tower) -> "Processor":
        """That of a local checkpoint directory. Opens no connection and runs no code of the checkpoint."""
        path = Path(path)
        name, settings = _settings(path)
        kind = settings.get("image_processor_type")
        if not isinstance(kind, str):
            raise BadCheckpoint(f"{path / name}: image_processor_type = {shown(kind)}; expected a name")
        known = _TILED if tower.grids else _FIXED
        if kind.removesuffix("Fast") not in known:
            raise UnsupportedModel(
                f"{path / name}: image_processor_type = {shown(kind)}; supported: {', '.join(known)}"
            )
        try:
            from transformers import AutoImageProcessor

            # trust_remote_code=False keeps code of the checkpoint out, even where auto_map names some
            hf = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True, trust_remote_code=False)
        except ImportError as error:
            raise EnvironmentProblem(f"pictures need transformers and Pillow: {error}", "pip install pillow") from error
        except Exception as error:  # the values of a file may raise anything
            raise BadCheckpoint(
                f"{path / name} cannot be used: {type(error).__name__}: {shown(str(error))}",
                "compare it with the original checkpoint",
            ) from error
        processor = cls(hf, tower)
        processor._check(path / name)
        return processor

    def tokens(self, picture: Picture) -> int:
        """How many placeholders stand for a picture."""
        if self.tower.grids:
            return _tiled_tokens(*picture.size, self.tower, self._grid(picture))
        return (self.tower.side // self.tower.patch) ** 2 + self.tower.keeps_class

    def prepare(self, picture: Picture) -> Prepared:
        """The pixels of one picture; a UsageError if it is so long and thin that preparing it would take all memory."""
        import numpy as np

        width, height = self._between(picture)
        if width * height > _MOST_BETWEEN:
            raise UsageError(
                f"the picture is {_by(picture.size)} pixels; this model's processor would make {_by((width, height))} "
                "of it",
                "cut it to a shape that is less long and thin",
            )
        made = self._hf(images=picture.image, return_tensors="np")
        pixels = np.ascontiguousarray(made["pixel_values"], dtype=np.float32)
        if self.tower.grids:
            pixels = pixels[0]
        return Prepared(pixels, picture.size[::-1], self.tokens(picture))

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[list[int], list[range]]:
        """`ids` with each placeholder repeated as often as its picture has tokens, and where each picture then lies.

        Placeholders come from the chat template (or a prompt written by hand); the tokenizer never makes one of text
        in a message. UsageError if they are not as many as the pictures.
        """
        return expand(ids, self.tower.image_token, [self.tokens(picture) for picture in pictures])

    def receipt(self, picture: Picture, kv_bytes: int) -> Receipt:
        """What was sent, what the model sees of it, and what that costs at `kv_bytes` per token."""
        count = self.tokens(picture)
        return Receipt(picture.stored_size, picture.notes, self._seen(picture), count, count * kv_bytes)

    def _seen(self, picture: Picture) -> str:
        width, height = picture.size
        side = self.tower.side
        if self.tower.grids:
            high, wide = self._grid(picture)
            scale = min(wide / width, high / height)
            fitted = min(math.ceil(width * scale), wide), min(math.ceil(height * scale), high)
            tiles = (high // side) * (wide // side)
            where = "" if fitted == (wide, high) else f" in {_by((wide, high))}"
            return f"{_by(fitted)}{where}, {tiles} tile{'s' * (tiles != 1)} of {side} and an overview"
        shape = self._between(picture)
        steps = [f"padded to {_by(shape)}"] if self._pads() and width != height else []
        size = self._hf.size
        if size.shortest_edge:
            steps.append(_by(shape := (size.shortest_edge,) * 2 if self._pads() else shape))
        else:
            before = shape if self._pads() else picture.size
            shape = (size.width, size.height)
            steps.append("squashed to " * _squashes(before, shape) + _by(shape))
        if self._hf.do_center_crop and shape != (side, side):
            steps.append(f"the middle {_by((side, side))} of it")
        return ", ".join(steps)

    def _between(self, picture: Picture) -> tuple[int, int]:
        """Width and height of the largest picture that the processor makes on its way."""
        width, height = picture.size
        if self.tower.grids:
            high, wide = self._grid(picture)
            return wide, high
        if self._pads():
            return max(width, height), max(width, height)
        size = self._hf.size
        if not size.shortest_edge:
            return size.width, size.height
        short, edge = min(width, height), size.shortest_edge
        return (edge, int(edge * height / short)) if width == short else (int(edge * width / short), edge)

    def _grid(self, picture: Picture) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution(picture.size[::-1], [list(grid) for grid in self.tower.grids])

    def _pads(self) -> bool:
        return bool(self._hf.do_pad) and not self.tower.grids

    def _check(self, name: Path) -> None:
        """That the processor makes what the tower takes, found out with two small pictures."""
        import numpy as np
        import PIL.Image

        hf, tower = self._hf, self.tower
        sizes = [value for size in (hf.size, hf.crop_size) if size is not None for value in dict(size).values()]
        if not all(isinstance(value, int) and 0 < value <= 4096 for value in sizes if value is not None):
            raise BadCheckpoint(f"{name}: sizes of {shown(sizes)}; expected 1 to 4,096 pixels")
        if hf.size is None or not hf.do_resize or not (hf.size.shortest_edge or hf.size.height and hf.size.width):
            raise UnsupportedModel(f"{name}: pictures are not resized to a fixed size; supported: those that are")
        if hf.size.longest_edge or (hf.do_pad and type(hf).__name__.startswith("CLIP")):
            raise UnsupportedModel(
                f"{name}: longest_edge or do_pad is set; supported: processors of LLaVA without them"
            )
        if tower.grids and [list(grid) for grid in hf.image_grid_pinpoints] != [list(grid) for grid in tower.grids]:
            raise BadCheckpoint(f"{name}: image_grid_pinpoints differ from those of config.json")
        if any(side % tower.side or side <= 0 for grid in tower.grids for side in grid):
            raise BadCheckpoint(f"config.json: image_grid_pinpoints are no multiples of {tower.side}, the tower's side")
        if any(high * wide > _MOST_TILES * tower.side**2 for high, wide in tower.grids):
            raise BadCheckpoint(f"config.json: image_grid_pinpoints make more than {_MOST_TILES} tiles")
        for size in ((3, 2), (2, 3)):
            probe = Picture(PIL.Image.new("RGB", size), "", size, "RGB", ())
            try:
                pixels = self.prepare(probe).pixels
            except Exception as error:  # a mean of two numbers, an unknown way to resize
                raise BadCheckpoint(
                    f"{name} cannot be used: {type(error).__name__}: {shown(str(error))}",
                    "compare it with the original checkpoint",
                ) from error
            high, wide = self._grid(probe) if tower.grids else (0, 0)
            want = (1 + high * wide // tower.side**2, 3, tower.side, tower.side)
            if pixels.shape != want:
                raise BadCheckpoint(f"{name} makes pixels of shape {pixels.shape}; the tower takes {want}")
            if not np.isfinite(pixels).all():
                raise BadCheckpoint(f"{name}: image_std or another number makes pixels that are no numbers")


def expand(ids: Sequence[int], image_token: int, counts: Sequence[int]) -> tuple[list[int], list[range]]:
    """As `Processor.expand`, for pictures of which only the number of tokens is known."""
    found = sum(token == image_token for token in ids)
    if found != len(counts):
        raise UsageError(
            f"{len(counts)} picture{'s' * (len(counts) != 1)} and {found} placeholder{'s' * (found != 1)} "
            "for them in the prompt",
            "give one picture for each, in messages of the user (some chat templates drop those of other roles)",
        )
    whole: list[int] = []
    places: list[range] = []
    ahead = iter(counts)
    for token in ids:
        if token != image_token:
            whole.append(token)
            continue
        start, count = len(whole), next(ahead)
        whole.extend([token] * count)
        places.append(range(start, start + count))
    return whole, places


def _settings(path: Path) -> tuple[str, dict[str, Any]]:
    """The file that transformers takes the image processor from, and its settings."""
    nested = path / "processor_config.json"
    if nested.exists():
        settings = read_object(nested).get("image_processor")
        if isinstance(settings, dict):
            return nested.name, settings
    plain = path / "preprocessor_config.json"
    if not plain.exists():
        raise BadCheckpoint(
            f"{path}: no preprocessor_config.json", "copy the processor files of the original checkpoint into it"
        )
    return plain.name, read_object(plain)


def _tiled_tokens(width: int, height: int, tower: Tower, grid: tuple[int, int]) -> int:
    """Of an overview, and of the tiles put together, without what only padding is seen in, a newline after each row."""
    base = tower.side // tower.patch
    rows, columns = grid[0] // tower.side * base, grid[1] // tower.side * base
    if width / height > columns / rows:
        # rounded as the model does it, so that 0.1 + 0.2 does not make a row
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rows * columns + rows + base * base + tower.keeps_class


def _squashes(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether resizing changes the proportions, by a pixel or more."""
    scale = min(after[0] / before[0], after[1] / before[1])
    return any(after[i] - before[i] * scale >= 1 for i in (0, 1))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
