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


class DeviceState:
    """One vector of `rows` numbers for each fact of a request; the last row is nobody's, and pads use it.

    The device writes `last`, `length`, `ended`, `counts`, `ring` and `step` itself, step by step. The CPU writes to a
    row when its request joins, to the table when a request gets slots, and to `allowed` before every token that a
    constraint speaks of: small edits between two steps.
    """

    def __init__(self, max_requests: int, max_len: int, vocab: int, depth: int, device: torch.device):
        """`depth` is how many steps may be under way before the CPU reads the tokens of the first."""
        rows = max_requests + 1
        self.device, self.vocab, self.pad_row = device, vocab, max_requests
        ints = dict(dtype=torch.int32, device=device)
        self.table = torch.zeros(rows, max_len, **ints)  # slot of each position
        self._words = torch.zeros(len(_INTS) + len(_FLOATS), rows, **ints)
        at = {name: self._words[i] for i, name in enumerate(_INTS + _FLOATS)}
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
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stop_ids = torch.full((rows, MAX_STOPS), -1, **ints)  # -1: unused
        self.counts = torch.zeros(rows, vocab, **ints)  # occurrences in the output; flag PROMPT: in the prompt
        self.bias = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        self.allowed = torch.zeros(rows, words_of(vocab), **ints)  # a bit for each token; read where constrained
        self.step = torch.zeros(1, **ints)  # the line of the ring that the last step wrote to
        # The device writes each step's tokens straight into the CPU's memory, in turn.
        self.ring = torch.zeros(depth, 2 * rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.ended[self.pad_row] = 1
        self.top_p[self.pad_row] = self.repetition[self.pad_row] = 1.0

    def join(self, requests: list[Request]) -> None:
        """Write the rows of requests that have just got one."""
        if not requests:
            return
        stops = np.full((len(requests), MAX_STOPS), -1, dtype=np.int32)
        for i, request in enumerate(requests):
            stops[i, : len(request.stop_ids)] = sorted(request.stop_ids)
        known = [r.pending == 1 for r in requests]  # the prefix cache had all but one token, which is a decode then
        params = [r.params for r in requests]
        words = [
            [r.ids[-1] if one else 0 for r, one in zip(requests, known, strict=True)],
            [r.cached for r in requests],
            [0] * len(requests),
            [min(r.min_len, 2**31 - 1) for r in requests],
            [min(r.max_len, 2**31 - 1) for r in requests],
            [p.top_k for p in params],
            [int(p.penalized) for p in params],
            [int(bool(p.logit_bias)) for p in params],
            [int(r.constraint is not None) for r in requests],
        ]
        heat = [0.0 if p.greedy else p.temperature for p in params]
        floats = [heat, *([getattr(p, name) for p in params] for name in ("top_p", "min_p"))]
        floats += [[getattr(p, name + "_penalty") for p in params] for name in _FLOATS[3:]]
        t = self.upload(
            {
                "seeds": np.array([p.seed for p in params], dtype=np.int64).view(np.int32),
                "rows": np.array([r.row for r in requests], dtype=np.int32),
                "ints": np.array(words, dtype=np.int32),
                "floats": np.array(floats, dtype=np.float32).view(np.int32),
                "stops": stops,
            }
        )
        rows = t["rows"].long()
        words = torch.cat([t["ints"], t["floats"]]).view(-1, len(requests))
        self._words.index_copy_(1, rows, words)
        self.seeds.index_copy_(0, rows, t["seeds"].view(torch.int64))
        self.stop_ids.index_copy_(0, rows, t["stops"].view(-1, MAX_STOPS))
        for request in requests:
            self._count(request)

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

    def extend(self, requests: list[Request]) -> None:
        """Write the slots that the table does not know yet."""
        rows, positions, slots = [], [], []
        for request in requests:
            end = len(request.slots)
            if request.written < end:
                rows += [request.row] * (end - request.written)
                positions += range(request.written, end)
                slots += request.slots[request.written : end]
                request.written = end
        if slots:
            pieces = {"rows": rows, "positions": positions, "slots": slots}
            t = self.upload({name: np.array(piece, dtype=np.int32) for name, piece in pieces.items()})
            self.table[t["rows"].long(), t["positions"].long()] = t["slots"]

    def upload(self, pieces: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """int32 arrays, flattened, in one transfer that nobody waits for."""
        flat = torch.from_numpy(np.concatenate([piece.ravel() for piece in pieces.values()]))
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        return dict(zip(pieces, flat.split([piece.size for piece in pieces.values()]), strict=True))


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
