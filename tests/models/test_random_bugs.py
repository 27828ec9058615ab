"""Classic bugs, planted one at a time: the parity check must see each of them, or it proves nothing."""

import dataclasses
import sys

import pytest
import torch

from lite_llm import ops
from lite_llm.batch import Batch
from lite_llm.layers import Attention, Head, Linear
from lite_llm.models import llama
from lite_llm.ops import reference
from tests.models.test_parity import FAMILIES, LLAMA, MISTRAL, QWEN2, QWEN3, YARN, one_thread, parity_error, with_rope

__all__ = ["one_thread"]  # a fixture that holds for this file too

linear = sys.modules["lite_llm.ops.reference.linear"]  # the package has a function of this name
WINDOW = FAMILIES["mistral-window"]
SQUARE = FAMILIES["llama-one-kv-head-each"]  # Q, K and V have one shape, so that nothing else notices a swap
BIASES = LLAMA | dict(attention_bias=True, mlp_bias=True)


def wrap(monkeypatch, owner, name, change):
    """Replace `owner.name` by a function that gets the original as its first argument."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def load_swapped(**swap):
    def plant(patch):
        wrap(patch, Linear, "load", lambda f, self, name, tensor, part: f(self, name, tensor, swap.get(part, part)))

    return plant


def interleaved_pairs(patch):
    def rotate(_, x, positions, cos, sin):
        c, s = cos[positions][:, None], sin[positions][:, None]
        a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
        x[..., 0::2], x[..., 1::2] = a * c - b * s, b * c + a * s
        return x

    wrap(patch, reference.rope, "rope_", rotate)


def other_direction(patch):
    wrap(patch, reference.rope, "rope_", lambda f, x, positions, cos, sin: f(x, positions, cos, -sin))


def scaled_theta(patch):
    def parse(f, *args):
        rope, max_len = f(*args)
        return dataclasses.replace(rope, theta=rope.theta * 1.1), max_len

    wrap(patch, llama, "parse_rope", parse)


def no_yarn_magnitude(patch):
    def parse(f, *args):
        rope, max_len = f(*args)
        scaling = dataclasses.replace(rope.scaling, attention_factor=1.0)
        return dataclasses.replace(rope, scaling=scaling), max_len

    wrap(patch, llama, "parse_rope", parse)


def late_positions(patch):
    """The rotation forgets what is cached and starts each chunk at 0."""

    def project(f, k, v, x, weight, bias, norm, eps, positions, *rest):
        return f(k, v, x, weight, bias, norm, eps, torch.arange(len(positions)), *rest)

    wrap(patch, ops, "project_qkv_", project)


def slots_of_the_neighbour(patch):
    def project(f, k, v, x, weight, bias, norm, eps, positions, slots, *rest):
        return f(k, v, x, weight, bias, norm, eps, positions, slots.roll(1), *rest)

    wrap(patch, ops, "project_qkv_", project)


def one_stale_slot(patch):
    """Attention reads the slot of position 0 in place of position 1."""

    def attend(f, q, k, v, table, *rest):
        return f(q, k, v, torch.cat([table[:, :1], table[:, :1], table[:, 2:]], dim=1), *rest)

    wrap(patch, ops, "attend", attend)


def row_of_the_neighbour(patch):
    def attend(f, q, k, v, table, rows, *rest):
        return f(q, k, v, table, rows.roll(1), *rest)

    wrap(patch, ops, "attend", attend)


def layer_of_the_neighbour(patch):
    def add_(f, self, x, q, batch, kv, *rest, **named):
        return f(self, x, q, batch, dataclasses.replace(kv, k=kv.k.flip(0)), *rest, **named)

    wrap(patch, Attention, "add_", add_)


def heads_read_kv_in_turn(patch):
    """Query head h reads KV head h % kv_heads, and not h // groups."""

    def attend(f, q, k, v, *rest):
        turn = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
        return f(q[:, turn], k, v, *rest)[:, turn.argsort()]

    wrap(patch, ops, "attend", attend)


def changed_attend(**change):
    def plant(patch):
        def attend(f, q, k, v, table, rows, q_start, kv_len, decodes, scale, window):
            given = dict(scale=scale, window=window)
            for name, new in change.items():
                given[name] = new(given[name])
            return f(q, k, v, table, rows, q_start, kv_len, decodes, **given)

        wrap(patch, ops, "attend", attend)

    return plant


def last_block_stores_what_is_wanted_alone(patch):
    def project_(f, self, kv, x, norm, batch, rope):
        before, q = kv.k[self.layer].clone(), f(self, kv, x, norm, batch, rope)
        if self.layer == 1 and batch.logits_at is not None:
            unwanted = [t for t in range(len(x)) if t not in batch.logits_at]
            kv.k[self.layer, batch.slots[unwanted]] = before[batch.slots[unwanted]]
        return q

    wrap(patch, Attention, "project_", project_)


