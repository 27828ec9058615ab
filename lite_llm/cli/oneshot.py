"""One question, one answer: the answer on stdout, everything else on stderr."""

import json
from typing import TYPE_CHECKING, TextIO

from lite_llm.cli import pictures, report
from lite_llm.cli.chat import answer
from lite_llm.cli.interrupt import Interrupt
from lite_llm.cli.screen import Screen
from lite_llm.cli.session import Session
from lite_llm.errors import LiteLLMError, UsageError

if TYPE_CHECKING:
    from lite_llm.outputs import Output

SCHEMA_VERSION = 1
_STOPPED = 130


def question(prompt: str | None, stdin: TextIO | None) -> str | None:
    """What to ask: the prompt, with piped input after an empty line; None if this is to be a chat."""
    piped = stdin is not None and not stdin.isatty()
    if prompt is None and not piped:
        return None
    data = stdin.buffer.read() if piped or prompt == "-" and stdin is not None else b""
    if b"\0" in data:
        raise UsageError("what is piped in is no text", "pass pictures with --image FILE")
    text = data.decode("utf-8", "replace")
    given = [part for part in ("" if prompt == "-" else prompt, text) if part and part.strip()]
    if not given:
        raise UsageError("the prompt is empty", "pass --prompt TEXT or pipe a text in")
    return "\n\n".join(part if part is prompt else part.rstrip("\n") for part in given)


def run(session: Session, screen: Screen, text: str, as_json: bool) -> int:
    if as_json:
        shown = pictures.facts(session)
        with Interrupt() as interrupt:
            output = session.ask(text, lambda piece: None, stopped=lambda: interrupt.pressed)
    else:
        output = answer(session, screen, text)
    if output.finish_reason == "error":
        raise LiteLLMError("the model gave no usable numbers, so there is no answer", "try --dtype float32")
    if as_json:
        print_json(screen, document(session.llm.name, output, shown))
    if output.finish_reason == "abort":
        return _STOPPED
    cut = report.ending(output, session.context)
    if cut:
        screen.note(cut.split(";")[0])  # the rest is about slash commands
    screen.note(report.statistics(output, session.used, session.context))
    session.autosave()
    return 0


def document(model: str, output: "Output", shown: list[dict[str, object]]) -> dict[str, object]:
    params, timings = output.params, output.timings
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "pictures": shown,
        "output": output.text,
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": output.usage.prompt_tokens,
            "cached_tokens": output.usage.cached_tokens,
            "completion_tokens": output.usage.completion_tokens,
        },
        "timings": {
            "first_token_seconds": round(timings.first_token, 6),
            "total_seconds": round(timings.total, 6),
            "tokens_per_second": round(timings.tokens_per_second, 3),
        },
        "params": {
            name: getattr(params, name)
            for name in (
                "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "max_tokens", "seed", "stop",
            )
        },
    }  # fmt: skip


def failure(code: str, message: str, hint: str) -> dict[str, object]:
    return {"schema_version": SCHEMA_VERSION, "error": {"code": code, "message": message, "hint": hint}}


def print_json(screen: Screen, content: dict[str, object]) -> None:
    """One document, in ASCII: safe on any terminal and in any locale."""
    screen.out.write(json.dumps(content, indent=2) + "\n")
    screen.out.flush()
