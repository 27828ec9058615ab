"""Launches that only order their kernels, and the counter that shows that none is compiled later.

The compiler needs no GPU: a child process gives Triton a driver that compiles for sm_90, loads nothing, and notes what
it is told to launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lite_llm.ops import reference, warm
from tests.close import assert_close

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, threading, types, warnings
warnings.simplefilter("ignore")
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    utils = types.SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
    )
    launched, selected = [], set()
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    set_current_device = lambda self, device: self.selected.add(device)
    launcher_cls = lambda self, src, metadata: lambda *_: self.launched.append(src.name)

driver.set_active(Driver())
from lite_llm.ops.triton.compile import CompileCounter, ahead_of_time

@triton.jit
def double(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)
    tl.store(at, tl.load(at) * 2)

@triton.jit
def broken(x, SIZE: tl.constexpr):
    tl.store(x, tl.no_such_function(SIZE))

x, told, seen = torch.zeros(64), [], {}
SIZES = (16, 32, 64, 16, 16)

with CompileCounter() as counter:
    with ahead_of_time(lambda *news: told.append(news)):
        for size in SIZES:
            double[(1,)](x, size)
        seen["launched inside"] = list(Driver.launched)
    seen["compiled"], seen["loaded"] = len(counter.compiled), len(counter.loaded)
    for size in SIZES:
        double[(1,)](x, size)
    seen["launched"], seen["later"] = list(Driver.launched), counter.count - 3
    try:
        with ahead_of_time(lambda *_: None):
            double[(1,)](x, 16)
            broken[(1,)](x, 16)
    except RuntimeError as error:
        seen["error"] = str(error)
    try:
        with ahead_of_time(lambda *_: None):
            double[(1,)](x, 512)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        seen["interrupted"] = True
    del Driver.launched[:]
    with ahead_of_time(lambda *_: None):
        other = threading.Thread(target=lambda: double[(1,)](x, 128))
        other.start(), other.join()
        seen["of another thread"] = list(Driver.launched)
    before = counter.count
    double[(1,)](x, 256)
    seen["alone"] = counter.count - before
seen["told"], seen["devices"] = [told[0], told[-1]], sorted(Driver.selected)
double[(1,)](x, 1024)
seen["outside"] = counter.count - before
with CompileCounter() as outer, CompileCounter() as inner:
    double[(1,)](x, 2048)
seen["nested"] = [outer.count, inner.count]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory) -> list[dict]:
    """What two processes saw, one after the other, that share a cache which was empty."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "child.py").write_text(CHILD)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths}
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "child.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        seen.append(json.loads(done.stdout))
    return seen


def test_launches_inside_run_nothing_and_later_ones_compile_nothing(children):
    for child in children:
        assert child["launched inside"] == []
        assert child["launched"] == ["double"] * 5 and child["later"] == 0


def test_each_specialisation_is_compiled_once_and_then_comes_from_the_disk(children):
    assert [(child["compiled"], child["loaded"]) for child in children] == [(3, 0), (0, 3)]


def test_progress_ends_with_all_of_them(children):
    for child in children:
        assert child["told"][0][0] == "compiling kernels" and child["told"][0][2] == 1
        assert child["told"][-1] == ["compiling kernels", 3, 3]


def test_the_device_of_the_caller_is_that_of_the_workers(children):
    assert all(child["devices"] == [0] for child in children)


def test_a_kernel_that_does_not_compile_is_named_and_nothing_else_breaks(children):
    for child in children:
        assert child["error"].startswith("broken does not compile: ") and "no_such_function" in child["error"]
        assert child["interrupted"] and child["alone"] == 1


def test_other_threads_launch_as_ever(children):
    assert all(child["of another thread"] == ["double"] for child in children)


def test_a_counter_counts_while_it_is_entered_and_passes_on_what_it_hears(children):
    assert all(child["outside"] == 1 and child["nested"] == [1, 1] for child in children)


@pytest.mark.cpu
def test_a_cpu_has_nothing_to_compile():
    with warm.ahead_of_time(torch.device("cpu"), lambda *_: pytest.fail("nothing is done")):
        assert torch.equal(reference.silu_mul(torch.zeros(1, 4)), torch.zeros(1, 2))


def test_the_compiler_is_read_for_its_key_before_a_kernel_asks():
    code = """
import torch
from lite_llm.ops import warm
assert warm.prepare(torch.device("cpu")) is None
warm.prepare(torch.device("cuda")).join()
from triton.runtime.cache import triton_key
assert triton_key.cache_info().currsize == 1
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
def test_on_a_gpu():
    from lite_llm.ops.triton import silu_mul

    x = torch.randn(3, 2 * 1111, device="cuda")
    with warm.counting() as counter:
        with warm.ahead_of_time(x.device, lambda *_: None):
            assert silu_mul(x).isnan().all()  # fresh memory, that no kernel has written
        ordered = counter.count
        assert_close(silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.double()))
        assert counter.count == ordered <= 1
