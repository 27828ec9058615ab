"""The chat in a real terminal (a pty): keys, signals, escapes, exit codes (CLI-02, CLI-03, CLI-06)."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = " ".join(f"w{n}" for n in range(500))
PROMPT = r"\[[\d.]+k/[\d.]+k\]"
SLOW = 30.0  # seconds that anything may take on a busy machine


class Terminal:
    """A process whose terminal we are."""

    def __init__(self, *command: str, home: Path, **env: str):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        mine = {"XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color"} | env
        inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=inherited | mine,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = b""
        self._from = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def modes(self) -> list:
        """Of the terminal: echo, line mode and so on."""
        return termios.tcgetattr(self._master)

    def wait(self, text: str) -> str:
        """Output from the last match to this one."""
        pattern, end = re.compile(text.encode(), re.DOTALL), time.monotonic() + SLOW
        while (match := pattern.search(self.seen, self._from)) is None:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"no {text!r} in {self.seen[self._from :].decode(errors='replace')!r}")
        found, self._from = self.seen[self._from : match.end()], match.end()
        return found.decode(errors="replace")

    def exit_code(self) -> int:
        end = time.monotonic() + SLOW
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(max(1.0, end - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.seen += data
        return bool(data)


def recital(text: str, home: Path, **env: str) -> Terminal:
    return Terminal("-m", "tests.cli.recital", text, home=home, **env)


def test_ctrl_c_in_an_answer_keeps_the_part_and_ctrl_d_leaves(tmp_path):
    with recital(LONG, tmp_path) as terminal:
        terminal.wait(PROMPT)
        terminal.send("go\r")
        terminal.wait("w12 ")
        terminal.send("\x03")
        said = terminal.wait("stopped; the part said so far is kept")
        assert "w200" not in said
        terminal.wait(PROMPT)
        terminal.send("/show history\r")
        assert "w12" in terminal.wait(r"assistant: w0.*?" + PROMPT)
        terminal.send("again\r")  # the session goes on
        terminal.wait("w5 ")
        terminal.send("\x03")
        terminal.wait("stopped")
        terminal.wait(PROMPT)
        terminal.send("\x04")
        assert terminal.exit_code() == 0
    assert b"Traceback" not in terminal.seen


def test_ctrl_c_at_the_prompt_never_leaves(tmp_path):
    with recital("fine", tmp_path) as terminal:
        terminal.wait(PROMPT)
        terminal.send("never sent\x03")
        time.sleep(0.3)
        terminal.send("\x03")
        terminal.wait("Ctrl-D or /exit leaves")
        terminal.send("hello\r")
        terminal.wait("fine")
        terminal.wait(PROMPT)
        terminal.send("/exit\r")
        assert terminal.exit_code() == 0


def test_a_hangup_ends_the_chat(tmp_path):
    with recital("fine", tmp_path) as terminal:
        terminal.wait(PROMPT)
        os.kill(terminal.process.pid, signal.SIGHUP)
        assert terminal.exit_code() == -signal.SIGHUP


def test_the_model_cannot_command_the_terminal(tmp_path):
    hostile = r"\x1b]52;c;aGk=\x07 \x1b]8;;http://evil\x1b\\ \x1b[2J \u202eevil \r \x9b31m **bold** end"
    with recital(hostile, tmp_path) as terminal:
        terminal.wait(PROMPT)
        terminal.send("go\r")
        shown = terminal.wait("end") + terminal.wait(PROMPT)
        for code in ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\x9b"):
            assert code not in shown
        assert r"\x1b]52;c;aGk=\x07" in shown and r"\u202eevil" in shown and "\x1b[1mbold\x1b[0m" in shown


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"LC_ALL": "C"}])
def test_plain_terminals(env, tmp_path):
    with recital("**bold** and # end", tmp_path, **env) as terminal:
        terminal.wait(PROMPT)
        terminal.send("go\r")
        shown = terminal.wait("end") + terminal.wait(PROMPT)
        assert ("\x1b[1m" in shown) == ("LC_ALL" in env)
        if "TERM" in env:
            assert b"\x1b" not in terminal.seen and "**bold** and # end" in shown
        terminal.send("\x04")
        assert terminal.exit_code() == 0


def test_the_demo_answers_and_remembers(tmp_path):
    with Terminal("cli.py", home=tmp_path) as terminal:
        terminal.wait(r"\d+ free|GiB free")
        terminal.wait(PROMPT)
        terminal.send("My name is Ada.\r")
        terminal.wait("Ada.*?prompt tokens")
        terminal.wait(PROMPT)
        terminal.send("What is the capital of France?\r")
        terminal.wait("Paris")
        assert int(re.search(r"\((\d+) cached", terminal.wait("cached"))[1]) > 0
        terminal.wait(PROMPT)
        terminal.send("What is my name?\r")
        terminal.wait(r"Ada.*?prompt tokens")
        terminal.wait(PROMPT)
        terminal.send("\x04")
        assert terminal.exit_code() == 0


def test_ctrl_c_while_loading_is_130(tmp_path):
    with Terminal("cli.py", home=tmp_path) as terminal:
        terminal.wait("starting")
        time.sleep(0.3)
        terminal.send("\x03")
        assert terminal.exit_code() == 130
    assert b"Traceback" not in terminal.seen
