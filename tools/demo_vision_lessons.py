"""Batches to train the vision demo on: every row one long dialogue about a picture or a few, cut at the row's width.

The shape of a batch depends on its number alone, so that a training step is compiled once for each of two shapes.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from tools.demo_vision_data import exchanges, system
from tools.demo_vision_draw import PLACES, Scene, draw, ground, labels
from tools.demo_vision_text import CONTEXT, END, IMAGE, SIDE, Writer

IGNORE = -100  # a target that is not learnt
DRAWN = 16  # one picture in so many comes from PIL
LONG_EVERY = 8  # of so many batches the last one is of long rows


@dataclass(frozen=True)
class Form:
    """Rows of a batch: width in tokens, pictures of the rows by turns, and how late a picture may come."""

    width: int
    pictures: tuple[int, ...]
    latest: int  # question


SHORT = Form(256, (1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 1, 1, 2, 1, 1, 1), 3)
LONG = Form(CONTEXT, (1, 2, 3, 2), 20)

Batch = dict[str, np.ndarray]


class Lessons:
    """Training batches by number, the same on every machine, of `tokens` tokens with the padding."""

    def __init__(self, tokenizer: Tokenizer, seed: int, tokens: int):
        self.tokenizer, self.seed, self.tokens = tokenizer, seed, tokens
        self._writer: Writer | None = None

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, item: int) -> Batch:
        """Arrays of one batch.

        `ids` int16 [rows, width], padded on the right; `targets` int16 [rows, width], the next token where it is one
        of an answer, or IGNORE; `places` int32 [pictures * TOKENS], flat indices of the placeholders. Of the pictures,
        in their order: `fields` uint8 [pictures, 9, 2] and `grounds` uint8 [pictures] as `labels` and `ground` give
        them; `drawn` uint8 [some, SIDE, SIDE, 3], those of every sixteenth picture as the processor resizes them.
        """
        self._writer = self._writer or Writer(self.tokenizer)  # in the worker: it does not travel
        rng = random.Random(f"{self.seed} {item}")
        form = LONG if item % LONG_EVERY == LONG_EVERY - 1 else SHORT
        count = max(1, self.tokens // form.width)
        rows = [_row(rng, self._writer, form, form.pictures[i % len(form.pictures)]) for i in range(count)]
        ids = np.full((count, form.width), END, dtype=np.int16)
        targets = np.full((count, form.width), IGNORE, dtype=np.int16)
        for i, (row, learnt, _) in enumerate(rows):
            ids[i, : len(row)] = row
            targets[i, : len(learnt) - 1] = learnt[1:]
        scenes = [scene for *_, shown in rows for scene in shown]
        drawn = [pixels(rng, scene) for scene in scenes[::DRAWN]]
        return {
            "ids": ids,
            "targets": targets,
            "places": np.flatnonzero(ids == IMAGE).astype(np.int32),
            "fields": np.array([labels(scene) for scene in scenes], np.uint8).reshape(-1, len(PLACES), 2),
            "grounds": np.array([ground(scene) for scene in scenes], np.uint8),
            "drawn": np.array(drawn, np.uint8).reshape(-1, SIDE, SIDE, 3),
        }


def _row(rng: random.Random, writer: Writer, form: Form, pictures: int) -> tuple[list[int], list[int], list[Scene]]:
    """Ids, the same with IGNORE for all that is not learnt, and the scenes."""
    while True:
        ids = writer.opening(system(rng))
        learnt, scenes = [IGNORE] * len(ids), []
        for one in exchanges(rng, pictures, form.latest):
            asked, said = writer.exchange(one)
            if len(ids) + len(asked) + len(said) > form.width:
                break
            ids += asked + said
            learnt += [IGNORE] * len(asked) + said
            scenes += one.pictures
        if len(scenes) == pictures:  # else the row was full before the last one came
            return ids, learnt, scenes


def pixels(rng: random.Random, scene: Scene) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3] of a picture of `scene`, after the processor's resizing."""
    return np.asarray(draw(rng, scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
