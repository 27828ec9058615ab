"""Pictures in the chat, without a model: what goes with which question, commands, files, what the terminal shows."""

import base64
import io
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from lite_llm.cli import args, commands, pictures, transcript
from lite_llm.cli.chat import Chat
from lite_llm.cli.screen import Screen
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError
from lite_llm.text.images import Picture, open_picture
from tests.cli.doubles import FakeLLM
from tests.text.pictures import chunk, encoded


class FakeLlava(FakeLLM):
    """Sees pictures, and says how many."""

    def encode(self, messages) -> list[int]:
        return list(range(sum(9 * len(colours([m])) + len(transcript.text_of(m).split()) for m in messages)))

    def open(self, source) -> Picture:
        return source if isinstance(source, Picture) else open_picture(source)

    def receipt(self, picture: Picture) -> str:
        return f"{picture.size[0]} wide"


def colours(messages) -> list[tuple[int, int, int]]:
    return [picture.image.getpixel((0, 0)) for message in messages for picture in transcript.pictures_of(message)]


def session(script="seen", **options) -> Session:
    return Session(FakeLlava(script, **options), SamplingParams(temperature=0.5))


def show(talk: Session, colour: str, width: int = 8) -> None:
    talk.show(f"{colour}.png", open_picture(Image.new("RGB", (width, 6), colour)))


def ask(talk: Session, text: str, **options):
    return talk.ask(text, lambda piece: None, **options)


RED, BLUE, LIME = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def test_pictures_go_with_the_next_question_in_their_order():
    talk = session()
    show(talk, "red")
    show(talk, "blue")
    ask(talk, "what?")
    ask(talk, "and what else?")
    show(talk, "lime")
    ask(talk, "and now?")
    assert [colours([m]) for m in talk.messages] == [[RED, BLUE], [], [], [], [LIME], []]
    assert [part["type"] for part in talk.messages[0]["content"]] == ["image", "image", "text"]
    assert talk.messages[2] == {"role": "user", "content": "and what else?"} and not talk.waiting
    assert talk.used == 3 * 9 + 6 + 2 + 1  # of the last prompt: pictures, words, answers before it, and its own


def test_the_same_picture_object_goes_to_the_model_each_time():
    talk = session()
    show(talk, "red")
    ask(talk, "one")
    ask(talk, "two")
    first, again = (transcript.pictures_of(asked[0][0]) for asked in talk.llm.asked)
    assert first[0] is again[0]


def test_undo_gives_pictures_back_to_the_next_question():
    talk = session()
    show(talk, "red")
    ask(talk, "one")
    show(talk, "blue")
    assert talk.undo() == "one" and talk.messages == []
    ask(talk, "two")
    assert colours(talk.messages) == [RED, BLUE]


def test_another_answer_sees_the_same_pictures():
    talk = session()
    show(talk, "red")
    ask(talk, "one")
    again = commands.run(talk, "/regen")
    assert again == commands.Again("one", edit=False)
    ask(talk, again.question, replace=True)
    assert colours(talk.messages) == [RED] and len(talk.messages) == 2
    show(talk, "blue")
    ask(talk, "another one", replace=True)
    assert colours(talk.messages) == [RED, BLUE] and talk.last_question() == "another one"


@pytest.mark.parametrize("way", ["too long", "stopped", "failed"])
def test_a_question_that_gets_no_answer_leaves_its_pictures_waiting(way):
    def hook(n):
        if way == "failed":
            raise RuntimeError("boom")

    talk = session(context=20, hook=hook)
    show(talk, "red")
    try:
        ask(talk, "word " * (30 if way == "too long" else 2), stopped=lambda: way == "stopped")
    except (UsageError, RuntimeError):
        assert way != "stopped"
    assert talk.messages == [] and len(talk.waiting) == 1


def test_clear_forgets_pictures():
    talk = session()
    talk.system = "be brief"
    show(talk, "red")
    ask(talk, "one")
    show(talk, "blue")
    assert commands.run(talk, "/clear") == "cleared, the pictures too; the system prompt stays"
    assert not talk.waiting and not talk.pictures and commands.run(talk, "/image").startswith("no pictures")


def test_image_lists_what_there_is():
    talk = session()
    show(talk, "red", width=3)
    ask(talk, "one")
    show(talk, "blue", width=5)
    assert commands.run(talk, "/image") == "red.png: 3 wide\nblue.png: 5 wide (with the next question)"
    assert commands.run(talk, "/show history") == "user: [red.png] one\nassistant: seen"


