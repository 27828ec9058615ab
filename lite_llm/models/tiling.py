"""Pictures of any resolution as tiles: which grid a picture is fitted into, and how its features stand in the prompt.

Pure arithmetic on the size of a picture, its height before its width. Rounding follows transformers to the last bit,
for a processor that rounds otherwise would cut other tiles.
"""

import torch
from torch import Tensor

from lite_llm.config import VisionConfig

Size = tuple[int, int]


def tiles(cfg: VisionConfig, size: Size) -> int:
    """How many tiles a picture is cut into: the whole of it, shrunk, and those of its grid."""
    return 1 + _grid(cfg, size)[0] * _grid(cfg, size)[1] if cfg.resolutions else 1


def tokens(cfg: VisionConfig, size: Size) -> int:
    """How many tokens a picture takes in a prompt."""
    return len(order(cfg, size)) if cfg.resolutions else cfg.tile_features


def order(cfg: VisionConfig, size: Size) -> Tensor:
    """Which feature each token of a picture is (int64), counted through its tiles; -1 is the newline.

    First the shrunk picture, then the grid as one picture, row by row, without the rows or columns that are padding.
    """
    (down, across), side = _grid(cfg, size), cfg.side
    whole = torch.arange(side**2)
    grid = torch.arange(side**2, side**2 * (1 + down * across)).view(down, across, side, side)
    grid = _unpadded(grid.transpose(1, 2).reshape(down * side, across * side), size)
    return torch.cat([whole, torch.nn.functional.pad(grid, (0, 1), value=-1).flatten()])


def best_resolution(size: Size, resolutions: tuple[Size, ...]) -> Size:
    """The first of those that keep most of a picture's pixels and, among these, waste fewest of their own."""

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def _grid(cfg: VisionConfig, size: Size) -> Size:
    height, width = best_resolution(size, cfg.resolutions)
    return height // cfg.image_size, width // cfg.image_size


def _unpadded(grid: Tensor, size: Size) -> Tensor:
    """The part of a grid that shows the picture, which was scaled to its height or width and centred."""
    (height, width), (rows, columns) = size, grid.shape
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[pad : rows - pad]
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, pad : columns - pad]
