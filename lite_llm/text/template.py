"""Chat messages: checked, and rendered through the checkpoint's own template by `transformers`.

A template is code from a stranger. `transformers` renders it in jinja2's immutable sandbox (no attributes that lead
to Python, no changes of arguments, `range` up to 100,000), which does not stop endless work: so each rendering runs in
a thread of its own with a deadline. What stays open: one huge C call (`'a' * 10**10`, `9**9**9`) is neither timed
nor limited in memory, as only a child process could. Requests never bring a template.
"""

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lite_llm.errors import BadCheckpoint, EnvironmentProblem, LiteLLMError, UsageError

ROLES = ("system", "developer", "user", "assistant", "tool")
# What a template gets to see of a message; other keys, such as `refusal` or `annotations`, are dropped.
KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")

_DEADLINE = 1.0  # seconds; a long chat takes milliseconds
_MAX_CHARS = 1 << 24
_PROBE = "4815162342"


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI messages as new dicts, whose content is a list of {"type": "text", "text"} and {"type": "image"}.

    Raises a UsageError that names the message by index.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError(f"messages = {_short(messages)}; expected a non-empty list of {{'role', 'content'}}")
    return [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} = {_short(message)}; expected a dict with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UsageError(f"{where}.role = {_short(role)}; known: {', '.join(ROLES)}")
    checked = {"role": role} | {key: message[key] for key in KEYS if message.get(key) is not None}
    if "tool_calls" in checked:
        checked["tool_calls"] = _tool_calls(f"{where}.tool_calls", checked["tool_calls"])
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif content is None and role == "assistant" and checked.get("tool_calls"):
        content = []
    elif not isinstance(content, (list, tuple)) or not content:
        raise UsageError(f"{where}.content = {_short(content)}; expected a string or a list of content parts")
    checked["content"] = [_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)]
    return checked


def _part(where: str, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        return {"type": "image"}  # the pixels go another way
    raise UsageError(f"{where} = {_short(part)}; expected {{'type': 'text', 'text': ...}} or an image part")


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI sends the arguments as a JSON string, templates want the object."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise UsageError(f"{where} = {_short(calls)}; expected a list of dicts")
    parsed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            with suppress(ValueError, RecursionError):  # a model may have written broken JSON: it is shown as it is
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        parsed.append(dict(call))
    return parsed


def text_of(message: Mapping[str, Any], where: str) -> str:
    """The text parts of a checked message, joined by newlines; a UsageError if it holds an image."""
    if any(part["type"] != "text" for part in message["content"]):
        raise UsageError(
            f"{where} holds an image, but this checkpoint's chat template takes text only",
            hint="send text, or load a vision model",
        )
    return "\n".join(part["text"] for part in message["content"])


class ChatTemplate:
    """The template of one `transformers` tokenizer, which must have one."""

    def __init__(self, hf: Any):
        self._hf = hf
        template = hf.chat_template
        texts = list(template.values()) if isinstance(template, dict) else [template]
        if not all(isinstance(text, str) for text in texts):
            raise BadCheckpoint(f"chat_template = {_short(template)}; expected a string, or strings by name")
        self.source = "\n".join(texts)
        text, parts = self._probe(_PROBE), self._probe([{"type": "text", "text": _PROBE}])
        self._takes_text = _PROBE in text  # LLaVA's templates drop a string without a word
        # What knows strings alone may print a list as Python does.
        self._takes_parts = parts == text if self._takes_text else _PROBE in parts

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt text for checked messages. `continue_final` leaves the last message open."""
        messages = [self._adapt(message, f"messages[{index}]") for index, message in enumerate(messages)]
        return self._apply(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt and not continue_final,
            continue_final_message=continue_final,
        )

    def _adapt(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        if not message["content"]:  # only tool calls
            message = {key: value for key, value in message.items() if key != "content"}
        elif not self._takes_parts or self._takes_text and all(part["type"] == "text" for part in message["content"]):
            message = message | {"content": text_of(message, where)}
        if message["role"] == "developer" and "developer" not in self.source:
            message = message | {"role": "system"}  # the same thing, and older templates drop the unknown role
        return message

    def _probe(self, content: object) -> str:
        """What becomes of content of this form; "" if it is refused."""
        try:
            return self._apply([{"role": "user", "content": content}], add_generation_prompt=True)
        except UsageError:
            return ""  # not this form, or the template wants more than one message; broken ones raise BadCheckpoint

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
        except ImportError as error:
            raise EnvironmentProblem("chat templates need jinja2", hint="pip install 'jinja2>=3.1.6'") from error
        try:
            text = _with_deadline(lambda: self._hf.apply_chat_template(messages, tokenize=False, **options))
        except LiteLLMError:
            raise
        except ImportError as error:  # transformers asks for a newer jinja2
            raise EnvironmentProblem(str(error), hint="pip install 'jinja2>=3.1.6'") from error
        except (SecurityError, TemplateSyntaxError, RecursionError, MemoryError) as error:
            raise BadCheckpoint(
                f"the chat template is broken or not allowed: {type(error).__name__}: {_short(str(error))}",
                hint="repair chat_template.jinja (or chat_template in tokenizer_config.json)",
            ) from error
        except Exception as error:
            if type(error) is TemplateError:  # raise_exception(...) in the template
                raise UsageError(f"the chat template refuses these messages: {str(error)[:500]}") from error
            reason = f"{type(error).__name__}: {_short(str(error))}"
            raise UsageError(f"the chat template cannot render these messages: {reason}") from error
        if len(text) > _MAX_CHARS:
            raise BadCheckpoint(f"the chat template wrote {len(text):,} characters; allowed: {_MAX_CHARS:,}")
        return text


class _Late(BaseException):
    """Raised inside a rendering that is past its deadline."""


def _with_deadline(render: Any) -> str:
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(render())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work, name="lite_llm-template", daemon=True)
    thread.start()
    thread.join(_DEADLINE)
    if thread.is_alive():
        # A compiled template is Python bytecode, so an asynchronous exception ends it at the next instruction. The
        # thread does nothing else, so a late delivery harms nobody.
        for _ in range(20):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Late))
            thread.join(0.05)
            if not thread.is_alive():
                break
        raise BadCheckpoint(
            f"the chat template did not finish within {_DEADLINE:g} s and was stopped",
            hint="look for loops in chat_template.jinja; do not use a template that you cannot explain",
        )
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text
