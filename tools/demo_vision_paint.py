"""Paints training pictures on the training device, thousands in one call, as PIL and the processor would make them.

A shape's edge is the step response of bicubic resampling, at a signed distance that is looked up in a table drawn
once; a test holds the pictures against those of PIL.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools import demo_vision_draw as draw
from tools.demo_vision_draw import COLOURS, HELD, MOST, OUTLINES, PLACES, SHAPES

_FINE, _EDGE = 128, 1.6  # texels of a kind's table, and how many radii it reaches from the centre
_NOISY = 0.25  # of the pictures


class Painter:
    """Draws what a scene leaves open (where in its field a shape lies, sizes, turns, shades, proportions) at random.

    `side` is of the pictures, in pixels; the generator must be of the device.
    """

    def __init__(self, side: int, device: torch.device, seed: int):
        self.side, self.device = side, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.table = torch.cat([_distances(kind) for kind in SHAPES], 1)[None, None].to(device)
        most = max(len(shades) for shades in COLOURS.values())
        even = [[shades[i * len(shades) // most] for i in range(most)] for shades in COLOURS.values()]
        self.shades = torch.tensor(even, dtype=torch.float32, device=device)
        self.turns = torch.tensor([draw.TURNS.get(kind, 0.0) for kind in SHAPES], device=device)
        self.plain = torch.tensor([list(COLOURS).index(name) for name in draw.PLAIN], device=device)
        self.held = torch.zeros(len(PLACES), len(SHAPES), len(COLOURS), dtype=torch.bool)
        for kind, colour, place in HELD:
            self.held[place, SHAPES.index(kind), list(COLOURS).index(colour)] = True
        self.held = self.held.to(device)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def _below(self, bound: int, *shape: int) -> Tensor:
        return (self._random(*shape) * bound).long().clamp(max=bound - 1)

    def scenes(self, count: int) -> tuple[Tensor, Tensor]:
        """Random `fields` [count, 9, 2] and `grounds` [count] as `paint` takes them; nothing in them is held out."""
        places = torch.arange(len(PLACES), device=self.device)
        plain = self._random(count) < draw.PLAIN_SHARE
        grounds = torch.where(plain, self.plain[self._below(len(self.plain), count)], self._below(len(COLOURS), count))
        kinds = self._below(len(SHAPES), count, len(PLACES))
        colours = self._below(len(COLOURS) - 1, count, len(PLACES))
        colours = colours + (colours >= grounds[:, None])  # any but the background's
        there = self._random(count, len(PLACES)).argsort(1) < 1 + self._below(MOST, count)[:, None]
        there &= ~self.held[places, kinds, colours]
        return torch.stack((kinds + 1, colours + 1), 2) * there[..., None], grounds

    def paint(self, fields: Tensor, grounds: Tensor) -> Tensor:
        """uint8 [pictures, side, side, 3], some of them with noise.

        `fields` [pictures, 9, 2] are kinds and colours, counted from 1, or 0 as in `labels`; `grounds` [pictures]
        indices of COLOURS. At most MOST fields of a picture hold anything.
        """
        count = len(fields)
        places = fields[..., 0].argsort(1, descending=True)[:, :MOST]
        kinds, colours = fields.long().gather(1, places[..., None].expand(-1, -1, 2)).unbind(2)
        there, kinds, colours = kinds > 0, (kinds - 1).clamp(min=0), (colours - 1).clamp(min=0)
        alone = there.sum(1, keepdim=True) == 1
        low, high = draw.RADII
        radius = low + (torch.where(alone, draw.ALONE, high) - low) * self._random(count, MOST)
        jitter = torch.where(alone, draw.JITTER, (draw.REACH - radius).clamp(max=draw.JITTER))[..., None]
        at = (torch.stack((places % 3, places // 3), 2) + 0.5) / 3 + jitter * (2 * self._random(count, MOST, 2) - 1)
        at = at.maximum(radius[..., None] + 0.01).minimum(0.99 - radius[..., None])
        turn = self.turns[kinds] * (2 * self._random(count, MOST) - 1) * (self._random(count, MOST) < draw.TURNED)
        stretch = 1 + (draw.STRETCH - 1) * self._random(count) * (self._random(count) > 0.3)
        wide = self._random(count) < 0.6
        shorter = torch.stack((torch.where(wide, 1 / stretch, 1.0), torch.where(wide, 1.0, 1 / stretch)), 1)
        shades = self._shades(torch.cat((grounds.long()[:, None], colours), 1))
        out = self.compose(kinds, there, at, radius[..., None] * shorter[:, None], turn, shades)
        noise = torch.randn(out.shape, generator=self.generator, device=self.device)
        out += noise * ((self._random(count) < _NOISY) * (1 + 5 * self._random(count)))[:, None, None, None]
        return out.clamp_(0, 255).round_().to(torch.uint8)

    def _shades(self, colours: Tensor) -> Tensor:
        """Random shades [*, 3] of these colours [*], as `demo_vision_draw` mixes them."""
        known = self.shades[colours]
        one, other = (
            known.gather(-2, self._below(known.shape[-2], *colours.shape)[..., None, None].expand(*colours.shape, 1, 3))
            for _ in range(2)
        )
        mixed = torch.lerp(one, other, self._random(*colours.shape, 1, 1)).squeeze(-2)
        return (mixed + draw.SHADE * (2 * self._random(*mixed.shape) - 1)).clamp(0, 255).round()

    def compose(self, kinds: Tensor, there: Tensor, at: Tensor, radii: Tensor, turn: Tensor, shades: Tensor) -> Tensor:
        """float32 [pictures, side, side, 3], rounded and within 0 and 255 only afterwards.

        Per picture and shape, all [pictures, shapes]: kind, whether it is there, centre and radii [..., 2] along x and
        y as shares of the side, turn in radians; `shades` [pictures, 1 + shapes, 3] with the background's first.
        """
        pixels = (torch.arange(self.side, device=self.device) + 0.5) / self.side
        u = ((pixels - at[..., :1]) / radii[..., :1])[..., None, :]
        v = ((pixels - at[..., 1:]) / radii[..., 1:])[..., :, None]
        cos, sin = turn.cos()[..., None, None], turn.sin()[..., None, None]
        x, y = cos * u + sin * v, cos * v - sin * u
        # texel centres: a table's first and last texel lie at -_EDGE and _EDGE
        column = (x.clamp(-_EDGE, _EDGE) / _EDGE + 1) / 2 * (_FINE - 1) + 0.5 + kinds[..., None, None] * _FINE
        row = (y.clamp(-_EDGE, _EDGE) / _EDGE + 1) / 2 * (_FINE - 1) + 0.5
        grid = torch.stack((column / (_FINE * len(SHAPES)), row / _FINE), -1) * 2 - 1
        distance = F.grid_sample(self.table, grid.flatten(0, 2)[None], align_corners=False)
        distance = distance.view(x.shape) * self.side * radii.prod(-1).sqrt()[..., None, None]  # in pixels
        cover = _step(-distance) * there[..., None, None]
        return shades[:, 0, None, None] + torch.einsum("pshw,psc->phwc", cover, shades[:, 1:] - shades[:, :1])


def _step(t: Tensor) -> Tensor:
    """The response of bicubic resampling (a = -0.5) to an edge, t pixels inside of it."""
    s = t.abs().clamp(max=2)
    near = s * (1 + s * s * (-5 / 6 + 0.375 * s))
    far = -1 / 6 + s * (2 + s * (-2 + s * (5 / 6 - 0.125 * s)))
    return 0.5 + t.sign() * torch.where(s < 1, near, far)


def _distances(kind: str) -> Tensor:
    """float32 [_FINE, _FINE]: signed distances to the outline, in radii, negative inside."""
    line = np.linspace(-_EDGE, _EDGE, _FINE)
    x, y = line[None, :], line[:, None]
    if kind in ("circle", "ring"):
        around = np.hypot(x, y)
        out = around - 1 if kind == "circle" else np.maximum(around - 1, draw.HOLE - around)
        return torch.from_numpy(out).float()
    corners = np.array(OUTLINES[kind])
    apart, inside = np.full((_FINE, _FINE), math.inf), np.zeros((_FINE, _FINE), dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        apart = np.minimum(apart, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if dy:
            inside ^= ((ay > y) != (by > y)) & (x < ax + dx * (y - ay) / dy)
    return torch.from_numpy(np.where(inside, -apart, apart)).float()
