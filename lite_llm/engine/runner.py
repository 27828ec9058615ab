"""Runs steps on the device: each shape of step is one function, and on a GPU one CUDA graph of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lite_llm import ops
from lite_llm.batch import Batch, KVPool
from lite_llm.engine.graphs import record
from lite_llm.engine.request import Part
from lite_llm.engine.scheduler import FEW, MOST_REVEALED
from lite_llm.engine.state import DeviceState
from lite_llm.engine.vision import Encoder
from lite_llm.ops.warm import Say


class Shape(NamedTuple):
    """How much a step has room for. What it does not need is filled with pads: row `pad_row`, the pad slot."""

    decodes: int  # requests that advance by the one token that the device holds
    prompts: int  # further requests ...
    tokens: int  # ... and their tokens together, which the CPU sends
    samples: int = 1  # more: these are no prompts, but each request's last token and as many drafts as make this up

    @property
    def requests(self) -> int:
        """Of the batch, in which every token that is verified is a request that decodes."""
        return self.decodes + (self.prompts if self.samples == 1 else self.tokens)

    @property
    def computed(self) -> int:
        """Tokens, pads included."""
        return self.decodes + self.tokens


class Piece(NamedTuple):
    """What a step sends of one prompt, or of one request's last token and drafts."""

    row: int
    first: int  # position of its first token
    tokens: list[int]
    slots: list[int]
    wanted: bool  # whether its last token is followed by one that is sampled
    parts: Sequence[Part] = ()  # of pictures


DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BETWEEN = tuple(n // 4 * quarters for n in TOKENS[4:-1] for quarters in (5, 6, 7))
"""Further numbers of tokens, of steps that nobody decodes in: their first token waits for every pad."""
BESIDE = (16, 64, 128, 192)
"""Decodes that prompts are computed beside."""
LEAST, LARGE = 64, 512
"""Tokens of the smallest step with prompts and decodes, for fewer take as long, and of one whose matmuls take longer
than reading the weights."""
FINE = 16
"""Decodes from one step of LARGE tokens to the next: that is where most prompts are computed, and pads cost as much as
tokens do."""
PROMPTS = 32
"""Most prompts in one step of a graph."""
ANOTHER = 256
"""Tokens of a large step that take as long as a step of few: 294 of the 1B on an H200, 247 of the 8B."""


def shapes(max_requests: int, step_tokens: int) -> list[Shape]:
    """The shapes of steps that get a graph, smallest first. Any plan of the scheduler fits in one of them."""
    decodes = [n for n in DECODES if n < max_requests] + [max_requests]
    tokens = [n for n in TOKENS if n < step_tokens] + [step_tokens]
    prompts = min(PROMPTS, max_requests)
    beside = [n for n in BESIDE if n < max_requests] + [max_requests]
    sizes = {(d, t) for d in beside for t in _filling(d, tokens)}
    if step_tokens >= LARGE:
        sizes |= {(d, LARGE - d) for d in range(FINE, min(max_requests, LARGE // 2) + 1, FINE)}
    sizes |= {(0, t) for t in tokens} | {(0, t) for t in BETWEEN if t < step_tokens}
    mixed = [Shape(d, min(prompts, t), t) for d, t in sorted(sizes, key=lambda size: (sum(size), size))]
    return [Shape(d, 0, 0) for d in decodes] + mixed


def verifying(max_requests: int, drafts: int) -> list[Shape]:
    """The shapes of steps that verify up to `drafts` tokens of a request, smallest first; none without any."""
    few = {1, min(FEW, max_requests)} if drafts else set()
    return [Shape(n if n > 1 else 0, n, n * (drafts + 1), drafts + 1) for n in sorted(few)]


def _filling(decodes: int, tokens: list[int]) -> list[int]:
    """Numbers of tokens of prompts for steps with so many decodes; `tokens` are those for steps without.

    Large ones come to one of `tokens` together with the decodes: matmuls are cut into tiles of 128 tokens and more, and
    32 of them fill a GPU evenly where 34 need another round of it.
    """
    least = max(4 * decodes, LARGE)
    few = [n for n in tokens if LEAST <= n <= least // 2]
    return few + [n - decodes for n in tokens if n >= least] or tokens[-1:]


class Runner:
    """Owns the inputs of a step and its graphs. All its work is on the caller's current stream.

    Between the CPU and a step stand buffers at fixed places: `send` fills them, `run` reads them.
    """

    def __init__(
        self, model: nn.Module, kv: KVPool, state: DeviceState, usable: int, fixed: Iterable[Shape], most: Shape,
        encoder: Encoder | None = None, verifying: Iterable[Shape] = (),
    ):  # fmt: skip
        """`fixed` are the shapes that steps are padded to; none: every step has its own size, at most `most`.
        `verifying` are those of steps with drafts, smallest first; without `fixed`, what they have room for at most.

        Ids from `usable` on are padding of the vocabulary and never sampled. A model that takes pictures has an
        `encoder` for them.
        """
        self.model, self.kv, self.state, self.usable, self.fixed = model, kv, state, usable, list(fixed)
        self.encoder, self.verifying = encoder, list(verifying)
        self.graphs: dict[tuple[Shape, bool], torch.cuda.CUDAGraph] = {}
        self.seconds: dict[Shape, float] = {}  # that shapes take, filled with pads
        self._adjustable = most.requests
        requests, tokens = most.requests, most.decodes + most.tokens
        for shape in self.verifying:
            requests, tokens = max(requests, shape.requests), max(tokens, shape.decodes + shape.tokens)
        sizes = dict.fromkeys(("rows", "samples", "kv_len", "logits_at"), requests)
        sizes |= {"q_start": requests + 1} | dict.fromkeys(("tokens", "positions", "slots", "pictured"), tokens)
        self._flat = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=state.device)
        self._inputs: dict[str, Tensor] = dict(zip(sizes, self._flat.split(list(sizes.values())), strict=True))
        self._sent: tuple[Shape, list[int]] | None = None  # the decodes that the buffers hold, if nothing else
        # The logits before any penalty, for whoever wants their logprobs.
        self.raw: Tensor | None = None
        self.revealed = torch.empty(0)  # of all tokens of the last step that was to reveal them

    def fit(self, decodes: int, prompts: int, tokens: int, samples: int = 1) -> Shape:
        """The smallest shape that holds a step."""
        if not self.fixed:
            return Shape(decodes, prompts, tokens if samples == 1 else prompts * samples, samples)
        for shape in self.fixed if samples == 1 else self.verifying:
            if decodes <= shape.decodes and prompts <= shape.prompts and tokens <= shape.tokens:
                return shape
        raise AssertionError(f"no shape for {decodes} decodes and {prompts} prompts of {tokens} tokens")

    def beside(self, decodes: int, slowdown: float) -> int:
        """Most tokens of prompts in a step that takes at most `slowdown` times one of `decodes` requests alone.

        If no timed shape is that fast, those of the smallest, for prompts must get on.
        """
        most = slowdown * self.seconds[self.fit(decodes, 0, 0)]
        mixed = [shape for shape in self.seconds if shape.prompts and shape.decodes >= decodes]
        fast = [shape.tokens for shape in mixed if self.seconds[shape] <= most]
        return max(fast, default=min(shape.tokens for shape in mixed))

    def large(self, decodes: int) -> int:
        """Tokens of prompts that fill a step of LARGE tokens in which so many requests decode, or half of LARGE."""
        shapes = (shape for shape in self.fixed if shape.decodes >= decodes and shape.computed <= LARGE)
        return max((shape.tokens for shape in shapes), default=LARGE // 2)

    def fill(self, decodes: int, tokens: int) -> int:
        """How many of a step's tokens of prompts are better computed in it, and not in the next one.

        All, unless there are more than any shape holds, or less is computed if a shape that some of them fill comes
        first and one for the rest next: a step in which others decode takes place anyway, another one has to be worth
        its own time.
        """
        if not self.fixed:
            return tokens
        front: list[Shape] = []  # each holds more than all that compute less
        for shape in self.fixed:
            if shape.prompts and shape.decodes >= decodes and (not front or shape.tokens > front[-1].tokens):
                front.append(shape)
        holding = lambda n: next(shape for shape in front if shape.tokens >= n)  # noqa: E731
        if tokens > front[-1].tokens:
            return front[-1].tokens
        now, whole = tokens, holding(tokens).computed - (0 if decodes else ANOTHER)
        for first in reversed(front):
            if first.tokens < tokens:
                both = first.computed + holding(tokens - first.tokens).computed - decodes
                if both < whole:
                    now, whole = first.tokens, both
        return now

    def send(self, shape: Shape, rows: list[int], prompts: Sequence[Piece]) -> None:
        """Fill the inputs: rows that decode, and pieces of prompts or of what is verified."""
        if not prompts and self._sent == (shape, rows):
            return
        pad, decodes = self.state.pad_row, len(rows)
        flat = torch.empty(len(self._flat), dtype=torch.int32, pin_memory=self._flat.device.type == "cuda")
        words = flat.numpy()
        words.fill(0)  # by numpy: torch would wake its threads for that
        ends = np.cumsum([len(t) for t in self._inputs.values()])
        arrays = dict(zip(self._inputs, np.split(words, ends[:-1]), strict=True))
        arrays["rows"][:] = arrays["samples"][:] = pad
        arrays["rows"][:decodes] = arrays["samples"][:decodes] = rows
        shown = []
        if shape.samples > 1:
            _fill_drafts(arrays, shape, prompts)
        else:
            shown = _fill_prompts(arrays, shape, prompts, pad)
        self._flat.copy_(flat, non_blocking=True)
        if shown:
            self.encoder.show_(shown)
        self._sent = None if prompts else (shape, list(rows))

    def run(self, shape: Shape, adjusted: bool, reveal: bool = False) -> None:
        """One step; `adjusted`: some request has penalties, biases, a least length or a constraint, or wants logprobs.
        `reveal` keeps the logits of all tokens of prompts, for at most MOST_REVEALED of them; no graph does."""
        graph = self.graphs.get((shape, adjusted))
        if graph is not None and not reveal:
            graph.replay()
        else:
            self._step(shape, adjusted, reveal)

    def capture(self, say: Say, timed: bool = False) -> None:
        """Run every fixed shape once with pads alone, then record its graph; `timed`: and time it."""
        todo = self._variants()
        if self.raw is None:
            self._allocate()
        pool = torch.cuda.graph_pool_handle()
        for done, (shape, adjusted) in enumerate(todo):
            say("capturing graphs", done, len(todo))
            self.send(shape, [], [])
            graph = self.graphs[shape, adjusted] = record(lambda: self._step(shape, adjusted), pool)  # noqa: B023
            if timed and not adjusted and shape.samples == 1:
                self.seconds[shape] = _seconds(graph)
        say("capturing graphs", len(todo), len(todo))
        if self.encoder is not None:
            self.encoder.capture(pool, say)
        torch.cuda.current_stream().synchronize()

    def rehearse(self) -> None:
        """Run every fixed shape once with pads alone: afterwards no kernel is new."""
        for shape, adjusted in self._variants():
            self.send(shape, [], [])
            self._step(shape, adjusted)
            if shape.samples == 1 and not adjusted and 0 < shape.tokens <= MOST_REVEALED:
                self._step(shape, adjusted=False, reveal=True)
        self.revealed = torch.empty(0)
        if self.encoder is not None:
            self.encoder.rehearse()

    def _variants(self) -> list[tuple[Shape, bool]]:
        """What is recorded, the largest first: `run`'s arguments. No draft is verified beside adjusted logits."""
        whole = [(shape, adjusted) for shape in reversed(self.fixed) for adjusted in (True, False)]
        return whole + [(shape, False) for shape in reversed(self.verifying)]

    def _step(self, shape: Shape, adjusted: bool, reveal: bool = False) -> None:
        i, s, n = self._inputs, self.state, shape.decodes
        total, requests, verifies = n + shape.tokens, shape.requests, shape.samples > 1
        ops.decode_inputs_(
            i["tokens"], i["positions"], i["slots"], i["kv_len"], i["rows"][:n], s.last, s.length, s.ended, s.table,
            s.step, len(s.ring),
        )  # fmt: skip
        # Those that decode embed what was sampled.
        sees = self.encoder is not None and shape.prompts > 0 and not verifies
        batch = Batch(
            tokens=i["tokens"][:total],
            positions=i["positions"][:total],
            slots=i["slots"][:total],
            q_start=i["q_start"][: requests + 1],
            kv_len=i["kv_len"][:requests],
            table=s.table,
            rows=i["rows"][:requests],
            logits_at=i["logits_at"][:requests] if shape.prompts and not verifies and not reveal else None,
            decodes=requests if verifies else n,
            features=self.encoder.features[:total] if sees else None,
            pictured=i["pictured"][:total].bool() if sees else None,
        )
        logits = self.model(batch, self.kv)
        if reveal:
            self.revealed = logits[n:]
            logits = logits[i["logits_at"][:requests]]
        # A sampled token stands behind the cached ones: its position is their number.
        rows, positions = i["samples"][:requests], batch.kv_len
        if adjusted:
            if self.raw is None:
                self._allocate()
            self.raw[:requests].copy_(logits)
            logits = logits.to(torch.float32, copy=True)
            ops.adjust_(
                logits, rows, positions, s.counts, s.bias, s.biased, s.repetition, s.presence, s.frequency,
                s.stop_ids, s.min_len, s.allowed, s.constrained,
            )  # fmt: skip
        chosen = ops.sample(logits, rows, positions, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, self.usable)
        parts = [(0, n, 1), (n, requests, shape.samples)] if verifies else [(0, requests, 1)]
        for first, end, samples in parts:
            ops.advance_(
                rows[first:end], positions[first:end], chosen[first:end], batch.tokens[first:end], s.last, s.length,
                s.ended, s.stop_ids, s.min_len, s.max_len, s.counting, s.counts, s.ring[:, first:], s.step, samples,
            )  # fmt: skip

    def _allocate(self) -> None:
        weight = next(self.model.parameters(), None)
        dtype = weight.dtype if weight is not None else torch.float32
        shape = (self._adjustable, self.state.vocab)
        self.raw = torch.zeros(shape, dtype=dtype, device=self.state.device)


def _fill_prompts(arrays: dict[str, np.ndarray], shape: Shape, prompts: Sequence[Piece], pad: int) -> list[Part]:
    """Write pieces of prompts behind the decodes, end to end; returns the parts of pictures in them."""
    arrays["q_start"][: shape.decodes + 1] = np.arange(shape.decodes + 1)
    arrays["logits_at"][: shape.decodes] = np.arange(shape.decodes)
    at, shown = shape.decodes, []
    for b, (row, first, tokens, slots, wanted, parts) in enumerate(prompts, start=shape.decodes):
        end = at + len(tokens)
        for part in parts:
            shown.append(part._replace(at=at + part.at))
            arrays["pictured"][shown[-1].at : shown[-1].at + part.count] = 1
        arrays["rows"][b] = row
        arrays["samples"][b] = row if wanted else pad
        arrays["tokens"][at:end], arrays["slots"][at:end] = tokens, slots
        arrays["positions"][at:end] = np.arange(first, first + len(tokens))
        arrays["kv_len"][b] = first + len(tokens)
        arrays["q_start"][b + 1], arrays["logits_at"][b] = end, end - 1
        at = end
    arrays["q_start"][shape.decodes + len(prompts) + 1 :] = at
    return shown


def _fill_drafts(arrays: dict[str, np.ndarray], shape: Shape, pieces: Sequence[Piece]) -> None:
    """Write what is verified behind the decodes: every token a request of its own, pads behind those of each piece."""
    arrays["q_start"][:] = np.arange(len(arrays["q_start"]))
    for at, (row, first, tokens, slots, _, _) in zip(range(shape.decodes, shape.requests, shape.samples), pieces):
        end = at + len(tokens)
        arrays["rows"][at:end] = arrays["samples"][at:end] = row
        arrays["tokens"][at:end], arrays["slots"][at:end] = tokens, slots
        arrays["positions"][at:end] = np.arange(first, first + len(tokens))
        arrays["kv_len"][at:end] = np.arange(first + 1, first + 1 + len(tokens))


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(2):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 2e3
