"""Sampling, kernel against reference. The kernel runs on CPU tensors too, in the interpreter."""

import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops.reference.sampling import _cutoff, gumbel, philox
from tests.close import DEVICE, DTYPES

GPU = DEVICE == "cuda"
BACKENDS = [reference, kernels]
NAMES = ["reference", "triton"]
both = pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, order=None):
    """The arguments of `sample` between the logits and `usable`; each is a number for all rows or a list.

    The tables have three rows more than there are logits, of poison, and `order` (random) is where each row finds its
    own.
    """
    order = torch.randperm(rows + 3)[:rows] if order is None else order

    def column(value, dtype, poison):
        table = torch.full((rows + 3,), poison, dtype=dtype)
        table[order] = torch.as_tensor(
            value if isinstance(value, (list, torch.Tensor)) else [value] * rows, dtype=dtype
        )
        return table.to(DEVICE)

    nan = float("nan")
    position = torch.as_tensor(position if isinstance(position, (list, torch.Tensor)) else [position] * rows)
    return (
        order.int().to(DEVICE), position.int().to(DEVICE), column(temperature, torch.float32, nan),
        column(top_k, torch.int32, -7), column(top_p, torch.float32, nan), column(min_p, torch.float32, nan),
        column(seed, torch.int64, -1),
    )  # fmt: skip


def draw(backend, logits, args, usable=None):
    return backend.sample(logits, *args, logits.shape[1] if usable is None else usable)


def of(args, rows):
    """The arguments of some of the rows of logits; the tables stay as they are."""
    return *(x[rows] for x in args[:2]), *args[2:]


def each(args):
    """(temperature, top_k, top_p, min_p, seeds, positions) of each row."""
    return *(table[args[0].long()] for table in args[2:]), args[1]


def random_settings(rows, vocab):
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (rows,))]  # noqa: E731
    return settings(
        rows, pick(0.0, 0.3, 0.7, 1.0, 2.0), pick(0, 0, 1, 5, 40, 64, 65, 300, vocab, 2 * vocab),
        pick(1.0, 1.0, 0.1, 0.5, 0.9, 0.95, 0.999), pick(0.0, 0.0, 0.02, 0.3, 1.0),
        torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 2**31, (rows,)),
    )  # fmt: skip


def assert_same_draw(got, logits, args, usable=None):
    """Token for token; where they differ, the two were the best and closer than 1e-4, or one lies at the rim of top_p.

    The rim: both are kept or dropped by a cutoff that a change of top_p by 1e-5 would move past one of them.
    """
    usable = usable or logits.shape[1]
    want = draw(reference, logits, args, usable)
    assert got.dtype == want.dtype == torch.int32
    for row in (got != want).nonzero().flatten().tolist():
        temperature, top_k, top_p, min_p, seeds, positions = (a[row : row + 1] for a in each(args))
        a, b = int(got[row]), int(want[row])
        assert a >= 0 <= b and temperature > 0, f"row {row}: {a}, reference {b}"
        scaled = logits[row : row + 1, :usable].float() / temperature
        noisy = (scaled + gumbel(seeds, positions, usable))[0]
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
    """Flat rows: the token drawn is the one with the most noise, over seeds of 64 bits and all positions."""
    rows, vocab = 64 if GPU else 16, 1000
    args = settings(rows, seed=torch.randint(-(2**63), 2**63 - 1, (rows,)), position=torch.randint(0, 2**31, (rows,)))
    logits = torch.zeros(rows, vocab, device=DEVICE)
    assert torch.equal(draw(kernels, logits, args), gumbel(*each(args)[-2:], vocab).argmax(-1).int())


@pytest.mark.parametrize("vocab", [1, 2, 31, 64, 65, 1000, 4096, 4097, 20000])
def test_kernel_draws_as_the_reference(vocab):
    rows = 256 if GPU else 24 if vocab < 4096 else 8
    logits = torch.randn(rows, vocab, device=DEVICE) * torch.rand(rows, 1, device=DEVICE) * 8
    args = random_settings(rows, vocab)
    assert assert_same_draw(draw(kernels, logits, args), logits, args) <= rows // 16


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 262144])
def test_kernel_draws_as_the_reference_over_real_vocabularies(vocab):
    rows = 64
    for scale in (0.0, 1.0, 5.0):
        logits = torch.randn(rows, vocab, device=DEVICE) * scale
        args = random_settings(rows, vocab)
        assert assert_same_draw(draw(kernels, logits, args), logits, args) <= 2


def test_filters_that_the_list_cannot_answer():
    """Flat rows, many ties, large k, a nucleus of thousands: the kernel goes over the whole row."""
    logits = torch.zeros(8, 9000, device=DEVICE)
    logits[1] = torch.arange(9000) % 3
    logits[2, ::7] = -torch.inf
    logits[3:] = torch.randn(5, 9000)
    args = settings(8, 1.0, [5, 100, 0, 3000, 8999, 0, 700, 0], [1, 1, 0.5, 1, 1, 0.9, 0.7, 0.99], seed=3)
    assert_same_draw(draw(kernels, logits, args), logits, args)


