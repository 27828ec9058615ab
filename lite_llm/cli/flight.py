"""Requests in flight: a line for each, drawn while they run. A view takes one part in a hundred of the time at most."""

import dataclasses
import heapq
import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from lite_llm.cli.interrupt import whole
from lite_llm.outputs import InFlight, Output, Progress, SlotMap
from lite_llm.text.escape import visible

FRAME = 0.1  # seconds between two frames, at least
SHARE = 0.01  # of the time, for drawing
WINDOW = 2.0  # seconds over which tokens per second are counted
_TITLED, _WIDE = 60, 112  # columns from which on there are titles and the map, and everything
_TALL = 10  # lines from which on there are a map and a hint
_BAR = 40  # columns of a bar, at most
_TOP = 40  # lines of /top, at most
_GAP = "  "
_STYLES = {  # colours mean what they mean on the server's page
    "head": Style(bold=True),
    "used": Style(color="bright_blue"),
    "kept": Style(color="cyan"),
    "dim": Style(dim=True),
    "waiting": Style(dim=True),
    "prompt": Style(color="yellow"),
    "decoding": Style(color="bright_blue"),
    "done": Style(color="green"),
    "bad": Style(color="red"),
}

Line = list[tuple[str, str]]
"""Pieces of text, each with the name of its style or ""."""


class Watched(Protocol):
    """What can be watched, such as an LLM."""

    def in_flight(self) -> InFlight: ...


class FlightView:
    """The requests of an engine on a terminal, gone without a trace at the end; nothing at all on any other stream.

    with FlightView() as view:
        while ...:
            llm.step()
            view.update(llm)

    While nobody steps nothing moves: whoever waits for requests calls `update` as well.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic, hint: str = ""
    ):  # fmt: skip
        """`console`: stderr without one. `clock` counts seconds. `hint`: the last line, where there is room."""
        self._console = console or Console(stderr=True)
        self._clock, self._hint = clock, hint
        # FORCE_COLOR makes rich take a file for a terminal; a file full of frames is of no use to anybody.
        shown = self._console.is_interactive and self._console.file.isatty()
        self._due = 0.0 if shown else math.inf
        self._counts: deque[tuple[float, int]] = deque()  # when, and how many tokens there were
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=shown and sys.stdout.isatty(),  # lines of others go above; what is piped goes on its way
            redirect_stderr=shown and sys.stderr.isatty(),
        )

    def __enter__(self) -> "FlightView":
        if self._due < math.inf:
            try:
                with whole():
                    self._live.start()
            except BaseException:  # Ctrl-C, heard when it had started
                self.__exit__()
                raise
        return self

    def __exit__(self, *_) -> None:
        with whole():
            self._live.stop()

    def update(self, llm: Watched) -> None:
        """Draw a frame if one is due; to be called after every step."""
        start = self._clock()
        if start >= self._due:
            self._draw(llm.in_flight(), start)
            end = self._clock()
            self._due = max(start + FRAME, end + (end - start) * (1 / SHARE - 1))

    def _draw(self, now: InFlight, at: float) -> None:
        self._counts.append((at, now.tokens))
        while len(self._counts) > 2 and self._counts[1][0] <= at - WINDOW:
            self._counts.popleft()
        since, before = self._counts[0]
        rate = (now.tokens - before) / (at - since) if at > since else None
        size, blocks = self._console.size, self._console.encoding.startswith("utf")
        hint: list[Line] = [[(self._hint[: size.width], "dim")]] if self._hint and size.height >= _TALL else []
        lines = frame(now, size.width, size.height - 1 - len(hint), rate, blocks) + hint
        with whole():  # half a frame could not be taken back
            self._live.update(_Frame(lines), refresh=True)


class _Frame:
    def __init__(self, lines: list[Line]):
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in self.lines:
            for text, style in line:
                yield Segment(text, _STYLES.get(style))
            yield Segment.line()


def top(now: InFlight, last: Output | None, context: int | None, width: int) -> str:
    """/top: a moment as text. The last answer of a chat is forgotten by then; it stands in front of what there is.

    `context`: None if a server does not say.
    """
    if last is not None:
        now = dataclasses.replace(now, requests=(_ended(last, context), *now.requests))
    lines = frame(now, width, _TOP)
    return "\n".join("".join(text for text, _ in line)[:width].rstrip() for line in lines)


def frame(now: InFlight, width: int, height: int, rate: float | None = None, blocks: bool = True) -> list[Line]:
    """A moment in at most `height` lines, for a terminal of `width` columns. `rate`: tokens/s; not `blocks`: ASCII.

    If there are more answers than lines, the newest that run come first, then the next in line, then what has ended.
    """
    lines = _packed(_head(now, rate), width)
    if width >= _TITLED and height >= _TALL and now.slots_used + now.slots_cached:
        lines.append(_map(now.map, now.slots, width, blocks))
    titled = width >= _TITLED and bool(now.requests)
    room = height - len(lines) - titled
    shown = _chosen(now.requests, room)
    if shown:
        lines += _table(shown, width, titled, blocks)
    if len(shown) < len(now.requests):
        left = Counter(p.state for p in now.requests)
        left.subtract(Counter(p.state for p in shown))
        lines.append([("and " + ", ".join(f"{n} {state}" for state, n in left.items() if n)[: width - 4], "dim")])
    return lines[: max(height, 1)]


def _head(now: InFlight, rate: float | None) -> Line:
    """What is said of the pool is the map's legend: in its colours."""
    done = sum(p.state == "done" for p in now.requests)
    words = [(text, "head") for text in (f"{now.running} running", f"{now.waiting} waiting", f"{done} done")]
    words.append((f"{now.slots_used:,} of {now.slots:,} slots in use ({now.slots_used / now.slots:.0%})", "used"))
    if now.slots_cached:
        words.append((f"{now.slots_cached:,} kept", "kept"))
    return words if rate is None else [*words, (f"{rate:,.0f} tok/s", "head")]


