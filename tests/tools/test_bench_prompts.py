"""tools/bench_prompts.py without a GPU: what it counts, and what it calls wrong."""

import pytest
import torch

from lite_llm.config import HFConfig
from lite_llm.engine.runner import Runner
from lite_llm.models import registry, shapes
from lite_llm.ops import reference
from tools import bench_prompts, prompt_attention
from tools.benchmark.limits import prompt_flops
from tools.prompt_attention import Work

WORK = Work("small", [5, 3], [2, 0], (4, 2), 16, scattered=True)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(prompt_attention, "DEVICE", "cpu")
    monkeypatch.setattr(prompt_attention, "randn", torch.randn)


def test_operations_are_those_that_a_causal_mask_leaves():
    seen = [3, 4, 5, 6, 7] + [1, 2, 3]
    assert WORK.flops == 4 * sum(seen) * 4 * 16
    assert WORK._replace(causal=False).flops == 4 * (5 * 7 + 3 * 3) * 4 * 16


@pytest.mark.parametrize("causal", [True, False])
def test_rows_are_compared_with_plain_torch(causal):
    made = prompt_attention.make(WORK)
    out = reference.attend(*made.args(), None, causal)
    assert prompt_attention.off(made, causal, out) < 1e-5
    assert prompt_attention.off(made, not causal, out) > 0.1
    out[3] *= 1.5
    assert prompt_attention.off(made, causal, out) > prompt_attention.OFF


@pytest.mark.parametrize("causal", [True, False])
def test_the_portable_kernel_is_among_what_is_compared(causal):
    made = prompt_attention.make(WORK)
    assert prompt_attention.off(made, causal, prompt_attention.portable(made, causal)) < 1e-5


def test_first_tokens_are_timed_behind_a_gate(monkeypatch):
    monkeypatch.setattr(bench_prompts, "LENGTHS", {"tiny-llama-3.2-1b": (8, 40)})
    monkeypatch.setattr(bench_prompts, "GATED", (5, 30))
    found = bench_prompts.firsts("tiny-llama-3.2-1b", rounds=2, roof=1e12)
    assert found["gate"]["wrong"] is None and found["gate"]["answers"] == 2
    assert [row["tokens"] for row in found["rows"]] == [8, 40]
    assert all(row["ms"] > 0 and len(row["ms_rounds"]) == 2 for row in found["rows"])
    hit = found["cached"]
    assert (hit["tokens"], hit["cached_tokens"]) == (40, 39) and hit["step_ms"] > 0 and hit["ms"] > 0
    cfg = registry.parse(HFConfig(shapes.shape_config("tiny-llama-3.2-1b")))
    assert [row["floor_ms"] for row in found["rows"]] == [prompt_flops(cfg, n) / 1e12 * 1e3 for n in (8, 40)]
    [table] = bench_prompts.tables({"attention": [], "first": [found], "shapes": [], "beside": []})
    assert "of 40 tokens 39 cached" in table.caption


def test_the_rise_of_a_tokens_cost_is_that_over_the_next_smaller_step_beside_as_many_decodes():
    seconds = {(0, 100): 1.0, (0, 200): 2.1, (0, 50): 0.4, (50, 50): 1.0, (50, 150): 1.6, (64, 0): 9.0}
    rows = bench_prompts.ramp(seconds)
    found = {(row["decodes"], row["tokens"]): row["rise"] for row in rows}
    assert found == {
        (0, 50): None, (0, 100): pytest.approx(0.25), (0, 200): pytest.approx(0.05), (50, 50): None,
        (50, 150): pytest.approx(-0.2),
    }  # fmt: skip
    record = {"attention": [], "first": [], "shapes": [{"shape": "some", "rows": rows}], "beside": []}
    [table] = bench_prompts.tables(record)
    assert "+25.0%, to 100 beside 0" in table.caption


def test_steps_of_a_prompt_beside_decodes_are_told_from_those_of_each_alone(monkeypatch):
    """By a clock that counts what is computed: a token of a prompt is a second, a request that decodes 10 ms."""
    clock, run = [0.0], Runner.run

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def counted(self, step, *given, **more):
        clock[0] += step.tokens + step.decodes / 100
        run(self, step, *given, **more)

    monkeypatch.setattr(bench_prompts.torch.cuda, "Event", Event)
    monkeypatch.setattr(bench_prompts.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Runner, "run", counted)
    for name, value in {"DECODES": 3, "BEHIND": 9, "CHUNKS": (20, 41)}.items():
        monkeypatch.setattr(bench_prompts, name, value)
    found = bench_prompts.beside("tiny-llama-3.2-1b", rounds=3)
    for row, tokens in zip(found["rows"], (20, 41), strict=True):
        assert row["tokens"] == tokens and row["alone_ms"] == pytest.approx(tokens * 1e3)
        assert (row["decodes_ms"], row["both_ms"]) == pytest.approx((30, tokens * 1e3 + 30))
        assert (row["alone_rows"], row["both_rows"]) == (tokens, tokens + 3)
    [table] = bench_prompts.tables({"attention": [], "first": [], "shapes": [], "beside": [found]})
    assert "beside 3 requests" in table.title


def test_cudnn_is_the_faster_of_its_ways_and_each_kernel_the_median_of_its_turns(monkeypatch):
    """Seconds by the kernel: the first turn is the slowest for all, the last the fastest."""
    seconds = {"ours": 2.0, "portable": 4.0, "slow": 8.0, "fast": 1.0}
    turns = []

    def timed(call, made):
        name = getattr(call, "name", "ours" if len(turns) % 4 == 0 else "portable")
        turns.append(name)
        return seconds[name] * (1.5 if len(turns) <= 4 else 0.5 if len(turns) > 4 * 4 else 1.0)

    ways = [lambda made: None, lambda made: None]
    ways[0].name, ways[1].name = "slow", "fast"
    monkeypatch.setattr(prompt_attention, "timed", timed)
    monkeypatch.setattr(prompt_attention, "cudnn", lambda made, causal: ways)
    monkeypatch.setattr(prompt_attention, "WORKS", [WORK._replace(new=[4, 4], old=[0, 0], scattered=False)])
    [row] = prompt_attention.attentions()
    unit = prompt_attention.WORKS[0].flops / 1e12
    found = [row[name] for name in ("tflop_s", "portable_tflop_s", "cudnn_tflop_s")]
    assert turns == ["ours", "portable", "slow", "fast"] * 5 and row["off"] < 1e-5
    assert found == pytest.approx([unit / 2.0, unit / 4.0, unit / 1.0])
