"""A stream cut at its stop string equals the whole text cut at its first stop string, for every chunking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_llm.errors import UsageError
from lite_llm.text import StopMatcher

LETTERS = st.sampled_from("ab\n🙂é")
TEXTS = st.text(LETTERS, max_size=40)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=5)


def cut(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The definition: the stop that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def chunks_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 40), max_size=12), st.booleans())
def test_equals_the_definition_for_every_chunking(text, stops, cuts, include_stop):
    matcher = StopMatcher(stops, include_stop)
    want, stop = cut(text, stops, include_stop)
    shown = ""
    for chunk in chunks_of(text, cuts):
        shown += matcher.add(chunk)
        assert want.startswith(shown)  # nothing shown is ever taken back
    assert (shown + matcher.finish(), matcher.stopped) == (want, stop)


@given(TEXTS, STOPS)
def test_holds_back_only_what_could_become_a_stop(text, stops):
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.add, text))
    if matcher.stopped is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[at:]) for stop in stops for at in range(len(shown)) if text[at:])


@pytest.mark.parametrize(
    "stops, text, shown, stopped",
    [
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # complete first
        (["c", "abc"], "xabc", "x", "abc"),  # both complete here: the longest
        (["aab"], "aaaab", "aa", "aab"),  # overlaps itself
        (["好。"], "你好，好。再", "你好，", "好。"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["x" * 1000], "x" * 999 + "y", "x" * 999 + "y", None),
        (["<|eot|>"], "a <|eot", "a <|eot", None),
        ("END", "an END", "an ", "END"),  # a string is one stop, as in the OpenAI API
    ],
)
def test_examples(stops, text, shown, stopped):
    matcher = StopMatcher(stops)
    assert "".join(map(matcher.add, text)) + matcher.finish() == shown
    assert matcher.stopped == stopped


def test_sixteen_long_stops_stay_linear():
    stops = ["a" * 2000 + str(index) for index in range(16)]
    matcher, text = StopMatcher(stops), "a" * 20_000
    assert matcher.add(text) + matcher.finish() == text


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], [3]])
def test_a_useless_stop_is_refused(stops):
    with pytest.raises(UsageError, match=r"stop\[\d\]"):
        StopMatcher(stops)
