"""The modes with sides that answer by rule, so that every figure is known."""

import dataclasses

import pytest
import torch

from lite_llm.engine.roofline import Ceilings, floor, step_costs
from tools.benchmark import bench as benches
from tools.benchmark import modes
from tools.benchmark.bench import AGAIN, JUDGE, OURS, Bench, Facts, takes
from tools.benchmark.limits import alone_limits, prompt_limit, step_limit, work_limit
from tools.benchmark.modes import Job
from tools.benchmark.record import Record
from tools.benchmark.sides import Limits, SideFailed
from tools.benchmark.work import Answer, Ask, Run, Work, batch

ROOF = Ceilings(copy=1e10, matmul=1e11)
OF_A_REQUEST = {"ttft_ms": 0.020, "tpot_ms": 0.010, "e2e_ms": 0.060}  # seconds, of five tokens of our side


class FakeSide:
    """Every token takes `step` seconds, the first one twice as long; tokens are 1, 1, 1 ..."""

    def __init__(self, label, step, gap=0.0, times=True, off=0.0, only=None):
        """`off`: what its log-probabilities are off by; `only`: of the token there in each answer, None: of all."""
        self.name, self.step, self.gap, self.times = label.split(",")[0], step, gap, times
        self.special, self.ready_s, self.info = frozenset(), 2.0, {"import_s": 1.0}
        self.ran, self.off, self.only = [], off, only

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def warm(self, work):
        self.ran.append(("warm", work))

    def run(self, work, watch=None):
        self.ran.append(("run", work))
        answers = []
        for ask in work.asks:
            times = tuple(ask.at + self.step * (2 + i) for i in range(ask.new))
            logprobs = (-1.0 - self.off * (self.only in (None, i)) for i in range(ask.new * work.logprobs))
            answers.append(Answer((1,) * ask.new, ask.at, times if self.times else (), times[-1], tuple(logprobs)))
        return Run(max(a.ended for a in answers), tuple(answers), 0, None, {})

    def gaps(self, pairs):
        return [[self.gap] * len(answer) for _, answer in pairs]

    def score(self, pairs):
        return self.gaps(pairs), [[-1.0] * len(answer) for _, answer in pairs]


@pytest.fixture
def made(monkeypatch):
    def make(rounds=4, max_requests=8, **sides):
        found = {OURS: FakeSide(OURS, 0.010), JUDGE: FakeSide(JUDGE, 0.020)} | {
            name.replace("_", "-"): side for name, side in sides.items() if name != "ours"
        }
        if "ours" in sides:
            found[OURS] = sides["ours"]

        def fresh(self, label, prefix_cache=False, variant=None):
            if label == "vllm":
                raise SideFailed("vllm: it is not installed", kind="missing")
            return found[label]

        monkeypatch.setattr(Bench, "fresh", fresh)
        facts, said = Facts.find(None, None, 0, "float32", "cpu"), []
        record = Record.begin({"argv": []}, {"name": facts.name}, {"copy_tb_s": 0.01, "matmul_tflops": 0.1})
        bench = Bench(facts, record, ROOF, Limits(max_requests, 64), rounds, said.append)
        return bench, record, found, said

    return make


def job(size=2, prompt=8, new=5):
    return Job(lambda turn: batch(100, size, prompt, new, seed=turn), {"batch": size, "prompt": prompt, "new": new})


def row(record, side, **work):
    return next(row for row in record.rows if row.side == side and work.items() <= row.work.items())


def test_latency_by_hand(made):
    bench, record, sides, _ = made()
    modes.latency(bench, [job()], [OURS, JUDGE])
    ours = row(record, OURS)
    assert ours.figures["ttft_ms"]["median"] == pytest.approx(20)
    assert ours.figures["tpot_ms"]["median"] == pytest.approx(10)
    assert ours.figures["tokens_per_second"]["median"] == pytest.approx(2 * 5 / 0.06)
    (against,) = ours.against
    assert against["side"] == JUDGE and against["ratio"]["median"] == pytest.approx(2) and against["differs"]
    assert row(record, JUDGE).against == []
    # The same ids for both, fresh ones each round, by turns, warmed outside the timing.
    for side in sides.values():
        assert [kind for kind, _ in side.ran].count("warm") == 1
    works = [[w for kind, w in sides[name].ran if kind == "run"][-4:] for name in (OURS, JUDGE)]
    assert works[0] == works[1] and len({w.asks for w in works[0]}) == 4


def test_a_wrong_token_refuses_every_speedup(made):
    bench, record, _, _ = made(transformers=FakeSide(JUDGE, 0.020, gap=0.3))
    modes.latency(bench, [job()], [OURS, JUDGE])
    ours = row(record, OURS)
    assert "0.3 nats" in record.refusal(ours) and not list(record.comparisons(ours))


