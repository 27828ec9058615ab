"""The input line, typed into through prompt_toolkit's pipe (CLI-02, CLI-04)."""

import threading
import time

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lite_llm.cli.line import LineInput, _Commands, clean, unquoted


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def typed(keys: str, prefilled: str = "") -> str:
    with create_pipe_input() as pipe:
        threading.Thread(target=pipe.send_text, args=[keys], daemon=True).start()  # a pipe holds 64 KiB
        return LineInput(input=pipe, output=DummyOutput())("0.0k/1k", prefilled)


@pytest.mark.parametrize("keys, line", [
    ("hello\r", "hello"),
    ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
    ('"""\rone\rtwo\r"""\r', "one\ntwo"),
    ('"""one"""\r', "one"),
    ("\x1b[200~one\ntwo\n\x1b[201~\r", "one\ntwo\n"),  # bracketed paste
    ("lost\x03kept\r", "kept"),  # Ctrl-C clears the line
    ("\x03\x03kept\r", "kept"),
    ("nul\x00\r", "nul"),
    ("中文🙂\r", "中文🙂"),
    ("\r", ""),
])  # fmt: skip
def test_what_keys_make(keys, line, state):
    assert typed(keys) == line


def test_ctrl_d_leaves_on_an_empty_line_only(state):
    with pytest.raises(EOFError):
        typed("\x04")
    assert typed("ab\x1b[D\x04\r") == "a"


def test_prefilled_text_is_edited(state):
    assert typed(" more\r", prefilled="said") == "said more"


def test_history_is_kept_for_its_owner(state):
    typed("first question\r")
    history = state / "lite_llm" / "history"
    assert "first question" in history.read_text() and history.stat().st_mode & 0o777 == 0o600
    assert typed("\x1b[A\r") == "first question"


def test_without_a_place_for_history_the_line_still_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert typed("x\r") == "x"


def test_a_paste_of_a_megabyte(state):
    text = "word and more\n" * 75_000
    start = time.monotonic()
    assert typed(f"\x1b[200~{text}\x1b[201~\r") == text
    assert time.monotonic() - start < 20


def test_bad_utf8_becomes_replacement_characters(state):
    assert clean(b"a\xffb".decode("utf-8", "surrogateescape")) == "a\ufffdb"


def test_quotes():
    assert unquoted('"""\na\n b\n"""') == "a\n b" and unquoted('"""') == '"""' and unquoted('say """x') == 'say """x'


@pytest.mark.parametrize("text, names", [
    ("/s", ["/system", "/set", "/show", "/save", "/stats"]),
    ("/un", ["/undo"]),
    ("/undo ", []),
    ("hello /s", []),
    ("//s", []),
])  # fmt: skip
def test_completion(text, names):
    found = list(_Commands().get_completions(Document(text), CompleteEvent()))
    assert [completion.text for completion in found] == names
    assert all(completion.display_meta_text for completion in found)
