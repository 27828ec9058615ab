"""What a step reads of the state on the device and what its tokens change, kernel against reference: exactly equal."""

import functools

import pytest
import torch

import lite_llm.ops.reference as reference
import lite_llm.ops.triton as kernels
from lite_llm.ops.reference.sampling import PROMPT
from lite_llm.ops.reference.state import NO_TOKEN
from tests.close import DEVICE, assert_close

both = pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "triton"])
POISON = -77


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def full(*shape, value=POISON):
    return torch.full(shape, value, dtype=torch.int32, device=DEVICE)


def random_ints(low, high, *shape):
    return torch.randint(low, high, shape, dtype=torch.int32, device=DEVICE)


def rows_of(count, owners):
    """As many rows of the tables, in any order, then pads."""
    rows = torch.randperm(owners - 1)[:count].int()
    return torch.cat([rows, torch.full((count - len(rows),), owners - 1, dtype=torch.int32)]).to(DEVICE)


def run(op, tensors, **more):
    """The tensors after `backend.op` of copies of them."""
    tensors = {name: t.clone() for name, t in tensors.items()}
    op(**tensors, **more)
    return tensors


def assert_equal(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


def decode_state(decodes, owners, length=40, room=None):
    state = dict(zip(("tokens", "positions", "slots", "kv_len"), full(4, room or decodes + 3), strict=True))
    state |= {"rows": rows_of(decodes, owners), "last": random_ints(0, 1000, owners)}
    state |= {"length": random_ints(0, length, owners), "ended": random_ints(0, 2, owners)}
    state["ended"][-1] = 1
    return state | {"table": random_ints(1, 10**6, owners, length), "step": ints(7)}


@pytest.mark.parametrize("decodes", [0, 1, 5, 127, 128, 129, 300])
def test_the_inputs_of_a_step_are_those_of_the_reference(decodes):
    state = decode_state(decodes, 200)
    got, want = run(kernels.decode_inputs_, state, depth=9), run(reference.decode_inputs_, state, depth=9)
    assert_equal(got, want)
    assert got["step"].item() == 8 and (got["tokens"][decodes:] == POISON).all()


@both
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 16])
def test_steps_are_counted_modulo_the_depth_of_the_ring(backend, depth):
    """A count that only grows passes int32 after some weeks."""
    state, seen = decode_state(2, 5) | {"step": ints(0)}, []
    for _ in range(2 * depth + 1):
        backend.decode_inputs_(**state, depth=depth)
        seen.append(state["step"].item())
    assert seen == [(i + 1) % depth for i in range(2 * depth + 1)]


@both
def test_a_request_that_has_ended_computes_a_pad(backend):
    """Whatever its row says: the length may lie outside the table."""
    state = decode_state(3, 4)
    state |= {"rows": ints(2, 0, 3), "last": ints(5, 6, 7, POISON), "ended": ints(0, 0, 1, 1)}
    state |= {"length": ints(39, 1, 10**9, -1)}
    got = run(backend.decode_inputs_, state, depth=9)
    assert got["tokens"][:3].tolist() == [0, 5, 0] and got["positions"][:3].tolist() == [0, 39, 0]
    assert got["slots"][:3].tolist() == [0, state["table"][0, 39].item(), 0]
    assert got["kv_len"][:3].tolist() == [0, 40, 0]


def step_state(count, owners, vocab, stops, depth=4):
    state = {"rows": rows_of(count, owners), "positions": random_ints(0, 20, count)}
    state |= {"chosen": random_ints(-1, vocab, count), "computed": full(count)}
    state |= {"last": full(owners), "length": full(owners)}
    state |= {"ended": random_ints(0, 2, owners) * random_ints(0, 2, owners), "min_len": random_ints(0, 20, owners)}
    stop_ids = torch.where(random_ints(0, 2, owners, stops) > 0, random_ints(0, vocab, owners, stops), -1)
    state |= {"stop_ids": stop_ids, "max_len": random_ints(10, 40, owners), "counting": random_ints(0, 2, owners)}
    counts = random_ints(0, 3, owners, vocab) + PROMPT * random_ints(0, 2, owners, vocab)
    return state | {"counts": counts, "ring": full(depth, count + 2), "step": ints(depth - 1)}


