"""The lessons of the vision demo, how it is trained, and the bundled checkpoint. The exam's figures are in its model
card; here a handful of its questions proves that what lies in the repository is what was examined.
"""

import math
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from lite_llm import LLM
from lite_llm.cli.app import PICTURES
from tools import (
    demo_vision,
    demo_vision_ask,
    demo_vision_card,
    demo_vision_exam,
    demo_vision_lessons,
    demo_vision_text,
)
from tools.demo_vision_ask import Noun, listing, seen
from tools.demo_vision_data import TALK, TOPIC_NAMES, dialogue, held_out
from tools.demo_vision_draw import COLOURS, PLACES, SHAPES, Scene, Shape, draw, ground, labels, scene
from tools.demo_vision_lessons import Lessons
from tools.demo_vision_model import DemoLlava, config, save_model

DEMO = PICTURES.folder
MiB = 1 << 20


def shape(kind: str, colour: str, place: str) -> Shape:
    at = PLACES.index(place)
    return Shape(kind, colour, at, (at % 3 + 0.5) / 3, (at // 3 + 0.5) / 3, 0.12, 0.0)


THREE = Scene(
    (
        shape("star", "red", "at the top left"),
        shape("ring", "blue", "on the right"),
        shape("star", "blue", "at the bottom"),
    ),
    "white",
    (90, 60),
)


def test_a_dialogue_follows_from_its_seed():
    assert dialogue("a") == dialogue("a") != dialogue("b")
    assert held_out("count", 5) == held_out("count", 5)


def test_dialogues_have_questions_answers_and_at_most_two_pictures():
    for i in range(500):
        found = dialogue(f"{i}")
        assert found.exchanges and len(found.scenes) <= 2
        assert all(e.user == e.user.strip() != "" and e.answer for e in found.exchanges)


def test_no_picture_of_a_lesson_holds_what_is_held_out_and_each_of_the_exam_does():
    lessons = [shape for i in range(2000) for scene in dialogue(f"{i}").scenes for shape in scene.shapes]
    assert len(lessons) > 5000 and not any(shape.held for shape in lessons)
    for topic in TOPIC_NAMES:
        for exam in held_out(topic, 20):
            assert all(any(shape.held for shape in scene.shapes) for scene in exam.scenes)
            assert bool(exam.scenes) == (topic != TALK)


def test_one_shape_in_twelve_is_held_out_and_every_colour_kind_and_place_is_taught():
    every = [shape(kind, colour, place) for kind in SHAPES for colour in COLOURS for place in PLACES]
    held = [one for one in every if one.held]
    assert 40 < len(held) < 80
    taught = {(one.kind, one.colour) for one in every if not one.held}
    assert len(taught) == len(SHAPES) * len(COLOURS)


def test_words_for_a_scene():
    assert listing(THREE.shapes) == "a red star, a blue ring and a blue star"
    assert listing((THREE.shapes[0],) * 3) == "three red stars" and listing(()) == "nothing"
    assert seen(Scene((), "orange", (9, 9))) == "nothing on an orange background"
    assert [len(n.of(THREE)) for n in (Noun(), Noun("star"), Noun(colour="blue"), Noun("ring", "red"))] == [3, 2, 2, 0]
    assert demo_vision_ask.plural("cross") == "crosses" and demo_vision_ask.plural("ring") == "rings"


ANSWERS = {  # of questions about THREE
    r"How many stars \w+ \w+\?": "There are two stars.",
    r"How many rings \w+ \w+\?": "There is one ring.",
    r"How many hearts \w+ \w+\?": "There are no hearts.",
    r"How many (shapes|objects|things) \w+ \w+\?": "There are three shapes.",
    r"Where is the red star\?": "At the top left.",
    r"Where is the ring\?": "On the right.",
    r"Where are the stars\?": "At the top left and at the bottom.",
    r"Where is the red heart\?": "There is no red heart.",
    r"What colour is the ring\?": "The ring is blue.",
    r"What colour are the stars\?": "The stars are red and blue.",
    r"What colour is the cross\?": "There is no cross.",
    r"What colour is the background\?": "The background is white.",
    r"What is at the bottom\?": "A blue star.",
    r"What is in the middle\?": "Nothing.",
    r"Which shape is blue\?": "A blue ring and a blue star.",
    r"(Is there|Do you see|Can you see) a blue star\?": "Yes.",
    r"(Is there|Do you see|Can you see) a blue star (at the top left|on the right)\?": "No.",
    r"(Is there|Do you see|Can you see) a blue star at the bottom\?": "Yes.",
    r"Is there a red ring\?": "No.",
    r"Is there anything blue\?": "Yes.",
    r"Is the ring blue\?": "Yes.",
    r"Is the ring (?!blue)\w+\?": "No, it is blue.",
    r"Are there two stars\?": "Yes.",
    r"Are there (three|four) stars\?": "No, there are two stars.",
    r"What do you see\?": "I see a red star, a blue ring and a blue star on a white background.",
}


def test_answers_are_right():
    rng, asked = random.Random(0), set()
    topics = [getattr(demo_vision_ask, name) for name in ("describe", "colour", "which", "count", "where", "yes_or_no")]
    for _ in range(40_000):
        turn = rng.choice(topics)(rng, THREE)
        for question, answer in ANSWERS.items():
            if re.fullmatch(question, turn.user):
                asked.add(question)
                assert turn.answer == answer, turn
    assert asked == set(ANSWERS)


def test_what_only_the_words_before_explain():
    rng = random.Random(1)
    found = {}
    for _ in range(400):
        turn = demo_vision_ask.where(rng, THREE)
        if turn.about is None or turn.about.name != "blue ring":
            continue
        after = demo_vision_ask.follow_up(rng, THREE, turn)
        found[after.topic, after.about and after.about.name] = after.answer
    assert found["colour", "blue ring"] == "It is blue." and found["shape", "blue ring"] == "A blue ring."
    assert ("place", "blue ring") in found or ("place", "red star") in found


def test_several_pictures_are_told_apart():
    rng = random.Random(0)
    other = Scene((shape("heart", "pink", "in the middle"),), "black", (50, 50))
    turns = [demo_vision_ask.about_all(rng, [THREE, other]) for _ in range(800)]
    answers = {turn.user: turn.answer for turn in turns}
    assert answers["Which picture has a heart?"] == "The second."
    assert answers["Which picture has a star?"] == "The first."
    assert {answer for text, answer in answers.items() if text.endswith("a cross?")} == {"None of them."}
    assert answers["How many pictures are there?"] == "There are two pictures."
    assert {demo_vision_ask.in_picture(rng, "What is in the picture?", 1) for _ in range(20)} == {
        "What is in the second picture?", "What is in the second image?"
    }  # fmt: skip


def test_pictures_show_their_scene():
    """The middle of a shape has its colour, the corner that of the background, whatever the shades."""
    for i in range(200):
        rng = random.Random(f"{i}")
        one = scene(rng)
        pixels = np.asarray(draw(rng, one), dtype=int)
        assert pixels.shape == (one.size[1], one.size[0], 3)
        assert any(shape.place == 0 for shape in one.shapes) or near(pixels[0, 0], one.background)
        for shape in one.shapes:
            at = pixels[
                min(int(shape.y * one.size[1]), one.size[1] - 1), min(int(shape.x * one.size[0]), one.size[0] - 1)
            ]
            assert near(at, one.background if shape.kind == "ring" else shape.colour), (i, shape, at)
            assert int(shape.x * 3) + 3 * int(shape.y * 3) == shape.place


def near(pixel: np.ndarray, colour: str) -> bool:
    """Between two shades of a name, 9 off at most."""
    low, high = np.min(COLOURS[colour], axis=0) - 9, np.max(COLOURS[colour], axis=0) + 9
    return bool(((low <= pixel) & (pixel <= high)).all())


def test_shapes_do_not_touch():
    for i in range(300):
        one = scene(random.Random(f"{i}"))
        for a in one.shapes:
            for b in one.shapes:
                apart = math.hypot((a.x - b.x) * one.size[0], (a.y - b.y) * one.size[1])
                assert a is b or apart > (a.radius + b.radius) * min(one.size)


# ---- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of a model that has learnt for two steps."""
    out = tmp_path_factory.mktemp("vision")
    plan = demo_vision.Plan(
        torch.device("cpu"), steps=2, pictures=4, tokens=2048, kept=2, spelling=3000, workers=0, layers=1
    )
    demo_vision.build(plan, out)
    return out


def test_a_trained_directory_is_whole_and_loads_anywhere(folder):
    assert {file.name for file in folder.iterdir()} >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
        "chat_template.jinja", "generation_config.json", "README.md", "picture-1.png", "picture-6.png",
    }  # fmt: skip
    scores = demo_vision_exam.examine(folder, 1, device="cpu")
    assert list(scores) == TOPIC_NAMES
    demo_vision_card.write_scores(folder, scores | {TALK: (1, 1)}, torch.device("cpu"))
    card = (folder / "README.md").read_text()
    assert "of 9 held-out questions right" in card and "| no picture | 1 of 1 | 100.0 % |" in card
    assert card.count("## Measured") == card.count("Held out means:") == 1 and "not taken yet" not in card
    assert "## How it was made" in card


def test_the_template_writes_what_is_trained(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for i in range(60):
        talk = dialogue(f"{i}")
        said, answer = demo_vision_exam.messages(talk, random.Random(i))
        parts = [*said, {"role": "assistant", "content": answer}]
        for message in parts:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            message["content"] = [part if part["type"] == "text" else {"type": "image"} for part in content]
        ids = tokenizer.apply_chat_template(parts)["input_ids"]
        image, times = demo_vision_text.IMAGE, demo_vision_text.TOKENS
        whole = [token for one in ids for token in ([one] * times if one == image else [one])]
        assert whole == demo_vision_text.Writer(tokenizer.backend_tokenizer).dialogue(talk)
        assert ids.count(demo_vision_text.BOS) == 1


def test_the_processor_makes_the_pixels_that_are_trained(folder):
    processor = AutoProcessor.from_pretrained(folder)
    one = scene(random.Random(5))
    batch = processor(text="<image>?", images=draw(random.Random(6), one), return_tensors="pt")
    assert (batch["input_ids"] == demo_vision_text.IMAGE).sum() == demo_vision_text.TOKENS
    want = torch.tensor(demo_vision_lessons.pixels(random.Random(6), one)).permute(2, 0, 1).float() / 127.5 - 1
    assert (batch["pixel_values"][0] - want).abs().max() < 1e-6


def test_the_model_that_learns_is_the_one_that_is_saved(tmp_path, folder):
    torch.manual_seed(0)
    cfg, tokenizer = config(layers=1), AutoTokenizer.from_pretrained(folder)
    model = DemoLlava(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin with 0, and norms with 1
            parameter += 0.05 * torch.randn_like(parameter)
    model = model.bfloat16().float()
    save_model(model, cfg, tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    lesson = Lessons(tokenizer.backend_tokenizer, 1, 1024)[0]
    ids, targets, places = (torch.as_tensor(lesson[name].astype("int64")) for name in ("ids", "targets", "places"))
    pixels = torch.randint(0, 256, (len(lesson["fields"]), 64, 64, 3), dtype=torch.uint8)
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        ours = model.read(model.features(pixels), ids, targets, places)
        logits = theirs(input_ids=ids, pixel_values=scaled).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert len(pixels) > 3 and abs(ours - want) < 1e-3


def test_labels_say_what_lies_where():
    kinds, colours = labels(THREE).T
    assert kinds.tolist() == [1 + SHAPES.index("star"), 0, 0, 0, 0, 1 + SHAPES.index("ring"), 0, 4, 0]
    assert [c and list(COLOURS)[c - 1] for c in colours] == ["red", 0, 0, 0, 0, "blue", 0, "blue", 0]
    assert list(COLOURS)[ground(THREE)] == "white"


def test_sample_pictures_show_something_held_out_and_nothing_unknown():
    for background, _, _, shapes in demo_vision_card.SAMPLES:
        assert background in COLOURS and any(shape(*reversed(n.split()), PLACES[p]).held for p, n in shapes.items())
        assert {tuple(n.split()) for n in shapes.values()} <= {(c, k) for c in COLOURS for k in SHAPES}


# ---- the bundled checkpoint


def test_the_bundled_files_are_small_and_complete():
    files = {file.name: file.stat().st_size for file in DEMO.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", PICTURES.picture} <= set(files)
    assert sum(files.values()) < 16 * MiB


def test_the_vision_model_answers_held_out_questions():
    asked = [question for topic in TOPIC_NAMES for question in demo_vision_exam.asked(topic, 8)]
    with LLM(DEMO, say=lambda text: None) as llm:
        replies = demo_vision_exam.answers(llm, [said for said, _ in asked])
    assert sum(reply == answer for reply, (_, answer) in zip(replies, asked, strict=True)) >= 0.93 * len(asked)


@torch.no_grad()
def test_transformers_gives_the_same_answers():
    processor = AutoProcessor.from_pretrained(DEMO)
    theirs = LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    with LLM(DEMO, device="cpu", dtype="float32", say=lambda text: None) as llm:
        for number in (1, 4):
            picture = llm.open(DEMO / f"picture-{number}.png")
            text = {"type": "text", "text": "What is in the picture?"}
            ours = llm.chat([{"role": "user", "content": [{"type": "image", "image": picture}, text]}])
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, text]}], add_generation_prompt=True
            )
            batch = processor(text=prompt, images=picture.image, return_tensors="pt", add_special_tokens=False)
            out = theirs.generate(**batch, max_new_tokens=64)[0, batch["input_ids"].shape[1] :]
            assert ours.text == processor.decode(out, skip_special_tokens=True) != ""
