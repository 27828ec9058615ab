"""cli.py as a process, and with the bundled demo: streams, exit codes, no network (CLI-05 to CLI-08)."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lite_llm.cli import chat_main, main, transcript
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.llm import DEMO, LLM

ROOT = Path(__file__).parents[2]
FRANCE = "What is the capital of France?"
OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from lite_llm.cli import chat_main
raise SystemExit(chat_main(sys.argv[1:]))
"""


@pytest.fixture
def call(capsys, monkeypatch):
    """A command in this process, with nothing on stdin: (exit code, stdout, stderr)."""

    def run(*argv: str, command=chat_main, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = command(list(argv))
        return code, *capsys.readouterr()

    return run


def test_one_answer_and_nothing_else_on_stdout(call):
    code, out, err = call("-p", FRANCE)
    assert code == 0 and "Paris" in out and out.endswith("\n") and "\x1b" not in out + err
    assert "weights +" in err and "sampling: greedy" in err and "prompt tokens" in err
    code, out, err = call("--quiet", stdin=FRANCE.encode())
    assert (code, err) == (0, "") and "Paris" in out


def test_the_tokenizer_is_prepared_beside_torch():
    code = """
import sys
from lite_llm.cli import chat_main, llava_main
from lite_llm.text import Tokenizer
seen = []
Tokenizer.prepare = lambda model: seen.append((str(model)[-9:], "torch" in sys.modules))
assert chat_main(["-p", "Hi", "--quiet", "--max-tokens", "1"]) == 0 and seen == [("demo/chat", False)], seen
assert llava_main(["-p", "Hi", "--quiet", "--max-tokens", "1"]) == 0 and seen[1:] == [("mo/vision", True)], seen
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def test_json_and_resume(call, tmp_path):
    path = tmp_path / "chat.jsonl"
    transcript.save(
        path,
        [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Nice to meet you, Ada!"}],
    )
    code, out, _ = call("--json", "-p", "What is my name?", "--resume", str(path), "--seed", "4")
    document = json.loads(out)
    assert code == 0 and "Ada" in document["output"] and document["finish_reason"] == "stop"
    assert document["params"]["seed"] == 4 and document["usage"]["completion_tokens"] > 1
    assert transcript.load(path)[0][3] == {"role": "assistant", "content": document["output"]}


def test_max_tokens_and_stop_strings(call):
    assert "cut at max_tokens = 2" in call("-p", FRANCE, "--max-tokens", "2")[2]
    assert "Paris" not in call("-p", FRANCE, "--stop", "Paris")[1]


def test_plan_loads_nothing_and_says_the_same(call):
    code, out, _ = call("plan", "--json", command=main)
    plan = json.loads(out)["plan"]
    assert code == 0 and plan["weights"] > 1 << 20 and plan["context"] <= plan["wanted"]
    code, out, _ = call("plan", str(DEMO), command=main)
    assert code == 0 and "weights" in out and len(out.splitlines()) == 1


def broken(tmp_path: Path, name: str, change) -> str:
    folder = tmp_path / name
    shutil.copytree(DEMO, folder)
    change(folder)
    return str(folder)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_errors_have_their_exit_codes_and_few_lines(call, tmp_path):
    half = broken(tmp_path, "half", lambda f: os.truncate(f / "model.safetensors", 1 << 20))
    bare = broken(tmp_path, "bare", lambda f: (f / "model.safetensors").unlink())
    other = broken(tmp_path, "other", lambda f: edit_config(f, architectures=["Gemma3ForCausalLM"]))
    odd = broken(tmp_path, "odd", lambda f: edit_config(f, attn_logit_softcapping=50.0))
    large = broken(tmp_path, "large", lambda f: edit_config(f, intermediate_size=1 << 24))
    cases = [
        (2, ["-p", "word " * 5000]), (2, ["-p", " "]), (2, ["-p", "x", "--resume", "/nowhere"]),
        (3, ["-p", "x", "--device", "cuda:99"]), (4, ["-p", "x", "-m", large]), (2, ["-p", "x", "--context", "1m"]),
        (5, ["-p", "x", "-m", str(tmp_path / "no")]),
        (5, ["-p", "x", "-m", str(tmp_path)]), (5, ["-p", "x", "-m", str(ROOT / "cli.py")]),
        (5, ["-p", "x", "-m", half]), (5, ["-p", "x", "-m", bare]), (5, ["-p", "x", "-m", other]),
        (5, ["-p", "x", "-m", odd]),
    ]  # fmt: skip
    for expected, argv in cases:
        code, out, err = call("-q", *argv)
        assert (code, out) == (expected, ""), (argv, code, out, err)
        assert err.startswith("error: ") and len(err.splitlines()) <= 6 and "Traceback" not in err, err
    code, out, err = call("--json", "-p", "x", "-m", half)
    assert code == 5 and json.loads(out)["error"]["code"] == "bad_checkpoint" and "error: " in err
    assert "Traceback" in call("--debug", "-p", "x", "-m", half)[2]


def test_a_full_context_says_so(call):
    code, out, err = call("-p", "Count from 1 to 20.", "--context", "30")
    assert code == 0 and out and "the context is full" in err and "= 30 tokens" in err


def test_later_turns_reuse_the_cache_and_change_nothing():
    """CLI-08: the same answers, cached or computed from scratch."""
    questions = ["My name is Ada.", "What is 3 plus 4?", "What is my name?"]
    answers: dict[bool, list[str]] = {}
    for cache in (True, False):
        with LLM(prefix_cache=cache, say=lambda text: None) as llm:
            session = Session(llm, SamplingParams(temperature=0))
            outputs = [session.ask(question, lambda text: None) for question in questions]
            answers[cache] = [output.text for output in outputs]
            hits = [output.usage.cached_tokens for output in outputs]
            assert all(hits[1:]) if cache else not any(hits)
            scheduler = llm.engine.scheduler
            assert not scheduler.running and not scheduler.waiting
    assert answers[True] == answers[False] and "Ada" in answers[True][2]


def test_ctrl_c_frees_the_engine_between_two_steps():
    with LLM(say=lambda text: None) as llm:
        session, heard = Session(llm, SamplingParams(temperature=0)), []
        output = session.ask("Count from 1 to 20.", heard.append, stopped=lambda: len(heard) >= 5)
        assert output.finish_reason == "abort" and session.messages[-1]["content"] == output.text == "".join(heard)
        assert not llm.engine.scheduler.running
        assert "Paris" in session.ask(FRANCE, heard.append).text


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, env=environment, timeout=120, **options
    )


def test_a_local_model_needs_no_network_and_no_locale():
    done = run("-c", OFFLINE, "-p", FRANCE, env={"LC_ALL": "C", "PYTHONUTF8": "0"}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert b"Paris" in done.stdout and b"\x1b" not in done.stdout + done.stderr


def test_a_hub_model_that_cannot_be_fetched_is_6():
    done = run("cli.py", "-m", "nobody/nothing", "-p", "x", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 6 and done.stdout == b"" and len(done.stderr.splitlines()) <= 6, done.stderr


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "cli.py", "-q", "-p", FRANCE], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writer,
        stderr=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("command", [
    ["cli.py", "-p", "hi"], ["cli_llava.py", "-p", "hi"], ["benchmark.py", "--help"], ["-m", "lite_llm", "plan"],
    ["-m", "lite_llm", "serve", "--port", "0"],
], ids=" ".join)  # fmt: skip
def test_a_missing_package_is_one_line(command, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = [line for line in found.stderr.splitlines() if not line.startswith("port ")]
    assert (found.returncode, said) == (3, ["error: No module named 'numpy': pip install -r requirements.txt"])
