"""Pictures that the user shows: opened, drawn small in the terminal, and what they cost the model."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lite_llm.cli.screen import LoadingBar, Screen, height, width
from lite_llm.cli.session import Session

if TYPE_CHECKING:
    from lite_llm.text.images import Picture

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


def draw(screen: Screen, picture: "Picture") -> None:
    """Half blocks on stderr, in as many colours as the terminal has; nothing where it has no such characters."""
    from lite_llm.text.images import preview

    if not (screen.err.encoding or "").lower().startswith("utf"):
        return
    wide, high = min(width() - 1, _WIDEST), min(height() // 2 - 2, _HIGHEST)
    if high < 4:
        return
    colours = colours_of(os.environ) if screen.colour else 2
    text = preview(picture, wide, high, colour=colours > 2)
    screen.err.write(_RGB.sub(_nearest, text) if colours == 256 else text)
    screen.err.flush()


def colours_of(env: Mapping[str, str]) -> int:
    """2 (no more than black and white), 256, or 1 << 24: what the terminal says of itself."""
    if env.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 1 << 24
    return 256 if "256" in env.get("TERM", "") else 2


def name_of(source: str) -> str:
    """What to call a picture: short, whatever it was named by."""
    if source[:5].lower() == "data:":
        return "data URL"
    name = source if "://" in source[:10] else Path(source).name
    return name if len(name) <= 60 else f"{name[:28]}...{name[-28:]}"


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
