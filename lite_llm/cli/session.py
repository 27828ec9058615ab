"""A conversation with one model: what was said, how to sample, and asking the next question. No terminal here."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lite_llm.cli import transcript
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import LiteLLMError

if TYPE_CHECKING:
    from lite_llm.cli.remote import Remote
    from lite_llm.llm import LLM
    from lite_llm.outputs import Output
    from lite_llm.text.images import Picture

Message = transcript.Message


@dataclass
class Totals:
    """Of all answers since the start, for /stats."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0


class Session:
    """Messages change only when an answer has begun or ended: a question that fails leaves all as it was."""

    def __init__(self, llm: "LLM | Remote", params: SamplingParams):
        self.llm, self.params = llm, params
        self.messages: list[Message] = []
        self.waiting: list[Picture] = []  # those that go with the next question
        self.names: dict[str, str] = {}  # of pictures, by digest
        self.file: Path | None = None  # where this conversation was loaded from or saved to
        self.autosaving = False  # whether every turn goes there
        self.totals = Totals()
        self.last: Output | None = None
        self._used: int | None = 0  # None: the messages have changed

    # ---- what was said

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self._set([*([{"role": "system", "content": text}] if text is not None else []), *rest])

    @property
    def context(self) -> int | None:
        """Tokens; None: the model's server does not say."""
        return self.llm.cfg.max_len

    @property
    def used(self) -> int:
        """Tokens of the context that the conversation takes."""
        if self._used is None:
            self._used = self._count()
        return self._used

    @property
    def pictures(self) -> "list[Picture]":
        """All that the conversation holds, in order, without those that wait."""
        return [picture for message in self.messages for picture in transcript.pictures_of(message)]

    def show(self, name: str, picture: "Picture") -> None:
        """Let a picture go with the next question. UsageError if the model takes none."""
        picture = self.llm.open(picture)
        self.names[picture.digest] = name
        self.waiting.append(picture)

    def last_question(self) -> str | None:
        return next((transcript.text_of(m) for m in reversed(self.messages) if m["role"] == "user"), None)

    def clear(self) -> None:
        """Forget all but the system prompt. The next conversation does not overwrite this one's file."""
        self.file, self.autosaving, self.waiting = None, False, []
        self._set(self.messages[: self.system is not None])

    def undo(self) -> str | None:
        """Take the last question and its answer back; returns the question, None if there is none.

        Its pictures go with the next one.
        """
        at = self._last_question_at()
        if at is None:
            return None
        question = transcript.text_of(self.messages[at])
        self.waiting = transcript.pictures_of(self.messages[at]) + self.waiting
        self._set(self.messages[:at])
        return question

    def load(self, path: Path) -> None:
        self._take(*transcript.load(path, self.llm.open))
        self.file, self.autosaving = path, False

    def resume(self, path: Path, messages: list[Message], names: Mapping[str, str]) -> None:
        """Go on with what `path` holds, as `transcript.load` has read it; every later turn is saved there."""
        self._take(messages, names)
        self.file, self.autosaving = path, True

    def save(self, path: Path) -> None:
        transcript.save(path, self.messages, self.names)
        self.file = path

    def autosave(self) -> None:
        if self.autosaving and self.file is not None:
            self.save(self.file)

    # ---- answers

    def ask(
        self,
        text: str,
        say: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
        replace: bool = False,
    ) -> "Output":
        """Answer a question; `say` gets the pieces as they come, and `stopped` is asked between two steps.

        A stopped answer keeps what it has said as the assistant's turn. With `replace` the question takes the place
        of the last one, whose pictures it keeps, and of its answer. LiteLLMError leaves the conversation as it was; so
        does an answer that was stopped before its first character.
        """
        before = self.messages
        at = self._last_question_at() if replace else None
        kept = [] if at is None else transcript.pictures_of(before[at])
        question = transcript.with_pictures(text, kept + self.waiting)
        messages = [*(before if at is None else before[:at]), question]
        output = self._run(messages, say, stopped)
        if output.finish_reason == "error" or (output.finish_reason == "abort" and not output.text):
            return output
        self._set([*messages, {"role": "assistant", "content": output.text}])
        self.waiting = []
        counted = output.usage.prompt_tokens > 0  # a server need not
        self._used = output.usage.prompt_tokens + output.usage.completion_tokens if counted else None
        self._add_up(output)
        return output

    def _run(self, messages: list[Message], say: Callable[[str], None], stopped: Callable[[], bool]) -> "Output":
        name, said = self.llm.add_request(messages, self.params), 0
        try:
            while not self.llm.finished(name):
                if stopped():
                    self.llm.abort(name)
                    break
                for delta in self.llm.step():
                    if delta.id == name and delta.text:
                        said += len(delta.text)
                        say(delta.text)
            output = self.llm.result(name)
        finally:
            self.llm.forget(name)
        if len(output.text) > said:  # what was held back when the answer was stopped
            say(output.text[said:])
        return output

    def _add_up(self, output: "Output") -> None:
        self.last = output
        self.totals.answers += 1
        self.totals.prompt_tokens += output.usage.prompt_tokens
        self.totals.cached_tokens += output.usage.cached_tokens or 0
        self.totals.answer_tokens += output.usage.completion_tokens
        self.totals.seconds += output.timings.total

    def set(self, **changes) -> None:
        """Change sampling parameters. UsageError, and no change, if one is out of its range."""
        self.params = dataclasses.replace(self.params, **changes)

    # ---- helpers

    def _take(self, messages: list[Message], names: Mapping[str, str]) -> None:
        """UsageError, and no change, if there are pictures that the model cannot take."""
        found = [self.llm.open(picture) for message in messages for picture in transcript.pictures_of(message)]
        for picture in found:
            self.names.setdefault(picture.digest, names.get(picture.digest, "saved picture"))
        self._set(messages)

    def _set(self, messages: list[Message]) -> None:
        self.messages, self._used = messages, None

    def _last_question_at(self) -> int | None:
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)

    def _count(self) -> int:
        if not self.messages:
            return 0
        try:
            return len(self.llm.encode(self.messages))
        except LiteLLMError:  # a template may refuse a conversation without a question, and a server to count
            return 0
