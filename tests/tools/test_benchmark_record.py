"""tools/benchmark/record.py keeps what was measured whole, and no way to a ratio that must not be shown."""

import dataclasses
import json
import os

import pytest

from lite_llm.errors import UsageError
from tools import environment as environment_module
from tools.benchmark import record as record_module
from tools.benchmark.record import FIGURES, INTERVAL, PERCENTILES, Record, Row, load, spread
from tools.environment import environment, parse_gpu_state

SEEN = 7.77  # no figure of these records is like it: a ratio
SHARE = 0.6161


def near(value, limit=None):
    return spread(value, value * 0.99, value * 1.01, limit)


def figures(mode, value=10.0, limit=None):
    if mode == "accuracy":
        return {"agreement": 1.0, "worst_gap_nats": 0.1, "verdict": "noise", "first_layer": None, "error_ratio": 1.1}
    made = {INTERVAL: near(value, limit), PERCENTILES: {"p50": value, "p90": near(2 * value), "p99": 3 * value}}
    return {name: dict(made[parts]) for name, parts in FIGURES[mode].items()}


def row(mode="latency", side="lite_llm", name="b8", value=10.0, **fields):
    """A row with a ratio over transformers and a share of the limit, unless `fields` say otherwise."""
    work = {"name": name, "batch": 8, "prompt": 64, "new": 32} | fields.pop("work", {})
    against = [] if mode == "accuracy" or side != "lite_llm" else [compared()]
    usual = {"figures": figures(mode, value), "runs": 5, "against": against, "limit": reached()}
    return Row(mode, work, side, **(usual | fields))


def compared(side="transformers", differs=True, **fields):
    return {"side": side, "ratio": spread(SEEN, SEEN - 0.01, SEEN + 0.01), "differs": differs} | fields


def reached():
    return {"name": "memory", "of_limit": SHARE}


def record(*rows, gates=(), **fields):
    usual = {
        "arguments": {"argv": ["--quick"], "prefix_cache": False}, "model": {"name": "demo", "dtype": "float32"},
        "limits": {"copy_tb_s": 0.02, "matmul_tflops": None},
        "environment": {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "0123456789", "date": "2026-11-21"},
    }  # fmt: skip
    return Record(**(usual | fields), rows=list(rows), gates=list(gates))


def every_mode():
    """Both sides of each mode."""
    pairs = [(row(mode), row(mode, "transformers", value=80.0)) for mode in FIGURES if mode != "ablation"]
    full, less = {"variant": "full"}, {"variant": "no graph"}
    against_full = [compared("lite_llm", variant="full")]
    ablation = [row("ablation", work=full, against=None), row("ablation", work=less, against=against_full)]
    return [row for pair in pairs for row in pair] + ablation


def test_a_document_comes_back_as_it_was(tmp_path):
    path = tmp_path / "run.json"
    wrote = record(path=path, gates=[{"name": "copy", "wrong": None}])
    for one in every_mode():
        wrote.add(one)
    found = load(path)
    assert found.to_json() == wrote.to_json() == json.loads(path.read_text())
    assert found.rows == wrote.rows and {one.mode for one in found.rows} == set(FIGURES)
    assert found.path is None  # nothing added to it can overwrite the file


def test_the_document_has_the_keys_of_its_schema(tmp_path):
    path = tmp_path / "run.json"
    Record.begin({"argv": []}, {"name": "demo"}, {"copy_tb_s": 1, "matmul_tflops": 2}, path)
    found = json.loads(path.read_text())
    assert found["schema_version"] == 2 and found["rows"] == [] and found["gates"] == []
    assert found["environment"].keys() >= {"date", "command", "commit", "python", "torch", "driver", "throttle_reasons"}


