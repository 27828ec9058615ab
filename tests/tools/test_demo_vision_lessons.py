"""What the vision demo is trained with: rows of ids, and pictures that are painted where the training runs."""

import random

import numpy as np
import pytest
import torch

from tools import demo_vision
from tools import demo_vision_draw as drawing
from tools.demo_vision_data import dialogue
from tools.demo_vision_draw import COLOURS, HELD, MOST, PLACES, SHAPES
from tools.demo_vision_lessons import DRAWN, IGNORE, LONG_EVERY, Lessons, pixels
from tools.demo_vision_model import DemoLlava, config
from tools.demo_vision_paint import Painter
from tools.demo_vision_text import ASSISTANT, CONTEXT, END, IMAGE, PATCH, SIDE, TOKENS, Writer, train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(2000)


def test_ids_of_words_are_those_of_the_whole_text(tokenizer):
    writer = Writer(tokenizer)
    texts = [text for i in range(1500) for e in dialogue(f"{i}").exchanges for text in (e.user, e.answer)]
    texts += ["don't I'LL we've", "a  b   c ", "x\n\ny", "Bogotá, São_Paulo? 12ab3", "über__ 東京 №5 ½ it's"]
    for text in texts:
        assert writer.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_batches_of_a_kind_have_one_shape_whatever_is_said(tokenizer):
    lessons = Lessons(tokenizer, 1, 8192)
    shapes = [{name: array.shape for name, array in lessons[i].items()} for i in range(2 * LONG_EVERY)]
    short, long = shapes[0], shapes[LONG_EVERY - 1]
    assert short["ids"] == (32, 256) and long["ids"] == (8, CONTEXT)
    assert all(one == (long if i % LONG_EVERY == LONG_EVERY - 1 else short) for i, one in enumerate(shapes))
    assert short["places"] == (short["fields"][0] * TOKENS,) and short["drawn"][0] == -(-short["fields"][0] // DRAWN)


def test_answers_are_learnt_and_nothing_else(tokenizer):
    batch = Lessons(tokenizer, 1, 8192)[0]
    for ids, targets in zip(batch["ids"], batch["targets"], strict=True):
        learnt = np.flatnonzero(targets != IGNORE)
        assert (targets[learnt] == ids[learnt + 1]).all()
        said = []
        for at in np.flatnonzero(ids == ASSISTANT):
            said += range(at, at + 1 + np.flatnonzero(ids[at + 1 :] == END)[0])
        assert learnt.tolist() == said != []
    assert (batch["ids"].flatten()[batch["places"]] == IMAGE).all() and (batch["ids"] == IMAGE).sum() % TOKENS == 0


def test_a_batch_depends_on_seed_and_number_alone(tokenizer):
    plan = demo_vision.Plan(CPU, tokens=1024, workers=0)
    alone = demo_vision.lessons(plan, tokenizer)
    many = demo_vision.lessons(demo_vision.Plan(CPU, tokens=1024, workers=2), tokenizer)
    for _ in range(5):
        one, other = next(alone), next(many)
        assert all((one[name] == other[name]).all() for name in one)
    assert not np.array_equal(Lessons(tokenizer, 2, 1024)[0]["ids"], Lessons(tokenizer, 1, 1024)[0]["ids"])


# ---- pictures


def painted(scene: drawing.Scene, shades: list) -> np.ndarray:
    """The scene as the painter composes it, rounded."""
    short = min(scene.size)
    facts = [
        (SHAPES.index(s.kind), s.x, s.y, s.radius * short / scene.size[0], s.radius * short / scene.size[1], s.turn)
        for s in scene.shapes
    ]
    kinds, x, y, wide, high, turn = torch.tensor(facts, dtype=torch.float32).T[:, None]
    there = torch.ones(1, len(facts), dtype=torch.bool)
    at, radii = torch.stack((x, y), 2), torch.stack((wide, high), 2)
    out = Painter(SIDE, CPU, 0).compose(kinds.long(), there, at, radii, turn, torch.tensor([shades]).float())
    return out.clamp(0, 255).round()[0].numpy()


def test_painted_pictures_are_those_of_pil_and_the_processor():
    """Within 1.5 of 255 on average (PIL draws whole pixels of the large picture), the larger the closer."""
    differences = []
    for i in range(80):
        rng = random.Random(i)
        one = drawing.scene(rng, least=1)
        shades = drawing.shades(rng, one)
        small = np.asarray(drawing.draw_in(one, shades).resize((SIDE, SIDE), 3), dtype=float)
        differences.append((min(one.size), np.abs(painted(one, shades) - small).mean()))
    assert np.mean([d for _, d in differences]) < 1.5
    assert np.mean([d for side, d in differences if side > 150]) < 0.9
    assert max(d for _, d in differences) < 6


def test_random_scenes_hold_nothing_that_is_held_out_and_all_else():
    fields, grounds = Painter(SIDE, CPU, 3).scenes(20_000)
    number = torch.arange(len(PLACES)).expand(len(fields), -1)
    there = fields[..., 0] > 0
    seen = {tuple(row) for row in torch.stack((fields[..., 0], fields[..., 1], number), 2)[there].tolist()}
    seen = {(SHAPES[kind - 1], list(COLOURS)[colour - 1], place) for kind, colour, place in seen}
    every = {(kind, colour, place) for kind in SHAPES for colour in COLOURS for place in range(len(PLACES))}
    assert seen == every - HELD
    assert (
        (there == (fields[..., 1] > 0)).all() and there.sum(1).max() == MOST and set(grounds.tolist()) == set(range(9))
    )
    assert not (there & (fields[..., 1] - 1 == grounds[:, None])).any()


def test_painted_shapes_lie_where_their_fields_say():
    painter = Painter(96, CPU, 4)
    fields, grounds = painter.scenes(200)
    for picture, field, ground in zip(painter.paint(fields, grounds), fields, grounds, strict=True):
        assert picture.shape == (96, 96, 3) and picture.dtype == torch.uint8
        around = picture.int()
        for place, (kind, colour) in enumerate(field.tolist()):
            cell = around[32 * (place // 3) :, 32 * (place % 3) :][:32, :32].reshape(-1, 3)
            others = sum(share(cell, c) for i, c in enumerate(COLOURS) if i not in (ground, colour - 1))
            assert kind or share(cell, list(COLOURS)[ground]) > 0.5 or field[:, 0].count_nonzero() == 1
            assert not kind or share(cell, list(COLOURS)[colour - 1]) > 0.04, (place, kind, colour)
            assert others < 0.35


def share(pixels: torch.Tensor, colour: str) -> float:
    """Of the pixels that may bear this name, noise considered."""
    low, high = (torch.tensor(f(COLOURS[colour], axis=0)) for f in (np.min, np.max))
    return ((pixels >= low - 25) & (pixels <= high + 25)).all(1).float().mean().item()


def test_pictures_of_pil_are_among_them(tokenizer):
    batch = Lessons(tokenizer, 1, 8192)[0]
    assert batch["drawn"].shape[1:] == (SIDE, SIDE, 3)
    corner = batch["drawn"][:, 0, 0].astype(int)
    for pixel, ground in zip(corner, batch["grounds"][::DRAWN], strict=True):
        assert share(torch.tensor(pixel)[None], list(COLOURS)[ground]) == 1
    one = drawing.scene(random.Random(1))
    assert (pixels(random.Random(2), one) == pixels(random.Random(2), one)).all()


# ---- training


def test_the_tower_is_asked_about_a_field_at_the_token_in_its_middle():
    middles = DemoLlava(config(1, 64)).middles.tolist()
    for place, token in enumerate(middles):
        row, column = divmod(token, SIDE // PATCH)
        x, y = (column + 0.5) * PATCH / SIDE, (row + 0.5) * PATCH / SIDE
        assert abs(x - (place % 3 + 0.5) / 3) < 0.07 and abs(y - (place // 3 + 0.5) / 3) < 0.07
    assert len(set(middles)) == len(PLACES)


def test_layers_are_compiled_once_for_each_kind_and_give_the_same_loss(tokenizer):
    torch.manual_seed(0)
    model = DemoLlava(config(2, 64))
    batch = {name: torch.as_tensor(array) for name, array in Lessons(tokenizer, 1, 1024)[0].items()}
    picture = Painter(SIDE, CPU, 0).paint(batch["fields"], batch["grounds"])

    def loss() -> torch.Tensor:
        features = model.features(picture)
        return model.read(features, batch["ids"], batch["targets"], batch["places"])

    before = loss()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.layers:
        layer.compile(dynamic=False, backend="aot_eager")
    after = loss()
    after.backward()
    assert (after - before).abs() < 1e-5 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_phase_ends_by_its_steps_or_its_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(demo_vision.time, "monotonic", lambda: now[0])
    by_steps, by_time = demo_vision.Clock(0.0, 10, 2), demo_vision.Clock(20.0, 10, 2)
    by_steps.step, now[0] = 5, 5.0
    assert by_steps.share() == 0.5 and by_time.share() == 0.25
    due = [by_time.due(share) for share in (0.0, 0.1, 0.4, 0.5, 0.6, 0.99)]
    assert due == [True, False, False, True, False, False]


def test_minutes_are_kept(tokenizer, capsys):
    plan = demo_vision.Plan(
        CPU, minutes=0.1, looking=0.5, pictures=4, tokens=1024, kept=2, workers=0, layers=1, hidden=64
    )
    facts = demo_vision.Training(plan, DemoLlava(config(1, 64)), tokenizer).run()
    assert 5.5 < facts["seconds"] < 8 and facts["looks"] > 0 < facts["steps"]
    assert 8 < len(capsys.readouterr().out.splitlines()) < 18
