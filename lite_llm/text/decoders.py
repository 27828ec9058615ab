"""Pictures decoded in processes of their own: what hostile data do to a decoder written in C, they do not do here.

A child is Python with Pillow and numpy, without torch. It starts when it is needed, answers one picture after another,
and is killed when it takes too long; the kernel ends it when it asks for too much memory. Whatever ends a child, the
picture is refused and the next one finds another child. The two talk over a pair of sockets, in bytes and JSON.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

from lite_llm.errors import EnvironmentProblem, UsageError
from lite_llm.text.images import Picture, decode_with_bytes

SECONDS = 10.0
"""For one picture; the slowest of 64 million pixels (16 bits, lossless WebP) take 3 s on a 4-core machine."""
MEMORY = 2 << 30
"""Bytes of address space of a child; the largest pictures need 1.5 GiB."""

_START_SECONDS = 60.0  # a fifth of a second, but not on a disk that is far away and busy
_SIZES = struct.Struct("<II")  # of the two parts of a message: what it is about, and the bytes


class DecoderEnded(UsageError):
    """A picture that its decoder did not survive: the file is hostile, or the decoder has a bug that it shows."""


class Decoders(contextlib.AbstractContextManager):
    """Child processes that decode pictures: as many as threads ask at the same time. A context manager ends them."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        """`seconds` for one picture, `memory` in bytes of address space for one child."""
        self._seconds, self._memory = seconds, memory
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._closed = False

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End all children at once; a picture that is being decoded is refused."""
        self._closed = True
        for child in list(self._children):
            child.process.kill()  # a thread that waits for it hears of it
        while self._idle:
            self._drop(self._idle.pop())

    def decode(self, data: bytes, name: str) -> Picture:
        """As `images.decode_here`, from any thread. DecoderEnded if its child died of it or took too long."""
        child = self._take()
        try:
            answer, pixels = child.ask(name, data, self._seconds)
        except TimeoutError:
            self._drop(child)
            raise DecoderEnded(f"{name} takes more than {self._seconds:g} s to decode", "send it smaller") from None
        except OSError:
            end = self._drop(child)
            raise DecoderEnded(f"{name} ended its decoder ({end})", "save it again, as a PNG or JPEG") from None
        except BaseException:  # Ctrl-C: what the child says next would be taken for an answer to another picture
            self._drop(child)
            raise
        self._idle.append(child)
        if isinstance(answer, dict):
            raise UsageError(**answer)
        import PIL.Image

        size, digest, stored_size, stored_mode, notes = answer
        image = PIL.Image.frombytes("RGB", tuple(size), pixels)
        return Picture(image, digest, tuple(stored_size), stored_mode, tuple(notes))

    def _take(self) -> "_Child":
        while self._idle:
            child = self._idle.pop()
            if child.process.poll() is None:
                return child
            self._drop(child)  # somebody has ended it, and no picture did
        if self._closed:
            raise UsageError("the decoders of pictures are closed", "open pictures before that")
        child = _Child(self._seconds, self._memory)
        self._children.add(child)
        try:
            child.start()
        except BaseException:
            self._drop(child)
            raise
        return child

    def _drop(self, child: "_Child") -> str:
        """How it ended, for people."""
        self._children.discard(child)
        code = child.end()
        known = {-number: number.name for number in signal.Signals}
        return known.get(code, f"exit code {code}")


class _Child:
    def __init__(self, seconds: float, memory: int):
        code = f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}\n"  # where this process finds its modules
        code += f"from lite_llm.text import decoders\ndecoders.serve({seconds}, {memory})"
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each thread takes address space
        try:
            self._link, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env=os.environ | one, start_new_session=True,  # Ctrl-C is for this process alone
                )  # fmt: skip
        except OSError as error:
            raise EnvironmentProblem(
                f"no process can be started to decode pictures ({error.strerror})", "see ulimit -n and ulimit -u"
            ) from None

    def start(self) -> None:
        """Wait until it can decode."""
        try:
            _receive(self._link, time.monotonic() + _START_SECONDS)
        except OSError:
            import numpy  # noqa: F401 -- if one of its two packages is missing, this says which
            import PIL.Image  # noqa: F401

            raise EnvironmentProblem(
                "the process that decodes pictures does not start", f"try {sys.executable} -c 'import PIL.Image, numpy'"
            ) from None

    def ask(self, name: str, data: bytes, seconds: float) -> tuple[Any, bytearray]:
        """What `_answer` gives. TimeoutError after `seconds`, another OSError if the child has ended."""
        end = time.monotonic() + seconds
        self._link.settimeout(seconds)
        _send(self._link, name, data)
        return _receive(self._link, end)

    def end(self) -> int:
        """The exit code, negative for a signal."""
        self.process.kill()
        code = self.process.wait()
        self._link.close()
        return code


# ---- what both sides say


def _send(link: socket.socket, about: Any, data: bytes) -> None:
    head = json.dumps(about).encode()
    link.sendall(_SIZES.pack(len(head), len(data)) + head)
    link.sendall(data)


def _receive(link: socket.socket, end: float | None) -> tuple[Any, bytearray]:
    """An OSError if the other side is gone, or at the monotonic time `end`."""
    head, data = map(bytearray, _SIZES.unpack(_filled(link, bytearray(_SIZES.size), end)))
    return json.loads(_filled(link, head, end)), _filled(link, data, end)


def _filled(link: socket.socket, buffer: bytearray, end: float | None) -> bytearray:
    rest = memoryview(buffer)
    while rest:
        if end is not None:
            link.settimeout(max(end - time.monotonic(), 1e-3))
        count = link.recv_into(rest)
        if not count:
            raise ConnectionError
        rest = rest[count:]
    return buffer


# ---- the child


def serve(seconds: float, memory: int) -> None:
    """Decode what comes over standard input, a socket, until it is closed."""
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(memory, hard),) * 2)  # -1: there is none yet
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a user's picture
    link = socket.socket(fileno=0)
    with contextlib.suppress(OSError):
        _send(link, None, b"")
        while True:
            name, data = _receive(link, None)
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends it within a decoder too, if nobody is left to
            about, pixels = _answer(bytes(data), name)
            del data
            _send(link, about, pixels)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(data: bytes, name: str) -> tuple[Any, bytes]:
    """What is known of a picture and its pixels, or why it is refused."""
    try:
        picture, pixels = decode_with_bytes(data, name)
    except UsageError as error:
        return {"message": error.message, "hint": error.hint}, b""
    return [picture.size, picture.digest, picture.stored_size, picture.stored_mode, picture.notes], pixels