def test_the_file_is_whole_after_every_row(tmp_path):
    path = tmp_path / "run.json"
    ticks = iter(range(100))
    wrote = record(path=path, clock=lambda: next(ticks))
    for i, one in enumerate(every_mode(), 1):
        wrote.add(one)
        assert len(load(path).rows) == i and load(path).seconds == i


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_in_the_middle_of_writing_leaves_the_document_before(tmp_path, monkeypatch, moment):
    path = tmp_path / "run.json"
    wrote = record(path=path)
    wrote.add(row())

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(os, moment, killed)
    with pytest.raises(SystemExit):
        wrote.add(row(name="b16"))
    assert [one.work["name"] for one in load(path).rows] == ["b8"]
    monkeypatch.undo()
    wrote.add(row(name="b32"))
    assert len(load(path).rows) == 3 and os.listdir(tmp_path) == ["run.json"]


def test_a_link_stays_a_link_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "run.json")
    record(path=tmp_path / "link.json").write()
    assert (tmp_path / "link.json").is_symlink() and load(tmp_path / "there" / "run.json").rows == []
    for path in (tmp_path / "there", tmp_path / "nowhere" / "run.json"):
        with pytest.raises(UsageError, match=path.name):
            record(path=path).write()


@pytest.mark.parametrize("fields", [{"refused": "3 of 48 answers differ"}, {"compiles": 2}], ids=str)
def test_a_refused_row_keeps_no_ratio(fields):
    one = row(**fields)
    assert one.refused and one.against == [] and str(SEEN) not in json.dumps(dataclasses.asdict(one))
    assert list(record(one).comparisons(one)) == [] and record(one).limit(one, "tokens_per_second") is None
    assert row().refuse("because").against == []


def test_a_ratio_over_a_refused_row_is_not_there():
    ours, theirs = row(), row(side="transformers")
    (pair,) = record(ours, theirs).comparisons(ours)
    assert pair.ratio["median"] == SEEN and pair.other is theirs
    assert not list(record(ours, theirs.refuse("out of memory")).comparisons(ours))
    assert list(record(ours, row(side="transformers", name="b16").refuse("out of memory")).comparisons(ours))


@pytest.mark.parametrize(
    ("gate", "kept"), [({}, 0), ({"side": "lite_llm"}, 0), ({"side": "transformers"}, 0), ({"side": "vllm"}, 1)]
)
@pytest.mark.parametrize("with_theirs", [True, False])
def test_a_failed_gate_refuses_the_sides_it_is_about(gate, kept, with_theirs):
    ours, theirs = row(), row(side="transformers")
    gates = [{"name": "demo", "wrong": None}, {"name": "tokens", "wrong": "3 differ"} | gate]
    found = record(ours, *[theirs] * with_theirs, gates=gates)
    assert len(list(found.comparisons(ours))) == kept
    if gate.get("side") in (None, "lite_llm"):
        assert found.refusal(ours) == "tokens: 3 differ"


@pytest.mark.parametrize("name, kept", [("b1", 0), ("b16", 1)])
@pytest.mark.parametrize("with_theirs", [True, False])
@pytest.mark.parametrize("side", ["lite_llm", "transformers"])
def test_a_gate_may_be_about_one_work(side, name, kept, with_theirs, tmp_path):
    work = {"name": "b1", "lengths": (8, 9)}
    ours, theirs = row(work=work), row(side="transformers", work=work)
    found = record(ours, *[theirs] * with_theirs, path=tmp_path / "run.json")
    found.add_gate({"name": "tokens", "wrong": "3 differ", "side": side, "work": ours.work | work | {"name": name}})
    for one in (found, load(tmp_path / "run.json")):
        assert len(list(one.comparisons(one.rows[0]))) == kept
        assert one.refusal(one.rows[0]) == ("tokens: 3 differ" if side == "lite_llm" and not kept else None)


def test_a_gate_about_a_work_is_about_all_variants_of_it_that_it_names():
    full, less = (one for one in every_mode() if one.mode == "ablation")
    work = {name: value for name, value in full.work.items() if name != "variant"}
    gate = {"name": "tokens", "wrong": "3 differ", "work": work}
    for side, refused in {"full": [full], "lite_llm": [full, less]}.items():
        found = record(full, less, gates=[gate | {"side": side}])
        assert [one for one in found.rows if found.refusal(one)] == refused
        assert not list(found.comparisons(less))


