"""What the device knows of every running request, by row, so that a step needs nothing from the CPU."""

from collections.abc import Mapping

import numpy as np
import torch

from lite_llm.engine.request import Request
from lite_llm.ops.reference.sampling import PROMPT

MAX_STOPS = 64
"""Most stop tokens of a request."""

_INTS = ("last", "length", "ended", "min_len", "max_len", "top_k", "counting", "biased", "constrained")
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_ALIGNED = 4
"""Words that begin where a vector may: kernels are compiled for 16 bytes."""


class DeviceState:
    """One vector of `rows` numbers for each fact of a request; the last row is nobody's, and pads use it.

    The device writes `last`, `length`, `ended`, `counts`, `ring` and `step` itself, step by step. The CPU writes to a
    row when its request joins, to the table when a request gets slots, and to `allowed` before every token that a
    constraint speaks of: small edits between two steps.
    """

    def __init__(self, max_requests: int, max_len: int, vocab: int, depth: int, device: torch.device, widest: int):
        """`depth` is how many steps may be under way before the CPU reads the tokens of the first, `widest` the most
        tokens of one."""
        rows = max_requests + 1
        self.device, self.vocab, self.pad_row = device, vocab, max_requests
        ints = dict(dtype=torch.int32, device=device)
        # All that joins and new slots write is one vector, so that a step's edits are one transfer and one launch.
        sizes = {"seeds": 2 * rows} | dict.fromkeys(_INTS + _FLOATS, rows)
        sizes |= {"stop_ids": rows * MAX_STOPS, "table": rows * max_len}
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()]).tolist()
        self._at = dict(zip(sizes, [0, *ends[:-1]], strict=True))
        self._words = torch.zeros(ends[-1], **ints)
        at = {name: self._words[first : first + sizes[name]] for name, first in self._at.items()}
        self.table = at["table"].view(rows, max_len)  # slot of each position
        self.last = at["last"]  # the token at position `length`: sampled, not yet computed
        self.length = at["length"]  # tokens whose K and V are cached
        self.ended = at["ended"]  # 1: the request has ended, and is skipped until the CPU knows
        self.min_len, self.max_len = at["min_len"], at["max_len"]  # in tokens, prompt and answer
        self.counting, self.biased = at["counting"], at["biased"]  # 1: penalties, biases matter here
        self.constrained = at["constrained"]  # 1: only what `allowed` says is sampled
        self.top_k = at["top_k"]
        floats = {name: at[name].view(torch.float32) for name in _FLOATS}
        self.temperature, self.top_p, self.min_p = floats["temperature"], floats["top_p"], floats["min_p"]
        self.repetition, self.presence = floats["repetition"], floats["presence"]
        self.frequency = floats["frequency"]
        self.seeds = at["seeds"].view(torch.int64)
        self.stop_ids = at["stop_ids"].view(rows, MAX_STOPS)
        self.stop_ids.fill_(-1)  # unused
        self.counts = torch.zeros(rows, vocab, **ints)  # occurrences in the output; flag PROMPT: in the prompt
        self.bias = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        self.allowed = torch.zeros(rows, words_of(vocab), **ints)  # a bit for each token; read where constrained
        self.step = torch.zeros(1, **ints)  # the line of the ring that the last step wrote to
        # The device writes each step's tokens straight into the CPU's memory, in turn.
        self.ring = torch.zeros(depth, widest, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.ended[self.pad_row] = 1
        self.top_p[self.pad_row] = self.repetition[self.pad_row] = 1.0

    def edit(self, requests: list[Request]) -> None:
        """Write the rows of those that have just got one, and of all of them the slots that the table does not know."""
        joining = [request for request in requests if request.written == 0]
        growing = [request for request in requests if request.written < len(request.slots)]
        edits = self._rows(joining) + [self._slots(request) for request in growing]
        if edits:
            at, words = (np.concatenate(arrays) for arrays in zip(*edits, strict=True))
            t = self.upload({"at": at.view(np.int32), "words": words})
            self._words.index_copy_(0, t["at"].view(torch.int64), t["words"])
        for request in growing:
            request.written = len(request.slots)
        for request in joining:
            self._count(request)

    def _rows(self, requests: list[Request]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Places in `_words` and what becomes of them, where requests join."""
        if not requests:
            return []
        rows, params = np.array([r.row for r in requests]), [r.params for r in requests]
        known = [r.pending == 1 for r in requests]  # the prefix cache had all but one token, which is a decode then
        words = {
            "last": [r.ids[-1] if one else 0 for r, one in zip(requests, known, strict=True)],
            "length": [r.cached for r in requests],
            "ended": [0] * len(requests),
            "min_len": [min(r.min_len, 2**31 - 1) for r in requests],
            "max_len": [min(r.max_len, 2**31 - 1) for r in requests],
            "top_k": [p.top_k for p in params],
            "counting": [int(p.penalized) for p in params],
            "biased": [int(bool(p.logit_bias)) for p in params],
            "constrained": [int(r.constraint is not None) for r in requests],
        }
        floats = {
            "temperature": [0.0 if p.greedy else p.temperature for p in params],
            "top_p": [p.top_p for p in params],
            "min_p": [p.min_p for p in params],
            "repetition": [p.repetition_penalty for p in params],
            "presence": [p.presence_penalty for p in params],
            "frequency": [p.frequency_penalty for p in params],
        }
        stops = np.full((len(requests), MAX_STOPS), -1, dtype=np.int32)
        for i, request in enumerate(requests):
            stops[i, : len(request.stop_ids)] = sorted(request.stop_ids)
        starts = np.array([self._at[name] for name in (*words, *floats)])
        return [
            ((starts[:, None] + rows).ravel(), np.concatenate([_words(words, np.int32), _words(floats, np.float32)])),
            (self._at["seeds"] + _cells(rows, 2), np.array([p.seed for p in params], dtype=np.int64).view(np.int32)),
            (self._at["stop_ids"] + _cells(rows, MAX_STOPS), stops.ravel()),
        ]

    def _slots(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        first, end = request.written, len(request.slots)
        start = self._at["table"] + request.row * self.table.shape[1]
        return np.arange(start + first, start + end), np.fromiter(request.slots[first:], np.int32, end - first)

    def _count(self, request: Request) -> None:
        """The tables as wide as the vocabulary, for a request that needs them."""
        if request.params.penalized:
            prompt, output = (
                np.bincount(np.array(ids, dtype=np.int64), minlength=self.vocab)
                for ids in (request.ids[: request.prompt_len], request.output)
            )
            counts = (output + PROMPT * (prompt > 0)).astype(np.int32)
            self.counts[request.row] = self.upload({"counts": counts})["counts"]
        if request.params.logit_bias:
            bias = np.zeros(self.vocab, dtype=np.float32)
            bias[list(request.params.logit_bias)] = list(request.params.logit_bias.values())
            self.bias[request.row] = self.upload({"bias": bias.view(np.int32)})["bias"].view(torch.float32)

    def allow(self, requests: list[Request]) -> None:
        """Write what the next tokens of constrained requests may be."""
        if requests:
            pieces = {"rows": np.array([r.row for r in requests], dtype=np.int32)}
            t = self.upload(pieces | {"allowed": np.stack([_allowed(request) for request in requests])})
            self.allowed.index_copy_(0, t["rows"].long(), t["allowed"].view(len(requests), -1))

    def upload(self, pieces: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """int32 arrays, flattened, in one transfer that nobody waits for."""
        sizes = [piece.size for piece in pieces.values()]
        flat = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        np.concatenate([piece.ravel() for piece in pieces.values()], out=flat.numpy())
        return dict(zip(pieces, flat.to(self.device, non_blocking=True).split(sizes), strict=True))


def _words(facts: dict[str, list], dtype: type) -> np.ndarray:
    return np.array(list(facts.values()), dtype=dtype).view(np.int32).ravel()


def _cells(rows: np.ndarray, width: int) -> np.ndarray:
    """Where these rows of a table of this width are in it."""
    return (rows[:, None] * width + np.arange(width)).ravel()


def words_of(vocab: int) -> int:
    """Words of 32 bits that have a bit for each token."""
    return -(-vocab // 32)


def _allowed(request: Request) -> np.ndarray:
    """What its constraint allows; before `min_tokens` without stop tokens, unless nothing else may follow."""
    allowed = request.constraint.allowed
    if request.output_len < request.params.min_tokens:
        going_on = allowed.view(np.uint32).copy()
        for token in request.stop_ids:
            going_on[token // 32] &= ~np.uint32(1 << token % 32)
        if going_on.any():
            return going_on.view(np.int32)
    return allowed
