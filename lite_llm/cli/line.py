"""The input line: editing, history in a file, many lines, completion of slash commands."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.styles import Style

from lite_llm.cli.commands import TABLE
from lite_llm.text.escape import visible

_QUOTES = '"""'
_LONG = 4096  # characters from which on a text is data, not something to complete
_OF_FILES = ("/image", "/load", "/save")
_PATHS = PathCompleter(expanduser=True)
_STYLE = Style.from_dict({"meter": "fg:ansibrightblack", "arrow": "bold"})


class LineInput:
    """Asks for one message at a time. EOFError when the user leaves, as `input` does."""

    def __init__(self, *, input: Input | None = None, output: Output | None = None):
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(),
            completer=_Commands(),
            complete_while_typing=Condition(self._is_command),
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: " " * width,
            enable_open_in_editor=True,
            enable_suspend=True,
            style=_STYLE,
            input=input,
            output=output or create_output(always_prefer_tty=True),  # the answers' stream may be a file
        )

    def __call__(self, meter: str, prefilled: str = "") -> str:
        """One message, without the triple quotes around it. Bytes that are no UTF-8 become U+FFFD."""
        prompt = FormattedText([("class:meter", f"[{meter}]"), ("class:arrow", " > ")])
        return unquoted(clean(self._prompt.prompt(prompt, default=prefilled)))

    def _is_command(self) -> bool:
        buffer = self._prompt.default_buffer
        return len(buffer.text) < _LONG and buffer.text.startswith("/") and "\n" not in buffer.text

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            if _open_block(event.current_buffer.text):
                event.current_buffer.insert_text("\n")
            else:
                event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                run_in_terminal(lambda: print("Ctrl-D or /exit leaves", file=sys.stderr))

        @keys.add("c-g")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.open_in_editor(validate_and_handle=False)

        return keys


def plain_line(meter: str, prefilled: str = "") -> str:
    """A line from a terminal that understands no control codes, on which nothing can be edited."""
    if prefilled:
        print(f"it was: {visible(prefilled)}", file=sys.stderr)
    print(f"[{meter}] > ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return clean(line.rstrip("\n"))


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        word = document.text_before_cursor
        name, blank, path = word.partition(" ")
        if name in _OF_FILES and blank:
            yield from _PATHS.get_completions(Document(path), complete_event)
        if not word.startswith("/") or any(c.isspace() for c in word):
            return
        for command in TABLE.values():
            if command.name.startswith(word[1:]):
                shown = f"/{command.name} {command.arguments}".strip()
                yield Completion(f"/{command.name}", -len(word), display=shown, display_meta=command.help)


class _FileHistory(FileHistory):
    """Never the reason that a chat ends: what cannot be written is remembered until the end only."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(clean(string))


def clean(text: str) -> str:
    """Input bytes that are no UTF-8 arrive as lone surrogates, which no file or tokenizer takes."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)


def unquoted(text: str) -> str:
    stripped = text.strip()
    if stripped.startswith(_QUOTES) and stripped.endswith(_QUOTES) and len(stripped) >= 2 * len(_QUOTES):
        return stripped[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return text


def _open_block(text: str) -> bool:
    stripped = text.strip()
    closed = stripped.endswith(_QUOTES) and len(stripped) >= 2 * len(_QUOTES)
    return stripped.startswith(_QUOTES) and not closed


def _history() -> History:
    """Kept in the XDG state directory, readable by its owner only; in memory if there is no such place."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    path = Path(state) / "lite_llm" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return _FileHistory(str(path))