def test_a_level_of_ties_that_top_p_needs_a_part_of_is_kept_whole():
    """More ties than are listed, so the cutoff is searched over the whole row. Those above it hold 0.41 of the mass."""
    logits = torch.zeros(5000, device=DEVICE)
    logits[torch.randperm(5000)[:1500]] = 0.5
    logits = logits.expand(8, -1).contiguous()
    args = settings(8, top_p=[0.6] * 4 + [0.4] * 4, seed=list(range(8)))
    got = draw(kernels, logits, args)
    assert_same_draw(got, logits, args)
    drawn = logits.gather(1, got[:, None].long())[:, 0]
    assert not drawn[:4].all() and drawn[4:].all(), "none of the level, or what is beyond"


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}], ids=["top_k", "both"])
def test_a_top_k_of_more_tokens_than_are_listed_still_counts(filters):
    logits = torch.randn(5000, device=DEVICE).expand(8, -1).contiguous()
    args = settings(8, 2.0, top_k=[700, 900, 1000, 1200] * 2, seed=list(range(8)), **filters)
    assert_same_draw(draw(kernels, logits, args), logits, args)


def test_the_best_tokens_may_stand_side_by_side():
    """So more of them than the list holds reach a bar that few groups reach; or but few tokens are left at all."""
    logits = torch.randn(8, 20_000, device=DEVICE)
    logits[:4, 3001:6000] += 12
    logits[4:, 800:] = -torch.inf
    logits[5:, 40:] = -torch.inf
    args = settings(8, 1.0, [20, 0, 900, 3, 20, 0, 50, 0], [0.5, 0.3, 1, 1, 0.9, 0.9, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0.1])
    assert_same_draw(draw(kernels, logits, args), logits, args)


@pytest.mark.parametrize("vocab", [40, 300, 5000])
def test_every_token_drawn_is_one_that_the_reference_keeps(vocab):
    """Ties are quantized in on purpose: they are kept or dropped together. Draws at high noise find a wrong rim."""
    rows = 64 if GPU else 8 if vocab < 5000 else 2
    logits = (torch.randn(1, vocab, device=DEVICE) * 4).round().div(2).expand(rows, -1).contiguous()
    for filters in [{"top_k": 3}, {"top_k": 30}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 30, "top_p": 0.5}]:
        args = settings(rows, 3.0, **filters, seed=list(range(rows)))
        scaled = logits / 3.0
        kept = scaled >= _cutoff(scaled, *each(args)[1:4])[:, None]
        got = draw(kernels, logits, args)
        assert kept.gather(1, got[:, None].long()).all()
        assert_same_draw(got, logits, args)


@both
def test_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, [4500, 77, 300]] = 1.0
    logits[2, [4095, 4096]] = 2.0
    logits[0, 3:] = -0.0  # equal to the zeros before it
    assert draw(backend, logits, settings(3, 0.0)).tolist() == [0, 77, 4095]


@both
def test_temperature_from_none_to_hot(backend):
    """0 is argmax; next to nothing is argmax where logits differ at all; hot is flat, and nothing overflows."""
    logits = torch.randn(1, 300).mul(20).repeat(5, 1).to(DEVICE)
    best = logits[0].argmax().item()
    got = draw(backend, logits, settings(5, [0.0, 1e-45, 1e-7, 1e-3, 100.0]))
    assert got[:4].tolist() == [best] * 4 and 0 <= got[4] < 300
    hot = draw(backend, logits[:1].repeat(16, 1), settings(16, 100.0, seed=list(range(16))))
    assert hot.unique().numel() > 8


@both
def test_one_token_is_always_left(backend):
    logits = torch.randn(1, 500).repeat(9, 1).to(DEVICE)
    best, one = logits[0].argmax().item(), {"top_k": 1}
    for strict in [one, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 7, "top_p": 1e-9, "min_p": 1.0}]:
        assert draw(backend, logits, settings(9, 2.0, **strict, seed=list(range(9)))).tolist() == [best] * 9


def test_filters_that_keep_everything_change_nothing():
    logits = torch.randn(8, 500, device=DEVICE)
    plain = draw(kernels, logits, settings(8, seed=list(range(8))))
    for idle in [{"top_k": 500}, {"top_k": 10**6}, {"min_p": 1e-30}, {"top_p": 0.9999999}]:
        assert torch.equal(draw(kernels, logits, settings(8, **idle, seed=list(range(8)))), plain)


