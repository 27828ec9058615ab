"""tools/benchmark/baseline.py finds what changed beyond noise, and compares nothing that cannot be."""

import pytest

from lite_llm.errors import UsageError
from tests.tools.test_benchmark_record import every_mode, figures, near, record, row
from tools.benchmark.baseline import KINDS, check, compare, summary
from tools.benchmark.record import FIGURES, spread


def kinds(now, before):
    return [found.kind for found in compare(now, before)]


def with_figure(value, figure="tokens_per_second", mode="latency", **fields):
    return record(row(mode, figures=figures(mode) | {figure: value}), **fields)


def test_nothing_is_found_where_nothing_changed():
    assert compare(record(*every_mode()), record(*every_mode())) == []


@pytest.mark.parametrize(
    "figure", [(mode, name) for mode, parts in FIGURES.items() for name in parts if mode != "accuracy"]
)
def test_less_time_and_more_per_second_is_faster(figure):
    mode, name = figure
    part = (lambda value: near(value)) if name not in ("ttft_ms", "tpot_ms", "e2e_ms") or mode != "online" else tail
    now, before = (with_figure(part(value), name, mode) for value in (1200.0, 1000.0))
    want = "faster" if name.endswith("_per_second") else "slower"
    (found,) = compare(now, before)
    assert found.kind == want and found.where == f"{mode} b8, lite_llm" and "(+20.0%)" in found.text
    assert kinds(before, now) == ["faster" if want == "slower" else "slower"]


def tail(value):
    return {"p50": 1.0, "p90": 2.0, "p99": near(value)}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (spread(1029, 1028, 1030), []), (spread(1031, 1030, 1032), ["faster"]), (spread(1100, 1004, 1200), []),
        (spread(1100, 1006, 1200), ["faster"]), (spread(969, 968, 970), ["slower"]), (spread(972, 971, 973), []),
        (spread(900, 800, 996), []), (spread(0, 0, 0), ["slower"]),
    ],
)  # fmt: skip
def test_a_change_is_beyond_both_intervals_and_three_percent(now, found):
    assert kinds(with_figure(now), with_figure(spread(1000, 995, 1005))) == found


def test_a_figure_that_was_zero_can_change():
    assert kinds(with_figure(near(5.0)), with_figure(spread(0, 0, 0))) == ["faster"]


def test_percentiles_without_an_interval_are_not_compared():
    then, now = ({"p50": 1.0, "p90": 2.0, "p99": top} for top in (3.0, 300.0))
    assert kinds(with_figure(now, "e2e_ms", "online"), with_figure(then, "e2e_ms", "online")) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"environment": {"gpu": "NVIDIA A100"}}, "gpu was 'NVIDIA H200', is 'NVIDIA A100'"),
        ({"environment": {"cpu": "x86_64"}}, "gpu was 'NVIDIA H200', is None"),
        ({"model": {"name": "other", "dtype": "float32"}}, "model name was 'demo', is 'other'"),
        ({"model": {"name": "demo", "dtype": "bfloat16"}}, "model dtype"),
        ({"arguments": {"argv": [], "prefix_cache": True}}, "prefix cache was False, is True"),
    ],
)
def test_another_machine_or_model_is_not_compared(fields, said):
    (found,) = compare(with_figure(near(1.0), **fields), with_figure(near(9.0)))
    assert found.kind == "incomparable" and found.fails and said in str(found)


def test_without_gpus_the_processor_must_be_the_same():
    one, other = ({"cpu": "x86_64", "cpu_name": name, "cores": 4} for name in ("one", "other"))
    assert kinds(record(row(), environment=one), record(row(), environment=one)) == []
    assert kinds(record(row(), environment=one), record(row(), environment=other)) == ["incomparable"]


def test_versions_and_limits_that_changed_are_noted():
    env = record().environment | {"torch": "2.12.0"}
    now = record(row(), environment=env, limits={"copy_tb_s": 0.017, "matmul_tflops": None})
    found = compare(now, record(row()))
    assert [f.text.split(":")[0] for f in found] == ["torch was 2.11.0, is 2.12.0", "copy_tb_s was 0.02, is 0.017"]
    assert {f.kind for f in found} == {"note"} and not any(f.fails for f in found)


