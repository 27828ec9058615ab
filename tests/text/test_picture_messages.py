"""Pictures in messages, and their previews in a terminal."""

import re
from pathlib import Path

import pytest
from PIL import Image

from lite_llm.errors import UsageError
from lite_llm.text.images import MOST_PICTURES, open_picture, preview, take_pictures
from tests.text.pictures import encoded, photo

# ---- messages


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def test_pictures_are_taken_out_of_messages_in_order():
    image, data = photo(), encoded(photo())
    messages = [
        {"role": "system", "content": "Be brief."},
        *user(text("one"), {"type": "image", "image": image}, text("two"), {"type": "image", "path": "a.png"}),
        {"role": "assistant", "content": "Fine."},
        *user({"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "high"}}, text("three")),
        *user({"type": "image_url", "image_url": "data:image/png;base64,AA"}, {"type": "image", "url": "HTTP://x/"}),
        *user({"type": "image", "image": data}),
        *user({"type": "image", "image": Path("b.png")}),
    ]
    kept, sources = take_pictures(messages)
    assert sources == [
        image,
        Path("a.png"),
        "https://x/y.png",
        "data:image/png;base64,AA",
        "HTTP://x/",
        data,
        Path("b.png"),
    ]
    assert kept[1] == user(text("one"), {"type": "image"}, text("two"), {"type": "image"})[0]
    assert kept[0] is messages[0] and kept[2] is messages[2]
    assert messages[1]["content"][1]["image"] is image  # the caller's messages stay as they are


@pytest.mark.parametrize("part, said", [
    ({"type": "video", "video": "x"}, "messages[0].content[0].type = 'video'"),
    ({"type": "input_image"}, "input_image"),
    ({"type": "audio"}, "audio"), ({"type": None}, "None"), ({}, "None"), ("text", "None"), (7, "None"), (None, "None"),
    ({"type": ["image"]}, "['image']"), ({"type": "image"}, "no picture"), ({"type": "image", "b64": "x"}, "'b64'"),
    ({"type": "image", "image": "a", "url": "http://x"}, "image and url"),
    ({"type": "image", "url": "a.png"}, "http(s)"), ({"type": "image", "url": 3}, "a int"),
    ({"type": "image", "path": 3}, "a int"), ({"type": "image", "image": None}, "image is None"),
    ({"type": "image_url"}, "NoneType"),
    ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "http(s) or data"),
    ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "http(s) or data"),
    ({"type": "image_url", "image_url": {}}, "NoneType"), ({"type": "image_url", "image_url": ["x"]}, "a list"),
    ({"type": "image_url", "image_url": {"url": "http://x", "size": 3}}, "'size'"),
    ({"type": "image_url", "image_url": "http://x", "image": "a.png"}, "'image'"),
])  # fmt: skip
def test_strict_about_parts(part, said):
    with pytest.raises(UsageError) as info:
        take_pictures(user(part))
    assert said in str(info.value) and str(info.value).startswith("messages[0].content[0]")


def test_messages_from_a_network_open_no_files():
    for part in (
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "path": "a"},
        {"type": "image", "image": b""},
    ):
        with pytest.raises(UsageError, match="not opened"):
            take_pictures(user(part), local=False)
    assert take_pictures(user({"type": "image", "url": "http://x"}), local=False)[1] == ["http://x"]


def test_the_number_of_pictures_is_limited():
    part = {"type": "image", "path": "a.png"}
    assert len(take_pictures(user(*[part] * MOST_PICTURES))[1]) == MOST_PICTURES
    with pytest.raises(UsageError, match="65 pictures"):
        take_pictures(user(*[part] * MOST_PICTURES) + user(part))


@pytest.mark.parametrize("messages", [None, "hi", 3, {}, [], ["hi"], [None], [{"role": "user"}], [{"content": None}]])
def test_what_else_is_wrong_is_left_to_the_template(messages):
    assert take_pictures(messages) == (messages if isinstance(messages, list) else [], [])


# ---- previews


def shape(drawn):
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn).split("\n")
    assert plain.pop() == "" and drawn.endswith("\n")
    assert {len(line) for line in plain} == {len(plain[0])}
    return len(plain[0]), len(plain)


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("size, box, want", [
    ((400, 300), (40, 20), (40, 15)), ((300, 400), (40, 20), (30, 20)), ((1, 1), (40, 20), (1, 1)),
    ((10, 7), (40, 20), (10, 4)), ((1, 4000), (40, 20), (1, 20)), ((4000, 1), (40, 20), (40, 1)),
    ((9, 9), (1, 1), (1, 1)),
])  # fmt: skip
def test_previews_keep_the_shape_within_the_box(size, box, want, colour):
    assert shape(preview(open_picture(photo(*size)), *box, colour)) == want


def test_a_preview_shows_the_colours():
    image = Image.new("RGB", (1, 3))
    for y, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        image.putpixel((0, y), colour)
    assert preview(open_picture(image), 9, 9, True) == (
        "\x1b[38;2;255;0;0m\x1b[48;2;0;255;0m▀\x1b[0m\n\x1b[38;2;0;0;255m▀\x1b[0m\n"
    )
    dots = Image.new("L", (4, 2))
    dots.putdata([255, 255, 0, 0, 255, 0, 255, 0])
    assert preview(open_picture(dots), 9, 9, False) == "█▀▄ \n"