@both
@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8}], ids=["plain", "both", "top_p"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_broken_row_ends_alone(temperature, filters, backend):
    logits = torch.randn(8, 5000, device=DEVICE)
    args = settings(8, temperature, **filters, seed=list(range(8)))
    whole = draw(backend, logits, args)
    broken = logits.clone()
    broken[1, 4999], broken[3, 0], broken[4], broken[6, 17] = float("nan"), float("inf"), -float("inf"), -float("inf")
    got = draw(backend, broken, args)
    assert got[[1, 3, 4]].tolist() == [-1] * 3
    assert torch.equal(got[[0, 2, 5, 7]], whole[[0, 2, 5, 7]]) and got[6] >= 0


@both
def test_logits_that_leave_fp32_when_scaled_are_broken(backend):
    logits = torch.tensor([[3e38, 1.0], [1.0, 2.0]], device=DEVICE)
    assert draw(backend, logits, settings(2, [0.5, 0.0])).tolist() == [-1, 1]
    assert draw(backend, logits, settings(2, 0.0)).tolist() == [0, 1]


def test_a_draw_does_not_depend_on_its_batch():
    vocab, batches = 5000, (1, 2, 3, 7) + (16, 64, 128) * GPU
    logits, args = torch.randn(max(batches), vocab, device=DEVICE), random_settings(max(batches), vocab)
    whole = draw(kernels, logits, args)
    for batch in batches:
        rows = torch.randperm(max(batches))[:batch].to(DEVICE)
        assert torch.equal(draw(kernels, logits[rows], of(args, rows)), whole[rows])


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
    nth, fixed = torch.arange(draws), torch.full((draws,), 7)
    seed, position = torch.where(nth % 2 == 0, fixed, nth), torch.where(nth % 2 == 0, nth, fixed)
    args = settings(draws, 0.9, **filters, seed=seed, position=position)
    counts = torch.zeros(vocab, dtype=torch.int64, device=DEVICE)
    for part in torch.arange(draws, device=DEVICE).split(20_000):
        got = draw(backend, logits.expand(part.numel(), -1).contiguous(), of(args, part))
        counts += got.bincount(minlength=vocab)
    scaled = logits / 0.9
    kept = scaled >= _cutoff(scaled, *(a[:1] for a in each(args)[1:4]))[:, None]
    chi_square_holds(counts, torch.where(kept, scaled, -torch.inf).softmax(-1)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [32, 5000])
def test_logits_of_any_float_are_read_as_fp32(dtype, vocab):
    """Few bits mean many ties, at the top as at a cutoff."""
    rows = 64 if GPU else 8
    logits, args = (torch.randn(rows, vocab, device=DEVICE) * 4).to(dtype), random_settings(rows, vocab)
    got = draw(kernels, logits, args)
    assert torch.equal(got, draw(kernels, logits.float(), args))
    assert assert_same_draw(got, logits, args) <= rows // 16


@pytest.mark.parametrize(("vocab", "usable"), [(32, 31), (40, 1), (4160, 4096), (4160, 4099), (5008, 4001)])
def test_ids_from_usable_on_do_not_exist(vocab, usable):
    rows = 32 if GPU else 8
    logits, args = torch.randn(rows, vocab, device=DEVICE) * 4, random_settings(rows, usable)
    want = draw(kernels, logits[:, :usable].contiguous(), args)
    for poison in (float("nan"), float("inf"), 1e9, -float("inf")):
        logits[:, usable:] = poison
        assert torch.equal(draw(kernels, logits, args, usable), want)
    assert assert_same_draw(want, logits, args, usable) <= rows // 16


@both
def test_rows_may_share_their_settings(backend):
    """As all pads do."""
    logits, args = torch.randn(1, 300, device=DEVICE).repeat(5, 1), settings(5, 0.7, [0, 3, 3, 0, 5], seed=5)
    shared = (args[0][[1, 0, 1, 1, 0]], *args[1:])
    one, other = draw(backend, logits[:2], of(args, slice(0, 2))).tolist()
    assert draw(backend, logits, shared).tolist() == [other, one, other, other, one]


def test_nothing_gives_nothing():
    got = draw(kernels, torch.zeros(0, 40, device=DEVICE), settings(0))
    assert got.shape == (0,) and got.dtype == torch.int32


def test_wrong_arguments_are_named():
    logits, args = torch.zeros(2, 40, device=DEVICE), settings(2)
    for at, name in enumerate(["rows", "positions", "temperature", "top_k", "top_p", "min_p", "seeds"]):
        wrong = list(args)
        wrong[at] = args[at][:1].repeat(2, 1)
        with pytest.raises(ValueError, match=f"{name}: shape"):
            draw(kernels, logits, wrong)
        wrong[at] = args[at].half()
        with pytest.raises(ValueError, match=f"{name}: torch.float16"):
            draw(kernels, logits, wrong)
    for wrong, match in [
        (logits.double(), "logits: torch.float64"),
        (logits[0], "logits: shape"),
        (logits.T.contiguous().T, "logits: strides"),
        (torch.zeros(1, 2**18 + 1, device=DEVICE), "logits: shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            draw(kernels, wrong, args, 40)
    for usable in (0, 41):
        with pytest.raises(ValueError, match=f"usable: {usable}"):
            draw(kernels, logits, args, usable)


@pytest.mark.gpu
def test_a_thousand_runs_are_one_result():
    logits, args = torch.randn(8, 151936, device=DEVICE) * 4, random_settings(8, 151936)
    first = draw(kernels, logits, args)
    for n in range(1000):
        rows = slice(0, n % 8 + 1)
        assert torch.equal(draw(kernels, logits[rows], of(args, rows)), first[rows])
