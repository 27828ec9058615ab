"""Conversations in files: one OpenAI message a line, so that a file replays on any server."""

import base64
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import UsageError

if TYPE_CHECKING:
    from lite_llm.text.images import Picture

    Open = Callable[[str], Picture]

Message = dict[str, Any]
"""`content` is text, or a list of parts: {"type": "image", "image": Picture} and {"type": "text", "text": ...}."""

_MAX_BYTES = 64 << 20
_ROLES = ("system", "user", "assistant")
_LONGEST = 60  # characters of a picture's name
_TITLE = re.compile(rb"\x89PNG.{29}(.{4})iTXtTitle\0{5}", re.DOTALL)  # and the length of this chunk


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


def data_url(picture: "Picture", name: str = "") -> str:
    """As PNG: the same pixels when it is read again. The name is its title, for messages have no field that fits."""
    import PIL.PngImagePlugin

    data, info = io.BytesIO(), PIL.PngImagePlugin.PngInfo()
    if name:
        info.add_itxt("Title", name[:_LONGEST].encode("utf-8", "replace").decode())
    picture.image.save(data, "PNG", pnginfo=info)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def in_openai_form(message: Message, url: Callable[["Picture"], str] = data_url) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": url(part["image"])}} if "image" in part else part
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def load(path: Path, open_url: "Open | None" = None) -> tuple[list[Message], dict[str, str]]:
    """The messages of a file, their pictures opened, and such names of pictures, by digest, as `save` has kept.

    `open_url` opens data URLs; None: `open_picture`. UsageError names the line that is no message.
    """
    names: dict[str, str] = {}

    def open_named(url: str) -> "Picture":
        from lite_llm.text.images import open_picture  # Pillow

        picture = (open_url or open_picture)(url)
        if title := _title(url):
            names[picture.digest] = title
        return picture

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
        _message(line, f"{path}, line {n}", open_named) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise UsageError(f"{path}, message {index + 1}: a system message must be the first")
    return messages, names


def save(path: Path, messages: list[Message], names: Mapping[str, str] | None = None) -> None:
    """Write the messages: the whole file or, if that fails, what was there before. UsageError says why it failed.

    `names` are those of pictures, by digest.
    """
    names = names or {}
    named = [in_openai_form(one, lambda picture: data_url(picture, names.get(picture.digest, ""))) for one in messages]
    lines = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in named)
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


def _message(line: str, where: str, open_url: "Open") -> Message:
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


def _part(part: object, where: str, open_url: "Open") -> dict[str, Any]:
    """No URL is opened, and no other file: the one they are named in may be a stranger's."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if isinstance(part, dict) else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise UsageError(f"{where} holds a part that is neither text nor a picture", "pictures must be data URLs")
    try:
        return {"type": "image", "image": open_url(url)}
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None


def _title(url: str) -> str:
    """Of a picture that `data_url` has written; "" for others. Only the first bytes are looked at."""
    head = base64.b64decode(url[url.index(",") + 1 :][:1024])
    found = _TITLE.match(head)
    title = head[found.end() :][: int.from_bytes(found[1], "big") - len("Title") - 5] if found else b""
    return " ".join(title.decode("utf-8", "replace").split())[:_LONGEST]
