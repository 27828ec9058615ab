"""The errors a user can cause. A broken internal invariant stays an `assert`."""

import reprlib
from typing import Any


class LiteLLMError(Exception):
    """Base of all: `message` says what was found and expected, `hint` what to do, `exit_code` how the CLI ends."""

    exit_code = 1
    code = "internal"

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message if not hint else f"{message}: {hint}")
        self.message, self.hint = message, hint


class UsageError(LiteLLMError):
    """An argument, parameter or message that cannot be used."""

    exit_code = 2
    code = "invalid_request"


class ContextExceeded(UsageError):
    """A prompt that does not fit the context or the KV pool."""

    code = "context_length_exceeded"


class EnvironmentProblem(LiteLLMError):
    """This machine cannot run what was asked: driver, compiler, device."""

    exit_code = 3
    code = "environment"


class DoesNotFit(LiteLLMError):
    """Weights, workspaces or KV pool exceed the memory."""

    exit_code = 4
    code = "does_not_fit"


class UnsupportedModel(LiteLLMError):
    """The checkpoint asks for something the code does not implement."""

    exit_code = 5
    code = "unsupported_model"


class BadCheckpoint(LiteLLMError):
    """The checkpoint is missing, damaged, or disagrees with the model about names, shapes or dtypes."""

    exit_code = 5
    code = "bad_checkpoint"


class SourceProblem(LiteLLMError):
    """A hub, network, permission or disk problem while fetching a model or a picture."""

    exit_code = 6
    code = "source"


def shown(value: Any) -> str:
    """A value of a file for a message: one line of printable characters, short, however long or deep the value is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    text = short.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
