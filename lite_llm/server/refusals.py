"""What a client is told instead of an answer: a status, and OpenAI's error document. Nothing internal is in either."""

import json
import logging
import re

from lite_llm.errors import ContextExceeded, LiteLLMError, SourceProblem, UsageError
from lite_llm.text.decoders import DecoderEnded
from lite_llm.text.escape import visible

log = logging.getLogger("lite_llm")

_PARAM = re.compile(r"[a-z_]+(\[\w+\])*(\.[a-z_]+(\[\w+\])*)*")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
GRAMMAR_STUCK = "grammar_stuck"
RETRY_AFTER = 1  # seconds: a place may be free as soon as one answer ends


class Refusal(Exception):
    """`status` is that of HTTP; `param` the field that is wrong, `code` a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        headers = {"retry-after": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        if self.code in ("timeout", GRAMMAR_STUCK):
            headers["x-should-retry"] = "false"  # clients of OpenAI would ask, and wait, twice more
        return headers

    def document(self) -> dict[str, object]:
        """In OpenAI's shape."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        return json.dumps(self.document()).encode()


def refusal_of(error: Exception) -> Refusal:
    """What a client hears of an error while its request was read or added; what it must not hear goes to the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ContextExceeded):
        return Refusal(400, str(error), code=error.code)
    if isinstance(error, UsageError):
        if isinstance(error, DecoderEnded):  # somebody tries, or a decoder has a bug
            log.warning("%s", visible(str(error)))
        name = _PARAM.match(error.message)
        rest = error.message[name.end() :] if name else ""
        param = name[0] if name and rest.startswith((" = ", " is ", " has token id", " holds ")) else None
        return Refusal(400, visible(str(error)), param)
    if isinstance(error, SourceProblem):
        return Refusal(400, visible(str(error)), "messages", error.code)
    log.error("a request failed", exc_info=error)
    if isinstance(error, LiteLLMError):
        return Refusal(500, "the server cannot answer this request; its log says why", code=error.code)
    return Refusal(500, "an error inside the server; its log says more", code="internal")


def unusable_numbers() -> Refusal:
    return Refusal(500, "the step that computed this answer failed, or gave no usable number", code="step_failed")


def grammar_stuck() -> Refusal:
    """A limit on the work for one token, mostly, which a few tokens into the answer was too low."""
    message = "the grammar took more work for one token than is allowed, or lets nothing follow what the model wrote"
    return Refusal(400, message + "; make it simpler", code=GRAMMAR_STUCK)


def too_late(seconds: float) -> Refusal:
    message = f"the answer had not begun after {seconds:g} s, the timeout of this request; its place is free again"
    return Refusal(503, message, "timeout", "timeout")


def stopping() -> Refusal:
    return Refusal(503, "the server is shutting down", code="shutting_down")


def loading(progress: str) -> Refusal:
    """`progress`: how far it is, in words; "" if that is not known."""
    return Refusal(503, "the model is being loaded" + (f": {progress}" if progress else ""), code="model_loading")
