"""Markdown as it streams: what it looks like, that chunks do not matter, and that nothing is lost."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lite_llm.cli.inline import BOLD, CODE, ITALIC, scan
from lite_llm.cli.markdown import Markdown

_SGR = re.compile(r"\x1b\[[\d;]*m")


def render(*chunks: str, width: int = 40) -> str:
    markdown = Markdown(lambda: width)
    return "".join([*(markdown.feed(chunk) for chunk in chunks), markdown.finish()])


def plain(*chunks: str, width: int = 40) -> str:
    return _SGR.sub("", render(*chunks, width=width))


@pytest.mark.parametrize("text, expected", [
    ("**bold** and *it*", "\x1b[1mbold\x1b[0m and \x1b[3mit\x1b[0m"),
    ("`a*b*c`", "\x1b[36ma*b*c\x1b[0m"),
    ("``a`b``", "\x1b[36ma`b\x1b[0m"),
    ("***x***", "\x1b[1;3mx\x1b[0m"),
    ("**a *b***", "\x1b[1ma\x1b[0m \x1b[1;3mb\x1b[0m"),
    ("~~old~~", "\x1b[9mold\x1b[0m"),
    ("_it_ and snake_case_name", "\x1b[3mit\x1b[0m and snake_case_name"),
    ("2*3*4 = 24, 2 * 3 * 4", "2*3*4 = 24, 2 * 3 * 4"),
    ("**never closed", "**never closed"),
    ("a `tick", "a `tick"),
    (r"\*literal\* and \(x\)", r"*literal* and \(x\)"),
    ("[text](http://a.b)", "\x1b[4mtext\x1b[0m\x1b[2m \x1b[0m\x1b[2m(http://a.b)\x1b[0m"),
    ("see [1] and [x", "see [1] and [x"),
    ("a ** b", "a ** b"),
])  # fmt: skip
def test_inline(text, expected):
    assert render(text).replace("\x1b[2m \x1b[0m", " ") == expected.replace("\x1b[2m \x1b[0m", " ")


@pytest.mark.parametrize("text, expected", [
    ("# Title\ntext", "Title\ntext"),
    ("#hashtag", "#hashtag"),
    ("- a\n* b\n  + c", "• a\n• b\n  • c"),
    ("1. a\n10) b", "1. a\n10) b"),
    ("> said\n> so", "│ said\n│ so"),
    ("-5 degrees\n-", "-5 degrees\n-"),
    ("---", "─" * 39),
    ("```py\n# no *title*\n\n```\n*x*", "```py\n# no *title*\n\n```\nx"),
    ("````\n```\n````\nz", "````\n```\n````\nz"),
    ("```\nnever closed", "```\nnever closed"),
    ("a\n\n\nb\n", "a\n\n\nb\n"),
    ("| a | b |\n|--|--:|\n| 1 | 22 |\nend", "a │  b\n──┼───\n1 │ 22\nend"),
    ("| a | b |\n|--|:-|\n| 中 |", "a  │ b\n───┼──\n中 │  "),
    ("| a | b |\n|--|--|\n| 1 | 2 | 3 |", "| a | b |\n|--|--|\n| 1 | 2 | 3 |"),
    ("| not a table\nend", "| not a table\nend"),
    ("|x| is absolute", "|x| is absolute"),
])  # fmt: skip
def test_blocks(text, expected):
    assert plain(text) == expected


def test_a_table_that_is_too_wide_stays_as_it_came():
    table = "| aaaaaaaaaaaaaaaaaaaaaaaaa | bbbbbbbbbbbbbbbbbbbbbbbb |\n|--|--|\n| 1 | 2 |"
    assert plain(table) == table


def test_words_wrap_with_the_indent_of_their_block():
    assert plain("- one two three four", width=12) == "• one two\n  three four"
    assert plain("> one two three four", width=12) == "│ one two\n│ three four"
    assert plain("one " + "x" * 30 + " two", width=12) == "one\n" + "x" * 30 + " two"  # the terminal wraps it
    assert plain("中文字符很多很多", width=10) == "中文字符很\n多很多"


def test_text_is_shown_as_early_as_it_can_be():
    markdown = Markdown(lambda: 40)
    assert _SGR.sub("", markdown.feed("Hello wor")) == "Hello"
    assert _SGR.sub("", markdown.feed("ld, **bo")) == " world,"
    assert _SGR.sub("", markdown.feed("ld** x ")) == " bold x"
    markdown.feed("\n```\n")
    assert _SGR.sub("", markdown.feed("for x in")) == "for x in"  # code does not wait for words


def test_a_span_that_stays_open_does_not_hold_the_answer_back():
    markdown = Markdown(lambda: 40)
    shown = markdown.feed("*note " + "word " * 200)
    assert len(shown) > 900


def test_every_piece_ends_its_attributes():
    markdown = Markdown(lambda: 40)
    for character in "# Head\n**bold words** `code`\n```\ncode\n":
        assert _balanced(markdown.feed(character))


def _balanced(text: str) -> bool:
    codes = _SGR.findall(text)
    return all(code == "\x1b[0m" for code in codes[1::2]) and len(codes) % 2 == 0


PIECES = st.lists(
    st.sampled_from(
        ["*", "**", "_", "`", "```", "~~", "[", "](u)", "]", "\\", "|", "#", "- ", "> ", "1. ", "\n", "\n\n", " ", "  "]
        + ["word", "a", "中", "🙂", "|--|--|\n", "| a | b |\n", "---", "\t", "e\u0301", "👩\u200d👧", "x" * 50]
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.lists(st.integers(1, 7), min_size=1, max_size=40))
@example(["*", "*", "a", "**", "*"], [1])
@example(["]", "👩\u200d👧", "x" * 50], [1])
def test_chunks_do_not_matter(pieces, sizes):
    text, chunks, at = "".join(pieces), [], 0
    while at < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[at : at + size])
        at += size
    assert plain(*chunks) == plain(text)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_no_word_is_lost_and_no_line_too_long(pieces):
    text = "".join(pieces)
    shown = plain(text)
    for token in ("word", "a", "中", "🙂"):
        assert shown.count(token) == text.count(token)
    if "```" not in text and "|" not in text:
        for line in shown.split("\n"):
            assert cell_len(line) <= 40 or any(cell_len(word) > 30 for word in line.split())


@given(st.text(alphabet="ab*_` ~[]()\\", max_size=60))
def test_scan_takes_everything_at_the_end(text):
    done, spans = scan(text, True)
    assert done == len(text)
    letters = [c for c in text if c in "ab"]
    assert [c for _, part in spans for c in part if c in "ab"] == letters or "](" in text


def test_scan_waits_for_the_closing_mark():
    assert scan("a **b", False) == (2, [((), "a ")])
    assert scan("**b** c", False) == (7, [((BOLD,), "b"), ((), " c")])
    assert scan("*b*", False) == (0, [])  # a second star may follow
    assert scan("*b*", True) == (3, [((ITALIC,), "b")])
    assert scan("`x`y", False) == (4, [((CODE,), "x"), ((), "y")])
