"""Compile kernels for a GPU that is not here: `python -m lite_llm.ops.triton.aot 90` prints a JSON line per case.

Every module of this package may define `aot_cases(capability) -> list[AotCase]`, one case for each configuration its
wrappers can choose on that GPU. Triton's interpreter replaces kernels at import, so run this where TRITON_INTERPRET
is not set; a case filter may follow the capability: `... aot 90 decode`.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one block may use, by compute capability."""

SPILLS = {"_hopper_kernel": 32}
"""Bytes on the stack that are none too many, by kernel: Triton 3.9's assembler puts a few values there before the warp
groups part. All others have none.
"""


@dataclass(frozen=True)
class AotCase:
    name: str
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", ...; constexprs may be left out
    constexprs: dict[str, Any]
    attrs: dict[str, int] = field(default_factory=dict)  # argument -> divisibility; a pointer's default is 16
    num_warps: int = 4
    num_stages: int = 3
    max_shared: int = 99 << 10


@dataclass(frozen=True)
class Compiled:
    kernel: Any  # triton's CompiledKernel: .metadata, .asm
    shared: int
    n_regs: int
    n_spills: int  # bytes of stack per thread: spilled registers and local arrays


def compile_case(case: AotCase, capability: int) -> Compiled:
    assert not isinstance(case.kernel, _interpreted()), "TRITON_INTERPRET is set: kernels were not kept as kernels"
    arguments = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in arguments}
    divisible = {name: 16 for name, kind in signature.items() if kind.startswith("*")} | case.attrs
    attrs = {(arguments.index(name),): [["tt.divisibility", by]] for name, by in divisible.items() if by > 1}
    language = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = language(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    regs, stack = _resources(kernel.asm["cubin"], kernel.metadata.name)
    return Compiled(kernel, kernel.metadata.shared, regs, stack)


def all_cases(capability: int) -> list[AotCase]:
    package = importlib.import_module("lite_llm.ops.triton")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names if name != "aot"]
    return [case for module in modules if "aot_cases" in vars(module) for case in module.aot_cases(capability)]


def report(capability: int, wanted: str = "", workers: int = 1) -> Iterator[dict[str, Any]]:
    """Compile every case whose name contains `wanted`; a case that fails to compile has an "error"."""

    def one(case: AotCase) -> dict[str, Any]:
        row = {"case": case.name, "kernel": case.kernel.__name__, "capability": capability}
        row["max_shared"] = case.max_shared
        try:
            done = compile_case(case, capability)
        except Exception as error:  # the report must go on, and says which case failed
            return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
        return row | {"shared": done.shared, "regs": done.n_regs, "spills": done.n_spills, "warps": case.num_warps}

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, [case for case in all_cases(capability) if wanted in case.name])


def _resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers and stack bytes per thread, as `cuobjdump` (it comes with Triton) reads them from the binary."""
    tool = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about {name}: {text!r}")
    return int(found[1]), int(found[2])


def _interpreted() -> type:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction


def main() -> int:
    capability, wanted = int(sys.argv[1]), "".join(sys.argv[2:3])
    failed = 0
    for row in report(capability, wanted, workers=min(os.cpu_count() or 1, 4)):
        failed += "error" in row or row["shared"] > row["max_shared"] or row["spills"] > SPILLS.get(row["kernel"], 0)
        print(json.dumps(row), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
