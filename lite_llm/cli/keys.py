"""Single keys, for what watches rather than asks: they come at once and are not shown."""

import contextlib
import os
import select
import signal
import sys
import time
from typing import Any

from lite_llm.cli.interrupt import silence_keys

try:
    import termios
except ImportError:  # not a Unix
    termios = None

CTRL_D = "\x04"
_ENDS = ("SIGTERM", "SIGHUP", "SIGQUIT")  # SIGINT raises by itself


class Keys(contextlib.AbstractContextManager):
    """In this `with` block keys are heard one by one, if stdin is a terminal; afterwards it is as before, however the
    block ends: a signal that would end the process raises SystemExit. For the main thread."""

    def __enter__(self) -> "Keys":
        self._terminal = silence_keys()
        self._signals: dict[int, Any] = {}
        if self.heard:
            for number in [getattr(signal, name) for name in _ENDS]:
                self._signals[number] = signal.signal(number, _leave)
            self._signals[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: silence_keys())  # after Ctrl-Z
        return self

    def __exit__(self, *_) -> None:
        if self.heard:
            with contextlib.suppress(termios.error):  # the terminal is gone
                # what else was typed is for nobody
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSAFLUSH, self._terminal)
        for number, before in self._signals.items():
            signal.signal(number, before)

    @property
    def heard(self) -> bool:
        return self._terminal is not None

    def wait(self, seconds: float) -> str:
        """The first key within that time, else "". Ctrl-D if the terminal is gone."""
        if not self.heard:
            time.sleep(seconds)
            return ""
        if not select.select([sys.stdin], [], [], seconds)[0]:
            return ""
        try:
            return os.read(sys.stdin.fileno(), 1).decode("latin-1") or CTRL_D
        except OSError:
            return CTRL_D


def _leave(number: int, *_) -> None:
    raise SystemExit(128 + number)
