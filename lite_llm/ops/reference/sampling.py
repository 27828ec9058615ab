"""From logits to tokens. Randomness is a function of (seed, position, token id) alone, so batches never matter."""

import torch
from torch import Tensor

PROMPT = 1 << 30
"""Flag in a count: the token occurs in the prompt. The bits below count its occurrences in the output."""

MIN_TEMPERATURE = 1e-5
"""Colder temperatures, 0 excepted, count as this one: logits divided by less could pass the range of fp32."""

_MASK = 0xFFFFFFFF


def penalize_(
    logits: Tensor, counts: Tensor, rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Apply penalties in place to fp32 `logits[N, V]`; row n's counts are `counts[rows[n]]` (int32 [R, V]).

    `repetition[N]` (arXiv 1909.05858; 1 is none) divides positive and multiplies negative logits of tokens seen in
    prompt or output; then `presence[N]` is subtracted for tokens in the output, `frequency[N]` per occurrence there
    (both as OpenAI's API defines them; 0 is none).
    """
    seen = counts[rows]
    times = (seen & (PROMPT - 1)).float()
    factor = torch.where(seen > 0, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits -= presence[:, None] * (times > 0) + frequency[:, None] * times


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token id per row of fp32 `logits[N, V]`; int64 [N]. -1 where a row has NaN, +inf or no finite logit, before
    or after the division by its temperature.

    `temperature` fp32 [N]: 0 takes the largest logit, ties to the lowest id. Otherwise, on logits / temperature:
    `top_k` int32 [N] keeps the k largest (0: all); of these `top_p` fp32 [N] keeps each token for which the tokens
    strictly more probable hold less than top_p together (1: all); `min_p` fp32 [N] keeps tokens at least min_p times
    as probable as the best (0: all). Equal logits are kept or dropped together; one token is always kept.
    The draw is the Gumbel-max of the kept logits, with noise from Philox4x32-10 (doi 10.1145/2063384.2063405) at
    key `seeds` (int64 [N]) and counter (token id, position, 0, 0), `positions` int64 [N].
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature.clamp(min=MIN_TEMPERATURE))[:, None]
    bad = scaled.isnan().any(-1) | (scaled == torch.inf).any(-1) | (scaled == -torch.inf).all(-1)
    scaled = torch.where(bad[:, None], 0.0, scaled)
    noise = gumbel(seeds, positions, logits.shape[1])
    noisy = torch.where(scaled >= _cutoff(scaled, top_k, top_p, min_p)[:, None], scaled + noise, -torch.inf)
    chosen = torch.where(greedy[:, None], logits, noisy)
    first = (chosen == chosen.amax(-1, keepdim=True)).int().argmax(-1)  # ties to the lowest id
    return torch.where(bad, -1, first)


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
    word = philox(seeds[:, None], ids[None], positions[:, None])
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
