"""Sampling, kernel against reference. The kernel runs on CPU tensors too, in the interpreter."""

import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops.reference.sampling import PROMPT, _cutoff, gumbel, philox
from tests.close import DEVICE, assert_close

GPU = DEVICE == "cuda"
BACKENDS = [reference, kernels]
NAMES = ["reference", "triton"]
both = pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """The arguments of `sample` after the logits; each is a number for all rows or a list."""

    def column(value, dtype):
        value = value if isinstance(value, (list, torch.Tensor)) else [value] * rows
        return torch.as_tensor(value, dtype=dtype).to(DEVICE)

    floats = (column(temperature, torch.float32),)
    filters = column(top_k, torch.int32), column(top_p, torch.float32), column(min_p, torch.float32)
    return floats + filters + (column(seed, torch.int64), column(position, torch.int64))


def random_settings(rows, vocab):
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (rows,))]  # noqa: E731
    return settings(
        rows, pick(0.0, 0.3, 0.7, 1.0, 2.0), pick(0, 0, 1, 5, 40, 64, 65, 300, vocab, 2 * vocab),
        pick(1.0, 1.0, 0.1, 0.5, 0.9, 0.95, 0.999), pick(0.0, 0.0, 0.02, 0.3, 1.0),
        torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 2**33, (rows,)),
    )  # fmt: skip


def assert_same_draw(got, logits, args):
    """Token for token; where they differ, the two were the best and closer than 1e-4, or one lies at the rim of top_p.

    The rim: both are kept or dropped by a cutoff that a change of top_p by 1e-5 would move past one of them.
    """
    want = reference.sample(logits, *args)
    for row in (got != want).nonzero().flatten().tolist():
        one = [a[row : row + 1] for a in args]
        temperature, top_k, top_p, min_p, seeds, positions = one
        a, b = int(got[row]), int(want[row])
        assert a >= 0 <= b and temperature > 0, f"row {row}: {a}, reference {b}"
        scaled = logits[row : row + 1] / temperature
        noisy = (scaled + gumbel(seeds, positions, logits.shape[1]))[0]
        rims = [_cutoff(scaled, top_k, top_p * (1 + by), min_p) for by in (-1e-5, 1e-5)]
        assert scaled[0, a] >= min(rims), f"row {row}: {a} lies outside the nucleus"
        assert (noisy[a] - noisy[b]).abs() < 1e-4 or rims[0] != rims[1], f"row {row}: {a}, reference {b}"
    return int((got != want).sum())


def test_philox_known_answers():
    """The test vectors of Random123, kat_vectors: philox4x32 10; ours have zeros in the upper half of the counter."""

    def words(*values):
        return (torch.tensor([v], dtype=torch.int64) for v in values)

    assert philox(*words(0, 0, 0)).item() == 0x6627E8D5
    # Counters with an upper half, through the round function that both twins spell out.
    for counter, key, first in [
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ]:
        assert philox_by_hand(counter, key) == first
    for seed, position, token in [(1, 2, 3), (-1, 2**32 - 1, 2**18 - 1), (2**63 - 1, 7, 0), (-(2**63), 0, 151935)]:
        key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        assert philox(*words(seed, token, position)).item() == philox_by_hand((token, position, 0, 0), key)


def philox_by_hand(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def test_noise_is_finite_at_both_ends_of_the_word(monkeypatch):
    words = torch.tensor([[0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1]])
    monkeypatch.setattr("lite_llm.ops.reference.sampling.philox", lambda *_: words)
    noise = gumbel(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 6)
    assert noise.isfinite().all() and noise.diff().ge(0).all() and 16 < noise.max() < 17


def test_the_kernel_draws_the_noise_of_the_reference():
    """Flat rows: the token drawn is the one with the most noise, over seeds of 64 bits and positions past 32."""
    rows, vocab = 64 if GPU else 16, 1000
    args = settings(rows, seed=torch.randint(-(2**63), 2**63 - 1, (rows,)), position=torch.randint(0, 2**40, (rows,)))
    logits = torch.zeros(rows, vocab, device=DEVICE)
    assert torch.equal(kernels.sample(logits, *args), gumbel(*args[-2:], vocab).argmax(-1))


@pytest.mark.parametrize("vocab", [1, 2, 31, 64, 65, 1000, 4096, 4097, 20000])
def test_kernel_draws_as_the_reference(vocab):
    rows = 256 if GPU else 24 if vocab < 4096 else 8
    logits = torch.randn(rows, vocab, device=DEVICE) * torch.rand(rows, 1, device=DEVICE) * 8
    args = random_settings(rows, vocab)
    assert assert_same_draw(kernels.sample(logits, *args), logits, args) <= rows // 16


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 262144])
def test_kernel_draws_as_the_reference_over_real_vocabularies(vocab):
    rows = 64
    for scale in (0.0, 1.0, 5.0):
        logits = torch.randn(rows, vocab, device=DEVICE) * scale
        args = random_settings(rows, vocab)
        assert assert_same_draw(kernels.sample(logits, *args), logits, args) <= 2


