"""The command line: what it refuses, how, and how fast it answers (CLI-01)."""

import subprocess
import sys
from pathlib import Path

import pytest

from lite_llm.cli import args, chat_main, main

ROOT = Path(__file__).parents[2]
BAD = [
    "--temperature hot", "--temperature -1", "--temperature nan", "--temperature inf", "--temperature 1e9",
    "--temperature", "--top-p 1.5", "--top-p -0.1", "--top-p x", "--top-k -1", "--top-k 1.5", "--top-k 99999999999",
    "--min-p 2", "--min-p -1", "--repetition-penalty 0", "--repetition-penalty nan", "--presence-penalty 1000",
    "--frequency-penalty x", "--seed x", "--seed 1.5", "--seed 99999999999999999999999999", "--max-tokens 0",
    "--max-tokens -3", "--max-tokens many", "--max-tokens 1.5", "--max-tokens 9999m", "--context 0", "--context -1",
    "--context 32x", "--context 0.3", "--context k", "--context 99999999999", "--device tpu", "--device cuda:x",
    "--device cuda:-1", "--dtype int3", "--dtype", "--unknown", "--tempe 3", "-x", "--model", "--model=", "one two",
    "one --model two", "--quiet --verbose", "--system=", "--prompt", "--resume", "--ignore-config a,,b",
    "--json=yes", "--stop=", "--no-prefix-cache=1", "--drafts 16", "--drafts -1", "--drafts few", "--drafts 1.5",
]  # fmt: skip


def refused(call, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        call()
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert out == ""
    assert len(err.splitlines()) <= 3 and err.startswith("error: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments_are_refused_in_few_lines(line, capsys):
    refused(lambda: chat_main(line.split()), capsys)


@pytest.mark.parametrize("line", ["--prompt x", "--context 0", "a b", "--temperature 1", "--dtype x", "--device -1"])
def test_plan_refuses_what_it_does_not_know(line, capsys):
    refused(lambda: main(["plan", *line.split()]), capsys)


@pytest.mark.parametrize("line", ["", "chatt", "server", "--bad", "--help-me"])
def test_unknown_commands(line, capsys):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) <= 3 and "chat" in err


def test_huge_and_strange_values_make_short_messages(capsys):
    err = refused(lambda: chat_main(["--" + "x" * 100_000]), capsys)
    assert len(err) < 1000
    err = refused(lambda: chat_main(["--context", "\x1b[31m" + "9" * 100_000]), capsys)
    assert len(err) < 1000 and "\x1b" not in err
    err = refused(lambda: chat_main(["--device", "a\nb\nc\nd\ne"]), capsys)


def test_messages_name_the_flag_and_the_nearest_one(capsys):
    assert "--top-p" in refused(lambda: chat_main(["--top-p", "2"]), capsys)
    assert "--temperature" in refused(lambda: chat_main(["--temp", "2"]), capsys)
    assert "--max-tokens" in refused(lambda: chat_main(["--max-tokns", "2"]), capsys)


def parsed(line: str):
    return args.parse(args.chat_parser("cli.py"), line.split())


def test_sizes_are_human():
    assert parsed("--context 32k").engine["context"] == 32768
    assert parsed("--context 1m").engine["context"] == 1 << 20
    assert parsed("--context 0.5K").engine["context"] == 512
    assert parsed("--max-tokens 4096").params.max_tokens == 4096


def test_what_is_not_given_stays_open_for_the_checkpoint():
    params = parsed("").params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (None,) * 5


def test_a_full_line():
    options = parsed(
        "-m a/b --stop x --stop y --temperature 0.5 --seed -3 --ignore-config a,b --no-prefix-cache --no-cuda-graphs"
    )
    assert options.model == "a/b" and options.params.stop == ("x", "y")
    assert options.params.temperature == 0.5 and options.params.seed == -3
    assert options.engine["ignore_config"] == ("a", "b") and options.engine["prefix_cache"] is False
    assert options.engine["cuda_graphs"] is False and parsed("").engine["cuda_graphs"] is True
    assert parsed("a/b").model == "a/b"
    assert parsed("--drafts 15").engine["drafts"] == 15 and parsed("").engine["drafts"] == 0


@pytest.mark.parametrize("command", [["cli.py"], ["-m", "lite_llm", "chat"]])
def test_bad_arguments_of_the_process(command):
    done = subprocess.run([sys.executable, *command, "--top-p", "7"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3 and "--top-p: 7.0" in done.stderr


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from lite_llm.cli import chat_main, main
assert main(["--help"]) == 0 == main(["--version"])
for line in (["--help"], ["--version"]):
    try:
        chat_main(line)
    except SystemExit as left:
        assert left.code == 0
heavy = {"torch", "transformers", "tokenizers", "prompt_toolkit", "rich", "huggingface_hub", "numpy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--temperature" in done.stdout and "exit codes" in done.stdout
