"""Where output goes: the answer to stdout, all else to stderr, and what each of the two may show."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TextIO

from lite_llm.text.escape import visible

_DIM, _RED, _END, _CLEAR = "\x1b[2m", "\x1b[31m", "\x1b[0m", "\r\x1b[K"


class Renderer(Protocol):
    def feed(self, text: str) -> str: ...

    def finish(self) -> str: ...


class Plain:
    """Text as it is."""

    def feed(self, text: str) -> str:
        return text

    def finish(self) -> str:
        return ""


@dataclass(frozen=True)
class Screen:
    out: TextIO  # the answer
    err: TextIO  # everything else
    markdown: bool  # answers may be styled
    escaped: bool  # answers must not reach the terminal as they are
    colour: bool  # on err
    bars: bool  # on err
    quiet: bool = False

    @classmethod
    def of_process(cls, *, raw: bool = False, quiet: bool = False) -> "Screen":
        out, err, env = sys.stdout, sys.stderr, os.environ
        for stream in (out, err):
            stream.reconfigure(errors="replace")  # a Latin-1 terminal shows ? instead of a traceback
        styled = _may_style(out, env) and (out.encoding or "").lower().startswith("utf")
        return cls(
            out=out,
            err=err,
            markdown=styled and not raw,
            escaped=(out.isatty() or styled) and not raw,
            colour=_may_style(err, env),
            bars=err.isatty() and env.get("TERM") != "dumb" and not quiet,
            quiet=quiet,
        )

    def renderer(self) -> Renderer:
        if not self.markdown:
            return Plain()
        from lite_llm.cli.markdown import Markdown  # rich is not needed for a pipe

        return Markdown(width)

    def answer(self, text: str) -> None:
        """A piece of what the renderer made of an answer, seen at once."""
        if text:
            self.out.write(text)
            self.out.flush()

    def safe(self, text: str) -> str:
        """The model's text as it may reach the answer's stream."""
        return visible(text) if self.escaped else text

    def note(self, text: str, loud: bool = False) -> None:
        """A line beside the answers: dim, and not at all when quiet unless it is `loud`."""
        if self.quiet and not loud:
            return
        text = self._folded(visible(text))
        self.err.write(f"{_DIM}{text}{_END}\n" if self.colour and not loud else f"{text}\n")
        self.err.flush()

    def error(self, text: str) -> None:
        label = f"{_RED}error:{_END} " if self.colour else "error: "
        self.err.write(self._folded(label + visible(text)) + "\n")
        self.err.flush()

    def _folded(self, text: str) -> str:
        """Long lines broken between words, on a terminal; a table's own spaces and other streams stay as they are."""
        if not self.err.isatty():
            return text
        size = width() - 1
        return "\n".join(
            textwrap.fill(line, size, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            if len(line) > size
            else line
            for line in text.split("\n")
        )


class LoadingBar:
    """One line on stderr that shows loading and disappears; nothing where there is no terminal."""

    def __init__(self, screen: Screen):
        self._screen, self._shown = screen, ""

    def __call__(self, done: int, total: int) -> None:
        """Of the weights, in bytes."""
        self.status(f"loading weights {_bar(done, total)} {_share(done, total):4.0%} of {_bytes(total)}")

    def stage(self, what: str, done: int, total: int) -> None:
        """Of what comes after the weights, in numbers."""
        self.status(f"{what} {_bar(done, total)} {done}/{total}")

    def status(self, text: str) -> None:
        if self._screen.bars and text != self._shown:
            self._screen.err.write(_CLEAR + text[: width() - 1])
            self._screen.err.flush()
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            self._screen.err.write(_CLEAR)
            self._screen.err.flush()
            self._shown = ""


def width() -> int:
    """Columns of the terminal, now; COLUMNS overrides."""
    return max(20, shutil.get_terminal_size().columns)


def height() -> int:
    """Lines of the terminal, now; LINES overrides."""
    return shutil.get_terminal_size().lines


def _share(done: int, total: int) -> float:
    return min(done / total, 1.0) if total else 1.0


def _bar(done: int, total: int) -> str:
    size = max(10, min(40, width() - 40))
    filled = int(_share(done, total) * size)
    return "█" * filled + "░" * (size - filled)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _may_style(stream: TextIO, env: Mapping[str, str]) -> bool:
    if env.get("NO_COLOR") or env.get("TERM") == "dumb":
        return False
    return stream.isatty() or env.get("FORCE_COLOR", "0") not in ("", "0")
