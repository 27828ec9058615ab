"""The state of decoding on the device: what a step reads of it, and what its tokens change.

The tables have one row per request and a last one that is nobody's: steps of fewer requests are padded with it.
A token at position p is the p-th (0-based) of its request. `length` counts the tokens whose K and V are cached: that is
the position of `last`, the token to be computed next.
"""

import torch
from torch import Tensor

NO_TOKEN = -2
"""What the ring holds for a row that has no request or whose request had ended before."""


def decode_inputs_(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_len: Tensor,
    rows: Tensor,
    last: Tensor,
    length: Tensor,
    ended: Tensor,
    table: Tensor,
    step: Tensor,
    depth: int,
) -> None:
    """Write what a decode step of the D requests `rows` runs on to the first D of `tokens`, `positions`, `slots`,
    `kv_len`, and count it in `step[1]`, modulo `depth`; all int32.

    Row r computes its token `last[r]` at position p = `length[r]`, in slot `table[r, p]`, over p + 1 cached tokens. If
    it has `ended[r]` it computes token 0 at position 0 in slot 0, the pad slot, over none, and `length` and `table` may
    say anything.
    """
    at = rows.long()
    over = ended[at] != 0
    p = torch.where(over, 0, length[at])
    count = len(rows)
    tokens[:count] = torch.where(over, 0, last[at])
    positions[:count] = p
    slots[:count] = torch.where(over, 0, table[at, p.long()])
    kv_len[:count] = torch.where(over, 0, p + 1)
    step.copy_((step + 1) % depth)


def advance_(
    rows: Tensor,
    positions: Tensor,
    chosen: Tensor,
    computed: Tensor,
    last: Tensor,
    length: Tensor,
    ended: Tensor,
    stop_ids: Tensor,
    min_len: Tensor,
    max_len: Tensor,
    counting: Tensor,
    counts: Tensor,
    ring: Tensor,
    step: Tensor,
    samples: int,
) -> None:
    """Append the N tokens `chosen` (-1: the logits were unusable) at `positions` to the requests `rows`; all int32.

    Each `samples` neighbours are of one request, in the order of their positions, with pads behind them. The first one
    counts; another counts if the one before it does, has not ended the request, and is the token that was `computed` in
    its place: `computed[N]` are the tokens that the logits are of, and not read where `samples` is 1.

    Those that count become `last`, their positions `length`; both [R], as are `ended`, `min_len`, `max_len`, `counting`
    (bool or int32). A request ends at an unusable token, at one of `stop_ids[R, S]` (-1: unused) from position
    `min_len` on, and when it has `max_len` tokens. `counts[R, V]` gains one at the token where the row is `counting`.
    For the CPU, `ring[K, >= N]` gets the tokens at `[step, :N]`, with 0 <= step < K; it may be pinned memory, and some
    columns of it. Tokens that do not count, those of rows that had ended before and of the last one of the tables
    change nothing, and are NO_TOKEN in the ring.
    """
    going = ended[rows[::samples].long()] == 0
    for i in range(samples):
        at, p, token = rows[i::samples].long(), positions[i::samples], chosen[i::samples]
        if i:
            going = going & (computed[i::samples] == chosen[i - 1 :: samples])
        lives = going & (at < len(last) - 1)
        stops = (stop_ids[at] == token[:, None]).any(1) & (p >= min_len[at])
        ends = (token < 0) | stops | (p + 1 >= max_len[at])
        counted = lives & (counting[at] != 0) & (token >= 0)

        ring[int(step), i : len(rows) : samples] = torch.where(lives, token, NO_TOKEN).to(ring.device)
        last[at] = torch.where(lives, token, last[at])
        length[at] = torch.where(lives, p, length[at])
        ended[at] = torch.where(lives, ends.int(), ended[at])
        counts[at, token.clamp(min=0).long()] += counted.int()
        going = lives & ~ends
