"""What reaches a terminal moves no cursor, writes no clipboard and hides no text."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lite_llm.text import visible


def test_commands_are_shown_escaped():
    assert visible("\x1b[2J") == "\\x1b[2J"
    assert visible("\x1b]52;c;ZXZpbA==\x07") == "\\x1b]52;c;ZXZpbA==\\x07"
    assert visible("\x1b]8;;http://evil\x1b\\click") == "\\x1b]8;;http://evil\\x1b\\click"
    assert visible("safe\rEVIL\x7f\x9b31m") == "safe\\x0dEVIL\\x7f\\x9b31m"
    assert visible("user\u202enimda\u2066x\u2069") == "user\\u202enimda\\u2066x\\u2069"
    assert visible("\ud83d") == "\\ud83d"


def test_ordinary_text_is_untouched():
    text = "tab\t newline\n emoji 👩‍👩‍👧 עברית العربية 你好 e\u0301 \\x1b"
    assert visible(text) == text


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_nothing_unsafe_is_left_and_chunks_join(a, b):
    shown = visible(a + b)
    assert shown == visible(a) + visible(b)
    shown.encode()  # no surrogates
    assert all(char in "\t\n" or unicodedata.category(char) != "Cc" for char in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
