"""`lite-llm warmup`, and the line that says what a start is doing."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lite_llm.cli import args, main
from lite_llm.cli.screen import LoadingBar, Screen
from lite_llm.llm import DEMO

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(capsys, monkeypatch):
    """A command in this process, with nothing on stdin: (exit code, stdout, stderr)."""

    def run(*argv: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        code = main(["warmup", *argv])
        return code, *capsys.readouterr()

    return run


def test_a_cpu_needs_no_warmup(call):
    assert call("--device", "cpu") == (0, "nothing to compile on a CPU\n", "")
    code, out, err = call(str(DEMO), "--device", "cpu", "--json")
    rows = json.loads(out)["warmup"]
    assert (code, err) == (0, "") and [row["max_requests"] for row in rows] == [4, 64]
    assert all(row["compiled"] == row["loaded"] == 0 and row["directory"] is None for row in rows)


def test_the_number_of_requests_can_be_chosen(call):
    rows = json.loads(call("--device", "cpu", "--max-requests", "7", "--json")[1])["warmup"]
    assert [row["max_requests"] for row in rows] == [7]


@pytest.mark.parametrize("line", ["--max-requests 0", "--max-requests x", "--max-requests 1.5", "-p x", "a b"])
def test_bad_arguments_are_refused_in_few_lines(line, capsys):
    with pytest.raises(SystemExit) as left:
        main(["warmup", *line.split()])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.startswith("error: ") and len(err.splitlines()) <= 3


def test_errors_are_those_of_a_chat(call):
    assert call("--device", "cuda:99")[0] == 3
    assert call("/nowhere")[0] == 5
    assert call("--device", "cpu", "--context", "1m")[0] == 2


def test_it_takes_the_model_flags_of_a_chat():
    line = "-m a/b --device cuda:1 --dtype bfloat16 --context 32k --no-prefix-cache --ignore-config a,b"
    warmup = args.parse(args.warmup_parser("warmup"), line.split())
    chat = args.parse(args.chat_parser("chat"), line.split())
    assert (warmup.model, warmup.engine) == (chat.model, chat.engine)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def screen(bars: bool) -> Screen:
    return Screen(io.StringIO(), Terminal(), markdown=False, escaped=False, colour=False, bars=bars)


def test_one_line_says_what_is_done_and_disappears(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    here = screen(bars=True)
    bar = LoadingBar(here)
    bar(500_000_000, 2_000_000_000)
    bar.stage("compiling kernels", 12, 40)
    bar.stage("compiling kernels", 12, 40)
    bar.stage("capturing graphs", 20, 20)
    bar.clear()
    lines = here.err.getvalue().split("\r\x1b[K")
    assert [line.rstrip("\n") for line in lines] == [
        "", "loading weights " + "█" * 10 + "░" * 30 + "  25% of 2.0 GB", "compiling kernels " + "█" * 12 + "░" * 28
        + " 12/40", "capturing graphs " + "█" * 40 + " 20/20", "",
    ]  # fmt: skip
    assert "\n" not in here.err.getvalue()


def test_nothing_is_shown_where_nobody_looks():
    here = screen(bars=False)
    bar = LoadingBar(here)
    bar(1, 2), bar.stage("capturing graphs", 1, 2), bar.clear()
    assert here.err.getvalue() == ""


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_the_line_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    here = screen(bars=True)
    LoadingBar(here).stage("compiling kernels", 123, 456)
    assert len(here.err.getvalue().removeprefix("\r\x1b[K")) < int(columns)


CHAT = """
import json
from lite_llm.llm import LLM
from lite_llm.ops import warm
said = []
with warm.counting() as counter:
    with LLM(max_requests=4, status=lambda *news: said.append(news)) as llm:
        ready = counter.count
        text = llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text
print(json.dumps([len(counter.compiled), len(counter.loaded), counter.count - ready, text, said[-1]]))
"""


@pytest.mark.gpu
def test_after_a_warmup_the_next_process_compiles_nothing(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}

    def run(*command: str):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (row,) = run("-m", "lite_llm", "warmup", "--max-requests", "4", "--json")["warmup"]
    assert row["directory"] == str(tmp_path) and row["compiled"] > 5 and row["loaded"] == 0
    compiled, loaded, later, text, (what, done, total) = run("-c", CHAT)
    assert (compiled, loaded, later) == (0, row["compiled"], 0) and "Paris" in text
    assert what == "capturing graphs" and done == total > 0
