"""What callers get back. Plain data."""

from dataclasses import dataclass

from lite_llm.engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer; the last one of an answer has a `finish_reason`."""

    id: str
    index: int  # which of the n answers
    text: str  # may be empty: characters are held back until they cannot change
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    token_ids: tuple[int, ...]  # a final stop token included
    finish_reason: str
    stop: str | int | None  # the stop string or stop token that ended it
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of these, how many needed no computing
    completion_tokens: int  # of all choices


@dataclass(frozen=True)
class Timings:
    """Seconds, from the moment the request was queued."""

    first_token: float
    total: float
    tokens_per_second: float  # of the first choice, after its first token; 0 for an answer of one token


@dataclass(frozen=True)
class Output:
    """The answers to one prompt. `text`, `token_ids` and `finish_reason` are those of the first choice."""

    id: str
    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    params: SamplingParams  # as used: defaults filled in

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason
