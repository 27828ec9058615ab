"""What a user asks for (`SamplingParams`) and one generation in progress (`Request`). Plain Python: no tensors."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lite_llm.engine.constraint import Constraint, Grammar
from lite_llm.engine.draft import Lookup
from lite_llm.errors import UsageError, shown

if TYPE_CHECKING:
    import numpy as np

_RANGES = {
    "max_tokens": (int, 1, 2**31),
    "min_tokens": (int, 0, 2**31),
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 100),
    "presence_penalty": (float, -100, 100),
    "frequency_penalty": (float, -100, 100),
    "seed": (int, -(2**63), 2**63 - 1),
    "logprobs": (int, 0, 20),
    "prompt_logprobs": (int, 0, 20),
    "n": (int, 1, 64),
}
_DEFAULTS = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
COLDEST = 1e-4
"""Temperatures below this are greedy: logits / temperature would leave fp32's useful range."""
_ABOVE_PICTURES = 320
"""Bits that no key of a token or a picture reaches."""
MOST_BIAS = 1e9
"""Enough to force or ban a token; a logit with it, divided by the coldest temperature, stays finite in fp32."""


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens and when to stop. None takes the checkpoint's generation_config, else the neutral value.

    UsageError names the parameter that is out of its range or of a wrong type; NaN is always out of range.
    """

    max_tokens: int | None = None  # of the answer; None: the rest of the context
    min_tokens: int = 0  # no stop token before the answer has this many, unless `grammar` lets nothing else follow
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # 0: all tokens
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None  # over prompt and answer; 1: none
    presence_penalty: float = 0.0  # over the answer, once per token; 0: none
    frequency_penalty: float = 0.0  # over the answer, per occurrence; 0: none
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of token ids
    seed: int | None = None  # None: a fresh one, reported with the answer
    stop: str | tuple[str, ...] = ()  # strings that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report per token; 0: the chosen token only
    prompt_logprobs: int | None = None  # the same of the prompt's tokens but the first
    n: int = 1  # answers per prompt; answer i uses seed + i
    grammar: Grammar | None = None  # what the answer must be, unless a stop or max_tokens cuts it: see `LLM.grammars`

    def __post_init__(self):
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if type(value) not in (kind, int) or not low <= value <= high:
                raise UsageError(f"{name} = {shown(value)}; expected {_a(kind)} from {low} to {high}")
            object.__setattr__(self, name, kind(value))
        if type(self.ignore_eos) is not bool:
            raise UsageError(f"ignore_eos = {shown(self.ignore_eos)}; expected True or False")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise UsageError(f"grammar is a {type(self.grammar).__name__}; expected what LLM.grammars makes")
        if self.grammar is not None and self.ignore_eos:
            raise UsageError("ignore_eos = True; an answer with a grammar ends where the grammar does")
        stop = (self.stop,) if isinstance(self.stop, str) and self.stop else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop) or len(stop) > 16:
            raise UsageError(f"stop = {shown(self.stop)}; expected at most 16 strings, none empty")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if not isinstance(ids, (tuple, list, set, frozenset)) or not all(type(t) is int for t in ids):
            raise UsageError(f"stop_token_ids = {shown(ids)}; expected token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias = {shown(self.logit_bias)}; expected a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or type(bias) not in (int, float) or not -MOST_BIAS <= bias <= MOST_BIAS:
                raise UsageError(
                    f"logit_bias[{shown(token)}] = {shown(bias)}; expected token id: number from "
                    f"{-MOST_BIAS:g} to {MOST_BIAS:g}"
                )
        object.__setattr__(self, "logit_bias", {token: float(bias) for token, bias in self.logit_bias.items()})

    def resolved(self, generation_config: Mapping[str, object]) -> "SamplingParams":
        """With None replaced by `generation_config`, else by the neutral value, wherever None is no value."""
        given = {name: generation_config[name] for name in _DEFAULTS if generation_config.get(name) is not None}
        if generation_config.get("do_sample"):
            given.setdefault("temperature", 1.0)
        else:
            given["temperature"] = 0.0
        chosen = {name: value for name, value in (_DEFAULTS | given).items() if getattr(self, name) is None}
        if self.seed is None:
            chosen["seed"] = int.from_bytes(os.urandom(4), "little")
        return dataclasses.replace(self, **chosen)

    def of_answer(self, index: int) -> "SamplingParams":
        """Of the index-th of `n` answers alone, once resolved: the seeds follow each other, and the first answer tells
        what the prompt's tokens were worth."""
        if self.n == 1:
            return self
        seed = (self.seed + index + 2**63) % 2**64 - 2**63
        return dataclasses.replace(self, n=1, seed=seed, prompt_logprobs=None if index else self.prompt_logprobs)

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _a(kind: type) -> str:
    return {int: "a whole number", float: "a number"}[kind]


def each(params: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    """Those of n prompts: one for all, or a list of one each. UsageError for anything else."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if not isinstance(params, Sequence) or not all(isinstance(wish, SamplingParams) for wish in params):
        raise UsageError(f"params is a {type(params).__name__}; expected SamplingParams, or a list of them")
    wishes = list(params)
    if len(wishes) != n:
        raise UsageError(f"{len(wishes)} sampling parameters for {n} prompts; expected one for all or one each")
    return wishes


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture as a vision tower takes it."""

    pixels: "np.ndarray"  # [tiles, 3, side, side] float32, as the checkpoint's processor cuts and normalizes them
    size: tuple[int, int]  # height and width of the picture, which say where the tiles belong
    tokens: int  # that stand for it in a prompt
    digest: str = ""  # hexadecimal; stands for what is seen, and for nothing else. Computed if it is left out

    def __post_init__(self):
        if not self.digest:
            hashed = hashlib.blake2b(repr(self.size).encode(), digest_size=32)
            hashed.update(self.pixels.tobytes())
            object.__setattr__(self, "digest", hashed.hexdigest())

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def keys(self) -> range:
        """For each token a number that no token id and no token of another picture has."""
        first = (int(self.digest, 16) + 1) << 32
        return range(first, first + self.tokens)


class Part(NamedTuple):
    """Of a picture's tokens `count` from `first` on, which are those from `at` on of a piece of the prompt."""

    tiles: Tiles
    first: int
    count: int
    at: int


@dataclass(eq=False)
class Request:
    """One answer in progress. The scheduler places it; its `commit` alone adds to `ids`, its `cancel` may end it."""

    ids: list[int]  # prompt, then answer
    params: SamplingParams  # resolved
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer; part of ids, never of the text
    max_len: int = 1 << 62  # prompt and answer together
    pictures: tuple[tuple[int, Tiles], ...] = ()  # and the first of each one's placeholders in `ids`; in order
    salt: str = ""  # requests of another salt share no cached prefix with this one
    deadline: float | None = None  # moment of `time.monotonic` at which it ends, wherever it is
    constraint: Constraint | None = None  # its own state of `params.grammar`, for it follows `ids`
    prompt_len: int = -1
    min_len: int = field(init=False)
    """Tokens, prompt and answer together, that it has when a stop token may first end it. Under a constraint any stop
    token that was sampled does: what is sent as allowed has none where it is too early."""
    cached: int = 0  # tokens whose K and V are in the pool, or will be by the steps under way
    flying: int = 0  # tokens that the steps under way will bring, those of drafts that stand aside
    drafts: list[int] = field(default_factory=list)  # guesses of what follows `ids`, until their step has landed
    stood: int = 0  # of the answer's tokens, those that had been drafted
    lookup: Lookup = field(default_factory=Lookup)
    slots: list[int] = field(default_factory=list)  # where the cached tokens are, in order, and the next ones will be
    shared: int = 0  # of these, the first ones that belong to the prefix cache
    node: object = None  # locked place in the prefix cache, while running
    row: int | None = None  # of the device's tables, while running
    written: int = 0  # of the slots, the first ones that the device's table knows; 0: it knows nothing of the request
    held: int = -1  # position of the token that the device holds, ready to be computed; -1: none
    finish_reason: str | None = None  # "stop", "length", "timeout", "abort", "grammar" or "error"
    logprobs: list["TokenLogprobs"] = field(default_factory=list)
    prompt_logprobs: list["TokenLogprobs"] = field(default_factory=list)  # from the second token on, as they come
    prefix_hit: int = 0  # prompt tokens whose K and V were already there, at first admission
    preemptions: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # for the first time
    first_token: float | None = None
    ended: float | None = None

    def __post_init__(self):
        if self.prompt_len < 0:
            self.prompt_len = len(self.ids)
        p = self.params
        if p.grammar is not None and self.constraint is None:
            self.constraint = p.grammar.start()
        self.min_len = self.prompt_len + (p.min_tokens if self.constraint is None else 0)
        self._always_adjusted = (
            p.penalized or bool(p.logit_bias) or p.logprobs is not None or self.constraint is not None
        )

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_len :]

    @property
    def output_len(self) -> int:
        return len(self.ids) - self.prompt_len

    def keys(self, end: int) -> list[int]:
        """The first `end` tokens as the prefix cache compares them: placeholders by what they stand for, and in the
        first one the salt."""
        keys = self.ids[:end]
        for start, tiles in self.pictures:
            keys[start : start + tiles.tokens] = tiles.keys[: max(end - start, 0)]
        if self.salt and keys:
            hashed = hashlib.blake2b(self.salt.encode("utf-8", "surrogatepass"), digest_size=32).digest()
            keys[0] += (int.from_bytes(hashed, "big") + 1) << _ABOVE_PICTURES
        return keys

    def parts(self, first: int, end: int) -> list[Part]:
        """Of pictures, what lies in the tokens from `first` to before `end`."""
        found = []
        for start, tiles in self.pictures:
            low, high = max(start, first), min(start + tiles.tokens, end)
            if low < high:
                found.append(Part(tiles, low - start, high - low, low - first))
        return found

    @property
    def pending(self) -> int:
        """Tokens not yet computed: the rest of the prompt, or the one just sampled and its drafts."""
        return len(self.ids) + self.flying + len(self.drafts) - self.cached

    @property
    def unread(self) -> bool:
        """Whether what it may say next depends on a token that is still on its way."""
        return self.flying > 0 and (self.constraint is not None or bool(self.drafts))

    @property
    def decoding(self) -> bool:
        """Whether its next step needs nothing from the CPU, but for drafts if there are any."""
        return self.held == self.cached

    @property
    def revealing(self) -> bool:
        """Whether the logits of the tokens that it computes next are wanted, for they tell the prompt's logprobs."""
        if self.cached + 1 >= self.prompt_len or self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def satisfied(self) -> bool:
        """Whether the tokens under way are its last, whatever they are."""
        return len(self.ids) + self.flying >= self.max_len

    @property
    def state(self) -> str:
        """ "waiting" for a row, "prompt" while tokens that are known are computed, "decoding", or "done".

        A preempted request waits again, and what it had said is then part of its prompt.
        """
        if self.finish_reason is not None:
            return "done"
        if self.row is None:
            return "waiting"
        return "decoding" if self.decoding else "prompt"

    @property
    def adjusted(self) -> bool:
        """Whether its next token takes more than the model's logits as they are."""
        return self._always_adjusted or len(self.ids) + self.flying < self.min_len

    def append(self, token: int) -> None:
        """Add a sampled token and end the request if that was its last. -1 is a row without a usable logit."""
        if token < 0:
            stuck = self.constraint is not None and not self.constraint.allowed.any()
            self.end("grammar" if stuck else "error")
            return
        self.first_token = self.first_token or time.monotonic()
        self.ids.append(token)
        if token in self.stop_ids and len(self.ids) > self.min_len:
            self.end("stop")
        elif len(self.ids) >= self.max_len:
            self.end("length")
        elif self.constraint is not None:
            self.constraint.advance(token)

    def end(self, reason: str) -> None:
        self.finish_reason, self.ended = reason, time.monotonic()


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model's unmodified distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most probable first
