"""benchmark.py as users call it: arguments, one real run, a run again, and a broken kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lite_llm import ops
from lite_llm.errors import UsageError
from tools.benchmark import arguments
from tools.benchmark import main as program
from tools.benchmark.bench import OURS, Bench
from tools.benchmark.record import load

ROOT = Path(__file__).parents[2]
SMALL = ["--batch", "2", "--input", "6", "--output", "6", "--rounds", "2"]


def broken() -> dict:
    """A variant for the worker: attention that looks the wrong way."""
    right = ops.attend
    ops.attend = lambda q, *args, **kwargs: right(-q, *args, **kwargs)
    return {}


def test_a_run_and_the_same_again(tmp_path, capsys):
    first, again, table = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "a.csv"
    assert program.main([*SMALL, "--json", str(first), "--csv", str(table)]) == 0
    record = load(first)
    assert [row.side for row in record.rows] == ["lite_llm", "transformers"]
    assert record.gates[0]["wrong"] is None and list(record.comparisons(record.rows[0]))
    assert 0 < record.rows[0].limit["of_limit"] < 1.5
    assert "transformers" in table.read_text() and "demo/chat" in capsys.readouterr().out
    assert program.main(["--rerun", str(first), "--json", str(again)]) == 0
    assert load(again).arguments["argv"] == record.arguments["argv"] == SMALL
    assert [row.work for row in load(again).rows] == [row.work for row in record.rows]


def test_a_broken_kernel_gets_no_speedup(tmp_path, monkeypatch, capsys):
    fresh = Bench.fresh

    def with_a_bug(self, label, prefix_cache=False, variant=None):
        return fresh(self, label, prefix_cache, f"{__name__}:broken" if label == OURS else variant)

    monkeypatch.setattr(Bench, "fresh", with_a_bug)
    out = tmp_path / "a.json"
    assert program.main([*SMALL, "--json", str(out)]) == 1
    record = load(out)
    assert "nats below" in record.gates[0]["wrong"] and not list(record.comparisons(record.rows[0]))
    assert "nats below" in capsys.readouterr().out


def test_the_script_itself_refuses_what_it_does_not_know():
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", "--bach=3"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean --batch?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words, message", [
    (["--batch", "0"], "at least 1"),
    (["latency", "--arrivals", "poisson:3"], "are for online"),
    (["--against", "none", "vllm"], "stands alone"),
    (["--against", "llama.cpp"], "invalid choice"),
    (["--shape", "llama-3.2-1b", "--model", "x"], "not allowed with"),
    (["--ttft", "-1"], "more than 0"),
])  # fmt: skip
def test_bad_words(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments.parse(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--input", "5-9"], "expected a number of tokens"),
    (["--output", "5000"], "is made for"),
    (["online", "--arrivals", "now"], "cannot be read"),
    (["online", "--arrivals", "burst:3"], "expected every:SECONDS"),
    (["--model", "/nowhere/at/all"], "nowhere"),
    (["--shape", "llama-9"], "llama-9"),
    (["--rerun", "missing.json"], "missing.json"),
    (["--baseline", "missing.json"], "missing.json"),
    (["--plot", "picture.bmp"], "picture.bmp"),
])  # fmt: skip
def test_bad_wishes_are_refused_before_anything_starts(words, message, capsys, monkeypatch):
    monkeypatch.setattr(Bench, "fresh", lambda *_, **__: pytest.fail("a side was started"))
    assert program.main(words) in (2, 5, 6)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_rerun_keeps_the_work_and_names_its_own_files(tmp_path):
    words = ["online", "--json", "a", "--seed", "3", "--csv=b"]
    assert arguments.argv_without_outputs(words) == ["online", "--seed", "3"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UsageError, match="too much"):
        program._outputs(["--rerun", str(path), "--seed", "4"])
    assert program._outputs(["--json", "b", "--rerun", str(path)]) == ["--json", "b"]
