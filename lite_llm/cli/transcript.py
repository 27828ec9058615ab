"""Conversations in files: one OpenAI message a line, so that a file replays on any server."""

import json
import os
import tempfile
from pathlib import Path

from lite_llm.errors import UsageError

Message = dict[str, str]
_MAX_BYTES = 64 << 20
_ROLES = ("system", "user", "assistant")


def load(path: Path) -> list[Message]:
    """The messages of a file. UsageError names the line that is none."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never ends
            raise UsageError(f"{path} is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    messages = [_message(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise UsageError(f"{path}, message {index + 1}: a system message must be the first")
    return messages


def save(path: Path, messages: list[Message]) -> None:
    """Write the messages: the whole file or, if that fails, what was there before. UsageError says why it failed."""
    lines = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)
    temporary = None
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600  # conversations are private
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(lines.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _message(line: str, where: str) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is not JSON", 'expected {"role": "user", "content": "..."} on each line') from None
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), str)
    ):
        raise UsageError(f"{where} is not a message with a role ({', '.join(_ROLES)}) and a text as content")
    return {"role": message["role"], "content": message["content"]}