@pytest.mark.parametrize("mode", ["latency", "throughput", "online", "startup", "ablation"])
@pytest.mark.parametrize("off, only, wrong", [
    (0.0002, 1, ""), (0.0012, 1, "0.0012 nats from transformers'"),
    (0.0001, None, ""), (0.0003, None, "root mean square"),
])  # fmt: skip
def test_log_probabilities_that_are_off_refuse_every_speedup(made, mode, off, only, wrong):
    """One of them by more than rounding, or all by a little. What is timed asks for none."""
    bench, record, sides, _ = made(ours=FakeSide(OURS, 0.010, off=off, only=only))
    {
        "latency": lambda: modes.latency(bench, [job()], [OURS, JUDGE]),
        "throughput": lambda: modes.throughput(bench, [job()], [OURS, JUDGE]),
        "online": lambda: modes.online(bench, [job()], [OURS, JUDGE], None, None),
        "startup": lambda: modes.startup(bench, job(1, 4, 2), [OURS, JUDGE]),
        "ablation": lambda: ablated(bench),
    }[mode]()
    ours = [one for one in record.rows if one.side == OURS]
    assert ours and all((record.refusal(one) is not None) == bool(wrong) for one in ours)
    assert any(list(record.comparisons(one)) for one in ours) == (not wrong)
    gates = [gate for gate in record.gates if gate["name"].startswith("log-probabilities")]
    assert gates and all(gate["worst_logprob_nats"] == pytest.approx(off) for gate in gates)
    assert not wrong or wrong in record.refusal(ours[0])
    timed = [work for kind, work in sides[OURS].ran if kind == "warm"]
    assert mode == "startup" or timed and not any(work.logprobs for work in timed)


def test_a_gate_has_whole_answers_to_all_requests_of_a_work(made):
    bench, record, sides, _ = made()
    work = Work("w", tuple(Ask((1,) * (1 + i), 50, i) for i in range(40)))
    modes.online(bench, [Job(lambda turn: work, {})], [OURS], 1, 1)
    (asked,) = [work for kind, work in sides[OURS].ran if work.logprobs]
    assert [(len(ask.ids), ask.new, ask.at) for ask in asked.asks] == [(1 + i, 50, 0.0) for i in range(40)]
    sides[JUDGE].gaps = lambda pairs: [[float(len(ids) == 31)] * len(answer) for ids, answer in pairs]
    bench.gate_first({OURS: sides[OURS]}, work, {})
    assert [gate["wrong"] is None for gate in record.gates] == [True, True, False]
    scored = []  # of many long requests the longest and some others
    sides[JUDGE].gaps = lambda pairs: scored.append([len(ids) for ids, _ in pairs]) or [[0.0]] * len(pairs)
    bench.gate_first({OURS: sides[OURS]}, Work("w", tuple(Ask((1,) * (700 + i), 300) for i in range(100))), {})
    assert scored == [[799, 798, 797, 796, *range(795, 699, -4)]]


def test_what_was_timed_is_what_is_judged(made):
    """What is asked before is right here, and what is timed of the second work is not."""
    bench, record, sides, _ = made()
    timed = {ask.ids for ask in job(3, 20, 15).works(1).asks}
    sides[JUDGE].gaps = lambda pairs: [[0.5 * (ids in timed)] for ids, _ in pairs]
    modes.latency(bench, [job(), job(3, 20, 15)], [OURS, JUDGE])
    assert [gate["wrong"] is None for gate in record.gates] == [True, True, True, False]
    assert record.refusal(row(record, OURS, prompt=20)).startswith("greedy tokens, b3 in20 out15: a token is 0.5 nats")
    short = row(record, OURS, prompt=8)
    assert record.refusal(short) is None and list(record.comparisons(short)), "another work's answers are no reason"


def test_each_work_is_refused_for_its_own_answers(made):
    bench, record, sides, _ = made()
    sides[JUDGE].gaps = lambda pairs: [[len(ids) / 10] for ids, _ in pairs]
    modes.latency(bench, [job(), job(3, 20, 12)], [OURS, JUDGE])
    why = {size: record.refusal(row(record, OURS, prompt=size)) for size in (8, 20)}
    assert "b2 in8 out5: a token is 0.8 nats" in why[8] and "b3 in20 out12: a token is 2 nats" in why[20]


