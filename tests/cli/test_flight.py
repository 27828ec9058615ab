"""Requests in flight on a terminal: what a frame shows, how often there is one, and what is left behind: nothing."""

import colorsys
import dataclasses
import io
import os
import re
import signal
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console

from lite_llm.cli import commands, flight
from lite_llm.cli.flight import FRAME, SHARE, FlightView, frame
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.llm import LLM
from lite_llm.outputs import InFlight, Progress, SlotMap
from tests.cli.test_terminal import Terminal

WAITING = Progress("request-1", 0, "waiting", 100, 0, 0, 0, 50, 0, 0, None, 0.25, None)
PROMPT = Progress("request-2", 0, "prompt", 100, 40, 10, 0, 100, 40, 0, None, 0.5, None)
DECODING = Progress("request-3", 0, "decoding", 100, 100, 0, 50, 100, 160, 2, 0.0123, 12.5, None)
DONE = Progress("request-4", 0, "done", 100, 100, 0, 100, 100, 0, 0, 0.2, 3.0, "length")
MAP = SlotMap(100, (100, 50, 0, 0, 0, 50, 0, 0, 0, 0), (0, 0, 0, 0, 24, 0, 0, 0, 0, 0))
NOW = InFlight((WAITING, PROMPT, DECODING, DONE), 2, 1, 200, 24, 1000, 1234, MAP)


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a terminal shows by now, without styles."""
        lines, row, column = [""], 0, 0
        for code, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|\n|\r)|([^\x1b\n\r]+)", self.getvalue()):
            if code == "\n":
                row, column = row + 1, 0  # a terminal's driver makes it CR LF
                lines += [""] * (row + 1 - len(lines))
            elif code == "\r":
                column = 0
            elif code.endswith("A"):
                row -= int(code[2:-1])
            elif code == "\x1b[2K":
                lines[row] = ""
            else:
                assert text or code[-1] in "mhl", f"unknown code {code!r}"
                lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
                column += len(text)
        while lines and not lines[-1]:
            lines.pop()
        return [line.rstrip() for line in lines]


class Engine:
    """Says how far it is; asking takes `takes` seconds of its clock."""

    def __init__(self, now: InFlight = NOW, takes: float = 0.0):
        self.now, self.takes, self.time, self.asked = now, takes, 100.0, 0

    def clock(self) -> float:
        return self.time

    def in_flight(self) -> InFlight:
        self.asked += 1
        self.time += self.takes
        return self.now


def console(width: int = 120, height: int = 20, **options) -> Console:
    return Console(file=Tty(), force_terminal=True, width=width, height=height, **options)


def many(n: int, state: str) -> list[Progress]:
    return [dataclasses.replace(DECODING, id=f"{state}-{i}", state=state) for i in range(n)]


def texts(now: InFlight, width: int, height: int, **options) -> list[str]:
    return ["".join(text for text, _ in line) for line in frame(now, width, height, **options)]


def shown(engine: Engine, at: Console) -> list[str]:
    with FlightView(at, engine.clock) as view:
        view.update(engine)
        return at.file.screen()


def test_a_wide_terminal_shows_all_there_is():
    head, drawn, titles, *rows = shown(Engine(), console(120))
    assert drawn == "[█▄  ▂▄    ]"
    assert head == "2 running  1 waiting  1 done  200 of 1,000 slots in use (20%)  24 kept"
    assert titles.split() == ["request", "state", "prompt", "cached", "answer", "slots", "first", "age"]
    assert [re.sub("[▒█░]+ *", "", row).split() for row in rows] == [
        ["request-1", "waiting", "0/100", "0", "0/50", "0", "250", "ms"],
        ["request-2", "prompt", "40/100", "10", "0/100", "40", "500", "ms"],
        ["request-3", "decoding", "100/100", "0", "50/100", "160", "12", "ms", "12.5", "s", "preempted", "2x"],
        ["request-4", "done", "100/100", "0", "100/100", "0", "200", "ms", "3.0", "s", "length"],
    ]
    answers = [f" {p.output}/{p.wanted}" for p in NOW.requests]
    ends = {row.rindex(answer) + len(answer) for row, answer in zip(rows, answers, strict=True)}
    assert ends == {titles.index("answer") + len("answer")}, "numbers stand below their title"


def test_forty_columns_are_enough():
    lines = shown(Engine(), console(40))
    assert lines[:2] == ["2 running  1 waiting  1 done", "200 of 1,000 slots in use (20%)  24 kept"]
    assert [line.split()[0::3] for line in lines[2:]] == [
        ["request-1", "0/50"], ["request-2", "0/100"], ["request-3", "50/100"], ["request-4", "100/100"],
    ]  # fmt: skip
    assert all("░" in line or "█" in line for line in lines[2:])


@pytest.mark.parametrize("width", [*range(20, 140, 7), 40, 60, 72, 80, 112, 120])
def test_no_line_is_longer_than_the_terminal(width):
    long = dataclasses.replace(DECODING, id="a-name-that-never-ends-" * 9 + "7", index=1)
    wide = dataclasses.replace(
        DECODING, id="请求请求请求请求请求请求请求-7", output=123456, wanted=234567, prompt=99999
    )
    engine = Engine(dataclasses.replace(NOW, requests=(*NOW.requests, long, wide), slots=10**9))
    assert all(cell_len(line) <= width for line in shown(engine, console(width)))
    if width >= 40:
        assert all(cell_len(line) <= width for line in texts(engine.now, width, 20, rate=1e6)), "before rich cuts it"


def test_a_bar_is_as_long_as_its_share():
    """Of prompt and answer together; what the prompt has is drawn apart."""
    bars = [re.search("[▒█░]+", line)[0] for line in texts(NOW, 80, 20)[3:]]
    size = len(bars[0])
    assert [bar.count("░") for bar in bars] == [size, round(size * 0.8), round(size * 0.25), 0]
    assert [bar.count("▒") for bar in bars] == [0, round(size * 0.2), round(size * 0.5), round(size * 0.5)]
    assert {len(bar) for bar in bars} == {size} and size > 10
    short = [dataclasses.replace(DONE, output=9, finish_reason=reason) for reason in ("stop", "abort")]
    stopped, aborted = (
        re.search("[▒█░]+", line)[0] for line in texts(dataclasses.replace(NOW, requests=short), 80, 20)[3:]
    )
    assert "░" not in stopped and "░" in aborted


def test_the_most_interesting_come_first_and_the_others_are_counted():
    requests = tuple(many(30, "done") + many(10, "decoding") + many(30, "waiting"))
    now = dataclasses.replace(NOW, requests=requests)
    names = [line.split()[0] for line in texts(now, 80, 20)]
    assert names[3:] == [f"decoding-{i}" for i in range(10)] + [f"waiting-{i}" for i in range(6)] + ["and"]
    assert texts(now, 80, 20)[-1] == "and 30 done, 24 waiting"
    assert [line.split()[0] for line in texts(now, 80, 8)][2:-1] == [f"decoding-{i}" for i in range(5, 10)]
    everybody = [line.split()[0] for line in texts(now, 80, 73)]
    assert everybody[3:] == [p.id for p in requests], "all fit: in order of arrival"
    assert [line.split()[0] for line in texts(now, 80, 61)][-2] == "waiting-29", "of what has ended, the newest"


@pytest.mark.parametrize("height", range(1, 12))
@pytest.mark.parametrize("width", [40, 120])
def test_a_frame_leaves_the_last_line_of_the_terminal_free(width, height):
    engine = Engine(dataclasses.replace(NOW, requests=tuple(many(50, "decoding"))))
    assert len(shown(engine, console(width, height + 1))) <= height


def test_answers_to_one_prompt_are_numbered():
    twins = tuple(dataclasses.replace(DECODING, index=i) for i in range(2))
    lines = texts(dataclasses.replace(NOW, requests=(WAITING, *twins)), 80, 20)
    assert [line.split()[0] for line in lines[3:]] == ["request-1", "request-3/0", "request-3/1"]


def test_a_name_cannot_command_the_terminal():
    evil = dataclasses.replace(DECODING, id="a\x1b]0;b\nc")
    assert texts(dataclasses.replace(NOW, requests=(evil,)), 120, 20)[3].startswith(r"a\x1b]0;b c ")


def drawn(cells: SlotMap, slots: int, width: int = 80, **options) -> list[tuple[str, str]]:
    now = dataclasses.replace(NOW, slots=slots, slots_used=sum(cells.used), map=cells)
    return next(line[1:-1] for line in frame(now, width, 20, **options) if line[0][0] == "[")


def test_the_map_shows_how_full_each_part_of_the_pool_is_and_of_what():
    cells = SlotMap(8, (8, 4, 1, 0, 0, 3), (0, 4, 7, 5, 0, 0))  # the last cell has three slots
    assert drawn(cells, 43) == [("██", "used"), ("█▅", "kept"), (" █", "used")]
    assert drawn(cells, 43, blocks=False) == [("@@", "used"), ("@+", "kept"), (" @", "used")]
    assert drawn(SlotMap(1000, (1, 0), (0, 1)), 2000) == [("▁", "used"), ("▁", "kept")], "a single slot is seen"


def test_the_words_about_the_pool_are_the_maps_legend():
    head, pool, *_ = frame(NOW, 80, 20)
    assert head[-2:] == [("  200 of 1,000 slots in use (20%)", "used"), ("  24 kept", "kept")]
    assert {style for text, style in pool[1:-1] if text.strip()} <= {"used", "kept"}


@pytest.mark.parametrize("name", ["used", "kept", "prompt"])
def test_a_colour_means_the_same_on_the_page(name):
    """Of hues, a sixth of the circle apart: a terminal has colours of its own."""
    page = (Path(flight.__file__).parents[1] / "server" / "page.html").read_text()
    ours = flight._STYLES[name].color.get_truecolor()
    for theirs in re.search(rf"--{name}: light-dark\((#\w+), (#\w+)\)", page).groups():
        hues = [colorsys.rgb_to_hsv(*rgb)[0] * 360 for rgb in (ours, Color.parse(theirs).get_truecolor())]
        assert abs(hues[0] - hues[1]) < 30, hues


@pytest.mark.parametrize("width", [60, 61, 100, 300])
def test_a_map_of_any_size_fits(width):
    cells = SlotMap(100, (100,) * 128 + (0,) * 128, (0,) * 192 + (50,) * 64)
    (used, _), (cached, _), *_ = [piece for piece in drawn(cells, 25_600, width) if piece[0].strip()]
    columns = min(width - 2, 256)
    assert used.count("█") == pytest.approx(columns / 2, abs=1)
    assert cached.count("▄") == pytest.approx(columns / 4, abs=1)


def test_where_there_is_little_room_there_is_no_map():
    assert any(line[0] == "[" for line in texts(NOW, 60, 10))
    assert not any("[" in line for line in texts(NOW, 59, 10) + texts(NOW, 60, 9))


def test_nothing_in_flight_is_one_line():
    assert texts(InFlight((), 0, 0, 0, 0, 100, 0, SlotMap(10, (0,) * 10, (0,) * 10)), 80, 20) == [
        "0 running  0 waiting  0 done  0 of 100 slots in use (0%)"
    ]


def test_a_terminal_without_unicode_gets_ascii():
    assert all(line.isascii() for line in texts(NOW, 80, 20, blocks=False))
    at = console()
    at.file.encoding = "latin-1"
    shown(Engine(), at)
    assert at.file.getvalue().isascii()


def test_frames_are_rare_whatever_the_number_of_steps():
    engine = Engine()
    with FlightView(console(), engine.clock) as view:
        for _ in range(1000):
            view.update(engine)
            engine.time += 0.001
    assert engine.asked == round(1 / FRAME)


def test_drawing_takes_no_more_than_its_share_of_the_time():
    engine = Engine(takes=0.02)
    start = engine.time
    with FlightView(console(), engine.clock) as view:
        for _ in range(100_000):
            view.update(engine)
            engine.time += 0.001
    assert engine.asked > 10
    assert engine.asked * engine.takes <= SHARE * (engine.time - start) + engine.takes


def test_tokens_per_second_are_those_of_the_last_moments():
    engine, at = Engine(), console()
    rates = []
    with FlightView(at, engine.clock) as view:
        for second in range(10):
            view.update(engine)
            rates += re.findall(r"[\d,]+ tok/s", at.file.screen()[0])
            engine.now = dataclasses.replace(engine.now, tokens=engine.now.tokens + (2000 if second < 4 else 10))
            engine.time += 1
    assert rates[:4] == ["2,000 tok/s"] * 4 and rates[-1] == "10 tok/s"


def test_the_next_frame_takes_the_place_of_the_last_and_the_end_leaves_nothing():
    engine, at = Engine(), console(80)
    with FlightView(at, engine.clock) as view:
        for n in (4, 1, 3, 0, 2):
            engine.now = dataclasses.replace(NOW, requests=NOW.requests[:n])
            view.update(engine)
            engine.time += 1
            assert len(at.file.screen()) == 2 + n + (n > 0)
    assert at.file.screen() == [] and at.file.getvalue().count("\x1b[?25h") == 1


def test_an_interrupt_leaves_nothing_and_comes_after_the_frame():
    engine, at = Engine(), console(80)
    at.file.write("before\n")
    before = signal.getsignal(signal.SIGINT)

    class Interrupted(Tty):
        def write(self, text: str) -> int:
            if "decoding" in text:
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    at.file.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        with FlightView(at, engine.clock) as view:
            view.update(engine)
    assert "decoding" in at.file.getvalue() and at.file.screen() == ["before"]
    assert at.file.getvalue().count("\x1b[?25h") == 1 and signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_before_the_first_frame_leaves_nothing():
    at = console()
    view = FlightView(at)
    start = view._live.start
    view._live.start = lambda: (start(), signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), view:
        raise AssertionError("the block began")
    assert at.file.getvalue().count("\x1b[?25l") == at.file.getvalue().count("\x1b[?25h") == 1


def test_without_a_terminal_nothing_is_written_and_nobody_is_asked(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for at in (Console(file=io.StringIO()), Console(file=Tty(), force_terminal=True, _environ={"TERM": "dumb"})):
        engine = Engine()
        with FlightView(at, engine.clock) as view:
            view.update(engine)
        assert at.file.getvalue() == "" and engine.asked == 0


def test_no_color():
    colours = r"\x1b\[[\d;]*3\d[\d;]*m"
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        at = console(_environ={"TERM": "xterm-256color", **environ})
        assert any("decoding" in line for line in shown(Engine(), at))
        assert bool(re.search(colours, at.file.getvalue())) == coloured


WATCH = """
import itertools, time
from lite_llm.cli.flight import FlightView
from tests.cli.test_flight import Engine
print("before")
engine = Engine()
with FlightView(clock=engine.clock) as view:
    for step in itertools.count():
        view.update(engine)
        engine.time += 0.1
        if step == 3:
            print("from beside")
        time.sleep(0.001)
"""


def test_ctrl_c_leaves_a_real_terminal_clean(tmp_path):
    with Terminal("-c", WATCH, home=tmp_path) as terminal:
        terminal.wait("from beside.*request-4.*request-4")
        terminal.send("\x03")
        assert terminal.exit_code() in (1, 130, -signal.SIGINT)
        seen = Tty(terminal.seen.decode())
    assert "\x1b[?25h" in seen.getvalue(), "the cursor is back"
    lines = seen.screen()
    assert lines[:2] == ["before", "from beside"] and not any("request-" in line for line in lines)


def test_top_shows_the_last_answer_and_the_pool():
    with LLM(device="cpu") as llm:
        talk = Session(llm, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        assert commands.run(talk, "/top").startswith("0 running  0 waiting  0 done  0 of ")
        output = talk.ask("What is the capital of France?", lambda text: None)
        head, pool, _, row = commands.run(talk, "/top").split("\n")
        assert re.search(r"0 running  0 waiting  1 done .* \d+ kept", head)
        assert re.fullmatch(r"\[ *▁ *\]", pool), "what it left in the cache"
        prompt = output.usage.prompt_tokens
        assert row.split()[:2] == [output.id, "done"] and f"{prompt}/{prompt}" in row and " 8/8 " in row