def test_filters_that_the_candidate_lists_cannot_answer():
    """Flat rows, many ties, large k, a nucleus of thousands: the kernel goes over the whole row."""
    logits = torch.zeros(8, 9000, device=DEVICE)
    logits[1] = torch.arange(9000) % 3
    logits[2, ::7] = -torch.inf
    logits[3:] = torch.randn(5, 9000)
    args = settings(8, 1.0, [5, 100, 0, 3000, 8999, 0, 700, 0], [1, 1, 0.5, 1, 1, 0.9, 0.7, 0.99], seed=3)
    assert_same_draw(kernels.sample(logits, *args), logits, args)


@pytest.mark.parametrize("vocab", [40, 300, 5000])
def test_every_token_drawn_is_one_that_the_reference_keeps(vocab):
    """Ties are quantized in on purpose: they are kept or dropped together. Draws at high noise find a wrong rim."""
    rows = 64 if GPU else 8 if vocab < 5000 else 2
    logits = (torch.randn(1, vocab, device=DEVICE) * 4).round().div(2).expand(rows, -1).contiguous()
    for filters in [{"top_k": 3}, {"top_k": 30}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 30, "top_p": 0.5}]:
        args = settings(rows, 3.0, **filters, seed=list(range(rows)))
        scaled = logits / 3.0
        kept = scaled >= _cutoff(scaled, *args[1:4])[:, None]
        got = kernels.sample(logits, *args)
        assert kept.gather(1, got[:, None]).all()
        assert_same_draw(got, logits, args)


@both
def test_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, [4500, 77, 300]] = 1.0
    logits[2, [4095, 4096]] = 2.0
    logits[0, 3:] = -0.0  # equal to the zeros before it
    assert backend.sample(logits, *settings(3, 0.0)).tolist() == [0, 77, 4095]


@both
def test_temperature_from_none_to_hot(backend):
    """0 is argmax; next to nothing is argmax where logits differ at all; hot is flat, and nothing overflows."""
    logits = torch.randn(1, 300).mul(20).repeat(5, 1).to(DEVICE)
    best = logits[0].argmax().item()
    got = backend.sample(logits, *settings(5, [0.0, 1e-45, 1e-7, 1e-3, 100.0]))
    assert got[:4].tolist() == [best] * 4 and 0 <= got[4] < 300
    hot = backend.sample(logits[:1].repeat(16, 1), *settings(16, 100.0, seed=list(range(16))))
    assert hot.unique().numel() > 8


@both
def test_one_token_is_always_left(backend):
    logits = torch.randn(1, 500).repeat(9, 1).to(DEVICE)
    best, one = logits[0].argmax().item(), {"top_k": 1}
    for strict in [one, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 7, "top_p": 1e-9, "min_p": 1.0}]:
        assert backend.sample(logits, *settings(9, 2.0, **strict, seed=list(range(9)))).tolist() == [best] * 9


def test_filters_that_keep_everything_change_nothing():
    logits = torch.randn(8, 500, device=DEVICE)
    plain = kernels.sample(logits, *settings(8, seed=list(range(8))))
    for idle in [{"top_k": 500}, {"top_k": 10**6}, {"min_p": 1e-30}, {"top_p": 0.9999999}]:
        assert torch.equal(kernels.sample(logits, *settings(8, **idle, seed=list(range(8)))), plain)


@both
@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8}], ids=["plain", "both", "top_p"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_broken_row_ends_alone(temperature, filters, backend):
    logits = torch.randn(8, 5000, device=DEVICE)
    args = settings(8, temperature, **filters, seed=list(range(8)))
    whole = backend.sample(logits, *args)
    broken = logits.clone()
    broken[1, 4999], broken[3, 0], broken[4], broken[6, 17] = float("nan"), float("inf"), -float("inf"), -float("inf")
    got = backend.sample(broken, *args)
    assert got[[1, 3, 4]].tolist() == [-1] * 3
    assert torch.equal(got[[0, 2, 5, 7]], whole[[0, 2, 5, 7]]) and got[6] >= 0


@both
def test_logits_that_leave_fp32_when_scaled_are_broken(backend):
    logits = torch.tensor([[3e38, 1.0], [1.0, 2.0]], device=DEVICE)
    assert backend.sample(logits, *settings(2, [0.5, 0.0])).tolist() == [-1, 1]
    assert backend.sample(logits, *settings(2, 0.0)).tolist() == [0, 1]


def test_a_draw_does_not_depend_on_its_batch():
    vocab, batches = 5000, (1, 2, 3, 7) + (16, 64, 128) * GPU
    logits, args = torch.randn(max(batches), vocab, device=DEVICE), random_settings(max(batches), vocab)
    whole = kernels.sample(logits, *args)
    for batch in batches:
        rows = torch.randperm(max(batches))[:batch].to(DEVICE)
        assert torch.equal(kernels.sample(logits[rows], *(a[rows] for a in args)), whole[rows])


def chi_square_holds(counts, probs):
    """At p > 1e-6, over the tokens that are expected five times or more; the rest is one class."""
    counts, expected = counts.double().cpu(), probs.double().cpu() * counts.sum().item()
    assert not counts[expected == 0].any(), "drew a token that was filtered out"
    often = expected >= 5
    pairs = [(counts[often], expected[often]), (counts[~often].sum()[None], expected[~often].sum()[None])]
    statistic = sum(((c - e) ** 2 / e.clamp(min=1e-9)).sum().item() for c, e in pairs if e.sum() > 1)
    freedom = int(often.sum()) - 1 + int(expected[~often].sum() > 1)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5  # Wilson-Hilferty
    assert z < 4.75, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


@both
@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "top_p": 0.9, "min_p": 0.01}], ids=["plain", "filtered"])
def test_draws_follow_the_distribution(filters, backend):
    """200,000 draws, over positions of one seed and seeds at one position; fewer in the interpreter."""
    vocab = 40
    draws = 200_000 if GPU or backend is reference else 120 if filters else 400
    logits = torch.randn(1, vocab, device=DEVICE) * 2
    draw, fixed = torch.arange(draws), torch.full((draws,), 7)
    seed, position = torch.where(draw % 2 == 0, fixed, draw), torch.where(draw % 2 == 0, draw, fixed)
    args = settings(draws, 0.9, **filters, seed=seed, position=position)
    counts = torch.zeros(vocab, dtype=torch.int64, device=DEVICE)
    for part in torch.arange(draws, device=DEVICE).split(20_000):
        got = backend.sample(logits.expand(part.numel(), -1).contiguous(), *(a[part] for a in args))
        counts += got.bincount(minlength=vocab)
    scaled = logits / 0.9
    kept = scaled >= _cutoff(scaled, *(a[:1] for a in args[1:4]))[:, None]
    chi_square_holds(counts, torch.where(kept, scaled, -torch.inf).softmax(-1)[0])