def test_a_picture_that_waits_can_be_taken_back():
    talk = session()
    show(talk, "red")
    assert commands.run(talk, "/image off").startswith("no picture")
    ask(talk, "one")
    assert not talk.pictures and not talk.waiting


def test_a_model_without_eyes_says_so():
    talk = Session(FakeLLM("hi"), SamplingParams())
    with pytest.raises(UsageError, match="takes text only"):
        show(talk, "red")
    ask(talk, "one")
    assert commands.run(talk, "/image").startswith("no pictures") and not talk.waiting


# ---- files


def test_a_saved_conversation_has_the_same_pixels(tmp_path):
    talk, path = session(), tmp_path / "talk.jsonl"
    for colour in ("red", "blue"):
        show(talk, colour)
    ask(talk, "what?")
    talk.save(path)
    first = json.loads(path.read_text().split("\n")[0])
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    other = session()
    other.load(path)
    assert [p.digest for p in other.pictures] == [p.digest for p in talk.pictures]
    assert [m["role"] for m in other.messages] == ["user", "assistant"] and other.last_question() == "what?"
    assert commands.run(other, "/image") == "red.png: 8 wide\nblue.png: 8 wide"
    with pytest.raises(UsageError, match="text only"):
        Session(FakeLLM("x"), SamplingParams()).load(path)


@pytest.mark.parametrize(
    "name, kept",
    [
        ("ünï cödé 東京.png", "ünï cödé 東京.png"), ("\udcff.png", "?.png"), ("two\nlines", "two lines"),
        ("東" * 80, "東" * 60), ("", "saved picture"),
    ],
)  # fmt: skip
def test_names_of_pictures_are_kept_in_their_files(name, kept, tmp_path):
    talk, path = session(), tmp_path / "talk.jsonl"
    talk.show(name, open_picture(Image.new("RGB", (8, 6), "red")))
    ask(talk, "what?")
    talk.save(path)
    assert not set(json.loads(path.read_text().split("\n")[0])) - {"role", "content"}  # any server takes it
    other = session()
    other.load(path)
    assert commands.run(other, "/image") == f"{kept}: 8 wide"


@pytest.mark.parametrize("kind", ["a png of others", "a jpeg", "a title that is no UTF-8"])
def test_files_without_names_are_read_as_ever(kind, tmp_path):
    data = encoded(Image.new("RGB", (8, 6), "red"), "JPEG" if kind == "a jpeg" else "PNG")
    if "UTF" in kind:
        data = data[:33] + chunk(b"iTXt", b"Title\0\0\0\0\0\xff\xfe") + data[33:]
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    (tmp_path / "talk.jsonl").write_text(json.dumps({"role": "user", "content": [part]}))
    talk = session()
    talk.load(tmp_path / "talk.jsonl")
    assert commands.run(talk, "/image") == ("\ufffd\ufffd: 8 wide" if "UTF" in kind else "saved picture: 8 wide")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "image_url", "image_url": "red.png"},
        {"type": "image", "path": "red.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "audio"}, {"type": "text", "text": 3}, "text", None,
    ],
)  # fmt: skip
def test_a_file_opens_nothing_but_what_is_in_it(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, "red")
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"role": "user", "content": [part]}))
    with pytest.raises(UsageError, match="line 1"):
        transcript.load(path)


# ---- the dialogue and the screen


class Stream(io.StringIO):
    encoding = "utf-8"

    def __init__(self, tty: bool):
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def screen(tty: bool = True, colour: bool = True, quiet: bool = False) -> Screen:
    return Screen(Stream(tty), Stream(tty), False, False, colour and tty, tty and not quiet, quiet)


