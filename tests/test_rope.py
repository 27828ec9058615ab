"""The tables of every scaling against transformers at the sizes of real checkpoints, and what they mean."""

import math

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lite_llm.config import HFConfig
from lite_llm.rope import Dynamic, Linear, Llama3, Rope, Yarn, parse_rope

SHAPES = {  # head_dim, max_position_embeddings, rope_parameters
    "Llama-2-7b": (128, 4096, dict(rope_type="default", rope_theta=10000.0)),
    "Llama-3.2-1B": (
        64, 131072,
        dict(
            rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "Llama-3.1-8B": (
        128, 131072,
        dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "Vicuna-16k": (128, 4096, dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "Qwen2.5-7B with YaRN": (
        128, 32768,
        dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=32768),
    ),
    "Qwen3-8B with YaRN": (
        128, 131072,
        dict(
            rope_type="yarn", rope_theta=1000000.0, factor=3.2, original_max_position_embeddings=40960,
            attention_factor=0.9, beta_fast=24.0, beta_slow=2.0, truncate=False,
        ),
    ),
    "heads of 96": (96, 2048, dict(rope_type="yarn", rope_theta=50000.0, factor=2.5, mscale=0.7, mscale_all_dim=1.2)),
}  # fmt: skip


def ours(head_dim, positions, parameters):
    return parse_rope(HFConfig(dict(rope_parameters=parameters)), head_dim, positions)


def theirs(head_dim, positions, parameters):
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=positions,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", SHAPES)
def test_tables_match_transformers(name):
    (rope, max_len), rotary = ours(*SHAPES[name]), theirs(*SHAPES[name])
    cos, sin = rope.tables(max_len)
    assert cos.shape == sin.shape == (max_len, SHAPES[name][0] // 2) and cos.dtype == sin.dtype == torch.float32
    position = torch.cat([torch.arange(0, max_len, 997), torch.arange(64), torch.tensor([max_len - 1])])
    # The last bit of a frequency is free: it moves the angle by 2**-23 of itself.
    slack = 2e-6 + position[:, None] * rotary.inv_freq * 2.0**-22
    want_cos, want_sin = (t[0, :, : cos.shape[1]] for t in rotary(torch.zeros(1), position[None]))
    assert ((cos[position] - want_cos).abs() <= slack).all()
    assert ((sin[position] - want_sin).abs() <= slack).all()


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_dynamic_matches_transformers_at_every_length(head_dim):
    parameters = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    (rope, max_len), rotary = ours(head_dim, 32, parameters), theirs(head_dim, 32, parameters)
    assert max_len == 128
    cos, sin = rope.tables(max_len)
    for position in range(max_len):  # a sequence that grows token by token
        want = rotary(torch.zeros(1), torch.tensor([[position]]))
        for got, table in zip((cos, sin), want, strict=True):
            torch.testing.assert_close(got[position], table[0, 0, : head_dim // 2], atol=1e-4, rtol=0)


SCALINGS = {
    "default": None,
    "linear": Linear(2.5),
    "dynamic": Dynamic(3.0, 20),
    "llama3": Llama3(8.0, 1.0, 4.0, 64),
    "yarn": Yarn(4.0, 32, 1.2, 32.0, 1.0, True),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_row_does_not_depend_on_how_long_the_table_is(scaling):
    rope = Rope(10000.0, 32, scaling)
    for short, long in zip(rope.tables(33), rope.tables(70), strict=True):
        assert torch.equal(short, long[:33])


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_position_zero_does_not_turn(scaling):
    cos, sin = Rope(10000.0, 32, scaling).tables(1)
    magnitude = scaling.attention_factor if isinstance(scaling, Yarn) else 1.0
    assert torch.equal(cos, torch.full((1, 16), magnitude)) and not sin.any()


def test_the_default_is_the_paper():
    cos, sin = Rope(10000.0, 8).tables(50)
    for p in (1, 7, 49):
        angles = [p * 10000.0 ** (-2 * i / 8) for i in range(4)]
        assert cos[p].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-5)
        assert sin[p].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-5)


def test_linear_divides_positions():
    for scaled, plain in zip(Rope(1e4, 32, Linear(4.0)).tables(81), Rope(1e4, 32).tables(21), strict=True):
        torch.testing.assert_close(scaled[::4], plain, atol=1e-5, rtol=0)


def test_dynamic_changes_nothing_within_the_original_length():
    for scaled, plain in zip(Rope(1e4, 32, Dynamic(4.0, 20)).tables(40), Rope(1e4, 32).tables(40), strict=True):
        torch.testing.assert_close(scaled[:20], plain[:20], atol=1e-6, rtol=0)
        assert (scaled[20:, 1:] - plain[20:, 1:]).abs().max() > 1e-2


def test_llama3_keeps_fast_features_and_divides_slow_ones():
    fast, slow = Rope(5e5, 64, Llama3(8.0, 1.0, 4.0, 8192)).tables(2)[1][1][[0, -1]].asin().tolist()
    assert fast == pytest.approx(1.0, abs=1e-6)
    assert slow == pytest.approx(5e5 ** (-62 / 64) / 8, rel=1e-5)


def test_yarn_scales_both_tables():
    quiet, loud = (Rope(1e4, 32, Yarn(4.0, 32, m, 32.0, 1.0, True)).tables(20) for m in (1.0, 1.5))
    for a, b in zip(quiet, loud, strict=True):
        assert torch.equal(a * 1.5, b)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (1e-6, 1e6), (1e5, 1e6)])
def test_yarn_survives_ramps_of_no_width(low, high):
    for truncate in (True, False):
        cos, sin = Rope(1e4, 32, Yarn(4.0, 32, 1.0, high, low, truncate)).tables(20)
        assert cos.isfinite().all() and sin.isfinite().all()


@pytest.mark.parametrize("theta", [1.0001, 1e15])
def test_extreme_bases_stay_finite(theta):
    for scaling in SCALINGS.values():
        assert all(table.isfinite().all() for table in Rope(theta, 32, scaling).tables(64))


def test_mscale_without_its_partner_means_nothing():
    base = dict(rope_type="yarn", rope_theta=1e4, factor=4.0)
    plain, _ = ours(32, 64, base)
    assert plain.scaling.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert ours(32, 64, base | dict(mscale=0.7))[0] == plain
    assert ours(32, 64, base | dict(mscale=0.7, mscale_all_dim=0.0))[0] == plain
    both, _ = ours(32, 64, base | dict(mscale=0.7, mscale_all_dim=1.0))
    assert both.scaling.attention_factor == pytest.approx((0.07 * math.log(4.0) + 1) / (0.1 * math.log(4.0) + 1))


@pytest.mark.parametrize("kind, factor, original, positions, serves", [
    ("default", None, None, 64, 64),
    ("linear", 2.5, None, 64, 160),
    ("dynamic", 4.0, None, 64, 256),
    ("llama3", 8.0, 16, 64, 64),
    ("yarn", 4.0, 32, 32, 128),
    ("yarn", 4.0, 32, 128, 128),
    ("yarn", 4.0, None, 64, 256),
    ("yarn", 1.0, 32, 64, 64),
])  # fmt: skip
def test_positions_that_a_checkpoint_serves(kind, factor, original, positions, serves):
    given = dict(rope_type=kind, factor=factor, original_max_position_embeddings=original)
    if kind == "llama3":
        given |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    assert ours(16, positions, given)[1] == serves


def test_old_and_new_spelling_agree():
    for name, (head_dim, positions, new) in SHAPES.items():
        old = {key: value for key, value in new.items() if key not in ("rope_type", "rope_theta")}
        old = dict(rope_theta=new["rope_theta"], rope_scaling=old | dict(type=new["rope_type"]))
        assert parse_rope(HFConfig(old), head_dim, positions) == ours(head_dim, positions, new), name