def test_a_side_that_fails_is_left_out_and_the_rest_goes_on(made):
    bench, record, sides, said = made()
    other = sides["transformers-cb"] = FakeSide("transformers-cb", 0.03)
    run = other.run

    def fails(work, watch=None):
        if len(other.ran) > 2:
            raise SideFailed("transformers-cb: out of memory", kind="memory")
        return run(work)

    other.run = fails
    modes.latency(bench, [job()], [OURS, JUDGE, "transformers-cb"])
    assert [r.side for r in record.rows] == [OURS, JUDGE] and len(row(record, OURS).against) == 1
    assert any("left out transformers-cb: transformers-cb: out of memory" in line for line in said)


def test_nobody_to_judge_refuses_too(made, monkeypatch):
    bench, record, _, _ = made()
    fresh = Bench.fresh

    def without(self, label, *args, **kwargs):
        if label == JUDGE:
            raise SideFailed("transformers: it is not installed", kind="missing")
        return fresh(self, label, *args, **kwargs)

    monkeypatch.setattr(Bench, "fresh", without)
    modes.latency(bench, [job()], [OURS])
    assert "nobody to judge" in record.refusal(row(record, OURS))


def test_ourselves_twice_do_not_differ(made):
    bench, record, sides, _ = made()
    sides[AGAIN] = FakeSide(AGAIN, 0.010)
    modes.latency(bench, [job()], [OURS, AGAIN])
    (against,) = row(record, OURS).against
    assert against["side"] == AGAIN and not against["differs"]


def test_a_side_that_cannot_run_is_left_out_and_said(made):
    bench, record, _, said = made()
    modes.latency(bench, [job()], [OURS, "vllm"])
    assert [r.side for r in record.rows] == [OURS] and any("left out vllm" in line for line in said)


def test_compilations_that_nobody_counts_are_not_known(made, monkeypatch):
    bench, record, sides, _ = made()
    run = sides[JUDGE].run
    monkeypatch.setattr(sides[JUDGE], "run", lambda *a, **k: dataclasses.replace(run(*a, **k), compiles=None))
    modes.latency(bench, [job()], [OURS, JUDGE])
    assert [row(record, side).compiles for side in (OURS, JUDGE)] == [0, None]
    assert list(record.comparisons(row(record, OURS)))


def test_a_side_without_times_shows_no_ratio(made):
    bench, record, _, _ = made(ours=FakeSide(OURS, 0.010, times=False))
    modes.latency(bench, [job()], [OURS, JUDGE])
    assert "no times" in row(record, OURS).refused and row(record, OURS).against == []


def test_throughput_and_online(made):
    bench, record, _, _ = made()
    asks = lambda turn: Work("w", tuple(Ask((1 + turn,) * 4, 5, 0.1 * i) for i in range(3)))  # noqa: E731
    modes.throughput(bench, [Job(asks, {})], [OURS, JUDGE])
    assert row(record, OURS).figures["requests_per_second"]["median"] == pytest.approx(3 / 0.26)
    shares = [record.limit(row(record, OURS), name) for name in ("requests_per_second", "tokens_per_second")]
    assert shares[0] == shares[1] == row(record, OURS).limit and shares[0]["of_limit"] > 0
    modes.online(bench, [Job(asks, {})], [OURS, JUDGE], ttft=0.03, tpot=0.05)
    online = {r.side: r for r in record.rows if r.mode == "online"}
    assert online[OURS].figures["ttft_ms"]["p99"]["median"] == pytest.approx(20)
    assert online[OURS].figures["e2e_ms"]["p50"]["median"] == pytest.approx(60)
    assert online[OURS].figures["goodput_per_second"]["median"] == pytest.approx(3 / 0.26)
    assert online[JUDGE].figures["goodput_per_second"]["median"] == 0  # its first token takes 40 ms
    assert online[OURS].limit is None
    cfg = bench.facts.cfg
    for name, limit in zip(("ttft_ms", "tpot_ms", "e2e_ms"), alone_limits(cfg, 4, 4, 5, ROOF), strict=True):
        share = record.limit(online[OURS], name)
        assert share == {"name": limit.name, "of_limit": pytest.approx(limit.seconds / OF_A_REQUEST[name])}
        assert record.limit(online[JUDGE], name)["of_limit"] == pytest.approx(share["of_limit"] / 2), "a slower side"
    assert record.limit(online[OURS], "goodput_per_second") is None
    modes.online(bench, [job()], [OURS, JUDGE], ttft=0.03, tpot=0.05)  # all at once; who is in time is no rate of work
    assert record.rows[-2].limit is None


