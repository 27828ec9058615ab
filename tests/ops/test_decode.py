"""Flash-decoding: whoever computes a request's keys, and however kernels follow each other, the bits are the same."""

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from lite_llm.ops.triton import decode as decoding
from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.launch import AT_ONCE, LAST, WAITED
from tests.close import DEVICE
from tests.ops.attention import GPU, Case, case, check


@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("window", [None, 700])
def test_segments_add_up_alike_whoever_computes_them(monkeypatch, programs, window):
    """One long request among short ones: runs of many requests, of one, and of a single segment."""
    monkeypatch.setattr(decoding, "max_segments", lambda kv_heads: 16)
    c = case([70, 2500, 1, 129, 0, 1100, 0], heads=2, kv_heads=1, head_dim=16, window=window)
    want = check(c)
    monkeypatch.setattr(decoding, "processors", lambda device: programs)
    assert torch.equal(c.run(), want)


@pytest.mark.parametrize("programs", [2, 3, 5, 100])
@pytest.mark.parametrize("window", [None, 700])
def test_who_arrives_last_does_not_matter(monkeypatch, programs, window):
    """The interpreter runs programs one after the other; turned round, those that begin a request come last."""
    monkeypatch.setattr(decoding, "max_segments", lambda kv_heads: 16)
    monkeypatch.setattr(decoding, "processors", lambda device: programs)
    c = case([70, 2500, 1, 129, 0, 1100, 0, 900], heads=2, kv_heads=1, head_dim=16, window=window)
    want = check(c)
    if DEVICE == "cpu":
        builder = interpreter.interpreter_builder
        usual = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: usual(x, builder.grid_dim[1] - 1 - y, z))
    assert torch.equal(c.run(), want)


def shaped(c: Case, **change) -> Tensor:
    usual = tuning.choose_decode(c.q.device, c.q.shape[2], c.q.element_size(), len(c.rows))
    out, args = torch.empty_like(c.q), (c.table, c.rows, c.kv_len, c.decodes, c.scale, c.window)
    decoding.decode(c.q, c.k_pool, c.v_pool, out, *args, shape=usual._replace(**change))
    return out


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("release", [AT_ONCE, WAITED, LAST])
def test_any_shares_release_and_prefetches_give_the_same_bits_in_a_row_of_launches(release, window):
    c = case([700, 1, 70, 129, 0], None, 8, 2, 64, torch.bfloat16 if DEVICE == "cuda" else torch.float16, window)
    want = check(c)
    for asked, least in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 1000)):
        got = [shaped(c, release=release, asked=asked, least=least) for _ in range(5 if DEVICE == "cuda" else 1)]
        assert all(torch.equal(one, want) for one in got), (asked, least)


def test_a_request_of_one_share_is_not_merged(monkeypatch):
    kept, make = [], decoding.workspace
    monkeypatch.setattr(decoding, "workspace", lambda *args: kept.append(make(*args)) or kept[-1])
    c = case([500], head_dim=16)
    assert torch.equal(check(c), shaped(c, least=500 // 16 + 1))
    assert not kept[0][0].isnan().all() and kept[1][0].isnan().all()


@pytest.mark.parametrize("lengths", [[900, 610, 600, 330, 129, 70, 1, 0], [1, 900, 0, 330], [70] * 5, [300]])
@pytest.mark.parametrize("window", [None, 300])
def test_requests_dealt_out_whole_or_split_give_the_same_bits(monkeypatch, lengths, window):
    """As many programs as requests, and half as many, so that each has one or two; also where some have none."""
    kept, make = [], decoding.workspace
    monkeypatch.setattr(decoding, "workspace", lambda *args: kept.append(make(*args)) or kept[-1])
    c = case(lengths, heads=2, kv_heads=1, head_dim=16, window=window)
    want, each = check(c), tuning.choose_decode(c.q.device, 16, c.q.element_size(), len(lengths)).programs
    for programs in (len(lengths), -(-len(lengths) // 2)):
        for splitting in (-(1 << 20), 1 << 20):
            monkeypatch.setattr(decoding, "SPLITTING", splitting)
            monkeypatch.setattr(decoding, "processors", lambda device, n=programs: -(-n // each))
            kept.clear()
            assert torch.equal(c.run(), want)
            assert splitting < 0 or kept[0][0].isnan().all(), "something was split"


@pytest.mark.parametrize(("tiles", "whole"), [(0, False), (1, True)])
def test_requests_stay_whole_where_no_program_gets_much_more_than_its_share(monkeypatch, tiles, whole):
    """Three of three tiles on two programs, where a share is five: one alone and two together, or split."""
    kept, make = [], decoding.workspace
    monkeypatch.setattr(decoding, "workspace", lambda *args: kept.append(make(*args)) or kept[-1])
    monkeypatch.setattr(decoding, "processors", lambda device: 1)
    c = case([3 * 64] * 3, heads=1, kv_heads=1, head_dim=16)
    monkeypatch.setattr(decoding, "SPLITTING", tiles * 64)
    shaped(c, block_n=64, programs=2)
    assert bool(kept[0][0].isnan().all()) == whole


@pytest.mark.parametrize("programs", [2, 40])
def test_more_requests_than_one_look_at_their_lengths(monkeypatch, programs):
    """Also that requests without keys may stand anywhere, a run of nothing else included."""
    monkeypatch.setattr(decoding, "processors", lambda device: programs)
    lengths = [b % 4 for b in range(250)] + [0] * 20 + [150, 1, 90]
    check(case(lengths, heads=1, kv_heads=1, head_dim=16))


@GPU
@pytest.mark.parametrize("window", [None, 300])
def test_launched_as_a_dependent_or_not_is_the_same_to_the_bit(monkeypatch, window):
    c = case([3000, 1, 700, 0, 129, 200], None, 8, 2, 64, torch.bfloat16, window)
    got = [c.run() for _ in range(20)]
    monkeypatch.setattr(decoding, "pdl", lambda device: False)
    want = c.run()
    assert all(torch.equal(one, want) for one in got)


def test_tickets_are_zero_again(monkeypatch):
    kept, make = [], decoding.tickets
    monkeypatch.setattr(decoding, "tickets", lambda *args: kept.append(make(*args)) or kept[-1])
    case([500, 1, 300, 0]).run()
    assert not kept[0].any()