def changed_last(**change):
    def plant(patch):
        def last(f, batch):
            made = f(batch)
            return dataclasses.replace(made, **{name: new(getattr(made, name)) for name, new in change.items()})

        wrap(patch, Batch, "last", last)

    return plant


def first_token_of_each_piece(patch):
    def forward(f, self, x, batch, *rest, **named):
        at = None if batch.logits_at is None else batch.q_start[:-1]
        return f(self, x, dataclasses.replace(batch, logits_at=at), *rest, **named)

    wrap(patch, llama.Block, "forward", forward)


def norms_skipped(patch):
    wrap(patch, linear, "rms_norm", lambda f, x, *rest: x)


def qk_norm_skipped(patch):
    wrap(patch, ops, "project_qkv_", lambda f, *args: f(*args[:11]))


def k_norm_for_q(patch):
    wrap(patch, ops, "project_qkv_", lambda f, *args: f(*args[:11], args[12], args[12]))


def small_eps(patch):
    wrap(patch, linear, "rms_norm", lambda f, x, weight, eps: f(x, weight, 1e-6))


def residual_forgotten(patch):
    wrap(patch, ops, "linear_add_", lambda f, residual, *rest: f(residual.zero_(), *rest))


def biases_dropped(patch):
    wrap(patch, ops, "linear", lambda f, x, weight, bias=None, *rest, **kw: f(x, weight, None, *rest, **kw))
    wrap(patch, ops, "linear_add_", lambda f, residual, x, weight, bias, *rest: f(residual, x, weight, None, *rest))
    wrap(patch, ops, "project_qkv_", lambda f, k, v, x, weight, bias, *rest: f(k, v, x, weight, None, *rest))


def gelu_for_silu(patch):
    def gelu_mul(_, x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up

    wrap(patch, linear, "silu_mul", gelu_mul)


def untied_head(patch):
    wrap(patch, Head, "forward", lambda f, self, x, norm: f(self, x.flip(-1), norm))


BUGS = {
    "rope pairs interleaved": (LLAMA, interleaved_pairs),
    "rope turns backwards": (LLAMA, other_direction),
    "rope theta 10 % too large": (LLAMA, scaled_theta),
    "rope of yarn without its magnitude": (with_rope(LLAMA, YARN, "v4"), no_yarn_magnitude),
    "rope starts anew with each chunk": (LLAMA, late_positions),
    "q and k swapped": (SQUARE, load_swapped(q="k", k="q")),
    "k and v swapped": (LLAMA, load_swapped(k="v", v="k")),
    "gate and up swapped": (LLAMA, load_swapped(gate="up", up="gate")),
    "norms skipped": (LLAMA, norms_skipped),
    "norms with another eps": (LLAMA, small_eps),
    "qk norm skipped": (QWEN3, qk_norm_skipped),
    "k norm used for q": (QWEN3, k_norm_for_q),
    "biases dropped": (BIASES, biases_dropped),
    "qkv bias dropped": (QWEN2, biases_dropped),
    "residual forgotten": (LLAMA, residual_forgotten),
    "window one too wide": (WINDOW, changed_attend(window=lambda w: w + 1)),
    "window one too narrow": (WINDOW, changed_attend(window=lambda w: w - 1)),
    "window ignored": (WINDOW, changed_attend(window=lambda w: None)),
    "window where there is none": (MISTRAL, changed_attend(window=lambda w: 12)),
    "attention scale off": (LLAMA, changed_attend(scale=lambda s: s * 1.01)),
    "slots of the neighbour": (LLAMA, slots_of_the_neighbour),
    "one stale slot": (LLAMA, one_stale_slot),
    "table row of the neighbour": (LLAMA, row_of_the_neighbour),
    "cache of another layer": (LLAMA, layer_of_the_neighbour),
    "query heads paired with the wrong kv head": (LLAMA, heads_read_kv_in_turn),
    "last block stores the keys of last tokens alone": (LLAMA, last_block_stores_what_is_wanted_alone),
    "last tokens do not see themselves": (LLAMA, changed_last(kv_len=lambda n: n - 1)),
    "last tokens with the row of the neighbour": (LLAMA, changed_last(rows=lambda rows: rows.roll(1))),
    "first token of each piece for its last": (LLAMA, first_token_of_each_piece),
    "gelu in place of silu": (LLAMA, gelu_for_silu),
    "head misread": (FAMILIES["llama-tied"], untied_head),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_parity_check_fails_for(bug, monkeypatch):
    raw, plant = BUGS[bug]
    plant(monkeypatch)
    assert parity_error(raw) > 1e-2


def test_without_a_bug_it_passes():
    assert max(parity_error(raw) for raw in (LLAMA, SQUARE, BIASES, WINDOW, MISTRAL, QWEN2, QWEN3)) <= 1e-4
