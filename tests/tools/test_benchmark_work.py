"""tools/benchmark/work.py: drawn lengths and arrivals follow what was asked, JSON loses nothing, bad input is told."""

import json
import math
import statistics
from dataclasses import replace
from random import Random

import pytest

from lite_llm.errors import UsageError
from tools.benchmark.work import Answer, Ask, Lengths, Run, Work, batch, burst, fixed, many, poisson, trace


def drawn(text: str, n: int, most: int | None = None) -> list[int]:
    lengths, rng = Lengths.parse(text, most), Random(5)
    return [lengths.draw(rng) for _ in range(n)]


def gaps(work: Work) -> list[float]:
    return [b.at - a.at for a, b in zip(work.asks, work.asks[1:])]


def online(arrivals, n: int) -> Work:
    return many(50, n, Lengths.parse("2"), Lengths.parse("3"), seed=4, arrivals=arrivals)


def saved(tmp_path, *lines) -> str:
    path = tmp_path / "load.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_a_work_survives_json_exactly():
    work = Work("odd", (Ask((3, 1), 2, 0.1 + 0.2), Ask((0,), 1)), 0.7, 40, 0.95, 9)
    document = work.to_json()
    assert json.loads(json.dumps(document)) == document
    assert Work.from_json(json.loads(json.dumps(document))) == work
    assert hash(Work.from_json(document)) == hash(work)  # tuples again, all the way down


def test_a_run_survives_json_exactly():
    answers = (Answer((5, 6), 0.1 + 0.2, (1 / 3, 2 / 3), 0.7), Answer((7,), 0.0, (), 1e-9))
    run = Run(2 / 3, answers, 0, None, {"preemptions": 0, "per step": [1, 2.5]})
    document = run.to_json()
    assert json.loads(json.dumps(document)) == document
    again = Run.from_json(json.loads(json.dumps(document)))
    assert again == run and hash(again.answers) == hash(run.answers)
    assert Run.from_json(replace(run, peak_bytes=1 << 40).to_json()).peak_bytes == 1 << 40


def test_a_json_with_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        Work.from_json(Work("w", (Ask((1,), 1),)).to_json() | {"temprature": 1.0})


def test_a_batch_has_the_shape_that_its_name_says():
    work = batch(1000, 8, 16, 12, seed=3)
    assert work.name == "b8 in16 out12" and work.seed == 3 and work.temperature == 0.0
    assert [(len(ask.ids), ask.new, ask.at) for ask in work.asks] == [(16, 12, 0.0)] * 8
    assert len({ask.ids for ask in work.asks}) == 8
    assert work == batch(1000, 8, 16, 12, seed=3)
    assert work.asks != batch(1000, 8, 16, 12, seed=4).asks


def test_ids_cover_the_vocabulary_but_what_is_banned():
    banned = frozenset({0, 3, 19, 77})
    work = batch(20, 2, 500, 1, seed=0, banned=banned)
    assert {i for ask in work.asks for i in ask.ids} == set(range(20)) - banned
    work = many(20, 40, Lengths.parse("25"), Lengths.parse("1"), seed=0, banned=banned)
    assert {i for ask in work.asks for i in ask.ids} == set(range(20)) - banned


def test_a_length_alone_is_that_length():
    assert set(drawn("128", 20)) == {128}


def test_a_range_is_uniform_and_inclusive():
    values = drawn("10-30", 20000)
    assert set(values) == set(range(10, 31))
    assert statistics.mean(values) == pytest.approx(20, abs=0.2)
    assert statistics.pvariance(values) == pytest.approx((21**2 - 1) / 12, rel=0.03)


def test_a_list_gives_each_of_its_lengths_as_often():
    values = drawn("64,128,7", 6000)
    assert set(values) == {7, 64, 128}
    assert all(values.count(v) == pytest.approx(2000, abs=150) for v in (7, 64, 128))


