"""The architecture as a test: who may import whom, where, and what the package never does."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"errors", "log", "jsonfile", "batch", "parallel", "config", "rope"}
MAY_IMPORT = {
    **dict.fromkeys(["errors", "log", "batch", "parallel"], set()),
    "jsonfile": {"errors"},
    "ops": {"errors", "log"},
    **dict.fromkeys(["weights", "text"], {"errors", "log", "jsonfile"}),
    **dict.fromkeys(["config", "rope"], {"errors", "jsonfile", "config", "rope"}),
    "quant": {"ops", "errors"},
    "layers": {"ops", "quant", "weights"} | LEAVES,
    "models": {"ops", "quant", "weights", "layers"} | LEAVES,
    "engine": {"ops", "quant", "weights", "layers", "models"} | LEAVES,
    "outputs": {"engine"} | LEAVES,
    "prompts": {"engine", "text"} | LEAVES,
    "answer": {"engine", "text", "outputs"} | LEAVES,
    "llm": {"engine", "text", "outputs", "prompts", "answer", "models", "weights"} | LEAVES,
    "server": {"engine", "text", "outputs", "prompts", "llm"} | LEAVES,
    "cli": {"engine", "text", "outputs", "llm", "server"} | LEAVES,
    "__init__": set(),
    "__main__": {"cli"},
}
SCRIPTS = {"cli.py": {"cli"}, "cli_llava.py": {"cli"}, "benchmark.py": {"cli", "server"}}  # beside `lite_llm` itself
ONLY_IN = {
    "triton": ("lite_llm/ops/triton/",),
    "torch.distributed": ("lite_llm/parallel.py",),
    "transformers": ("lite_llm/text/", "tools/", "benchmark.py"),
    "tokenizers": ("lite_llm/text/", "tools/", "benchmark.py"),
    "llguidance": ("lite_llm/text/",),
    "prompt_toolkit": ("lite_llm/cli/", "tools/", "benchmark.py"),
    "rich": ("lite_llm/cli/", "tools/", "benchmark.py"),
    **dict.fromkeys(
        [
            "fastapi",
            "starlette",
            "uvicorn",
            "pydantic",
            "prometheus_client",
            "aiohttp",
            "flask",
            "ray",
            "http.server",
            "wsgiref",
        ],
        ("lite_llm/server/",),
    ),
}
HEAVY = {  # worth an import inside a function; anything else stands at the top
    "torch", "triton", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy", "jinja2", "PIL", "rich",
    "prompt_toolkit", "fastapi", "starlette", "uvicorn", "ray", "llguidance",
}  # fmt: skip
LAZY = {"cli", "llm", "server", "text", "__init__", "__main__"}  # may import our own packages, for these bring torch
TRUSTED = {"lite_llm/server/link.py": {"pickle"}}  # between two processes of ours, over a socket that nobody else has
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAX_LINES = 400
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("lite_llm/**/*.py", "tools/**/*.py", *SCRIPTS)
    for path in ROOT.glob(pattern)
)


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line, full name, and whether it stands inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            deep = module in ("lite_llm", "torch", "http")  # `from lite_llm import ops` imports lite_llm.ops
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}" if deep else module, id(node) in inside
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed", False


def package_of(here: str) -> str:
    return here.split("/")[1].removesuffix(".py") if here.startswith("lite_llm/") else here


def import_violations(here: str, tree: ast.Module) -> Iterator[str]:
    package, ours = package_of(here), here.startswith("lite_llm/")
    for line, name, inside in imports(tree):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            yield f"{here}:{line}: write absolute imports"
        if top == "lite_llm" and rest:
            other = rest.split(".")[0]
            if other in MAY_IMPORT and not may_import(here, package, other):  # the rest are names like `LLM`
                yield f"{here}:{line}: {package} may not import {other}"
        for library, homes in ONLY_IN.items():
            if (name == library or name.startswith(library + ".")) and not here.startswith(homes):
                yield f"{here}:{line}: only {' '.join(homes)} may import {library}"
        if ours and inside and top not in HEAVY and not (top == "lite_llm" and package in LAZY):
            yield f"{here}:{line}: import {name} at the top of the file"
        if ours and top in UNSAFE - TRUSTED.get(here, set()):
            yield f"{here}:{line}: {top} runs what it reads"


def may_import(here: str, package: str, other: str) -> bool:
    if here.startswith("tools/"):
        return True
    if here in SCRIPTS:
        return other in SCRIPTS[here]
    return other == package or other in MAY_IMPORT.get(package, set())


def call_violations(here: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen"):
            yield f"{here}:{node.lineno}: {called}() runs what it reads"
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and on:
                yield f"{here}:{node.lineno}: {keyword.arg} runs what it reads"


def violations(here: str, source: str) -> list[str]:
    tree, lines = ast.parse(source), len(source.splitlines())
    found = list(import_violations(here, tree))
    if here.startswith("lite_llm/"):
        found += call_violations(here, tree)
        if lines > MAX_LINES:
            found.append(f"{here}: {lines} lines; at most {MAX_LINES}")
    return found


@pytest.mark.parametrize("here", FILES)
def test_no_file_breaks_a_rule(here):
    assert not violations(here, (ROOT / here).read_text(encoding="utf-8"))


def test_every_package_has_a_level():
    packages = {package_of(here) for here in FILES if here.startswith("lite_llm/")}
    assert packages <= MAY_IMPORT.keys() | {"demo"}, "give the new package a row in MAY_IMPORT"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_levels_have_no_cycle(package):
    """`config` and `rope` know each other's types and nothing else is mutual."""
    seen, ahead = set(), set(MAY_IMPORT[package])
    while ahead:
        seen.add(one := ahead.pop())
        ahead |= MAY_IMPORT[one] - seen
    assert package not in seen or package in ("config", "rope")


