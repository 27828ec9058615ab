"""What is typed behind /image: a path, however a terminal or a person writes it, or more than that."""

import pytest

from lite_llm.cli import commands
from lite_llm.errors import UsageError
from tests.cli.test_vision import saved, session


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with pictures in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "my photo.png", "it's.png", "odd?.png"):
        saved(tmp_path, "red", name)
    return tmp_path


@pytest.mark.parametrize(
    "typed", ["a.png b.png", "'a.png' b.png", r"my\ photo.png a.png", "a.png https://example.com/b.png"]
)
def test_two_pictures_in_one_line_are_told_how(typed, folder):
    with pytest.raises(UsageError, match="one picture at a time"):
        commands.run(session(), f"/image {typed}")


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "my photo.png",
        '"my photo.png"',
        r"my\ photo.png",
        "it's.png",
        '"it\'s.png"',
        "https://example.com/a.png",
    ],
)
@pytest.mark.parametrize("question", ["what is this?", "what's this?"])
def test_a_question_behind_the_path_is_told_where_it_goes(path, question, folder):
    with pytest.raises(UsageError) as info:
        commands.run(session(), f"/image {path} {question}")
    assert str(info.value).endswith(f"no question: /image {path} first, then the question: {question}")


def test_a_line_of_any_length_is_no_path_and_costs_little(folder):
    line = "a.png " + "word 'word " * 20_000
    with pytest.raises(UsageError) as info:
        commands.run(session(), f"/image {line}")
    assert "no question" in str(info.value) and len(str(info.value)) < 200


def test_patterns_are_not_expanded(folder):
    assert commands.run(session(), "/image odd?.png") == commands.Look("odd?.png")
    assert commands.run(session(), "/image https://e.com/?a=*") == commands.Look("https://e.com/?a=*")
    for pattern in ("*.png", "?.png", '"my *.png"'):
        with pytest.raises(UsageError, match=r"\* and \? stand for themselves"):
            commands.run(session(), f"/image {pattern}")


@pytest.mark.parametrize(
    "typed, path",
    [
        ("a.png", "a.png"), ("my photo.png", "my photo.png"), ("'my photo.png'", "my photo.png"),
        ('"my photo.png"', "my photo.png"), (r"my\ photo.png", "my photo.png"), ("it's.png", "it's.png"),
        ("'it", "'it"), ("'a' 'b'", "'a' 'b'"), (r"C:\new.png", r"C:\new.png"),
        ("a.png", "a.png"), ("'/no/my photo.png'", "/no/my photo.png"), ("nowhere", "nowhere"),
    ],
)  # fmt: skip
def test_names_as_terminals_drop_them(typed, path, folder):
    assert commands.run(session(), f"/image {typed}") == commands.Look(path)
