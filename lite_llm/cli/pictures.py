"""Pictures that the user shows: opened, drawn small in the terminal, and what they cost the model."""

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lite_llm.cli.screen import LoadingBar, Screen, height, width
from lite_llm.cli.session import Session
from lite_llm.errors import UsageError, shown

if TYPE_CHECKING:
    from lite_llm.text.images import Picture

_LONGEST = 1000  # characters of a line in which a path is looked for
_WIDEST, _HIGHEST = 48, 16  # characters of a preview
_RGB = re.compile(r"\x1b\[([34]8);2;(\d+);(\d+);(\d+)m")
_LEVELS = (0, 95, 135, 175, 215, 255)  # of the colour cube that terminals of 256 colours have


def open_all(
    sources: Sequence[str], open_one: Callable[[str], "Picture"], screen: Screen
) -> list[tuple[str, "Picture"]]:
    """Pictures by their names, in order. Before a model is loaded, so that a slip costs no time."""
    return [(name_of(source), _watched(source, screen, open_one)) for source in sources]


def add(session: Session, screen: Screen, source: str) -> None:
    """Take a picture for the next question, and show it. A LiteLLMError leaves all as it was."""
    show(session, screen, name_of(source), _watched(source, screen, session.llm.open))


def show(session: Session, screen: Screen, name: str, picture: "Picture") -> None:
    session.show(name, picture)
    if screen.bars:  # a terminal, and not quiet
        draw(screen, picture)
    screen.note(receipt(session, picture))


def receipt(session: Session, picture: "Picture") -> str:
    return f"{session.names[picture.digest]}: {session.llm.receipt(picture)}"


def facts(session: Session) -> list[dict[str, object]]:
    """Of each picture that an answer is about: its name, and what its receipt says."""
    seen = [*session.pictures, *session.waiting]
    return [{"name": session.names[one.digest]} | dataclasses.asdict(session.llm.receipt(one)) for one in seen]


def draw(screen: Screen, picture: "Picture") -> None:
    """Half blocks on stderr, in as many colours as the terminal has; nothing where it has no such characters, or where
    the user wants no colours (NO_COLOR): in black and white dots of this size little can be made out."""
    from lite_llm.text.images import preview

    if not screen.colour or not (screen.err.encoding or "").lower().startswith("utf"):
        return
    wide, high = min(width() - 1, _WIDEST), min(height() // 2 - 2, _HIGHEST)
    if high < 4:
        return
    colours = colours_of(os.environ)
    text = preview(picture, wide, high, colour=colours > 2)
    screen.err.write(_RGB.sub(_nearest, text) if colours == 256 else text)
    screen.err.flush()


def colours_of(env: Mapping[str, str]) -> int:
    """2 (no more than black and white), 256, or 1 << 24: what the terminal says of itself."""
    if env.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 1 << 24
    return 256 if "256" in env.get("TERM", "") else 2


def source_of(typed: str) -> str:
    """The path or URL of one picture, without the quotes and backslashes that terminals and shells put around a name.

    UsageError, with the way to do it, where more than that was typed.
    """
    source = _unquoted(typed)
    if _found(source):
        return source
    words = _words(typed)
    if len(words) > 1 and all(map(_found, words)):
        raise UsageError("/image takes one picture at a time", "type it again for the next one")
    heads = (typed[:at] for at in range(min(len(typed), _LONGEST), 0, -1) if typed[at : at + 1] == " ")
    head = next((head for head in heads if _found(_unquoted(head))), None)
    if head is not None:
        question = typed[len(head) :].strip()
        raise UsageError(
            "/image takes a picture and no question", f"/image {head} first, then the question: {question[:60]}"
        )
    if ("*" in source or "?" in source) and "://" not in source[:10]:
        raise UsageError(
            f"{shown(source)}: there is no such file, and * and ? stand for themselves", "name one picture; Tab helps"
        )
    return source


def name_of(source: str) -> str:
    """What to call a picture: short, whatever it was named by."""
    if source[:5].lower() == "data:":
        return "data URL"
    name = source if "://" in source[:10] else Path(source).name
    return name if len(name) <= 60 else f"{name[:28]}...{name[-28:]}"


def _unquoted(text: str) -> str:
    words = _words(text)
    return words[0] if len(words) == 1 and (text[0] in "'\"" or "\\ " in text) else text


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe
        return [text]


def _found(source: str) -> bool:
    """Whether it names a file, or is a URL as a whole."""
    return "://" in source[:10] and " " not in source or os.path.isfile(os.path.expanduser(source))


def _watched(source: str, screen: Screen, open_one: Callable[[str], "Picture"]) -> "Picture":
    """While a URL is fetched, the terminal says so."""
    bar = LoadingBar(screen)
    if "://" in source[:10]:
        bar.status(f"fetching {name_of(source)} ...")
    try:
        return open_one(source)
    finally:
        bar.clear()


def _nearest(code: re.Match) -> str:
    """The 24-bit colour as one of 256: of the cube of 6 x 6 x 6, or of the 24 greys."""
    rgb = tuple(int(code[i]) for i in (2, 3, 4))
    cube = tuple(min(range(6), key=lambda i, value=value: abs(_LEVELS[i] - value)) for value in rgb)
    grey = min(max(round((sum(rgb) / 3 - 8) / 10), 0), 23)
    as_cube = sum((_LEVELS[i] - value) ** 2 for i, value in zip(cube, rgb, strict=True))
    as_grey = sum((8 + 10 * grey - value) ** 2 for value in rgb)
    number = 232 + grey if as_grey < as_cube else 16 + 36 * cube[0] + 6 * cube[1] + cube[2]
    return f"\x1b[{code[1]};5;{number}m"