PLANTED = [
    ("lite_llm/layers/norm.py", "from lite_llm.models import llama", "layers may not import models"),
    ("lite_llm/layers/norm.py", "from lite_llm import engine", "layers may not import engine"),
    ("lite_llm/ops/dispatch.py", "import lite_llm.config", "ops may not import config"),
    ("lite_llm/ops/reference/norm.py", "from lite_llm.layers.norm import RMSNorm", "ops may not import layers"),
    ("lite_llm/config.py", "from lite_llm import ops", "config may not import ops"),
    ("lite_llm/quant/dense.py", "from lite_llm.parallel import SOLO", "quant may not import parallel"),
    ("lite_llm/engine/engine.py", "from lite_llm.text import Tokenizer", "engine may not import text"),
    ("lite_llm/text/stops.py", "from lite_llm.config import EngineConfig", "text may not import config"),
    ("lite_llm/models/llama.py", "import os\nfrom ..layers import Linear", ":2: write absolute imports"),
    ("lite_llm/layers/norm.py", "from . import linear", "write absolute imports"),
    ("lite_llm/layers/norm.py", "def f():\n    from lite_llm.models import llama", "layers may not import models"),
    ("cli.py", "from lite_llm.engine.engine import Engine", "cli.py may not import engine"),
    ("benchmark.py", "from lite_llm import models", "benchmark.py may not import models"),
    ("lite_llm/ops/reference/norm.py", "import triton.language as tl", "only lite_llm/ops/triton/ may import triton"),
    ("lite_llm/layers/linear.py", "import torch.distributed as dist", "may import torch.distributed"),
    ("lite_llm/layers/linear.py", "from torch import distributed", "may import torch.distributed"),
    ("lite_llm/layers/linear.py", "import torch\nx = torch.distributed.get_rank()", "may import torch.distributed"),
    ("lite_llm/engine/engine.py", "def f():\n    import transformers", "may import transformers"),
    ("lite_llm/llm.py", "from tokenizers import Tokenizer", "may import tokenizers"),
    ("lite_llm/llm.py", "from rich.console import Console", "may import rich"),
    ("lite_llm/text/stops.py", "import prompt_toolkit", "may import prompt_toolkit"),
    ("lite_llm/cli/serve.py", "import uvicorn", "may import uvicorn"),
    ("lite_llm/layers/norm.py", "def f():\n    import json", "import json at the top of the file"),
    ("lite_llm/layers/norm.py", "def f():\n    from lite_llm import ops", "at the top of the file"),
    ("lite_llm/weights/rules.py", "import pickle", "pickle runs what it reads"),
    ("lite_llm/server/remote.py", "import pickle", "pickle runs what it reads"),
    ("lite_llm/server/link.py", "import marshal", "marshal runs what it reads"),
    ("lite_llm/weights/rules.py", "import torch\nw = torch.load('x.bin')", "torch.load() runs what it reads"),
    ("lite_llm/text/template.py", "eval('1')", "eval() runs what it reads"),
    ("lite_llm/text/tokenizer.py", "load('x', trust_remote_code=True)", "trust_remote_code runs what it reads"),
    ("lite_llm/text/tokenizer.py", "load('x', trust_remote_code=flag)", "trust_remote_code runs what it reads"),
    ("lite_llm/errors.py", "\n" * 401, "401 lines; at most 400"),
]


@pytest.mark.parametrize("here, source, message", PLANTED)
def test_planted_violations_are_found(here, source, message):
    assert any(message in found and found.startswith(here) for found in violations(here, source))


@pytest.mark.parametrize("here, source", [
    ("lite_llm/layers/norm.py", "from lite_llm import ops\nfrom lite_llm.layers.linear import Linear"),
    ("lite_llm/ops/triton/norm.py", "import triton"),
    ("lite_llm/parallel.py", "import torch.distributed as dist"),
    ("lite_llm/text/tokenizer.py", "def f():\n    import transformers\n    load('x', trust_remote_code=False)"),
    ("lite_llm/cli/chat.py", "def f():\n    import rich\n    from lite_llm.llm import LLM"),
    ("lite_llm/rope.py", "def f():\n    import torch\n    model.eval()"),
    ("tools/diff.py", "import transformers\nfrom lite_llm.models import registry"),
    ("cli.py", "from lite_llm import LLM"),
    ("lite_llm/server/link.py", "import pickle"),
])  # fmt: skip
def test_what_is_allowed_passes(here, source):
    assert not violations(here, source)


def run(code: str, limit: float = 60.0) -> str:
    code = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_fast_and_loads_nothing_heavy():
    spent = run("""
        import sys, time
        start = time.perf_counter()
        import lite_llm, lite_llm.config, lite_llm.errors, lite_llm.rope
        spent = time.perf_counter() - start
        heavy = sys.modules.keys() & {"torch", "triton", "transformers", "tokenizers", "numpy", "rich"}
        assert not heavy, heavy
        print(spent)
    """)
    assert float(spent) < 2


def test_the_cpu_path_needs_neither_triton_nor_transformers():
    run("""
        import sys
        sys.modules.update(dict.fromkeys(["triton", "transformers", "tokenizers", "rich", "prompt_toolkit"]))  # refused
        import torch
        from lite_llm import ops
        from lite_llm.engine import engine
        from lite_llm.models import registry
        registry.find("LlamaForCausalLM")
        print(ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6))
    """)