def verifying_state(requests, samples, owners, vocab, stops):
    """Drafts of any length up to samples - 1, pads behind them; some stand, some by chance."""
    state, count = step_state(requests, owners, vocab, stops), requests * samples
    places = torch.arange(samples, device=DEVICE)
    used = places < random_ints(1, samples + 1, requests)[:, None]
    rows = torch.where(used, state["rows"][:, None], owners - 1)
    chosen = random_ints(0, vocab, requests, samples) - (random_ints(0, 20, requests, samples) == 0).int()
    right = torch.cat([full(requests, 1), chosen[:, :-1]], 1)
    computed = torch.where(random_ints(0, 4, requests, samples) > 0, right, random_ints(0, vocab, requests, samples))
    state |= {"rows": rows.flatten().int(), "chosen": chosen.flatten(), "computed": computed.flatten().int()}
    state |= {"positions": (state["positions"][:, None] + places).flatten().int()}
    return state | {"ring": full(4, count + 2)}


@pytest.mark.parametrize("stops", [1, 5, 64])
@pytest.mark.parametrize("count", [1, 3, 32, 33, 300])
def test_a_token_changes_what_the_reference_says(count, stops):
    state = step_state(count, 250, 12, stops)
    assert_equal(run(kernels.advance_, state, samples=1), run(reference.advance_, state, samples=1))
    flags = state | {"counting": state["counting"] > 0}
    assert_equal(run(kernels.advance_, flags, samples=1), run(reference.advance_, flags, samples=1))


@pytest.mark.parametrize("samples", [2, 3, 8, 16])
@pytest.mark.parametrize("requests", [1, 7, 40])
def test_drafts_change_what_the_reference_says(requests, samples):
    for stops in (1, 6):
        state = verifying_state(requests, samples, 50, 12, stops)
        assert_equal(run(kernels.advance_, state, samples=samples), run(reference.advance_, state, samples=samples))


@both
def test_drafts_are_what_steps_of_one_token_would_have_said(backend):
    """Those that stand, one after the other, until one does not or the request has ended."""
    stood = 0
    for _ in range(30):
        requests, samples = 9, 4
        state = verifying_state(requests, samples, 12, 5, 2)
        got, want = run(backend.advance_, state, samples=samples), run(lambda **_: None, state)
        ring = want["ring"][3]
        ring[: requests * samples] = NO_TOKEN
        for r in range(requests):
            for n in range(r * samples, (r + 1) * samples):
                lives = want["rows"][n] < 11 and want["ended"][want["rows"][n]] == 0
                if n % samples and (not lives or want["computed"][n] != want["chosen"][n - 1]):
                    break
                stood += n % samples > 0
                one = {name: want[name][n : n + 1] for name in ("rows", "positions", "chosen", "computed")}
                backend.advance_(**want | one | {"ring": want["ring"][:, n:]}, samples=1)
        assert_equal(got, want)
    assert stood > 100