def test_a_variant_is_compared_with_the_row_of_the_other_variant():
    rows = [one for one in every_mode() if one.mode == "ablation"]
    (pair,) = record(*rows).comparisons(rows[1])
    assert (pair.side, pair.other) == ("full", rows[0])
    assert not list(record(rows[0].refuse("why"), rows[1]).comparisons(rows[1]))


@pytest.mark.parametrize("side", ["full", "no graph", "lite_llm", "transformers"])
def test_a_gate_may_be_about_a_variant(side):
    full, less = (one for one in every_mode() if one.mode == "ablation")
    found = record(full, less, gates=[{"name": "tokens", "wrong": "3 differ", "side": side}])
    assert (found.refusal(full) is None) == (side in ("no graph", "transformers"))
    assert (found.refusal(less) is None) == (side in ("full", "transformers"))
    assert len(list(found.comparisons(less))) == (side == "transformers")
    alone = record(less, gates=found.gates)
    assert len(list(alone.comparisons(less))) == (side == "transformers")


def test_one_pair_tells_nothing_of_the_noise(tmp_path):
    """Nor does that of a document whose writer said otherwise."""
    path, found = tmp_path / "run.json", record(row()).to_json()
    found["rows"][0] |= {"runs": 1}
    del found["rows"][0]["note"]  # older documents have none
    path.write_text(json.dumps(found))
    back = load(path)
    assert [pair.differs for pair in back.comparisons(back.rows[0])] == [None]
    assert [pair.differs for pair in record(row()).comparisons(row())] == [True]


def test_a_share_belongs_to_its_figure():
    own = {"name": "matmul", "of_limit": 0.5}
    one = row(figures=figures("latency") | {"ttft_ms": near(1.0, own)})
    found = [record(one).limit(one, name) for name in ("ttft_ms", "tpot_ms", "tokens_per_second")]
    assert found == [own, None, reached()]


def test_a_work_is_measured_once_per_side():
    found = record(row())
    with pytest.raises(ValueError, match="b8, lite_llm is there already"):
        found.add(row(value=11.0))
    found.add(row(side="lite_llm again"))
    assert len(found.rows) == 2


def test_a_row_has_the_state_of_the_gpu_after_it(monkeypatch):
    state = {"throttle_reasons": ["sw_power_cap"]}
    monkeypatch.setattr(record_module, "gpu_state", lambda: state)
    assert record().add(row()).gpu == state
    assert record(environment={"cpu": "x86_64"}).add(row()).gpu is None


