"""Scenes of coloured shapes, and pictures of them.

A scene has at most one shape in each of nine places, so that every question about it has one right answer. A shape
whose colour, kind and place together are picked by the hash rule of `demo_data` is never in a training picture.
`demo_vision_paint` draws the same pictures by the thousand.
"""

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from tools.demo_data import is_held

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
COLOURS = {  # what people call by that name: pictures take a mixture of two of these, and a little of anything
    "red": ((215, 35, 35), (255, 0, 0), (190, 20, 30)),
    "orange": ((245, 140, 20), (255, 165, 0), (240, 120, 10)),
    "yellow": ((245, 220, 40), (255, 255, 0), (255, 225, 0)),
    "green": ((35, 150, 60), (0, 128, 0), (0, 255, 0), (50, 205, 50)),
    "blue": ((40, 80, 210), (0, 0, 255), (30, 120, 230)),
    "purple": ((130, 50, 170), (128, 0, 128), (148, 60, 200)),
    "pink": ((250, 150, 190), (255, 192, 203), (255, 130, 180)),
    "black": ((20, 20, 20), (0, 0, 0)),
    "white": ((245, 245, 245), (255, 255, 255)),
}
PLACES = (  # of the nine fields, row by row
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
MOST = 4  # shapes in a picture
PLAIN, PLAIN_SHARE = ("white", "black"), 0.5  # backgrounds that half of the pictures have
RADII = (0.115, 0.15)  # of the picture's shorter side: with the jitter, no shape leaves its field
ALONE = 0.26  # the largest radius of a shape that is alone
JITTER, REACH = 0.045, 0.16  # of a centre, and of a centre and a radius together
TURNS = {"square": 0.2, "heart": 0.3, "cross": 0.3, "star": math.pi, "triangle": 0.4}  # radians, either way
TURNED = 0.6  # of the shapes
SIDES, STRETCH = (64, 316), 1.5  # pixels of the shorter side, and how much longer the other may be
HOLE = 0.58  # of a ring's radius
SHADE = 9  # how far a colour is from a mixture of its shades


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    place: int  # index of PLACES
    x: float  # centre, as a share of the width
    y: float
    radius: float  # as a share of the shorter side
    turn: float  # radians

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def held(self) -> bool:
        return (self.kind, self.colour, self.place) in HELD


HELD = frozenset(
    (kind, colour, place)
    for kind, colour, place in itertools.product(SHAPES, COLOURS, range(len(PLACES)))
    if is_held(f"{colour} {kind} {PLACES[place]}")
)
_HELD = sorted(HELD)


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]  # in the order of their places
    background: str
    size: tuple[int, int]  # of the picture: width, height


def scene(rng: random.Random, held: bool = False, least: int = 0) -> Scene:
    """A random scene of `least` to MOST shapes, hardly ever without any.

    None of the shapes is held out, or, if `held`, the first that is drawn is.
    """
    background = rng.choice(PLAIN) if rng.random() < PLAIN_SHARE else rng.choice(list(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    count = 0 if not held and not least and rng.random() < 0.02 else rng.randint(max(least, 1), MOST)
    kind, colour = rng.choice(SHAPES), rng.choice(colours)  # one kind, or one colour, often repeats
    places = rng.sample(range(len(PLACES)), count)
    found = []
    if held:
        first = rng.choice([one for one in _HELD if one[1] != background])
        found.append(first)
        places = [first[2], *[place for place in places if place != first[2]][: count - 1]]
    for place in places[len(found) :]:
        one = None
        while one is None or (not held and one in HELD):
            one = (
                kind if rng.random() < 0.3 else rng.choice(SHAPES),
                colour if rng.random() < 0.3 else rng.choice(colours),
                place,
            )
        found.append(one)
    shapes = [lay(rng, *one, alone=count == 1) for one in found]
    return Scene(tuple(sorted(shapes, key=lambda shape: shape.place)), background, _size(rng))


def _size(rng: random.Random) -> tuple[int, int]:
    short = int(SIDES[0] * (SIDES[1] / SIDES[0]) ** rng.random())
    long = short if rng.random() < 0.3 else int(short * rng.uniform(1.0, STRETCH))
    return (long, short) if rng.random() < 0.6 else (short, long)


def lay(rng: random.Random, kind: str, colour: str, place: int, alone: bool) -> Shape:
    """A shape of random size and turn, somewhere in its field; larger perhaps if it is `alone` in its picture."""
    radius = rng.uniform(RADII[0], ALONE if alone else RADII[1])
    jitter = JITTER if alone else min(JITTER, REACH - radius)
    x, y = (
        min(max((field + 0.5) / 3 + rng.uniform(-jitter, jitter), radius + 0.01), 0.99 - radius)
        for field in (place % 3, place // 3)
    )
    turn = TURNS.get(kind, 0.0)
    return Shape(kind, colour, place, x, y, radius, rng.uniform(-turn, turn) if rng.random() < TURNED else 0.0)


# ---- pictures

Shade = tuple[int, int, int]  # red, green, blue, up to 255


def draw(rng: random.Random, scene: Scene) -> Image.Image:
    """An RGB picture; `rng` gives what is of no matter: shades."""
    return draw_in(scene, shades(rng, scene))


def shades(rng: random.Random, scene: Scene) -> list[Shade]:
    """Of the background, then of each shape."""
    return [_shade(rng, name) for name in (scene.background, *(shape.colour for shape in scene.shapes))]


def draw_in(scene: Scene, shades: list[Shade]) -> Image.Image:
    width, height = scene.size
    ground = shades[0]
    image = Image.new("RGB", scene.size, ground)
    pen = ImageDraw.Draw(image)
    for shape, colour in zip(scene.shapes, shades[1:], strict=True):
        x, y, r = shape.x * width, shape.y * height, shape.radius * min(scene.size)
        if shape.kind in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            if shape.kind == "ring":
                r *= HOLE
                pen.ellipse((x - r, y - r, x + r, y + r), fill=ground)
        else:
            cos, sin = r * math.cos(shape.turn), r * math.sin(shape.turn)
            pen.polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in OUTLINES[shape.kind]], fill=colour)
    return image


def _shade(rng: random.Random, name: str) -> Shade:
    one, other, share = rng.choice(COLOURS[name]), rng.choice(COLOURS[name]), rng.random()
    return tuple(
        min(max(round(a + (b - a) * share + rng.uniform(-SHADE, SHADE)), 0), 255)
        for a, b in zip(one, other, strict=True)
    )


def labels(scene: Scene) -> np.ndarray:
    """uint8 [9, 2]: kind and colour of the shape at each place, counted from 1, or 0."""
    out = np.zeros((len(PLACES), 2), dtype=np.uint8)
    for shape in scene.shapes:
        out[shape.place] = 1 + SHAPES.index(shape.kind), 1 + _NUMBER[shape.colour]
    return out


def ground(scene: Scene) -> int:
    """The background as an index of COLOURS."""
    return _NUMBER[scene.background]


_NUMBER = {colour: number for number, colour in enumerate(COLOURS)}


def _round(points: int, radius) -> list[tuple[float, float]]:
    """Corners around the centre, the first one at the top."""
    angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
    return [(radius(i) * math.cos(angle), radius(i) * math.sin(angle)) for i, angle in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    ts = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            16 * math.sin(t) ** 3 / 17,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 17,
        )
        for t in ts
    ]


_ARM = 0.34
OUTLINES = {  # clockwise, within a circle of radius 1
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _round(3, lambda i: 1.0),
    "star": _round(10, lambda i: (1.0, 0.42)[i % 2]),
    "heart": _heart(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
