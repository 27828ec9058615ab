"""Stop strings in streamed text. What could still become a stop string is held back, so none ever leaks.

Which stop wins: the one that is *complete first*; of several complete at the same character, the longest. Unlike
"the earliest start", this needs no look at text after a complete stop string, so generation ends at once, and the
answer does not depend on how the text was cut into chunks.
"""

from collections.abc import Sequence

from lite_llm.errors import UsageError


class StopMatcher:
    """Cuts one stream of text at its first stop string.

    `stopped` is the stop string that ended the text, None so far. The text before it is returned, the stop string
    itself only with `include_stop`. Compares code points: no case folding, no Unicode normalization.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False):
        stops = [stops] if isinstance(stops, str) else list(stops)
        for index, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise UsageError(f"stop[{index}] = {stop!r}; expected a non-empty string", hint="remove it")
        self.stops = tuple(sorted(set(stops), key=lambda stop: (-len(stop), stop)))  # longest first
        self.include_stop = include_stop
        self.stopped: str | None = None
        self._borders = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)  # how many characters of each stop the text ends with
        self._held = ""

    def add(self, text: str) -> str:
        """Take the next piece of text; returns what is safe to show. Text after the stop string is dropped."""
        if self.stopped is not None:
            return ""
        if not self.stops:
            return text
        stops, borders, matched = self.stops, self._borders, self._matched
        for position, char in enumerate(text):
            for index, stop in enumerate(stops):
                length = matched[index]
                while length and stop[length] != char:  # Knuth-Morris-Pratt: linear for any text and any stop
                    length = borders[index][length - 1]
                matched[index] = length = length + (stop[length] == char)
                if length == len(stop):  # longest first: the longest that is complete here
                    return self._stop(stop, self._held + text[: position + 1])
        text = self._held + text
        safe = len(text) - max(matched)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text has ended: returns what was held back and turned out to be ordinary text."""
        held, self._held = self._held, ""
        return held

    def _stop(self, stop: str, text: str) -> str:
        self.stopped, self._held = stop, ""
        return text if self.include_stop else text[: -len(stop)]


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0] * len(stop), 0
    for position in range(1, len(stop)):
        while length and stop[length] != stop[position]:
            length = borders[length - 1]
        length += stop[length] == stop[position]
        borders[position] = length
    return borders
