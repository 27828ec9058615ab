"""Directories that appear whole or not at all, whatever kills the writer."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lite_llm.errors import SourceProblem, UsageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes `out` when the block ends and vanishes if it raises.

    UsageError if `out` exists and may not be overwritten, SourceProblem for a full or broken disk and for a second
    writer. What killed writers left behind is removed; the lock dies with its process, so nothing goes stale.
    """
    out = Path(os.path.abspath(out))
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no directory", "create it first")
    try:
        with _lock(out):
            _clean(out)
            if os.path.lexists(out) and not overwrite:
                raise UsageError(f"{out} exists", "choose another name, or pass --overwrite")
            partial.mkdir()
            try:
                yield partial
                _sync(partial)
                _put(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # the old directory, if it was exchanged
    except OSError as error:
        raise SourceProblem(
            f"{out} was not written: {error.strerror or error}" + (f" ({error.filename})" if error.filename else ""),
            "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "nothing was changed",
        ) from error


def require_apart(source: Path, out: Path) -> None:
    """UsageError if writing `out` would touch `source`."""
    here, there = source.resolve(), out.resolve()
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"{out} and the source {source} are one directory, or one holds the other", "name another OUT")


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.lock"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise SourceProblem(f"another process is writing {out}", "wait for it, or choose another name") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        os.close(lock)  # its owner has just removed this file: take the next one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _clean(out: Path) -> None:
    """Undo what dead writers left: we hold the lock, so nobody alive owns any of it."""
    for old in out.parent.glob(f".{_literal(out.name)}.old-*"):
        if os.path.lexists(out):
            shutil.rmtree(old)
        else:
            old.rename(out)
    for partial in out.parent.glob(f".{_literal(out.name)}.partial-*"):
        shutil.rmtree(partial)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _put(partial: Path, out: Path) -> None:
    if not os.path.lexists(out):
        os.rename(partial, out)
    elif not _exchange(partial, out):  # between these two lines `out` is away; `_clean` would bring it back
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