def _map(cells: SlotMap, slots: int, width: int, blocks: bool) -> Line:
    """The pool in one line: how full each part is, in the colour of what most of it is for."""
    levels, drawn = " ▁▂▃▄▅▆▇█" if blocks else " .:-=+*#@", []
    columns = min(width - 2, len(cells.used))
    edges = [len(cells.used) * i // columns for i in range(columns + 1)]
    for first, end in itertools.pairwise(edges):
        used, cached = sum(cells.used[first:end]), sum(cells.cached[first:end])
        room = min(end * cells.size, slots) - first * cells.size
        level = math.ceil((used + cached) / room * (len(levels) - 1))  # whatever there is shows
        drawn.append((levels[level], "used" if used >= cached else "kept"))
    runs = itertools.groupby(drawn, key=lambda column: column[1])
    return [("[", "dim"), *(("".join(level for level, _ in run), style) for style, run in runs), ("]", "dim")]


def _packed(words: Line, width: int) -> list[Line]:
    """Words side by side, as many in a line as fit."""
    lines: list[Line] = []
    left = 0
    for word, style in words:
        if lines and len(_GAP) + len(word) <= left:
            lines[-1].append((_GAP + word, style))
            left -= len(_GAP) + len(word)
        else:
            lines.append([(word[:width], style)])
            left = width - len(word)
    return lines


def _chosen(requests: Sequence[Progress], room: int) -> Sequence[Progress]:
    """Those that fit, in order of arrival; one line is left for the others."""
    if len(requests) <= room:
        return requests

    def rank(i: int) -> tuple[int, int]:
        state = requests[i].state
        return (1, i) if state == "waiting" else (2 if state == "done" else 0, -i)

    return [requests[i] for i in sorted(heapq.nsmallest(max(room - 1, 0), range(len(requests)), rank))]


@dataclass(frozen=True)
class _Column:
    title: str
    from_width: int  # of the terminal
    size: int  # at least, so that columns seldom move
    text: Callable[[Progress], str]


_NUMBERS = (
    _Column("prompt", 72, 9, lambda p: f"{p.prompt_done}/{p.prompt}"),
    _Column("cached", _WIDE, 6, lambda p: str(p.cached)),
    _Column("answer", 0, 7, lambda p: f"{p.output}/{p.wanted}"),
    _Column("slots", 72, 5, lambda p: str(p.slots)),
    _Column("first", _WIDE, 6, lambda p: "" if p.first_token is None else _seconds(p.first_token)),
    _Column("age", 60, 6, lambda p: _seconds(p.age)),
)
_STATE, _NOTE = 8, 20  # columns


def _table(shown: Sequence[Progress], width: int, titled: bool, blocks: bool) -> Iterator[Line]:
    """Name, state, bar, numbers, and on a wide terminal how it ended."""
    several = {p.id for p in shown if p.index}
    names = [_name(p.id) + (f"/{p.index}" if p.id in several else "") for p in shown]
    columns = [column for column in _NUMBERS if column.from_width <= width]
    cells = [[column.text(p) for column in columns] for p in shown]
    sizes = [max(column.size, *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    noted = width >= _WIDE
    name_size = min(max(map(cell_len, names)), max(10, width // 5))
    name_size = max(name_size, len("request") * titled)
    bar = width - name_size - 1 - _STATE - 2 - sum(sizes) - 2 * len(sizes) - (_NOTE + 2) * noted
    bar = min(bar, _BAR) if bar >= 4 else 0

    def numbers(texts: Sequence[str]) -> str:
        return "".join(f"  {text:>{size}}" for text, size in zip(texts, sizes, strict=True))

    if titled:
        heads = numbers([column.title for column in columns])
        yield [(f"{'request':<{name_size}} {'state':<{_STATE}}  {'':<{bar}}{heads}", "dim")]
    for p, name, texts in zip(shown, names, cells, strict=True):
        style = "bad" if p.finish_reason in ("abort", "error", "grammar", "timeout") else p.state
        yield [
            (_fitted(name, name_size, blocks) + " ", ""),
            (f"{p.state:<{_STATE}}  ", style),
            *_bar(p, bar, style, blocks),
            (numbers(texts), ""),
            ("  " + _note(p) if noted else "", "dim"),
        ]


def _name(id: str) -> str:
    return visible(" ".join(id[-100:].split()))


def _fitted(name: str, size: int, blocks: bool) -> str:
    """Exactly `size` columns; the end of a name tells more than its beginning."""
    if cell_len(name) <= size:
        return set_cell_size(name, size)
    while cell_len(name) > size - 1:
        name = name[1:]
    return set_cell_size(("…" if blocks else "~") + name, size)


def _bar(p: Progress, size: int, style: str, blocks: bool) -> Line:
    """What is computed of the prompt, what the answer has, and what is left: nothing once it stopped by itself."""
    prompt, answer, rest = "▒█░" if blocks else "=#."
    scale = size / (p.prompt + (p.output if p.finish_reason == "stop" else p.wanted))
    first, done = (min(round(n * scale), size) for n in (p.prompt_done, p.prompt_done + p.output))
    return [(prompt * first, style), (answer * (done - first), style), (rest * (size - done), "dim")]


def _note(p: Progress) -> str:
    return ", ".join(filter(None, [p.finish_reason, f"preempted {p.preemptions}x" * (p.preemptions > 0)]))


def _ended(output: Output, context: int | None) -> Progress:
    """An answer whose request is forgotten."""
    usage, said = output.usage, output.usage.completion_tokens
    wanted = output.params.max_tokens or (context or usage.prompt_tokens + said) - usage.prompt_tokens
    return Progress(
        output.id, 0, "done", usage.prompt_tokens, usage.prompt_tokens, usage.cached_tokens or 0, said, wanted, 0, 0,
        output.timings.first_token, output.timings.total, output.finish_reason,
    )  # fmt: skip


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"
