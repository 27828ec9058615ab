"""LDR-13, -15: a killed converter leaves the old directory or the new one, whole; two at once do not mix.

Run as a script, this file converts in forked children, so that torch is imported once. A child is killed before the
n-th of its file-system calls (Python's audit events) and between tensors: every moment that can matter, in turn.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lite_llm.errors import LiteLLMError, SourceProblem, UsageError
from lite_llm.weights import open_checkpoint
from lite_llm.weights.fused import verify_fused, write_fused
from lite_llm.weights.publish import new_directory
from tests.weights.tiny import build, config_of, write

ROOT = Path(__file__).parent.parent.parent
STEPS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "shutil.rmtree",
    "ctypes.dlsym",
    "test.",
)


def run_script(*arguments):
    command = [sys.executable, "-m", "tests.weights.test_publish", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return int(run.stdout)


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_kill_at_any_moment_leaves_old_or_new(old, tmp_path):
    source = write(tmp_path / "source", config_of(), shards=2)
    assert run_script("kill", source, tmp_path / "out", int(old)) > 30


def test_of_many_converters_at_once_one_wins(tmp_path):
    source = write(tmp_path / "source", config_of(), shards=2)
    assert run_script("race", source, tmp_path / "out") == 5


def test_a_second_writer_is_refused_while_the_first_works(tmp_path):
    with new_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        with pytest.raises(SourceProblem, match="another process"):
            with new_directory(tmp_path / "out"):
                raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with new_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("a")
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_old_directory_comes_back_if_a_swap_in_two_steps_was_cut(tmp_path):
    (tmp_path / ".out.old-1").mkdir()
    (tmp_path / ".out.old-1" / "a").write_text("old")
    (tmp_path / ".out.partial-1").mkdir()
    with pytest.raises(UsageError, match="exists"):
        with new_directory(tmp_path / "out"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "old"


def test_a_swap_in_two_steps_serves_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("lite_llm.weights.publish._exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "new"


def convert(source, out, dtype=torch.bfloat16, **options):
    model, rules = build(source, dtype, "meta")
    write_fused(model, rules, source, out, **options)


def forked(work) -> int:
    """The process id of a child that does `work` and exits with 0, or with 1 if we refuse."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except LiteLLMError:
        os._exit(1)
    except BaseException:
        os._exit(3)
    os._exit(0)


def killed_at(step: int, source: Path, out: Path) -> bool:
    """Convert in a child that kills itself before its `step`-th call; False if it got through."""

    def work():
        count = 0

        def hook(event, _):
            nonlocal count
            if event.startswith(STEPS):
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        convert(source, out, torch.float16, overwrite=True, progress=lambda done, total: sys.audit("test.progress"))

    _, status = os.waitpid(forked(work), 0)
    assert status == 0 or os.WIFSIGNALED(status), status
    return status != 0


def kill(source: Path, out: Path, with_old: bool) -> int:
    unchanged = {path.name: path.read_bytes() for path in source.iterdir()}
    step = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if with_old:
            convert(source, out)
        killed = killed_at(step, source, out)
        assert out.exists() or (killed and not with_old), step
        if out.exists():
            verify_fused(out)
            assert open_checkpoint(out).dtype == torch.float16 or (killed and with_old), step
        if not killed:
            break
        step += 1
    assert {path.name: path.read_bytes() for path in source.iterdir()} == unchanged
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([source.name, out.name])
    return step


def race(source: Path, out: Path) -> int:
    for _ in range(5):
        shutil.rmtree(out, ignore_errors=True)
        children = [forked(lambda: convert(source, out)) for _ in range(4)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [0, 1, 1, 1], codes
        verify_fused(out)
        assert sorted(path.name for path in out.parent.iterdir()) == sorted([source.name, out.name])
    return 5


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked child may not use the parent's pool
    what, here, there = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print(kill(here, there, sys.argv[4] == "1") if what == "kill" else race(here, there))
