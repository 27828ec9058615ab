"""The inline part of Markdown: emphasis, code, links. A span that is not closed yet is held back, never guessed at."""

import re

Span = tuple[tuple[str, ...], str]
"""Terminal attributes (SGR codes) and the text that has them."""

BOLD, DIM, ITALIC, UNDERLINE, STRIKE, CODE = "1", "2", "3", "4", "9", "36"

_SPECIAL = re.compile(r"[`*_~\[\\]")
_ESCAPABLE = "\\`*_~[]#|"  # not ( and ): models write \( for mathematics
_LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]*)\)")
_LINK_BEGUN = re.compile(r"\[[^\[\]]*(\](\([^()\s]*)?)?")
_LONGEST = 400  # characters that an unclosed span may hold back
_STYLES = {1: (ITALIC,), 2: (BOLD,), 3: (BOLD, ITALIC)}
_HOLD = object()


def scan(text: str, final: bool, before: str = "") -> tuple[int, list[Span]]:
    """Spans of a line's beginning and how many characters they took; the rest must wait for more text.

    `before` is the character in front of `text`. With `final` nothing waits, and markers that were never closed stay
    as they are: no character is lost.
    """
    spans: list[Span] = []
    at = 0
    while at < len(text):
        special = _SPECIAL.search(text, at)
        start = special.start() if special else len(text)
        if start > at:
            spans.append(((), text[at:start]))
        if not special:
            return start, spans
        found = _span(text, start, final, text[start - 1] if start else before)
        if found is _HOLD and (final or len(text) - start > _LONGEST):
            found = None
        if found is _HOLD:
            return start, spans
        if found is None:  # just a character; a run of them stays together, so that ** is not * and *
            end = _run(text, start)
            if end == len(text) and not final and end - start < _LONGEST:
                return start, spans
            found = end, [((), text[start:end])]
        at, more = found
        spans += more
    return at, spans


def _span(text: str, start: int, final: bool, before: str):
    """(end, spans) of the construct that begins at `start`, None if there is none, _HOLD if more text decides."""
    mark = text[start]
    if mark == "\\":
        after = text[start + 1 : start + 2]
        return _HOLD if not after else (start + 2, [((), after)]) if after in _ESCAPABLE else None
    if mark == "[":
        return _link(text, start)
    end = _run(text, start)
    count = end - start
    if end == len(text):
        return _HOLD
    if mark == "`":
        return _close(text, start, end, final, rf"(?<!`)`{{{count}}}(?!`)", (CODE,))
    if text[end].isspace() or count > 3 or (mark == "~" and count != 2):
        return None
    if before.isalnum() and (mark == "_" or count == 1):  # snake_case, 2*3
        return None
    lonely = rf"(?<!{re.escape(mark)})" if count == 1 else ""
    after = r"(?!\w)" if mark == "_" else ""
    closer = rf"(?<!\s){lonely}{re.escape(mark * count)}(?!{re.escape(mark)}){after}"
    return _close(text, start, end, final, closer, (STRIKE,) if mark == "~" else _STYLES[count])


def _close(text: str, start: int, opened: int, final: bool, closer: str, style: tuple[str, ...]):
    match = re.compile(closer).search(text, opened + 1)
    if match is None or (match.end() == len(text) and not final):  # the next character may belong to the closer
        return _HOLD
    if match.end() - start > _LONGEST:  # the same whether the text came at once or in pieces
        return None
    inner = text[opened : match.start()]
    if style == (CODE,):
        padded = inner.startswith(" ") and inner.endswith(" ") and inner.strip()
        return match.end(), [(style, inner[1:-1] if padded else inner)]
    return match.end(), [(style + own, part) for own, part in scan(inner, True)[1]]


def _link(text: str, start: int):
    match = _LINK.match(text, start)
    if match is None:
        begun = _LINK_BEGUN.match(text, start)
        return _HOLD if begun and begun.end() == len(text) else None
    label = [((UNDERLINE, *own), part) for own, part in scan(match[1], True)[1]]
    return match.end(), label + ([((DIM,), f" ({match[2]})")] if match[2] not in ("", match[1]) else [])


def _run(text: str, start: int) -> int:
    """Where the run of equal characters that begins at `start` ends; a bracket or backslash is a run of one."""
    end = start + 1
    while end < len(text) and text[end] == text[start] and text[start] in "`*_~":
        end += 1
    return end
