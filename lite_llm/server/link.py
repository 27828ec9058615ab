"""Messages between the server and the process of its engine, over a pair of sockets.

Sending never waits: the engine must not stand still because the server is busy. What the other side has not taken yet
is kept here. Each message is a pickle, which only these two write: one is the child of the other, and a socket pair has
no name by which somebody else could reach it.
"""

import contextlib
import pickle
import select
import socket
import struct
import traceback
from typing import Any

from lite_llm.errors import LiteLLMError

_SIZE = struct.Struct("<Q")
_PIECE = 1 << 16  # bytes that are read at once


class Link:
    """One end. `ring` may be called by any thread, the rest by one."""

    def __init__(self, end: socket.socket, most: int | None = None):
        """`most`: bytes that may be kept here; beyond them `send` waits for the other side. None: any."""
        end.setblocking(False)
        self._end, self._most = end, most
        self._in, self._out = bytearray(), bytearray()
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._waiting = select.poll()
        self._waiting.register(self._bell, select.POLLIN)

    def close(self) -> None:
        for one in (self._end, self._bell, self._button):
            one.close()

    def fileno(self) -> int:
        """For event loops, which call `receive(0)` when there is something to read."""
        return self._end.fileno()

    def ring(self) -> None:
        """Ends a `receive` that waits, or else the next one."""
        with contextlib.suppress(OSError):  # it has been rung often enough, or is closed
            self._button.send(b"!")

    @property
    def unsent(self) -> int:
        """Bytes that the other side has not taken."""
        return len(self._out)

    def send(self, message: Any) -> None:
        """Returns at once, unless more than `most` bytes are kept. Nothing happens if the other side is gone."""
        data = pickle.dumps(message, protocol=5)
        self._out += _SIZE.pack(len(data))
        self._out += data
        self.push()
        while self._most is not None and len(self._out) > self._most:
            self._wait(None, reading=False)
            self.push()

    def push(self) -> None:
        """As much of what is kept as the other side has room for."""
        try:
            while self._out:
                del self._out[: self._end.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # nobody will ever take it; reading says so

    def receive(self, seconds: float | None) -> list[Any]:
        """All messages that have come, waiting for the first at most that long; None: until there is one, or a ring.

        EOFError if the other side is gone and all that it said has been received.
        """
        self.push()
        if seconds != 0:  # first, for a read that finds nothing gives Python's lock away and must get it back
            self._wait(seconds)
        gone = self._pull()
        found = []
        while size := self._complete():
            with memoryview(self._in) as come, come[_SIZE.size : size] as data:
                found.append(pickle.loads(data))
            del self._in[:size]
        if gone and not found:
            raise EOFError
        return found

    def _complete(self) -> int:
        """The size of the first message with its head, if all of it is here; else 0."""
        if len(self._in) < _SIZE.size:
            return 0
        size = _SIZE.size + _SIZE.unpack_from(self._in)[0]
        return size if len(self._in) >= size else 0

    def _pull(self) -> bool:
        """Take what has come; whether the other side is gone."""
        try:
            while piece := self._end.recv(_PIECE):
                self._in += piece
                if len(piece) < _PIECE:
                    return False
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _wait(self, seconds: float | None, reading: bool = True) -> None:
        events = select.POLLIN * reading | select.POLLOUT * bool(self._out)
        self._waiting.register(self._end, events)
        found = self._waiting.poll(None if seconds is None else seconds * 1000)
        if any(file == self._bell.fileno() for file, _ in found):
            self._bell.recv(_PIECE)


def portable(error: Exception) -> Exception:
    """An error that can be sent; of what no user has caused, with the place where it happened."""
    if not isinstance(error, LiteLLMError):
        error.add_note("in the engine's process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
