"""benchmark.py as users call it: arguments, one real run, a run again, and a broken kernel."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest

from lite_llm import ops
from lite_llm.errors import EnvironmentProblem, UsageError
from tests.tools.test_benchmark_record import compared, row
from tests.tools.test_benchmark_record import record as a_record
from tools.benchmark import arguments
from tools.benchmark import bench as benches
from tools.benchmark import main as program
from tools.benchmark.bench import OURS, Bench, Facts
from tools.benchmark.record import load

ROOT = Path(__file__).parents[2]
H200 = str(ROOT / "docs" / "results" / "latency-llama-3.2-1b-h200.json")
SMALL = ["--batch", "2", "--input", "6", "--output", "6", "--rounds", "2"]


def broken() -> dict:
    """A variant for the worker: attention that looks the wrong way."""
    right = ops.attend
    ops.attend = lambda q, *args, **kwargs: right(-q, *args, **kwargs)
    return {}


def tilted() -> dict:
    """A variant whose norms are 2 % too long: too little to change a greedy token."""
    right = ops.reference.rms_norm
    for name in ("", ".norm", ".linear"):
        sys.modules[f"{ops.reference.__name__}{name}"].rms_norm = lambda *args: right(*args) * 1.02
    return {}


def late() -> dict:
    """A variant whose attention is wrong behind 40 tokens, and only in one request of a batch."""
    right = ops.attend

    def attend(q, k_pool, v_pool, table, rows, q_start, kv_len, *rest):
        out = right(q, k_pool, v_pool, table, rows, q_start, kv_len, *rest)
        for b in ((rows == 1) & (kv_len > 40)).nonzero().flatten().tolist():
            out[q_start[b] : q_start[b + 1]] *= 1.1
        return out

    ops.attend = attend
    return {}


def test_a_run_and_the_same_again(tmp_path, capsys):
    first, again, table = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "a.csv"
    assert program.main([*SMALL, "--json", str(first), "--csv", str(table)]) == 0
    record = load(first)
    assert [row.side for row in record.rows] == ["lite_llm", "transformers"]
    assert record.gates[0]["wrong"] is None and list(record.comparisons(record.rows[0]))
    assert 0 < record.rows[0].limit["of_limit"] < 1.5
    assert "transformers" in table.read_text() and "demo/chat" in capsys.readouterr().out
    code = program.main(["--rerun", str(first), "--json", str(again), "--baseline", str(first)])
    told = capsys.readouterr().out
    assert f"2 rows compared, {'1' if code else 'none'} slower" in " ".join(told.split()), told
    assert load(again).arguments["argv"] == record.arguments["argv"] == SMALL
    assert [row.work for row in load(again).rows] == [row.work for row in record.rows]


@pytest.mark.parametrize("bug, why, words", [
    ("broken", "nats below", []), ("tilted", "nats from transformers'", []),
    ("tilted", "root mean square", [
        "--dtype", "bfloat16", "--shape", "tiny-llama-3.2-1b", "--batch", "8", "--input", "64", "--output", "48"
    ]),
    ("late", "nats from transformers'", ["--batch", "12", "--input", "24", "--output", "24"]),
], ids=["broken", "tilted", "tilted in bf16", "late"])  # fmt: skip
def test_a_broken_kernel_gets_no_speedup(tmp_path, monkeypatch, capsys, bug, why, words):
    fresh = Bench.fresh

    def with_a_bug(self, label, prefix_cache=False, variant=None):
        return fresh(self, label, prefix_cache, f"{__name__}:{bug}" if label == OURS else variant)

    monkeypatch.setattr(Bench, "fresh", with_a_bug)
    out = tmp_path / "a.json"
    assert program.main([*SMALL, *words, "--json", str(out)]) == 1
    record = load(out)
    assert why in record.gates[0]["wrong"] and not list(record.comparisons(record.rows[0]))
    told = " ".join(capsys.readouterr().out.split())
    assert "no speed-up is shown" in told and why in told and "is as fast" not in told and "x (" not in told
    if bug == "tilted" and not words:
        assert record.gates[1]["wrong"] is None, "its tokens are right: they alone would show the speed-up"


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("side", ["transformers", benches.AGAIN])
def test_the_same_program_twice_must_not_differ(side, differs, capsys):
    made = a_record(row(against=[compared(side, differs=differs)]), row(side=side))
    code = program._told(Namespace(csv=None, plot=None), made, None, None)
    wrong = differs and side == benches.AGAIN
    assert code == wrong and ("the same program twice differs" in capsys.readouterr().out) == wrong


def test_the_script_itself_refuses_what_it_does_not_know():
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", "--bach=3"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean --batch?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words, message", [
    (["--batch", "0"], "at least 1"),
    (["latency", "--arrivals", "poisson:3"], "--arrivals is for online"),
    (["--against", "none", "vllm"], "stands alone"),
    (["--against", "llama.cpp"], "invalid choice"),
    (["--shape", "llama-3.2-1b", "--model", "x"], "not allowed with"),
    (["--ttft", "-1"], "more than 0"),
    (["--requests", "5"], "--requests is for throughput, online; latency has no use for it"),
    (["throughput", "--batch", "5"], "throughput has no use for it"),
    (["ablation", "--against", "self"], "ablation has no use for it"),
    (["ablation", "--prefix-cache"], "--prefix-cache is for"),
    (["startup", "--prefix-cache"], "--prefix-cache is for"),
    (["accuracy", "--rounds", "3"], "accuracy has no use for it"),
    (["accuracy", "--plot", "x.png"], "accuracy has no use for it"),
    (["startup", "--batch", "1", "8"], "--batch 1 8: startup measures one"),
    (["ablation", "--input", "8", "9"], "--input 8 9: ablation measures one"),
    (["online", "--arrivals", "a.jsonl", "--output", "9"], "--output: the requests are those of --arrivals a.jsonl"),
    (["--json", "a", "--csv", "./a"], "--json and --csv are one file, a"),
    (["--rerun", "a", "--json", "a"], "--rerun and --json are one file, a"),
    (["--csv", "a", "--baseline", "a"], "--baseline and --csv are one file, a"),
    (["--baseline", "a", "--rounds", "1"], "needs two --rounds or more"),
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
    (["--model", str(ROOT / "lite_llm" / "demo" / "vision")], "tools/bench_pictures.py"),
    (["--device", "cpu", "--baseline", H200], "nothing could be compared: "),
])  # fmt: skip
def test_bad_wishes_are_refused_before_anything_starts(words, message, capsys, monkeypatch):
    monkeypatch.setattr(Bench, "fresh", lambda *_, **__: pytest.fail("a side was started"))
    assert program.main(words) in (2, 5, 6)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and said.startswith("error: ") and said.count("\n") == 1


def jobs(*words: str) -> tuple[Namespace, Facts, list]:
    args = arguments.parse(words)
    program._defaults(args, small=True)
    facts = Facts.find(None, None, 0, "float32", "cpu")
    return args, facts, program._jobs(args, facts)


def test_what_is_said_twice_is_measured_once():
    words = ["--batch", "2", "1", "2", "--input", "6", "6", "06", "--output", "4", "4", "--against", "self", "self"]
    args, _, made = jobs(*words)
    assert [job.work["name"] for job in made] == ["b2 in6 out4", "b1 in6 out4"] and args.against == ["self"]
    assert len(jobs("throughput", "--input", "2-6", "2-6", "--output", "4", "4")[2]) == 1


def test_a_step_takes_a_token_of_every_request_of_a_large_batch():
    for batch, step in ((3000, 3000), (2048, None)):
        assert program._limits(*jobs("--batch", str(batch), "--input", "2", "--output", "2")).step_tokens == step


def test_the_bar_of_an_ablation_ends_with_it(monkeypatch):
    monkeypatch.setattr(program, "Teller", lambda total: pytest.fail(str(total)))
    with pytest.raises(pytest.fail.Exception, match="^20$"):  # 2 rungs without a GPU, 2 sides, 5 rounds
        program.main(["ablation", "--quick", "--device", "cpu"])


def test_a_record_of_a_gpu_is_not_rerun_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(Bench, "fresh", lambda *_, **__: pytest.fail("a side was started"))
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: False)
    assert program.main(["--rerun", H200]) == EnvironmentProblem.exit_code
    said = capsys.readouterr().err
    assert "was measured on NVIDIA H200, and torch sees no GPU here" in said and "--device cpu" in said
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    args, words = program._again(Path(H200), ["--rerun", H200])
    assert args.device == "cuda" and words[:2] == ["--shape", "llama-3.2-1b"]


def test_a_record_of_a_cpu_is_rerun_on_one(tmp_path, monkeypatch):
    found = load(H200)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(found.to_json() | {"model": found.model | {"device": "cpu"}}))
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    assert program._again(path, ["--rerun", str(path)])[0].device == "cpu"
    path.write_text(json.dumps(found.to_json() | {"arguments": {"argv": ["--batch", 3]}}))
    with pytest.raises(UsageError, match="expected the words of a command line"):
        program._again(path, ["--rerun", str(path)])


def test_what_was_done_before_ctrl_c_is_in_every_file(tmp_path, monkeypatch, capsys):
    def interrupted(bench, *_):
        bench.record.add(row())
        raise KeyboardInterrupt

    monkeypatch.setattr(program.modes, "latency", interrupted)
    document, table = tmp_path / "a.json", tmp_path / "a.csv"
    assert program.main(["--json", str(document), "--csv", str(table)]) == 130
    assert len(load(document).rows) == 1 and "stopped" in capsys.readouterr().err
    with open(table) as file:
        assert {line["work"] for line in csv.DictReader(file)} == {"b8"}


def test_a_reader_who_leaves_is_141_and_gets_the_files(tmp_path):
    code = f"""
        from tests.tools.test_benchmark_record import row
        from tools.benchmark import main as program
        program.modes.latency = lambda bench, *_: bench.record.add(row())
        raise SystemExit(program.main(["--csv", {str(tmp_path / "a.csv")!r}]))
    """
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 141 and "Error" not in done.stderr, done.stderr
    assert "b8" in (tmp_path / "a.csv").read_text()


@pytest.mark.parametrize("script", ["benchmark.py", "tools/claims.py"])
def test_without_the_requirements_one_line_says_what_to_do(script):
    done = subprocess.run([sys.executable, "-S", ROOT / script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr == "error: No module named 'numpy': pip install -r requirements.txt\n"


def test_what_is_not_installed_is_said_first_and_no_server_is_asked_for_it(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(benches, "available", lambda device: {"vllm": "it is not installed"})
    online = lambda bench, jobs, sides, *_: seen.update(vars(bench), on=sides, of=jobs)  # noqa: E731
    monkeypatch.setattr(program.modes, "online", online)
    assert program.main(["online", "--quick", "--device", "cpu", "--against", "vllm", "transformers"]) == 0
    assert capsys.readouterr().err.startswith("left out vllm: it is not installed\n")
    assert seen["on"] == [OURS, "transformers"] and not seen["http"] and "over_http" not in seen["of"][0].work


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_the_demo_online_waits_for_less_than_half_a_minute(quick):
    args = arguments.parse(["online", *quick])
    program._defaults(args, small=True)
    (job,) = program._jobs(args, Facts.find(None, None, 0, "float32", "cpu"))
    assert sum(2 * job.works(turn).asks[-1].at for turn in range(args.rounds + 1)) < 30


def test_a_rerun_keeps_the_work_and_names_its_own_files(tmp_path):
    words = ["online", "--json", "a", "--seed", "3", "--csv=b"]
    assert arguments.argv_without_outputs(words) == ["online", "--seed", "3"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UsageError, match="too much"):
        program._outputs(["--rerun", str(path), "--seed", "4"])
    assert program._outputs(["--json", "b", "--rerun", str(path)]) == ["--json", "b"]
