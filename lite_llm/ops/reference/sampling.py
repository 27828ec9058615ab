"""From logits to tokens. Randomness is a function of (seed, position, token id) alone, so batches never matter."""

import torch
from torch import Tensor

PROMPT = 1 << 30
"""Flag in a count: the token occurs in the prompt. The bits below count its occurrences in the output."""

MIN_TEMPERATURE = 1e-5
"""Colder temperatures, 0 excepted, count as this one: logits divided by less could pass the range of fp32."""

_MASK = 0xFFFFFFFF


def adjust_(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    counts: Tensor,
    bias: Tensor,
    biased: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    stop_ids: Tensor,
    min_len: Tensor,
    allowed: Tensor,
    constrained: Tensor,
) -> None:
    """Apply penalties, then biases, then the bans: of early stops, and of what a constraint does not allow; in place
    to fp32 `logits[N, V]`.

    Row n belongs to row r = `rows[n]` (int32) of the tables, whose last row is nobody's: its logits stay as they are.
    `repetition[R]` (arXiv 1909.05858; 1 is none) divides positive and multiplies negative logits of tokens seen in
    prompt or output, as `counts` int32 [R, V] says; then `presence[R]` is subtracted for tokens in the output,
    `frequency[R]` per occurrence there (both as OpenAI's API defines them; 0 is none; all three fp32).
    `bias[r]` (fp32 [R, V]) is added where `biased[r]` (bool or int32 [R]) and not read elsewhere. While `positions[n]`
    (int32), that of the token to be sampled, is below `min_len[r]` (int32), the tokens `stop_ids[r]` (int32 [R, S],
    -1: unused) become -inf. So do, where `constrained[r]` (bool or int32 [R]), those whose bit of `allowed[r]` (int32
    [R, ceil(V / 32)]) is 0: token t's is bit t % 32 of word t // 32. Elsewhere `allowed` is not read.
    A constraint hides no NaN: what is unusable stays so, and +inf becomes NaN.
    """
    owned = (rows < len(counts) - 1)[:, None]
    at = rows.long()
    seen = counts[at]
    times = (seen & (PROMPT - 1)).to(logits.dtype)
    factor = torch.where(seen > 0, repetition[at, None], 1.0)
    x = torch.where(logits > 0, logits / factor, logits * factor)
    x = x - (presence[at, None] * (times > 0) + frequency[at, None] * times)
    x = torch.where((biased[at] != 0)[:, None], x + bias[at], x)
    stops = stop_ids[at].long()
    too_early = (stops >= 0) & (positions < min_len[at])[:, None]
    hits = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
    hits.scatter_add_(1, stops.clamp(min=0), too_early.int())
    x = torch.where(hits > 0, -torch.inf, x)
    held = (constrained[at] != 0)[:, None]
    if held.any():
        token = torch.arange(x.shape[1], device=x.device)
        bit = (allowed[at][:, token // 32] >> (token % 32).int()) & 1
        x = x + torch.where(held & (bit == 0), -torch.inf, 0.0)
    logits.copy_(torch.where(owned, x, logits))


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    usable: int,
) -> Tensor:
    """One token id per row of `logits[N, V]` (any float, read as fp32); int32 [N]. -1 where a row has NaN, +inf or no
    finite logit, before or after the division by its temperature. Ids from `usable` on are neither sampled nor read.

    Row n takes its settings from row `rows[n]` (int32) of the tables. `temperature` fp32 [R]: 0 takes the largest
    logit, ties to the lowest id. Otherwise, on logits / temperature:
    `top_k` int32 [R] keeps the k largest (0: all); of these `top_p` fp32 [R] keeps each token for which the tokens
    strictly more probable hold less than top_p together (1: all); `min_p` fp32 [R] keeps tokens at least min_p times
    as probable as the best (0: all). Equal logits are kept or dropped together; one token is always kept.
    The draw is the Gumbel-max of the kept logits, with noise from Philox4x32-10 (doi 10.1145/2063384.2063405) at
    key `seeds` (int64 [R]) and counter (token id, position, 0, 0), `positions` int32 [N] being those of the new tokens.
    """
    logits = logits[:, :usable].float()
    temperature, top_k, top_p, min_p, seeds = (x[rows.long()] for x in (temperature, top_k, top_p, min_p, seeds))
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature.clamp(min=MIN_TEMPERATURE))[:, None]
    bad = scaled.isnan().any(-1) | (scaled == torch.inf).any(-1) | (scaled == -torch.inf).all(-1)
    chosen = logits
    if not greedy.all():  # the noise costs more than all else
        scaled = torch.where(bad[:, None], 0.0, scaled)
        noise = gumbel(seeds, positions, usable)
        noisy = torch.where(scaled >= _cutoff(scaled, top_k, top_p, min_p)[:, None], scaled + noise, -torch.inf)
        chosen = torch.where(greedy[:, None], logits, noisy)
    first = (chosen == chosen.amax(-1, keepdim=True)).int().argmax(-1)  # ties to the lowest id
    return torch.where(bad, -1, first).int()


def _cutoff(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest scaled logit that each row keeps."""
    ordered = scaled.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k, ordered.shape[1]).clamp(max=ordered.shape[1]).long() - 1
    cut = ordered.gather(1, last[:, None])
    kept = torch.where(ordered >= cut, ordered, -torch.inf)
    probs = kept.double().softmax(-1)  # so that mass is exact, as far as top_p can tell
    first_of_its_value = torch.searchsorted(-ordered.contiguous(), -ordered, side="left")
    before = (probs.cumsum(-1) - probs).gather(1, first_of_its_value)  # mass strictly more probable
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    inside[:, 0] = True
    nucleus = torch.where(inside, ordered, torch.inf).amin(-1)
    floor = ordered[:, 0] + torch.where(min_p > 0, min_p.log(), -torch.inf)
    return torch.maximum(torch.maximum(cut[:, 0], nucleus), floor).minimum(ordered[:, 0])


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [N, vocab] in fp32: -log(-log(u)), u = ((philox's first word >> 9) + 0.5) / 2**23.

    With 24 bits the largest u would round to 1 and its noise be infinite: one draw in a hundred over 150k tokens.
    """
    ids = torch.arange(vocab, device=seeds.device)
    word = philox(seeds[:, None], ids[None], positions.long()[:, None])
    u = ((word >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def philox(key: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """First 32-bit word of Philox4x32-10 at a 64-bit key and counter (c0, c1, 0, 0); int64 tensors, broadcast."""
    key, c0, c1 = torch.broadcast_tensors(key, c0 & _MASK, c1 & _MASK)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, without passing 2**63."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