@both
def test_what_ends_a_draft(backend):
    """One request each: all stand, the first does not, a stop in the middle, full, unusable, ended before, no draft."""
    owners, count = 8, 7
    state = step_state(3 * count, owners, 50, 2) | {"ended": full(owners, value=0), "counting": full(owners, value=1)}
    rows = [[r, r, r] for r in range(count - 1)] + [[6, 7, 7]]
    chosen = [[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 2, 3], [1, -1, 3], [1, 2, 3], [1, 1, 1]]
    computed = [[0, 1, 2], [0, 5, 2], [0, 1, 9], [0, 1, 2], [0, 1, -1], [0, 1, 2], [1, 1, 1]]
    state |= {"rows": ints(*sum(rows, [])), "chosen": ints(*sum(chosen, [])), "computed": ints(*sum(computed, []))}
    state |= {"positions": ints(*[10, 11, 12] * count), "min_len": full(owners, value=0)}
    state["counts"] = full(owners, 50, value=0)
    state |= {"max_len": ints(20, 20, 20, 12, 20, 20, 20, 20), "stop_ids": full(owners, 2, value=9)}
    state["ended"][5] = 1
    got = run(backend.advance_, state, samples=3)
    none = NO_TOKEN
    assert got["ring"][3, : 3 * count].tolist() == sum(
        [[1, 2, 3], [1, none, none], [1, 9, none], [1, 2, none], [1, -1, none], [none] * 3, [1, none, none]], []
    )
    assert got["last"].tolist() == [3, 1, 9, 2, -1, POISON, 1, POISON]
    assert got["length"].tolist() == [12, 10, 11, 11, 11, POISON, 10, POISON]
    assert got["ended"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert got["counts"].sum(1).tolist() == [3, 1, 2, 2, 1, 0, 1, 0]


@both
def test_the_ring_may_be_columns_of_a_larger_one(backend):
    state, ring = step_state(5, 9, 12, 2), full(4, 12)
    want = run(backend.advance_, state, samples=1)["ring"][:, :5]
    backend.advance_(**state | {"ring": ring[:, 3:]}, samples=1)
    assert torch.equal(ring[:, 3:8], want) and (ring[:, :3] == POISON).all() and (ring[:, 8:] == POISON).all()


@both
def test_what_ends_a_request(backend):
    """One row each: nothing, a stop, a stop too early, a stop just in time, unusable, full, almost full."""
    rows = 7
    state = step_state(rows, rows + 1, 50, 2) | {"rows": ints(*range(rows)), "ended": full(rows + 1, value=0)}
    state["stop_ids"] = full(rows + 1, 2, value=-1)
    state["stop_ids"][:, 1] = 9
    state |= {"chosen": ints(8, 9, 9, 9, -1, 8, 8), "positions": ints(5, 5, 5, 6, 5, 19, 18)}
    state |= {"min_len": ints(0, 0, 6, 6, 0, 0, 0, 0), "max_len": full(rows + 1, value=20)}
    got = run(backend.advance_, state, samples=1)
    assert got["ended"].tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert got["last"].tolist() == [8, 9, 9, 9, -1, 8, 8, POISON]
    assert got["length"].tolist() == [5, 5, 5, 6, 5, 19, 18, POISON]


@both
def test_rows_of_nobody_and_of_the_ended_change_nothing_but_the_ring(backend):
    state = step_state(4, 4, 20, 3) | {"rows": ints(1, 3, 3, 0), "chosen": ints(4, 5, -1, 6), "step": ints(2)}
    state |= {"ended": ints(1, 0, POISON, 0), "counting": ints(1, 1, 1, 1), "max_len": ints(0, 100, 0, 0)}
    got = run(backend.advance_, state, samples=1)
    assert got["ring"][2].tolist() == [4, NO_TOKEN, NO_TOKEN, NO_TOKEN, POISON, POISON]
    assert (got["ring"][[0, 1, 3]] == POISON).all()
    assert got["last"].tolist() == [POISON, 4, POISON, POISON] and got["ended"][[0, 2, 3]].tolist() == [1, POISON, 0]
    assert (got["counts"] != state["counts"]).nonzero().tolist() == [[1, 4]]


@pytest.mark.gpu
def test_the_ring_may_be_pinned_memory():
    state = step_state(40, 60, 100, 4)
    want = run(reference.advance_, state, samples=1)["ring"].cpu()
    pinned = full(4, 50).cpu().pin_memory()
    ring = pinned[:, 3 : 3 + state.pop("ring").shape[1]]
    run(kernels.advance_, state, ring=ring, samples=1)
    torch.cuda.synchronize()
    assert torch.equal(ring, want)
    with pytest.raises(ValueError, match="ring: on cpu"):
        kernels.advance_(**state, ring=full(4, 50).cpu(), samples=1)


def adjustments(count, owners, vocab, stops=3):
    """Rows of every kind; NaN in the biases of those that have none."""
    counts = torch.where(
        random_ints(0, 2, owners, vocab) > 0,
        random_ints(0, 4, owners, vocab) + PROMPT,
        random_ints(0, 4, owners, vocab),
    )
    biased = random_ints(0, 2, owners)
    bias = torch.where(biased[:, None] > 0, torch.randn(owners, vocab, device=DEVICE) * 5, torch.nan)

    def knob(neutral, *values):
        return torch.tensor([neutral, *values], device=DEVICE)[random_ints(0, len(values) + 1, owners).long()]

    return {
        "rows": rows_of(count, owners), "positions": random_ints(0, 20, count), "counts": counts, "bias": bias,
        "biased": biased, "repetition": knob(1.0, 1.3, 0.8), "presence": knob(0.0, 0.5, -2.0),
        "frequency": knob(0.0, 0.1, -0.3), "min_len": random_ints(0, 20, owners),
        "stop_ids": torch.where(random_ints(0, 2, owners, stops) > 0, random_ints(0, vocab, owners, stops), -1),
        "allowed": random_ints(-(2**31), 2**31 - 1, owners, -(-vocab // 32)), "constrained": random_ints(0, 2, owners),
    }  # fmt: skip


@pytest.mark.parametrize("vocab", [2, 31, 5000])
def test_adjustments_are_those_of_the_reference(vocab):
    logits, args = torch.randn(9, vocab, device=DEVICE) * 5, adjustments(9, 8, vocab)
    got, want, exact = logits.clone(), logits.clone(), logits.double()
    kernels.adjust_(got, **args)
    reference.adjust_(want, **args)
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in args.items()}
    reference.adjust_(exact, **doubles)
    assert_close(got, want, exact)
    assert torch.equal(got[7:], logits[7:])  # pads
    flags = logits.clone()
    kernels.adjust_(flags, **args | {name: args[name] > 0 for name in ("biased", "constrained")})
    assert torch.equal(flags, got)


@both
def test_neutral_rows_stay_bit_by_bit(backend):
    logits, args = torch.randn(4, 5000, device=DEVICE), adjustments(4, 5, 5000)
    args |= {"biased": full(5, value=0), "bias": args["bias"] * torch.nan, "min_len": full(5, value=0)}
    args |= {"repetition": torch.ones(5, device=DEVICE), "constrained": full(5, value=0)}
    args |= dict.fromkeys(("presence", "frequency"), torch.zeros(5, device=DEVICE))
    got = logits.clone()
    backend.adjust_(got, **args)
    assert torch.equal(got, logits)


@both
def test_penalties_and_biases_leave_masked_tokens_masked(backend):
    logits = torch.full((1, 40), -torch.inf, device=DEVICE)
    args = adjustments(1, 2, 40) | {"biased": ints(1, 1), "bias": torch.randn(2, 40, device=DEVICE)}
    args |= dict.fromkeys(("repetition", "presence", "frequency"), torch.full((2,), 1.5, device=DEVICE))
    backend.adjust_(logits, **args)
    assert (logits == -torch.inf).all()


@both
def test_stops_are_banned_until_the_request_is_long_enough(backend):
    """Even if their bias is +inf; other tokens stay, and unused entries ban nothing."""
    logits, args = torch.randn(3, 9000, device=DEVICE), adjustments(3, 4, 9000)
    args |= {"rows": ints(2, 0, 1), "positions": ints(4, 5, 6), "min_len": ints(6, 6, 5, 99)}
    args |= {"stop_ids": full(4, 3, value=-1), "biased": ints(1, 0, 0, 1)}
    args["stop_ids"][:, 0], args["stop_ids"][:, 2] = 4095, 8999
    args["bias"] = torch.where(torch.arange(9000, device=DEVICE) == 4095, torch.inf, 0.0).repeat(4, 1)
    args |= {"repetition": torch.ones(4, device=DEVICE), "constrained": full(4, value=0)}
    args |= dict.fromkeys(("presence", "frequency"), torch.zeros(4, device=DEVICE))
    got = logits.clone()
    backend.adjust_(got, **args)
    banned = got == -torch.inf
    assert banned.nonzero().tolist() == [[0, 4095], [0, 8999], [1, 4095], [1, 8999]]
    assert torch.equal(got[~banned], logits[~banned])


@both
def test_only_what_a_constraint_allows_is_left(backend):
    """Bit by bit, the sign bit of a word included; nothing else is touched, and what is unusable stays so."""
    logits, args = torch.randn(3, 9000, device=DEVICE), adjustments(3, 4, 9000)
    args |= {"rows": ints(2, 0, 3), "constrained": ints(1, 0, 1, 1), "biased": full(4, value=0)}
    args |= {"repetition": torch.ones(4, device=DEVICE), "min_len": full(4, value=0)}
    args |= dict.fromkeys(("presence", "frequency"), torch.zeros(4, device=DEVICE))
    args["allowed"].zero_()
    args["allowed"][2, 0], args["allowed"][2, 128], args["allowed"][2, 281] = -(2**31) + 1, 1 << 5, 1 << 7
    args["allowed"][0, 1] = 1 << 9
    logits[1, 41], logits[0, 31], logits[0, 7] = torch.nan, torch.inf, torch.nan
    got = logits.clone()
    backend.adjust_(got, **args)
    for row, left in ((0, [0, 7, 31, 128 * 32 + 5, 8999]), (1, [41])):
        assert (got[row] != -torch.inf).nonzero().flatten().tolist() == left
        assert torch.equal(got[row, left].nan_to_num(7.0), logits[row, left].nan_to_num(7.0))
    assert torch.equal(got[2], logits[2])  # a pad


def test_wrong_arguments_are_named():
    logits, args = torch.zeros(2, 40, device=DEVICE), adjustments(2, 3, 40)
    decode_inputs_ = functools.partial(kernels.decode_inputs_, depth=4)
    cases = [(kernels.adjust_, {"logits": logits} | args), (decode_inputs_, decode_state(4, 5))]
    advance_ = functools.partial(kernels.advance_, samples=1)
    cases += [(advance_, step_state(4, 5, 20, 2))]
    for op, tensors in cases:
        for name, x in tensors.items():
            with pytest.raises(ValueError, match=f"{name}: torch.float16"):
                op(**tensors | {name: x.half()})
    for op, tensors in cases[1:]:
        rows = tensors["rows"].repeat(9)
        with pytest.raises(ValueError, match="expected \\[(36|36 or more)\\]"):
            op(**tensors | {"rows": rows})
    for name in ("counts", "bias", "rows", "allowed"):
        with pytest.raises(ValueError, match=f"{name}: shape"):
            kernels.adjust_(logits, **args | {name: args[name][..., :-1].contiguous()})
    with pytest.raises(ValueError, match="depth: 0"):
        kernels.decode_inputs_(**decode_state(4, 5), depth=0)
    with pytest.raises(ValueError, match="ring: shape"):
        state = step_state(4, 5, 20, 2)
        advance_(**state | {"ring": full(4, 3)})
    for samples in (0, 3):
        with pytest.raises(ValueError, match=f"samples: {samples} of 4 rows"):
            kernels.advance_(**step_state(4, 5, 20, 2), samples=samples)


def test_no_row_is_no_work():
    kernels.adjust_(torch.zeros(0, 40, device=DEVICE), **adjustments(0, 3, 40))
    state = step_state(0, 3, 40, 2)
    assert_equal(run(kernels.advance_, state, samples=1), state)