def test_lognormal_has_its_median_and_sigma():
    logs = [math.log(v) for v in drawn("lognormal:2000:0.8", 20000)]
    assert math.exp(statistics.median(logs)) == pytest.approx(2000, rel=0.03)
    assert statistics.mean(logs) == pytest.approx(math.log(2000), abs=0.03)
    assert statistics.stdev(logs) == pytest.approx(0.8, rel=0.03)


def test_lognormal_is_cut_at_both_ends():
    values = drawn("lognormal:20:0.8", 5000, most=50)
    above = 0.5 * math.erfc(math.log(50 / 20) / 0.8 / math.sqrt(2))
    assert max(values) == 50 and values.count(50) / 5000 == pytest.approx(above, abs=0.02)
    wild = drawn("lognormal:20:99", 2000)
    assert min(wild) == 1 and max(wild) == 320


@pytest.mark.parametrize(
    "text",
    ["", "abc", "0", "-5", "1.5", "10-", "30-10", "0-4", "64,", "64,0", "64,1-2", "lognormal:200", "lognormal:0:0.8",
     "lognormal:200:-1", "lognormal:200:nan", "normal:3:1", " 8", "8\n", "٣", "9" * 5000],
)  # fmt: skip
def test_an_unknown_length_is_refused(text):
    with pytest.raises(UsageError, match="^lengths = .*; expected ") as caught:
        Lengths.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["65", "10-65", "8,65", "lognormal:65:1"])
def test_a_length_above_the_most_is_refused(text):
    with pytest.raises(UsageError, match="at most 64"):
        Lengths.parse(text, most=64)
    Lengths.parse(text, most=65)


def test_many_are_the_same_requests_whatever_the_arrivals():
    prompts, news = Lengths.parse("1-9"), Lengths.parse("5,6")
    plain = many(50, 30, prompts, news, seed=2)
    assert plain.name == "n30 in1-9 out5,6" and all(ask.at == 0 for ask in plain.asks)
    assert {len(ask.ids) for ask in plain.asks} > {1, 9} and {ask.new for ask in plain.asks} == {5, 6}
    for arrivals in (fixed(1), poisson(3), burst(4, 1)):
        work = many(50, 30, prompts, news, seed=2, arrivals=arrivals)
        assert [(ask.ids, ask.new) for ask in work.asks] == [(ask.ids, ask.new) for ask in plain.asks]
        assert work.name == f"{plain.name} {arrivals.name}"
    assert many(50, 10, prompts, news, seed=2).asks == plain.asks[:10]


def test_fixed_arrivals():
    assert [ask.at for ask in online(fixed(0.5), 4).asks] == [0, 0.5, 1.0, 1.5]
    assert {ask.at for ask in online(fixed(0), 4).asks} == {0}


def test_bursts():
    assert [ask.at for ask in online(burst(3, 2.0), 7).asks] == [0, 0, 0, 2, 2, 2, 4]


def test_poisson_gaps_are_exponential_and_independent():
    found = gaps(online(poisson(4.0), 20001))
    assert min(found) >= 0
    assert statistics.mean(found) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(found) == pytest.approx(0.25, rel=0.03)
    assert statistics.median(found) == pytest.approx(0.25 * math.log(2), rel=0.03)
    assert abs(statistics.correlation(found[:-1], found[1:])) < 0.03
    work = online(poisson(4.0), 20)
    assert work.asks[0].at == 0 and work == online(poisson(4.0), 20)


