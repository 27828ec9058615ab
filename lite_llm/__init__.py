"""lite_llm: a light, fast inference framework for Llama and Qwen models, in Python and Triton.

Importing this package is cheap: torch is loaded when the first of these names is used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "plan": "llm",
    "SamplingParams": "engine.request",
    "EngineConfig": "config",
    "Output": "outputs",
    "Delta": "outputs",
    "LiteLLMError": "errors",
    "UsageError": "errors",
    "ContextExceeded": "errors",
    "EnvironmentProblem": "errors",
    "DoesNotFit": "errors",
    "UnsupportedModel": "errors",
    "BadCheckpoint": "errors",
    "SourceProblem": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'lite_llm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lite_llm.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
