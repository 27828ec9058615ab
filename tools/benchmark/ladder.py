"""What `ablation` takes away, one thing at a time, from outside: no engine option exists for a benchmark alone.

A variant is called in the worker before the model is made; it returns fields of EngineConfig, and may patch kernels'
dispatch in that process.
"""

import sys
from dataclasses import dataclass

from lite_llm import ops
from lite_llm.ops import reference


@dataclass(frozen=True)
class Rung:
    name: str
    against: str | None  # the rung from which it differs in one thing
    says: str
    variant: str | None = None  # "module:function" for the worker
    gpu: bool = False  # means nothing without one
    work: str = "plain"  # or "mixed" or "prefixed"
    windows: bool = False


def no_graphs() -> dict:
    return {"cuda_graphs": False}


def no_pdl() -> dict:
    _patch("pdl", lambda device: False)
    return {}


def cublas_only() -> dict:
    from lite_llm.ops.triton import tuning

    tuning.choose = lambda *_: tuning.CUBLAS
    return {}


def plain_attention() -> dict:
    """The reference reads lengths on the CPU, which no graph can record."""
    ops.attend = reference.attend
    return {"cuda_graphs": False}


def prefix_cache() -> dict:
    return {"prefix_cache": True}


def _patch(name: str, new: object) -> None:
    """In every kernel's module, for they import it by name."""
    import lite_llm.ops.triton  # noqa: F401 (loads them all)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("lite_llm.ops.triton.") and hasattr(module, name):
            setattr(module, name, new)


_HERE = __name__
RUNGS = (
    Rung("as it is", None, "the engine as users run it"),
    Rung("no PDL", "as it is", "kernels start only when the one before has ended", f"{_HERE}:no_pdl", gpu=True),
    Rung("cuBLAS only", "as it is", "matmuls by the library, norms apart", f"{_HERE}:cublas_only", gpu=True),
    Rung("no graphs", "as it is", "every kernel launched from Python", f"{_HERE}:no_graphs", gpu=True),
    Rung("plain attention", "no graphs", "attention in plain torch", f"{_HERE}:plain_attention", gpu=True),
    Rung("static batching", "as it is", "the next wait until all of a batch have ended", work="mixed", windows=True),
    Rung("prefix cache", "as it is", "a common beginning is computed once", f"{_HERE}:prefix_cache", work="prefixed"),
)
"""Each is compared with another one from which it differs in one thing; benchmarks run without a prefix cache."""
