"""tools/bench_serving.py counts what steps must read and multiply, and runs on a tiny shape."""

import dataclasses
import json
import random

import pytest

from lite_llm.config import HFConfig
from lite_llm.engine.roofline import Ceilings, floor, step_costs
from lite_llm.models import registry, shapes
from tools import bench_serving
from tools.bench_serving import Advance, limit
from tools.benchmark.work import Lengths

SHAPE = "tiny-llama-3.2-1b"
ROOF = Ceilings(copy=3e9, matmul=5e10)


@pytest.fixture(scope="module")
def cfg():
    return registry.parse(HFConfig(shapes.shape_config(SHAPE)))


def test_a_step_that_only_decodes_has_the_floor_of_the_roofline(cfg):
    assert limit(cfg, 2, [Advance(99, 1, True)] * 7, ROOF) == pytest.approx(floor(step_costs(cfg, 2, 7, 100), ROOF))


def test_a_prompt_in_pieces_sees_as_many_tokens_as_whole_but_reads_more(cfg):
    endless = Ceilings(copy=1e30, matmul=1.0)  # only multiplying takes time
    pieces = [Advance(0, 30, False), Advance(30, 50, False), Advance(80, 20, True)]
    apart = sum(limit(cfg, 2, [piece], endless) for piece in pieces)
    assert apart == pytest.approx(limit(cfg, 2, [Advance(0, 100, True)], endless))
    endless = Ceilings(copy=1.0, matmul=1e30)
    apart, whole = (sum(limit(cfg, 2, [a], endless) for a in step) for step in (pieces, [Advance(0, 100, True)]))
    weights = sum(cost.bytes for cost in step_costs(cfg, 2, requests=0, context=0, wanted=0))
    again = (cfg.num_layers - 1) * (30 + 80) * 2 * cfg.kv_heads * cfg.head_dim * 2
    assert apart - whole == pytest.approx(2 * weights + again) and weights + again > 1e5


def test_nobody_needs_logits_in_the_middle_of_a_prompt(cfg):
    slow = Ceilings(copy=1.0, matmul=1e30)
    more = limit(cfg, 2, [Advance(0, 5, True)], slow) - limit(cfg, 2, [Advance(0, 5, False)], slow)
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    head, block = cfg.hidden * cfg.vocab + cfg.hidden, cfg.hidden * (2 * q + 3 * cfg.ffn + 1)
    assert more == pytest.approx(2 * (head + block + 5 * 2 * kv)), "nor the last layer, beyond its keys and values"


def test_in_the_last_layer_a_prompt_counts_for_its_last_token_alone(cfg):
    """By hand: a decode, a prompt's last piece of 7 tokens behind 5, and 20 tokens of one that goes on."""
    busy, step = Ceilings(1e30, matmul=1.0), [Advance(9, 1, True), Advance(5, 7, True), Advance(0, 20, False)]
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    rest = cfg.hidden * (2 * q + 3 * cfg.ffn)  # queries, output, MLP
    seen = [10, *range(6, 13), *range(1, 21)]
    before = 28 * (2 * cfg.hidden * kv + rest) + 2 * q * sum(seen)
    last = 28 * 2 * cfg.hidden * kv + 2 * rest + 2 * q * (10 + 12)
    flops = 2 * ((cfg.num_layers - 1) * before + last + 2 * cfg.hidden * cfg.vocab)
    assert cfg.num_layers > 1 and limit(cfg, 2, step, busy) == pytest.approx(flops)
    near = dataclasses.replace(cfg, windows=(*cfg.windows[:-1], 8))
    assert flops - limit(near, 2, step, busy) == pytest.approx(4 * q * (2 + 4))


def test_a_window_hides_what_is_farther(cfg):
    draw, window = random.Random(0), 17
    for _ in range(200):
        a = Advance(draw.randint(0, 40), draw.randint(1, 40), True)
        assert bench_serving._pairs(a, window) == sum(min(a.old + i, window) for i in range(1, a.new + 1))
        assert bench_serving._pairs(a, None) == sum(a.old + i for i in range(1, a.new + 1))
    slow, step = Ceilings(copy=1.0, matmul=1e30), [Advance(500, 1, True)]
    narrow = dataclasses.replace(cfg, windows=(window,) * cfg.num_layers)
    fewer = (501 - window) * 2 * cfg.kv_heads * cfg.head_dim * 2 * cfg.num_layers
    assert limit(cfg, 2, step, slow) - limit(narrow, 2, step, slow) == pytest.approx(fewer)


def test_a_batch_that_is_held_computes_all_until_the_longest_has_ended():
    load = bench_serving.Load([[1], [2, 3], [4]], [5, 2, 9])
    assert load.part(0, 2).held() == ([[1], [2, 3]], [5, 5]) and load.part(2, 9).held().new == [9]
    assert load.part(0, 2).held().context == 7


def test_a_run_times_both_loads_and_records_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_serving, "MIXED", (5, Lengths.parse("4-9"), Lengths.parse("2-6")))
    monkeypatch.setattr(bench_serving, "CHAT", ("lognormal:8:0.5", "lognormal:6:0.9"))
    monkeypatch.setattr(bench_serving, "TOGETHER", 4)
    record = tmp_path / "record.json"
    assert bench_serving.main(["--shape", SHAPE, "--requests", "10", "--rounds", "1", "--json", str(record)]) == 0
    [row] = json.loads(record.read_text())["rows"]
    assert row["gate"]["wrong"] is None and row["mixed"]["requests"] == 5 and row["chat"]["requests"] == 10
    for name in ("mixed", "chat"):
        found = row[name]
        assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"])
        assert 0 < found["of_limit"] == pytest.approx(found["limit_seconds"] / found["seconds"])
        assert found["steps"] < found["new_tokens"]  # several advance together
    assert row["chat"]["static_seconds"] > 0 and row["chat"]["held_seconds"] > 0
    assert "x static" in capsys.readouterr().out


def test_nothing_is_timed_where_tokens_are_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_serving.peers, "gate", lambda *_, **__: {"wrong": "answer 3 parts"})
    monkeypatch.setattr(bench_serving.Load, "seconds", None)
    assert bench_serving.main(["--shape", SHAPE]) == 1
    told = capsys.readouterr()
    assert "WRONG: answer 3 parts" in told.err and "tokens/s" in told.out and "static" not in told.out


def test_an_answer_of_another_length_is_no_result(cfg):
    with bench_serving.LLM(shape=SHAPE, random_weights=True, dtype="float32", device="cpu", context=64) as llm:
        load = bench_serving.Load.draw(llm.cfg.vocab, 2, Lengths.parse("5"), Lengths.parse("4"))
        load.seconds(llm)
        with pytest.raises(RuntimeError, match="answers of"):
            bench_serving.Load(load.prompts, [4, 60]).seconds(llm)  # the context ends it
