"""How long steps take, learnt from those that ran: on a CPU no shape of step is recorded and timed beforehand."""

LEAST = 8
"""Tokens of prompts that any step may have: prompts must get on, and what is not known yet must be learnt."""
_NEW = 0.3
"""How much the last step says of the next one."""


class Pace:
    def __init__(self):
        self.alone: float | None = None  # seconds of a step that only decodes
        self.each: float | None = None  # and what a token of a prompt adds

    def note(self, decodes: int, tokens: int, seconds: float) -> None:
        """A step in which so many requests decoded, and so many tokens of prompts were computed, took `seconds`."""
        if not tokens:
            self.alone = _moved(self.alone, seconds)
        elif not decodes or self.alone is not None:
            self.each = _moved(self.each, max(seconds - (self.alone if decodes else 0.0), 1e-9) / tokens)

    def beside(self, slowdown: float) -> int:
        """Most tokens of prompts in a step of at most `slowdown` times one that only decodes; at least LEAST."""
        if self.alone is None or self.each is None:
            return LEAST
        return max(int((slowdown - 1) * self.alone / self.each), LEAST)


def _moved(before: float | None, now: float) -> float:
    return now if before is None else before + _NEW * (now - before)
