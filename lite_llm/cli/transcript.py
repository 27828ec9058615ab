"""Conversations in files: one OpenAI message a line, so that a file replays on any server."""

import base64
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lite_llm.text.images import Picture

    Open = Callable[[str], Picture]

Message = dict[str, Any]
"""`content` is text, or a list of parts: {"type": "image", "image": Picture} and {"type": "text", "text": ...}."""

_MAX_BYTES = 64 << 20
_ROLES = ("system", "user", "assistant")


def text_of(message: Message) -> str:
    """What a message says, without its pictures."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def pictures_of(message: Message) -> list["Picture"]:
    content = message["content"]
    return [] if isinstance(content, str) else [part["image"] for part in content if "image" in part]


def with_pictures(text: str, pictures: list["Picture"]) -> Message:
    """A question."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def data_url(picture: "Picture") -> str:
    """As PNG: the same pixels when it is read again."""
    data = io.BytesIO()
    picture.image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def in_openai_form(message: Message, url: Callable[["Picture"], str] = data_url) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": url(part["image"])}} if "image" in part else part
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def load(path: Path, open_url: "Open | None" = None) -> list[Message]:
    """The messages of a file, their pictures opened. UsageError names the line that is none.

    `open_url` opens data URLs; None: `open_picture`.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never ends
            raise UsageError(f"{path} is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "/save FILE in a chat makes one" if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    messages = [
        _message(line, f"{path}, line {n}", open_url) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise UsageError(f"{path}, message {index + 1}: a system message must be the first")
    return messages


def save(path: Path, messages: list[Message]) -> None:
    """Write the messages: the whole file or, if that fails, what was there before. UsageError says why it failed."""
    lines = "".join(json.dumps(in_openai_form(message), ensure_ascii=False) + "\n" for message in messages)
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


def _message(line: str, where: str, open_url: "Open | None") -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is not JSON", 'expected {"role": "user", "content": "..."} on each line') from None
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), (str, list))
    ):
        raise UsageError(f"{where} is not a message with a role ({', '.join(_ROLES)}) and a text as content")
    content = message["content"]
    if isinstance(content, list):
        content = [_part(part, where, open_url) for part in content]
    return {"role": message["role"], "content": content}


def _part(part: object, where: str, open_url: "Open | None") -> dict[str, Any]:
    """No URL is opened, and no other file: the one they are named in may be a stranger's."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if isinstance(part, dict) else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise UsageError(f"{where} holds a part that is neither text nor a picture", "pictures must be data URLs")
    from lite_llm.text.images import open_picture  # Pillow

    try:
        return {"type": "image", "image": (open_url or open_picture)(url)}
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None
