"""Prompt lookup (Saxena 2023; LLMA, arXiv 2304.04487): what followed the last tokens when they stood there before.

Drafts are guesses, and cost only time: a token stands if it is the one that is sampled in its place.
"""

_LONG, _SHORT = 3, 2
"""Tokens that must stand at an earlier place: three say more, two are found more often."""
_PAUSE = 8
"""Tokens of an answer without drafts after one of which nothing stood, or after waiting for nothing: text that only
looks repetitive is then rarely held up."""
_SPAN = 2048
"""Most tokens that one call reads, 1 ms of it: of a long prompt the rest is read in the steps that follow."""


class Lookup:
    """Where the tokens of one request stood last. Reads each of them once."""

    def __init__(self):
        self._behind: dict[tuple[int, ...], int] = {}  # position behind the last place of these tokens
        self._read = 0  # of the request's tokens, those that are in there, but for the last one of them
        self._resting = 0  # tokens of the request up to which nothing is guessed
        self._promised = False

    def guess(self, ids: list[int], most: int, missing: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, to which tokens are only added from call to call.

        `missing` tokens behind them are not known yet: then it says what would be guessed if these were known and
        none, and waiting for them is worth while if it says anything. If that comes to nothing there is a pause.
        """
        found = [] if len(ids) < self._resting or most < 1 else self._following(ids, most)
        if self._promised and not found and not missing:
            self.pause(ids)
        self._promised = bool(found) and missing > 0
        return found

    def pause(self, ids: list[int]) -> None:
        self._resting = len(ids) + _PAUSE

    def _following(self, ids: list[int], most: int) -> list[int]:
        end = min(self._read + _SPAN, len(ids) - 1)  # the last tokens have nothing behind them
        for size in (_SHORT, _LONG):
            first = max(self._read - size + 1, 0)
            read = [ids[first + i : end] for i in range(size)]
            self._behind.update(zip(zip(*read), range(first + size, end + 1)))
        self._read = end
        if end < len(ids) - 1:
            return []
        for size in (_LONG, _SHORT):
            at = self._behind.get(tuple(ids[-size:]))
            if at is not None:
                return [ids[at + i % (len(ids) - at)] for i in range(most)]  # what ends too soon begins again
        return []
