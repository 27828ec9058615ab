"""The process of one opponent: a JSON object per line on stdin, one back for each. `sides.Side` is the other end.

Libraries print what they like: stdout is the log, and answers go to a copy of the descriptor that nobody else has.
"""

import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol, TextIO

from lite_llm.errors import LiteLLMError
from tools.benchmark.sides import CLASSES, KINDS, SERVERS, Missing, Opening
from tools.benchmark.work import Run, Work

_BEGAN = time.monotonic()
_LINE = 300  # characters of an error
Tell = Callable[[dict], None]
"""Told the requests in flight, while they run, by a side that knows them."""


class Opponent(Protocol):
    """What a class of `sides.CLASSES` or `sides.SERVERS` is: made from an Opening, and ready when it is made."""

    vocab: int
    special: list[int]  # ids that a random prompt should not have
    info: dict

    def warm(self, work: Work) -> None: ...

    def run(self, work: Work, tell: Tell | None = None) -> Run: ...

    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]: ...  # "gaps" and "logprobs"

    def close(self) -> None: ...  # twice is fine


def main() -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(sys.stdin, answers)


def serve(questions: TextIO, answers: TextIO) -> int:
    """Until "close", or until nobody asks any more."""
    side: Opponent | None = None
    try:
        for line in questions:
            message = json.loads(line)
            try:
                if message["do"] == "open":
                    side, found = _open(message)
                else:
                    if side is None:
                        raise RuntimeError(f"{message['do']!r} before 'open'")
                    found = _obey(side, message, answers)
            except Exception as error:
                if not isinstance(error, LiteLLMError):  # its message says all, and a server's own end is seen
                    traceback.print_exc()
                found = {"ok": False, "error": _one_line(error), "kind": _kind(error)}
                del error  # with its frames, and the tensors in them
            answers.write(json.dumps(found) + "\n")
            answers.flush()
            if message["do"] == "close":
                break
            if not found["ok"]:
                _tidy()
    finally:  # whoever asks may be gone without a word, and a side's server must not stay
        if side is not None:
            side.close()
    return 0


def _open(message: dict) -> tuple[Opponent, dict]:
    opening = Opening.from_json({key: value for key, value in message.items() if key != "do"})
    module, name = (SERVERS if opening.http else CLASSES)[opening.side].split(":")
    try:
        made = importlib.import_module(f"tools.benchmark.{module}")
    except ImportError as error:
        raise Missing(f"{opening.side} cannot be imported: {error}") from error
    began = _BEGAN if opening.began is None else opening.began
    imported = time.monotonic() - began
    side: Opponent = getattr(made, name)(opening)
    ready = time.monotonic() - began
    info = side.info | {"import_s": imported}
    return side, {"ok": True, "vocab": side.vocab, "special": side.special, "ready_s": ready, "info": info}


def _obey(side: Opponent, message: dict, answers: TextIO) -> dict:
    match message["do"]:
        case "warm":
            side.warm(Work.from_json(message["work"]))
            return {"ok": True}
        case "run":
            tell = functools.partial(_tell, answers) if message.get("watch") else None
            return {"ok": True, "run": side.run(Work.from_json(message["work"]), tell).to_json()}
        case "score":
            return {"ok": True, **side.score(message["asks"])}
        case "close":
            side.close()
            return {"ok": True}
        case unknown:
            raise ValueError(f"do = {unknown!r}; expected open, warm, run, score or close")


def _tell(answers: TextIO, progress: dict) -> None:
    answers.write(json.dumps({"progress": progress}) + "\n")
    answers.flush()


def _kind(error: Exception) -> str:
    names = {kind.__name__ for kind in type(error).__mro__}  # torch is not imported for its name
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return "memory"
    if isinstance(error, (Missing, ImportError)):
        return "missing"
    code = error.exit_code if isinstance(error, LiteLLMError) else LiteLLMError.exit_code
    return next(kind for kind, its in KINDS.items() if its == code)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > _LINE:
        text = (text[:_LINE].rpartition(" ")[0] or text[:_LINE]) + " ..."
    known = isinstance(error, (Missing, LiteLLMError))
    return text if known and text else f"{type(error).__name__}: {text}"


def _tidy() -> None:
    """What a failed command held must not be missing for the next."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