def test_rows_of_one_record_alone_are_named():
    found = compare(record(row(), row(name="b16")), record(row(), row(side="vllm"), row(work={"new": 33})))
    assert [(f.kind, f.where) for f in found] == [
        ("unknown", "latency b16, lite_llm"), ("missing", "latency b8, vllm"), ("missing", "latency b8, lite_llm"),
    ]  # fmt: skip


def test_a_row_that_is_refused_now_fails_and_its_figures_are_not_compared():
    good, bad = record(row(value=10.0)), record(row(value=20.0, refused="tokens differ"))
    (found,) = compare(bad, good)
    assert found.kind == "refused" and found.fails and found.text == "tokens differ"
    assert kinds(good, bad) == kinds(bad, bad) == ["note"]
    gated = record(row(), gates=[{"name": "demo", "wrong": "differs"}])
    assert kinds(gated, good) == ["refused"] and kinds(good, gated) == ["note"]


@pytest.mark.parametrize(
    ("then", "now", "kind"),
    [("equal", "bug", "worse"), ("noise", "bug", "worse"), ("bug", "noise", "better"), ("equal", "noise", "note")],
)
def test_a_verdict_that_changes_is_found(then, now, kind):
    before, after = (with_figure(verdict, "verdict", "accuracy") for verdict in (then, now))
    assert kinds(after, before) == [kind] and kinds(after, after) == []


def test_only_what_is_worse_fails():
    assert {kind for kind, fails in KINDS.items() if fails} == {"incomparable", "slower", "worse", "refused"}


def wanted(found):
    return [(one.mode, one.work, one.side) for one in found.rows]


def test_what_cannot_be_compared_is_known_before_anything_is_measured():
    old, planned = record(row(), row(side="transformers")), record()
    assert check(planned, old, wanted(old)[:1]) is None
    for rows, has in [
        ([row(name="b16")], "it has latency b8"), ([row("startup")], "it has latency b8"),
        ([row(side="vllm")], "it has latency b8"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=f"nothing could be compared: {has}; to be measured: {rows[0].mode} b"):
            check(planned, old, wanted(record(*rows)))
    for useless in (record(row(refused="tokens differ")), record(row(runs=1)), record()):
        with pytest.raises(UsageError, match="it has no row with an interval"):
            check(planned, useless, wanted(old))
    other = record(model={"name": "other", "dtype": "float32"}, environment={"gpu": "NVIDIA A100"})
    with pytest.raises(UsageError, match="gpu was 'NVIDIA H200', is 'NVIDIA A100'; model name was 'demo'"):
        check(other, old, wanted(old))


def test_a_variant_is_no_other_work_before_it_is_measured():
    old = record(row("ablation", work={"variant": "no graphs"}))
    assert check(record(), old, wanted(record(row("ablation")))) is None


def said(now, before):
    return summary(now, before, compare(now, before))


def test_a_summary_counts_what_was_compared():
    old = record(row(), row(side="transformers"))
    assert said(record(row(), row(side="transformers")), old) == "2 rows compared, none slower"
    assert said(record(row(value=9.0)), old) == "1 row compared, 1 slower"  # fewer tokens per second
    assert said(record(row(), row(side="transformers", value=10.0, refused="no times")), old).startswith("1 row ")
    accuracy = record(row("accuracy"))
    assert said(accuracy, accuracy) == "1 row compared, none worse"
    for now in (record(row(name="b16")), record(row(runs=1)), record(row("startup"))):
        with pytest.raises(UsageError, match="nothing could be compared"):
            said(now, old)
    assert said(record(row(refused="wrong")), old) == "0 rows compared, none slower", "what fails is told by its line"


def test_one_run_is_not_compared():
    (found,) = compare(record(row(value=9.0, runs=1)), record(row(value=1.0)))
    assert str(found) == "note: latency b8, lite_llm: not compared, one run tells nothing of the noise"
    (found,) = compare(record(row(value=9.0)), record(row(value=1.0, runs=1)))
    assert str(found).endswith("not compared, in the old record one run tells nothing of the noise")
