"""Every kernel compiles for every supported GPU, without one, within its shared memory and without spills.

The configurations that models use most compile for every GPU; all others are dealt out, each to one GPU, or two where a
kernel has few. Everything for one GPU: `python -m lite_llm.ops.triton.aot 90`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lite_llm.ops.triton.aot import SPILLS

KILO = 1 << 10
SHARED = {80: 163 * KILO, 86: 99 * KILO, 89: 99 * KILO, 90: 227 * KILO, 100: 227 * KILO, 120: 99 * KILO}
# What each kernel takes today, and a tenth: more registers mean fewer programs on a multiprocessor at a time.
REGISTERS = {
    "_adjust_kernel": 140, "_advance_kernel": 130, "_attend_kernel": 255, "_decode_inputs_kernel": 32,
    "_decode_kernel": 255, "_embed_kernel": 32, "_gelu_kernel": 44, "_gemv_kernel": 184, "_gemv_qkv_kernel": 180,
    "_layer_norm_kernel": 107, "_pick_kernel": 140, "_rms_norm_kernel": 72, "_rope_kernel": 32,
    "_rope_store_kv_kernel": 60, "_scan_kernel": 84, "_silu_mul_kernel": 48, "_skinny_kernel": 210,
    "_skinny_qkv_kernel": 230, "_softmax_kernel": 48, "_store_kv_kernel": 40, "_wide_kernel": 255,
    "_wide_qkv_kernel": 255, "_hopper_kernel": 168, "_hopper_gated_kernel": 168,
}  # fmt: skip

CHILD = """
import ast, importlib, inspect, json, pkgutil, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")  # of Triton, about its own defaults
import lite_llm.ops.triton as package
from lite_llm.ops.triton.aot import all_cases, compile_case

def launched():
    for module in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module.name}")
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # kernel[grid](...)
                kernel = getattr(module, getattr(node.func.value, "id", ""), None)
                if hasattr(kernel, "arg_names"):
                    yield kernel

EVERYWHERE = {f"{op}-bf16-d{dim}-g4" for op in ("attend", "decode") for dim in (64, 128, 256)}
GPUS = (80, 86, 89, 90, 100, 120)

capabilities = [int(argument) for argument in sys.argv[1:]]
print(json.dumps({"launched": sorted({kernel.__name__ for kernel in launched()})}))
by_gpu = {gpu: {case.name: case for case in all_cases(gpu)} for gpu in GPUS}
kernels = {name: case.kernel.__name__ for cases in by_gpu.values() for name, case in cases.items()}
owner = {}  # the GPU of each case, in turn; some cases are there for some GPUs only
for kernel in set(kernels.values()):
    for turn, name in enumerate(name for name in kernels if kernels[name] == kernel):
        able = [gpu for gpu in GPUS if name in by_gpu[gpu]]
        owner[name] = able[turn % len(able)]
for capability in capabilities:
    by_kernel = {}
    for case in by_gpu[capability].values():
        by_kernel.setdefault(case.kernel.__name__, []).append(case)
    for name, cases in by_kernel.items():
        mine = [case for case in cases if owner[case.name] == capability or case.name in EVERYWHERE]
        for case in mine or [cases[GPUS.index(capability) % len(cases)]]:
            row = {"capability": capability, "kernel": name, "case": case.name, "max_shared": case.max_shared}
            row["of"] = [case.name for case in cases]
            try:
                done = compile_case(case, capability)
                row |= {"shared": done.shared, "registers": done.n_regs, "spills": done.n_spills}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[-600:]
            print(json.dumps(row), flush=True)
"""


@pytest.fixture(scope="module")
def compiled():
    """What compiling gave, from child processes: here the kernels may be interpreted ones, which cannot compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), env.get("PYTHONPATH")]))

    def child(capabilities):
        command = [sys.executable, "-c", CHILD, *map(str, capabilities)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    with ThreadPoolExecutor(2) as pool:
        rows = [row for part in pool.map(child, [(80, 89, 100), (86, 90, 120)]) for row in part]
    return {name for row in rows for name in row.get("launched", [])}, [row for row in rows if "case" in row]


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_fits_the_gpu(compiled, capability):
    launched, rows = compiled
    rows = [row for row in rows if row["capability"] == capability]
    errors = [f"{row['case']}: {row['error']}" for row in rows if "error" in row]
    assert not errors, "\n".join(errors)
    launched = {name for name in launched if capability == 90 or "hopper" not in name}
    assert launched == {row["kernel"] for row in rows}, "a kernel without AOT case, or a case of a kernel not launched"
    too_much = [
        row
        for row in rows
        if row["shared"] > min(SHARED[capability], row["max_shared"])
        or row["spills"] > SPILLS.get(row["kernel"], 0)
        or row["registers"] > REGISTERS[row["kernel"]]
    ]
    assert not too_much, "\n".join(str({k: v for k, v in row.items() if k != "of"}) for row in too_much)


def test_no_configuration_is_left_out(compiled):
    _, rows = compiled
    assert {row["case"] for row in rows} == {name for row in rows for name in row["of"]}
