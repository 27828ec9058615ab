"""Ctrl-C while a command is imported or opens a model."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lite_llm.cli import args, chat_main, main
from lite_llm.cli.interrupt import whole

ROOT = Path(__file__).parents[2]
WHILE_TORCH_IS_IMPORTED = """
import signal, sys
class Finder:
    pressed = False
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn" and not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from lite_llm.cli import main
code = main(sys.argv[1:])
print("whole" if hasattr(sys.modules.get("torch"), "compile") else "cut off")
raise SystemExit(code)
"""


def test_an_interrupt_waits_for_the_end_of_what_must_be_whole_and_the_second_one_does_not():
    before, seen = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), whole():
        signal.raise_signal(signal.SIGINT)
        seen.append("went on")
    with pytest.raises(KeyboardInterrupt), whole():
        signal.raise_signal(signal.SIGINT)
        seen.append("went on")
        signal.raise_signal(signal.SIGINT)
        seen.append("never here")
    with whole():
        pass
    assert seen == ["went on"] * 2 and signal.getsignal(signal.SIGINT) is before


def test_what_fails_in_such_a_block_is_heard_though_ctrl_c_came_too():
    with pytest.raises(ImportError), whole():
        signal.raise_signal(signal.SIGINT)
        raise ImportError


def test_what_ignores_ctrl_c_goes_on_ignoring_it_and_other_threads_hear_of_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def elsewhere() -> bool:
        with whole():
            return signal.getsignal(signal.SIGINT) is before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result()


@pytest.mark.parametrize(("command", "arguments"), [(main, ["chat"]), (main, ["serve"]), (chat_main, [])])
def test_before_a_command_is_imported_there_is_no_traceback(monkeypatch, command, arguments):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(args, "parse", interrupted)
    assert command(arguments) == 130


@pytest.mark.parametrize("arguments", [["chat", "-p", "Hi"], ["plan"], ["warmup"], ["serve", "--port", "0"]])
def test_torch_is_never_imported_by_halves(arguments):
    command = [sys.executable, "-c", WHILE_TORCH_IS_IMPORTED, *arguments, "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (130, "whole"), done
    assert "Traceback" not in done.stderr
