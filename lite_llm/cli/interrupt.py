"""Ctrl-C while something must not be cut in the middle, as an answer or the import of torch: noted."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

try:
    import termios
except ImportError:  # not a Unix
    termios = None


class Interrupt:
    """In this `with` block SIGINT only sets `pressed`, and keys are not echoed into the answer."""

    def __init__(self):
        self.pressed = False

    def __enter__(self) -> "Interrupt":
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._note)
        self._terminal = silence_keys()
        return self

    def __exit__(self, *_) -> None:
        if self._terminal is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._terminal)
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_) -> None:
        self.pressed = True


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """In this `with` block Ctrl-C waits for its end, and the second one does not. The first is lost if the block fails.

    For what must not be cut in the middle: torch's C++ aborts the process if its import is, and half a frame on the
    terminal could not be taken back. Only the main thread hears signals; in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, pressed = signal.getsignal(signal.SIGINT), 0

    def note(*_) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def silence_keys() -> list[Any] | None:
    """Turn echo and line mode off, so that what is typed waits for the next prompt. Returns the state before."""
    if termios is None or sys.stdin is None or not sys.stdin.isatty():
        return None
    before = termios.tcgetattr(sys.stdin.fileno())
    silent = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, silent)
    return before