def test_a_trace_is_read_in_order_of_time(tmp_path):
    path = saved(
        tmp_path, {"at": 1.5, "prompt": [4, 2], "new": 3}, "", {"at": 0, "prompt": 6, "new": 1},
        {"at": 1.5, "prompt": [9], "new": 2},
    )  # fmt: skip
    work = trace(path, vocab=10, seed=1, banned=frozenset({0, 1, 2, 3}))
    assert work.name == "trace load.jsonl n3"
    assert [ask.at for ask in work.asks] == [0, 1.5, 1.5] and [ask.new for ask in work.asks] == [1, 3, 2]
    assert [ask.ids for ask in work.asks[1:]] == [(4, 2), (9,)]  # as written, banned or not
    assert len(work.asks[0].ids) == 6 and set(work.asks[0].ids) <= set(range(4, 10))
    assert Work.from_json(json.loads(json.dumps(work.to_json()))) == work


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_trace_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="load.jsonl has no requests: expected lines"):
        trace(saved(tmp_path, text), vocab=10, seed=0)


def test_a_missing_or_binary_trace_is_refused(tmp_path):
    with pytest.raises(UsageError, match="none.jsonl cannot be read .No such file"):
        trace(tmp_path / "none.jsonl", vocab=10, seed=0)
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UsageError, match="binary cannot be read .not UTF-8"):
        trace(tmp_path / "binary", vocab=10, seed=0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("at 0: 5 tokens", "is no JSON; expected"),
        ("[" * 100000, "is no JSON; expected"),
        ("[1, 2]", "expected {"),
        ({"at": 0, "prompt": 5}, "expected {"),
        ({"at": 0, "prompt": 5, "new": 1, "max": 2}, "expected {"),
        ({"at": -1, "prompt": 5, "new": 1}, "at = -1; expected a number of at least 0"),
        ({"at": math.nan, "prompt": 5, "new": 1}, "at = nan; expected"),
        ({"at": "now", "prompt": 5, "new": 1}, "at = 'now'; expected"),
        ({"at": 0, "prompt": 0, "new": 1}, "prompt = 0; expected a whole number"),
        ({"at": 0, "prompt": "hello", "new": 1}, "prompt = 'hello'; expected"),
        ({"at": 0, "prompt": [], "new": 1}, "ids = .*; expected at least one"),
        ({"at": 0, "prompt": [3, 10], "new": 1}, "prompt = .*; expected ids from 0 to 9"),
        ({"at": 0, "prompt": [True], "new": 1}, "prompt = .*; expected ids from 0 to 9"),
        ({"at": 0, "prompt": 5, "new": 0}, "new = 0; expected a whole number of at least 1"),
    ],
)
def test_a_bad_line_of_a_trace_is_told_by_its_number(tmp_path, line, message):
    path = saved(tmp_path, {"at": 0, "prompt": 5, "new": 1}, line)
    with pytest.raises(UsageError, match=f"load.jsonl:2: .*{message}") as caught:
        trace(path, vocab=10, seed=0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: batch(10, 0, 4, 4, 0), "batch = 0; expected a whole number of at least 1"),
        (lambda: batch(10, 1, 0, 4, 0), "prompt = 0; expected"),
        (lambda: batch(10, 1, 4, 0, 0), "new = 0; expected"),
        (lambda: batch(10, 1, 4, 1.5, 0), "new = 1.5; expected"),
        (lambda: batch(10, True, 4, 1, 0), "batch = True; expected"),
        (lambda: batch(2, 1, 4, 4, 0, frozenset({0, 1})), "vocab = 2; every id is banned"),
        (lambda: many(10, 0, Lengths.parse("1"), Lengths.parse("1"), 0), "n = 0; expected"),
        (lambda: Ask((1,), 0), "new = 0; expected"),
        (lambda: Ask((), 1), "ids = .*; expected at least one"),
        (lambda: Ask((1,), 1, -0.1), "at = -0.1; expected"),
        (lambda: fixed(-1), "gap = -1; expected a number of at least 0"),
        (lambda: fixed(math.inf), "gap = inf; expected"),
        (lambda: burst(0, 1), "size = 0; expected"),
        (lambda: burst(2, -1), "gap = -1; expected"),
        (lambda: poisson(0), "rate = 0; expected more than 0"),
        (lambda: poisson(-2), "rate = -2; expected"),
    ],
)
def test_bad_arguments_are_told(make, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        make()
