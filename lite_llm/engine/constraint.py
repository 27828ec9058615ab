"""What an answer may be, token by token. The engine knows no grammar: somebody else says what may follow.

Which tokens are allowed depends on the last one, so a request with a constraint sits out steps until the CPU has read
what the step before said. Others go on meanwhile.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


class Constraint(Protocol):
    """One answer's state. Tokens that end the answer must be among those allowed where it may end."""

    allowed: "np.ndarray"
    """int32 [ceil(vocab / 32)]: bit t % 32 of word t // 32 says whether token t may come next. If nothing may, the
    request ends with reason "grammar"."""

    def advance(self, token: int) -> None:
        """The next token is `token`, which was allowed and does not end the answer; `allowed` is that behind it. Must
        not raise."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """What answers may be. Never changes, so that threads and requests may share it."""

    def start(self) -> Constraint:
        """The state of an answer without a token. Takes well below a millisecond: the engine's thread waits."""
        ...