def test_startup_counts_from_the_process(made):
    bench, record, sides, _ = made(rounds=3)
    modes.startup(bench, job(1, 4, 2), [OURS, JUDGE])
    figures = row(record, OURS).figures
    assert figures["import_s"]["median"] == 1.0 and figures["ready_s"]["median"] == 2.0
    assert figures["first_token_s"]["median"] == pytest.approx(2.02)
    assert len(sides[OURS].ran) == 5  # the first fills the caches and does not count, the last is a gate's
    assert row(record, OURS).runs == 3 and [gate["side"] for gate in record.gates] == [OURS, OURS]
    first, _, _ = alone_limits(bench.facts.cfg, 4, 4, 1, ROOF)
    assert record.limit(row(record, OURS), "first_token_s")["of_limit"] == pytest.approx(first.seconds / 2.02)
    assert record.limit(row(record, OURS), "ready_s") is None and row(record, OURS).compiles is None
    (pair,) = record.comparisons(row(record, OURS))
    assert pair.ratio["median"] == pytest.approx(2.04 / 2.02)


def test_a_wrong_token_refuses_a_startup(made):
    bench, record, _, _ = made(transformers=FakeSide(JUDGE, 0.020, gap=0.3))
    modes.startup(bench, job(1, 4, 2), [OURS, JUDGE])
    ours = row(record, OURS)
    assert "0.3 nats" in record.refusal(ours) and not list(record.comparisons(ours))


def test_one_round_tells_no_difference(made):
    bench, record, _, _ = made(rounds=1)
    modes.latency(bench, [job()], [OURS, JUDGE])
    assert row(record, OURS).against[0]["differs"] is None


def test_what_a_side_says_of_itself_stands_in_its_rows(made):
    bench, record, sides, _ = made()
    sides[JUDGE].info = sides[JUDGE].info | {"note": "another cache"}
    modes.latency(bench, [job()], [OURS, JUDGE])
    modes.startup(bench, job(), [OURS, JUDGE])
    assert [(r.side, r.note) for r in record.rows] == 2 * [(OURS, None), (JUDGE, "another cache")]


def test_windows_wait_for_all_of_the_last(made):
    side = FakeSide(OURS, 0.010)
    work = Work("w", tuple(Ask((1, 2), new) for new in (1, 9, 1, 1)))
    run = modes.in_windows(2)(side, work)
    assert run.seconds == pytest.approx(0.010 * (10 + 2))
    assert [a.times[0] for a in run.answers] == pytest.approx([0.02, 0.02, 0.12, 0.12])
    assert [len(a.tokens) for a in run.answers] == [1, 9, 1, 1]


def test_ablation_compares_each_rung_with_its_base(made):
    bench, record, _, _ = made(max_requests=2)
    mixed = Job(lambda turn: Work("mixed", tuple(Ask((turn,), new) for new in (1, 9, 1, 9))), {})
    modes.ablation(bench, job(), mixed, job(2, 6, 4))
    variants = {(r.work["name"], r.work["variant"]): r for r in record.rows}
    static = variants["mixed", "static batching"]
    assert static.against[0]["variant"] == "as it is"
    assert static.against[0]["ratio"]["median"] == pytest.approx(0.5)  # two windows of 100 ms, against one
    assert all(not r.against for (_, name), r in variants.items() if name == "as it is")


def ablated(bench):
    mixed = Job(lambda turn: Work("mixed", tuple(Ask((turn,), new) for new in (1, 9, 1, 9))), {})
    modes.ablation(bench, job(), mixed, job(2, 6, 4))


def test_a_wrong_token_refuses_an_ablation(made):
    bench, record, _, _ = made(max_requests=2, transformers=FakeSide(JUDGE, 0.020, gap=0.3))
    ablated(bench)
    assert len(record.rows) == 4 and all("0.3 nats" in record.refusal(row) for row in record.rows)
    assert not any(list(record.comparisons(row)) for row in record.rows)


def test_what_a_variant_is_compared_with_is_judged_too(made, monkeypatch):
    """Its own tokens are wrong in the first of two works here, and nobody's else are."""
    bench, record, _, _ = made(max_requests=2)
    wrong, gaps = iter([0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]), bench.open(JUDGE).gaps
    monkeypatch.setattr(bench.sides[JUDGE], "gaps", lambda pairs: [[next(wrong)], *gaps(pairs)])
    ablated(bench)
    (refused,) = [row for row in record.rows if record.refusal(row)]
    assert (refused.work["name"], refused.work["variant"]) == ("mixed", "as it is")
    (compared,) = [row for row in record.rows if list(record.comparisons(row))]
    assert compared.work["variant"] == "prefix cache", "the other work"


