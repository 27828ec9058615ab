"""One HTTP request in the engine: a prompt or several, with n answers each, and what has been said so far."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lite_llm.engine.request import SamplingParams, TokenLogprobs
from lite_llm.outputs import Output
from lite_llm.prompts import Encoded
from lite_llm.server.refusals import Refusal


@dataclass
class Piece:
    """What was added to one choice."""

    index: int  # of the choice: answers of the first prompt come first
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # ids, a final stop token included
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """The bridge adds to `pieces`, then calls `wake`, or `end`; whoever writes to the client calls `news`."""

    id: str
    prompts: list[Encoded]
    params: SamplingParams
    streamed: bool
    salt: str = ""
    timeout: float | None = None  # seconds, for the one who is told
    deadline: float | None = None  # moment of `time.monotonic`
    # By the code of a refusal that names no field: which one is meant.
    fields: Mapping[str | None, str | None] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)  # one for each prompt, once it is over
    told: bool = False  # whether any token was handed on
    answered: dict[str, Output] = field(default_factory=dict)  # prompts that are complete, by name
    failure: Refusal | None = None
    over: bool = False

    def __post_init__(self):
        several = len(self.prompts) > 1
        self.names = [f"{self.id}-{i}" if several else self.id for i in range(len(self.prompts))]
        # Which choice, its text, token ids, finish_reason, logprobs.
        self.pieces: deque[tuple[int, str, Sequence[int], str | None, Sequence[TokenLogprobs]]] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def end(self, outputs: list[Output], failure: Refusal | None = None) -> None:
        if failure and failure.param is None:
            failure.param = self.fields.get(failure.code)
        self.outputs, self.failure, self.over = outputs, failure, True
        self.wake()

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def news(self) -> list[Piece]:
        """What was said since the last call, one piece a choice; [] when all is said. Raises what ended it early."""
        while not self.pieces and not self.over:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self.pieces:
            return self._joined()
        if self.failure:
            raise self.failure
        return []

    def _joined(self) -> list[Piece]:
        found: dict[int, Piece] = {}
        while self.pieces:
            at, text, tokens, reason, logprobs = self.pieces.popleft()
            piece = found.get(at)
            if piece is None:
                found[at] = Piece(at, text, [*tokens], [*logprobs], reason)
                continue
            piece.text += text
            piece.tokens += tokens
            piece.logprobs += logprobs
            piece.finish_reason = reason
        return list(found.values())