@pytest.mark.parametrize("vocab", [2, 31, 5000])
def test_penalize(vocab):
    rows = 6
    logits = torch.randn(rows, vocab, device=DEVICE) * 5
    counts = torch.randint(0, 4, (9, vocab), dtype=torch.int32, device=DEVICE)
    counts = torch.where(torch.rand(9, vocab, device=DEVICE) < 0.5, counts + PROMPT, counts)
    counts[4], counts[5] = 0, 100_000  # an empty output; a very long one
    at = torch.tensor([8, 0, 4, 5, 2, 2], device=DEVICE)
    knobs = torch.tensor(
        [[1.3, 1, 1.1, 1.1, 0.8, 1], [0.5, 1, 0.5, 0.5, -2, 0], [0.1, 0, 0.1, 0.01, -0.3, 0]], device=DEVICE
    )
    got, want, exact = logits.clone(), logits.clone(), logits.double()
    kernels.penalize_(got, counts, at, *knobs)
    reference.penalize_(want, counts, at, *knobs)
    reference.penalize_(exact, counts, at, *knobs.double())
    assert_close(got, want, exact)
    assert torch.equal(got[5], logits[5])  # neutral knobs: bit by bit


def test_penalties_leave_masked_tokens_masked():
    logits = torch.full((1, 40), -torch.inf, device=DEVICE)
    counts = torch.ones(1, 40, dtype=torch.int32, device=DEVICE)
    row, knob = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.full((1,), 1.5, device=DEVICE)
    kernels.penalize_(logits, counts, row, knob, knob, knob)
    assert (logits == -torch.inf).all()


def test_nothing_gives_nothing():
    none = torch.zeros(0, 40, device=DEVICE)
    got = kernels.sample(none, *settings(0))
    assert got.shape == (0,) and got.dtype == torch.int64
    knobs = torch.zeros(3, 0, device=DEVICE)
    rows = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kernels.penalize_(none, torch.zeros(2, 40, dtype=torch.int32, device=DEVICE), rows, *knobs)


def test_wrong_arguments_are_named():
    logits, args = torch.zeros(2, 40, device=DEVICE), settings(2)
    names = ["temperature", "top_k", "top_p", "min_p", "seeds", "positions"]
    for at, name in enumerate(names):
        wrong = list(args)
        wrong[at] = args[at][:1]
        with pytest.raises(ValueError, match=f"{name}: shape"):
            kernels.sample(logits, *wrong)
        wrong[at] = args[at].half()
        with pytest.raises(ValueError, match=f"{name}: torch.float16"):
            kernels.sample(logits, *wrong)
    for wrong, match in [
        (logits.half(), "logits: torch.float16"),
        (logits[0], "logits: shape"),
        (logits.T.contiguous().T, "logits: strides"),
        (torch.zeros(1, 2**18 + 1, device=DEVICE), "logits: shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.sample(wrong, *args)
    counts, rows = torch.zeros(2, 39, dtype=torch.int32, device=DEVICE), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="counts: shape"):
        kernels.penalize_(logits, counts, rows.to(DEVICE), *args[:1] * 3)


@pytest.mark.gpu
def test_a_thousand_runs_are_one_result():
    logits, args = torch.randn(8, 151936, device=DEVICE) * 4, random_settings(8, 151936)
    first = kernels.sample(logits, *args)
    for n in range(1000):
        rows = slice(0, n % 8 + 1)
        assert torch.equal(kernels.sample(logits[rows], *(a[rows] for a in args)), first[rows])
