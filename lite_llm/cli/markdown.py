"""Markdown for a terminal, as it arrives and append-only: what was printed is never touched again, so nothing flickers.

A line's beginning is held back until its kind is known, a word until it ends (it may have to wrap), a span until it
closes, a table until its last row. Everything else is printed at once.
"""

import re
from collections.abc import Callable
from enum import Enum, auto

from rich.cells import cell_len

from lite_llm.cli.inline import BOLD, CODE, DIM, UNDERLINE, scan

_UNDECIDED = re.compile(r"\s*(#{0,6}|[-*_+\s]*|\d{1,9}[.)]?|(>\s?)+)\s*|\s*(```|~~~|\|).*|\s*(``?|~~?)")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^`]*)")
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s+")
_RULE = re.compile(r"\s{0,3}([-*_])(\s*\1){2,}\s*")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)")
_QUOTE = re.compile(r"\s{0,3}(>\s?)+")
_DELIMITERS = re.compile(r"\s*\|?(\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
_PIECES = re.compile(r"\s+|\S+")
_HEADING_STYLES = {1: (BOLD, UNDERLINE), 2: (BOLD, UNDERLINE)}


class _Kind(Enum):
    NEW = auto()  # nothing of this line is decided
    TEXT = auto()
    CODE = auto()  # inside a fence, in the middle of a line


class Markdown:
    """`feed` text as it comes and print what it returns; `finish` gives the rest. `width()` is asked at each wrap."""

    def __init__(self, width: Callable[[], int]):
        self._width = width
        self._kind = _Kind.NEW
        self._line = ""  # of the current line, what is not printed
        self._before = ""  # the character in front of it
        self._fence: str | None = None  # what will close the code block
        self._table: list[str] = []
        self._out: list[str] = []
        self._new_line()

    def feed(self, text: str) -> str:
        lines = text.split("\n")
        for line in lines[:-1]:
            self._line += line
            self._advance(final=True)
            self._end_line()
        self._line += lines[-1]
        if self._line:
            self._advance(final=False)
        return self._take()

    def finish(self) -> str:
        if self._line:
            self._advance(final=True)
        self._flush_word()
        self._flush_table(last=True)
        return self._take()

    def _take(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    # ---- blocks

    def _advance(self, final: bool) -> None:
        if self._fence is not None:
            self._code(final)
            return
        if self._kind is _Kind.NEW:
            if not final and _UNDECIDED.fullmatch(self._line):
                return
            self._begin_line(final)
        if self._kind is _Kind.TEXT:
            self._text(final)

    def _begin_line(self, final: bool) -> None:
        """Decide what the line is, and print its marker. Fences, rules and rows arrive here complete."""
        line = self._line
        if final and line.lstrip().startswith("|"):
            self._table.append(line)
            self._line = ""
            return
        self._flush_table()
        self._kind = _Kind.TEXT
        if final and (fence := _FENCE.fullmatch(line)):
            self._fence = fence[1]
            self._emit((DIM,), line)
            self._line = ""
        elif final and _RULE.fullmatch(line):
            self._emit((DIM,), "─" * max(3, min(self._width() - 1, 60)))
            self._line = ""
        elif heading := _HEADING.match(line):
            self._style = _HEADING_STYLES.get(len(heading[1]), (BOLD,))
            self._line = line[heading.end() :]  # closing #s stay: a stream has shown them before it knows
        elif item := _ITEM.match(line):
            marker = item[2] + item[3] if item[2][0].isdigit() else "•" + item[3]
            self._indent(item[1] + marker, " " * len(item[1] + marker))
            self._line = line[item.end() :]
        elif quote := _QUOTE.match(line):
            bar = f"\x1b[{DIM}m" + "│ " * quote[0].count(">") + "\x1b[0m"
            self._indent(bar, bar, 2 * quote[0].count(">"))
            self._line = line[quote.end() :]
        else:
            spaces = line[: len(line) - len(line.lstrip())].replace("\t", "    ")
            self._indent(spaces, spaces)
            self._line = line.lstrip()

    def _code(self, final: bool) -> None:
        stripped = self._line.strip()
        if self._kind is _Kind.NEW:
            closes = stripped and stripped == stripped[0] * len(stripped) and stripped.startswith(self._fence[0])
            if final and closes and len(stripped) >= len(self._fence):
                self._emit((DIM,), self._line)
                self._fence, self._line = None, ""
                return
            if not final and (closes or not stripped):
                return
            self._kind = _Kind.CODE
        self._emit((CODE,), self._line)
        self._line = ""

    def _end_line(self) -> None:
        self._flush_word()
        if not self._table or self._kind is not _Kind.NEW:  # a row's line ends with its table
            self._out.append("\n")
        self._new_line()

    def _new_line(self) -> None:
        self._kind = _Kind.NEW
        self._line = self._before = ""
        self._style: tuple[str, ...] = ()
        self._hanging, self._margin = "", 0  # what continues a wrapped line, and its width
        self._column = 0
        self._gap = ""  # spaces that are printed if a word follows on the same line
        self._word: list[tuple[tuple[str, ...], str]] = []
        self._word_width = 0
        self._before_cell = ""  # the character in front of the word's next one
        self._long = False  # whether the word has begun on the screen and fits no line

    # ---- running text

    def _text(self, final: bool) -> None:
        done, spans = scan(self._line, final, self._before)
        if done:
            self._before = self._line[done - 1]
        self._line = self._line[done:]
        for style, text in spans:
            for piece in _PIECES.findall(text.replace("\t", "    ")):
                self._put(self._style + style, piece)

    def _put(self, style: tuple[str, ...], piece: str) -> None:
        """Add spaces, or a part of a word. Chinese, Japanese and Korean break between any two characters."""
        if piece.isspace():
            self._flush_word()
            self._long = False
            self._gap += piece
            return
        for part in [piece] if piece.isascii() else piece:
            if cell_len(part) > len(part) and not _joins(part, self._before_cell):
                self._flush_word()
                self._long = False
            self._before_cell = part[-1]
            self._word.append((style, part))
            self._word_width += cell_len(part)
        if self._word_width > self._width():  # its line is clear by now, so there is nothing to wait for
            self._flush_word()
            self._long = True

    def _flush_word(self) -> None:
        """Print the word, on a new line if it does not fit. One that fits no line is left to the terminal to wrap, so
        that a long link can be copied."""
        if not self._word:
            return
        width, size = self._width(), self._word_width  # by character: joined emoji measure less, but come in pieces
        if not self._long and self._column > self._margin and self._column + len(self._gap) + size > width:
            self._out.append("\n" + self._hanging)
            self._column = self._margin
        else:
            self._emit(self._style, self._gap)  # a heading's underline has no holes
            self._column += len(self._gap)
        for style, text in self._word:
            self._emit(style, text)
        self._column += size
        if self._column > width:
            self._column %= width
        self._gap, self._word, self._word_width = "", [], 0

    def _indent(self, first: str, rest: str, width: int | None = None) -> None:
        self._out.append(first)
        self._hanging = rest
        self._column = self._margin = cell_len(rest) if width is None else width

    def _emit(self, style: tuple[str, ...], text: str) -> None:
        # Each piece ends its own attributes, so an answer that is stopped anywhere leaves the terminal clean.
        self._out.append(f"\x1b[{';'.join(style)}m{text}\x1b[0m" if style and text else text)

    # ---- tables

    def _flush_table(self, last: bool = False) -> None:
        """Print the rows so far: as a table if they are one and it fits, else as they came."""
        if not self._table:
            return
        rows, self._table = self._table, []
        self._out.append("\n".join(_table(rows, self._width()) or rows))
        self._out.append("" if last else "\n")


def _table(lines: list[str], width: int) -> list[str] | None:
    if len(lines) < 2 or not _DELIMITERS.fullmatch(lines[1]):
        return None
    cells = [_cells(line) for line in lines]
    columns = len(cells[1])
    if len(cells[0]) != columns or any(len(row) > columns for row in cells):  # what does not fit would be lost
        return None
    rows = [(row + [[]] * columns)[:columns] for row in cells]
    right = [mark.endswith(":") and not mark.startswith(":") for mark in _marks(lines[1])]
    del rows[1]
    sizes = [max(max(_cell_width(row[i]) for row in rows), 1) for i in range(columns)]
    if sum(sizes) + 3 * columns - 1 > width:
        return None
    lines = [
        f" \x1b[{DIM}m│\x1b[0m ".join(_cell(row[i], sizes[i], right[i], head=row is rows[0]) for i in range(columns))
        for row in rows
    ]
    lines.insert(1, f"\x1b[{DIM}m" + "─┼─".join("─" * size for size in sizes) + "\x1b[0m")
    return lines


def _cells(line: str) -> list[list[tuple[tuple[str, ...], str]]]:
    body = line.strip().removeprefix("|")
    body = body[:-1] if body.endswith("|") and not body.endswith("\\|") else body
    return [scan(cell.strip(), True)[1] for cell in re.split(r"(?<!\\)\|", body)]


def _marks(line: str) -> list[str]:
    return [mark.strip() for mark in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _cell_width(spans: list[tuple[tuple[str, ...], str]]) -> int:
    return sum(cell_len(text) for _, text in spans)


def _cell(spans: list[tuple[tuple[str, ...], str]], size: int, right: bool, head: bool) -> str:
    extra = (BOLD,) if head else ()
    text = "".join(f"\x1b[{';'.join(extra + style)}m{part}\x1b[0m" if extra + style else part for style, part in spans)
    padding = " " * (size - _cell_width(spans))
    return padding + text if right else text + padding


def _joins(character: str, before: str) -> bool:
    """Whether a wide character is shown in one cell with what is in front: skin tones, families."""
    return before == "\u200d" or character in "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