def dialogue(lines: list[str], seen: Screen, talk: Session | None = None) -> Session:
    typed, talk = iter(lines), talk or session()

    def ask_line(meter: str, prefilled: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    assert Chat(talk, seen, ask_line).run() == 0
    return talk


def saved(folder, colour: str, name: str | None = None) -> str:
    path = folder / (name or f"{colour}.png")
    Image.new("RGB", (40, 30), colour).save(path)
    return str(path)


def test_pictures_are_shown_asked_about_and_a_bad_one_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("COLUMNS", "300")  # no message is folded
    red, blue, text = saved(tmp_path, "red"), saved(tmp_path, "blue", "ünï 東京.png"), tmp_path / "text.png"
    text.write_text("hello")
    seen = screen()
    lines = [
        f"/image {red}",
        f'/image "{blue}"',
        f"/image {text}",
        f"/image {tmp_path}",
        "/image /nowhere.png",
        "which?",
    ]
    talk = dialogue(lines, seen)
    assert colours(talk.messages) == [RED, BLUE]
    shown = seen.err.getvalue()
    assert shown.count("error:") == 3 and "holds text" in shown and "is a directory" in shown and "no such" in shown
    assert "red.png: 40 wide" in shown and "ünï 東京.png: 40 wide" in shown
    assert "\x1b[38;2;255;0;0m" in shown and "▀" in shown and seen.out.getvalue() == "seen\n"


@pytest.mark.parametrize("where", ["a pipe", "quiet", "no colour", "256 colours", "latin-1", "a low window"])
def test_a_preview_fits_its_terminal(where, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "" if where == "256 colours" else "truecolor")
    monkeypatch.setenv("LINES", "10" if where == "a low window" else "24")
    monkeypatch.setenv("COLUMNS", "80")
    seen = screen(tty=where != "a pipe", colour=where != "no colour", quiet=where == "quiet")
    seen.err.encoding = where if where == "latin-1" else "utf-8"
    pictures.add(session(), seen, saved(tmp_path, "red"))
    *drawn, last = seen.err.getvalue().rstrip("\n").split("\n") if where != "quiet" else [""]
    drawing = "\n".join(drawn)
    assert ("▀" in drawing or "█" in drawing) == (where == "256 colours")
    assert "\x1b[38;2" not in drawing and ("\x1b[38;5;196m" in drawing) == (where == "256 colours")
    assert where != "no colour" or "\x1b" not in drawing
    assert len(drawn) <= 10 and all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) < 80 for line in drawn)
    assert ("red.png: 40 wide" in last) == (where != "quiet")


@pytest.mark.parametrize(
    "env, colours", [({"COLORTERM": "truecolor"}, 1 << 24), ({"TERM": "tmux-256color"}, 256), ({"TERM": "vt100"}, 2)]
)
def test_colours_are_what_the_terminal_says(env, colours):
    assert pictures.colours_of(env) == colours


@pytest.mark.parametrize(
    "rgb, number",
    [((0, 0, 0), 16), ((255, 255, 255), 231), ((255, 0, 0), 196), ((128, 128, 128), 244), ((0, 95, 175), 25)],
)
def test_the_nearest_of_256_colours(rgb, number):
    assert pictures._RGB.sub(pictures._nearest, f"\x1b[38;2;{';'.join(map(str, rgb))}m") == f"\x1b[38;5;{number}m"


@pytest.mark.parametrize(
    "source, name",
    [
        ("/a/b/c.png", "c.png"), ("c.png", "c.png"), ("https://example.com/c.png?x=1", "https://example.com/c.png?x=1"),
        ("data:image/png;base64," + "A" * 1000, "data URL"),
        ("https://e.com/" + "x" * 100, f"https://e.com/{'x' * 14}...{'x' * 28}"),
    ],
)  # fmt: skip
def test_names_are_short(source, name):
    assert pictures.name_of(source) == name


def test_options_and_their_help(capsys):
    options = args.parse(args.llava_parser("cli_llava.py"), ["-i", "a.png", "--image", "b.png", "-m", "x"])
    assert (options.image, options.model) == (["a.png", "b.png"], "x")
    assert args.parse(args.chat_parser("cli.py"), []).image == []
    with pytest.raises(SystemExit) as left:
        args.parse(args.llava_parser("cli_llava.py"), ["--image", " "])
    assert left.value.code == 2 and "is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        args.parse(args.llava_parser("cli_llava.py"), ["--help"])
    shown = capsys.readouterr().out
    assert "photo.jpg" in shown and "exit codes" in shown and "python cli.py" not in shown


def test_the_screen_says_that_it_fetches(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    seen, talk = screen(), session()
    fetched = open_picture(Image.new("RGB", (4, 4), "red"))
    monkeypatch.setattr(talk, "llm", SimpleNamespace(open=lambda source: fetched, receipt=lambda picture: "4 wide"))
    pictures.add(talk, seen, "https://example.com/a.png")
    assert "fetching https://example.com/a.png ..." in seen.err.getvalue() and talk.waiting == [fetched]
