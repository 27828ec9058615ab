"""The demo vision model's card and sample pictures. The exam's figures come into the card afterwards."""

import datetime
import random
from pathlib import Path

import torch

from tools.demo_exam import Scores, hardware, overall, table
from tools.demo_vision_draw import COLOURS, MOST, SHAPES, Scene, draw, lay

SAMPLES = (  # background, width, height, and what lies where by the index of its place; of each some is held out
    ("white", 480, 480, {0: "green heart", 2: "purple ring", 8: "red triangle"}),
    ("white", 480, 474, {1: "blue square", 2: "yellow triangle", 5: "pink circle", 7: "pink triangle"}),
    ("black", 480, 360, {3: "orange star", 4: "white circle", 8: "red heart"}),
    ("yellow", 360, 480, {2: "black square", 3: "black circle", 7: "black circle"}),
    ("blue", 480, 480, {4: "yellow ring", 8: "white star"}),
    ("white", 480, 340, {0: "red heart", 4: "green circle", 5: "purple cross", 7: "red heart"}),
)


def save_samples(folder: Path) -> None:
    """Writes picture-1.png and so on: what the demo shows."""
    for number, (background, width, height, shapes) in enumerate(SAMPLES, 1):
        rng = random.Random(f"sample {number}")
        laid = [lay(rng, *reversed(name.split()), place, alone=False) for place, name in shapes.items()]
        draw(rng, Scene(tuple(laid), background, (width, height))).save(folder / f"picture-{number}.png", optimize=True)


def card(facts: dict[str, object]) -> str:
    """The model card without the exam's figures; `facts` are what the training has measured."""
    return _CARD.format(**facts, date=datetime.date.today().isoformat(), torch=torch.__version__, **_KNOWN)


def write_scores(folder: Path, scores: Scores, device: torch.device) -> None:
    """Puts the exam's figures into the card in `folder`."""
    right, total = overall(scores)
    figures = (
        f"{right} of {total} held-out questions right ({100 * right / total:.1f} %), greedy, with lite_llm's own\n"
        f"`LLM.chat` on {hardware(device)}. Right means equal character for character.\n\n{table(scores)}\n"
    )
    file = folder / "README.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    file.write_text(f"{before}{_BEGIN}{figures}{_END}{after}", encoding="utf-8")


_KNOWN = {"samples": len(SAMPLES), "most": MOST, "shapes": ", ".join(SHAPES), "colours": ", ".join(COLOURS)}
_BEGIN, _END = "## Measured\n\n", "\nHeld out means:"
_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
language: en
license: apache-2.0
---

# lite_llm demo/vision

A LLaVA of {parameters} million parameters, trained from scratch by `tools/train_demo.py`, so that `cli_llava.py` can
be tried and tested on any machine without a download.

## What it is

A CLIP tower for pictures of 64 x 64 pixels, LLaVA's two-layer projector, and a Llama: 64 tokens for each picture. It
answers questions in English, in many phrasings, about pictures of up to {most} coloured shapes: what is in the picture,
colours, shapes, how many, where, and whether there is one. "And the square?" and "Where is it?" are understood, and
so are up to three pictures in a conversation. `picture-1.png` to `picture-{samples}.png` are examples, with shapes
where training never had them.

Shapes: {shapes}. Colours, of shapes and background: {colours}.
Greedy decoding is the default (`generation_config.json`): every question has exactly one right answer.

## What it is not

Not a model for any use of its own: it has seen nothing but what its script has drawn. Of a photo it sees shapes.

Its scenes have at most one shape in each field of a grid of three by three, near the middle of the field, with a radius
of 0.115 to 0.15 of the shorter side (a shape that is alone up to 0.26). Elsewhere it guesses: of 200 drawings of a
single circle, square or triangle it named all when they were centred in a field, and 162 when they lay anywhere. It
does not compare places ("Is the heart left of the ring?").

## Measured

The exam was not taken yet: `python tools/train_demo.py --vision --examine`.

Held out means: in each picture of the exam at least one shape has a colour, a kind and a place that are never together
in training, and the question is about that one wherever its topic allows. Half of the questions follow one to four
others about the same picture, follow-ups at least one; the answers before are the right ones, not the model's own.
"no picture" are questions without any picture, and small talk: there nothing is held out.

## How it was made

| | |
| --- | --- |
| command | `python tools/train_demo.py --vision {length} --seed {seed}` |
| hardware | {hardware}, {precision} |
| torch | {torch} |
| date | {date} |
| seed | {seed} |
| steps | {looks} of the tower alone, then {steps} of all |
| pictures | {pictures:.2f} million, none twice |
| tokens, padding included | {tokens:.0f} million |
| training time | {seconds:.0f} s |
| last training loss (answers only) | {loss:.4f} |

All pictures and all text are made by `tools/demo_vision_paint.py`, `tools/demo_vision_draw.py` and
`tools/demo_vision_ask.py`; no other data and no other model was used.
"""