def test_rungs_that_need_a_gpu_are_said_to_be_left_out(made):
    bench, _, _, said = made(max_requests=2)
    ablated(bench)
    (line,) = [line for line in said if line.startswith("left out")]
    assert "no PDL, cuBLAS only, no graphs, plain attention: without a GPU" in line


# ---- limits


def test_limits_by_hand():
    cfg = Facts.find(None, None, 0, "float32", "cpu").cfg
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    layer = cfg.hidden * (q + 2 * kv) + q * cfg.hidden + 3 * cfg.hidden * cfg.ffn
    flops = 2 * (cfg.num_layers - 1) * layer * 3 + (cfg.num_layers - 1) * 4 * q * 6 + 2 * cfg.hidden * cfg.vocab
    flops += 2 * (layer + 2 * 2 * cfg.hidden * kv) + 4 * q * 3  # the last layer: one token, and two more's K and V
    assert prompt_limit(cfg, 3, ROOF).seconds == pytest.approx(flops / ROOF.matmul)
    step = step_limit(cfg, 4, 2, 10, ROOF)
    assert step.seconds == floor(step_costs(cfg, 4, 2, 10), ROOF) and step.name == "memory"
    assert step_limit(cfg, 4, 2, 10, Ceilings(1e15, 1e9)).name == "matmul"


def test_the_limits_of_a_request_alone():
    cfg = Facts.find(None, None, 0, "float32", "cpu").cfg
    first, step, whole = alone_limits(cfg, 4, 6, 5, ROOF)
    assert step == step_limit(cfg, 4, 1, 9, ROOF) and whole.seconds == pytest.approx(first.seconds + 4 * step.seconds)
    assert first == step_limit(cfg, 4, 1, 0, ROOF), "of six tokens reading the weights takes longer than their matmuls"
    assert alone_limits(cfg, 4, 600, 5, ROOF)[0] == prompt_limit(cfg, 600, ROOF)


def test_the_limit_of_a_work():
    cfg = Facts.find(None, None, 0, "float32", "cpu").cfg

    def seconds(*asks, most=8):
        return work_limit(cfg, 4, Work("w", tuple(Ask((1,) * 4, new, at) for new, at in asks)), most, ROOF).seconds

    prompt, step = prompt_limit(cfg, 4, ROOF).seconds, step_limit(cfg, 4, 1, 5, ROOF).seconds
    assert seconds((1, 0)) == pytest.approx(prompt)  # the prompt gives the first token
    assert seconds((2, 0)) == pytest.approx(max(prompt, step))  # of other requests they could overlap
    nine = sum(step_limit(cfg, 4, 1, seen, ROOF).seconds for seen in range(5, 13))
    assert seconds((9, 0)) == pytest.approx(nine)
    assert nine < seconds((9, 0), (9, 0)) < 1.1 * nine  # weights are read once for both
    assert seconds((9, 0), (9, 0), most=1) == pytest.approx(2 * nine)
    # Two at a time, eight and two tokens: five steps would hold them, but eight of them follow each other.
    assert seconds((9, 0), (3, 0), most=2) < seconds((9, 0), (9, 0), most=2)
    assert seconds((9, 0), (9, 50.0)) == seconds((9, 0), (9, 0))  # when they come is not the machine's doing


def test_a_window_limits_what_a_prompt_costs():
    cfg = Facts.find(None, None, 0, "float32", "cpu").cfg
    seen = dataclasses.replace(cfg, windows=(2,) * cfg.num_layers)
    work = Work("w", (Ask((1,) * 3, 4),))
    tokens = 2 * cfg.kv_heads * cfg.head_dim * 4 / ROOF.copy * cfg.num_layers * (4 + 5 + 6 - 2 - 2 - 2)
    whole, short = (work_limit(c, 4, work, 1, ROOF).seconds for c in (cfg, seen))
    assert whole - short == pytest.approx(tokens)
    whole, short = (prompt_limit(c, 5, ROOF).seconds for c in (cfg, seen))
    pairs = (cfg.num_layers - 1) * (15 - 9) + 5 - 2  # 1 + 2 + 2 + 2 + 2 of 1 + 2 + 3 + 4 + 5, and for the last token
    assert whole - short == pytest.approx(4 * cfg.heads * cfg.head_dim * pairs / ROOF.matmul)


def test_what_works_take():
    assert takes([Work("a", (Ask((1,) * 3, 4), Ask((1,), 1))), Work("b", (Ask((1,) * 6, 2),))]) == (8, 9)


def test_near_is_rounding_and_no_more():
    assert benches.near("float32") < 0.01 < benches.near("bfloat16") < 0.5
    assert torch.finfo(torch.bfloat16).eps * 32 >= benches.near("bfloat16")
