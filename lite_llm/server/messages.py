"""What is read of a conversation in OpenAI's form, and for a client's receipt the names of what is not.

What is wrong with messages is said by those who use them: the template's own check, and what opens pictures.
"""

from collections.abc import Collection, Mapping
from typing import Any

from lite_llm.errors import shown
from lite_llm.server.refusals import Refusal

_PARTS = {"text": ("type", "text"), "image_url": ("type", "image_url")}  # other kinds are refused where they are read
_ALWAYS = ("role", "content")


def taken(messages: Any, heeded: Collection[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages whose parts have nothing but what is read, and the names of all that is ignored, such as
    `messages.content.cache_control`; what is null counts as left out.

    `heeded`: what the checkpoint's template looks at beside role and content.
    Refusal for what are no messages at all.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, f"messages = {shown(messages)}; expected a list of messages", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            where = f"messages[{index}]"
            raise Refusal(400, f"{where} = {shown(message)}; expected an object", where)
    known, ignored, found = {*_ALWAYS, *heeded}, dict[str, None](), []
    for message in messages:
        _known("messages", message, known, ignored)
        if isinstance(message.get("content"), list):
            message = message | {"content": [_part(part, ignored) for part in message["content"]]}
        found.append(message)
    return found, list(ignored)


def _part(part: Any, ignored: dict[str, None]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        return part
    part = _known("messages.content", part, _PARTS[kind], ignored)
    if isinstance(part.get("image_url"), dict):
        part["image_url"] = _known("messages.content.image_url", part["image_url"], ("url",), ignored)
    return part


def _known(where: str, given: Mapping[str, Any], known: Collection[str], ignored: dict[str, None]) -> dict[str, Any]:
    """A copy of what is known; adds the names of the rest to `ignored`."""
    ignored.update({f"{where}.{key}": None for key, value in given.items() if key not in known and value is not None})
    return {key: value for key, value in given.items() if key in known}