BAD_ROWS = {
    "mode": {"mode": "speed"}, "work": {"work": "b8"}, "side": {"side": ""}, "runs": {"runs": 2.5},
    "compiles": {"compiles": -1}, "refused": {"refused": ""}, "note": {"note": 3},
    "figures.tpot_ms": {"figures": figures("latency") | {"tpot_ms": {"median": 1, "low": 2, "high": 3}}},
    "figures.ttft_ms": {"figures": figures("latency") | {"ttft_ms": {"median": 1, "low": 1, "high": float("nan")}}},
    "figures.tokens_per_second: missing": {"figures": {k: near(1) for k in ("ttft_ms", "tpot_ms")}},
    "figures": {"figures": figures("throughput")}, "limit": {"limit": {"name": "memory"}},
    "against": {"against": {"side": "transformers", "ratio": 3.0}}, "against.ratio": {
        "against": {"side": "transformers", "ratio": {"median": 3, "low": 4, "high": 5}, "differs": True}
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_says_what_is_wrong(what, tmp_path):
    fields = {"mode": "latency", "work": {"name": "b8"}, "side": "lite_llm", "figures": figures("latency"), "runs": 5}
    assert Row(**fields).mode == "latency"
    with pytest.raises(ValueError, match=f"^{what}"):
        Row(**(fields | BAD_ROWS[what]))
    path, found = tmp_path / "run.json", record(row()).to_json()
    found["rows"][0] |= BAD_ROWS[what]
    path.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=rf"run.json: rows\[0\].{what}"):
        load(path)


@pytest.mark.parametrize("figure", ["p50 after p90", "verdict", "agreement", "refused with figures"])
def test_percentiles_and_verdicts_are_checked(figure):
    online, accuracy = figures("online"), figures("accuracy")
    bad = {
        "p50 after p90": ("online", online | {"e2e_ms": {"p50": 5, "p90": 4, "p99": 6}}, {}),
        "verdict": ("accuracy", accuracy | {"verdict": "fine"}, {}),
        "agreement": ("accuracy", accuracy | {"agreement": 98}, {}),
        "refused with figures": ("accuracy", accuracy, {"refused": "why"}),
    }[figure]
    with pytest.raises(ValueError, match="^figures"):
        row(bad[0], figures=bad[1], **bad[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: [d], "no schema_version"), (lambda d: {"rows": []}, "no schema_version"),
        (lambda d: d | {"schema_version": 3}, "schema_version = 3; this version reads 1 and 2"),
        (lambda d: {k: v for k, v in d.items() if k != "limits"}, "limits: missing"),
        (lambda d: d | {"limits": {"copy_tb_s": 1}}, "limits.matmul_tflops"),
        (lambda d: d | {"model": {}}, 'model = {}; expected an object with a "name"'),
        (lambda d: d | {"arguments": {}}, "arguments"), (lambda d: d | {"gates": [{}]}, "gates"),
        (lambda d: d | {"gates": [{"name": "a", "wrong": None, "work": "b1"}]}, "gates"),
        (lambda d: d | {"rows": d["rows"] * 2}, "each work and side once"), (lambda d: d | {"rows": [1]}, r"rows\[0\]"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_told(change, said, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(change(record(row()).to_json())))
    with pytest.raises(UsageError, match=said):
        load(path)


def test_a_document_of_the_first_version_is_read_and_an_unknown_count_comes_back(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record(row()).to_json() | {"schema_version": 1}))
    assert load(path).rows[0].compiles == 0
    wrote = record(row(), row(side="vllm", compiles=None), path=path)
    wrote.write()
    (ours, theirs) = load(path).rows
    assert (ours.compiles, theirs.compiles, theirs.refused) == (0, None, None) and list(wrote.comparisons(ours))


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "run.json")
    (tmp_path / "run.json").write_bytes(b'{"schema_version"\xff')
    with pytest.raises(UsageError, match="not a JSON document"):
        load(tmp_path / "run.json")


def test_the_gpu_state_is_that_of_torchs_device():
    told = (
        "GPU-aa, 580.1, 345, 3201, 1980, 31, 0x0000000000000001\n"
        "GPU-bb, 580.1, 1755, 3201, 1980, 78, 0x0000000000000224\n"
    )
    found = parse_gpu_state(told, "bb")
    assert found == {
        "driver": "580.1", "sm_mhz": 1755, "memory_mhz": 3201, "sm_mhz_max": 1980, "temperature_c": 78,
        "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown", "0x200"],
    }  # fmt: skip
    assert parse_gpu_state(told, "aa")["throttle_reasons"] == ["gpu_idle"]
    assert parse_gpu_state(told.splitlines()[0].replace("0x0000000000000001", "0x0"), None)["throttle_reasons"] == []
    for nothing in (None, "", told, "GPU-aa, 580.1", "GPU-aa, , [N/A], [N/A], [N/A], [N/A], [N/A]"):
        assert set(parse_gpu_state(nothing, "cc").values()) == {None}


def test_the_environment_keeps_its_keys(monkeypatch):
    monkeypatch.setattr(environment_module.torch.cuda, "is_available", lambda: False)
    found = environment()
    assert found.keys() >= {"date", "command", "commit", "python", "torch", "cpu", "triton", "transformers"}
    assert "gpu" not in found and found["driver"] is None and found["throttle_reasons"] is None
