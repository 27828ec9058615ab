"""What an answer must be: a JSON schema, a regular expression, a grammar, one of some texts. llguidance does the work.

A grammar is compiled for one model, in any thread and without holding Python up: some milliseconds, and once for each
source while it is remembered. An answer then has a state of its own, which says token by token what may follow.
"""

import importlib.metadata
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from lite_llm.errors import EnvironmentProblem, UnsupportedModel, UsageError
from lite_llm.text.grammar_sources import Source, arguments_of, source_of, source_of_calls
from lite_llm.text.tokenizer import Tokenizer
from lite_llm.text.tools import BareCalls, MarkedCalls, parser_of

if TYPE_CHECKING:
    import llguidance
    import numpy as np

log = logging.getLogger("lite_llm")

_OLDEST = "1.9"  # of llguidance, as in requirements-grammar.txt: earlier ones take one token that ends an answer
_INSTALL = "pip install -r requirements-grammar.txt"
_REMEMBERED = 64
_MOST_SHOWN = 300  # characters of what llguidance says
_NO_END = "it has no answer: a rule or $ref always leads back to itself, or no token of this model begins one"
_LIMITS = dict(step_lexer_fuel=50_000, step_max_items=10_000, max_lexer_states=50_000, verbose_errors=False)
"""Of the work for one token, a few milliseconds, and of memory: the engine waits for each answer's next mask."""


class CompiledGrammar:
    """`lite_llm.engine.constraint.Grammar`, for one model."""

    def __init__(self, source: Source, matcher: "llguidance.LLMatcher", words: int):
        import numpy as np

        self.source = source
        self._first = Answer(matcher, np.zeros(words, dtype=np.int32))
        self._first.look()

    @property
    def problem(self) -> str:
        """Why no answer can begin; "" if one can."""
        if self._first.allowed.any():
            return ""
        error = self._first.error
        return _NO_END if not error or error.startswith("NoExtension") else error

    def start(self) -> "Answer":
        return self._first.copy()


class Answer:
    """`lite_llm.engine.constraint.Constraint`."""

    def __init__(self, matcher: "llguidance.LLMatcher", allowed: "np.ndarray"):
        self._matcher, self.allowed = matcher, allowed

    @property
    def error(self) -> str:
        return _line(self._matcher.get_error())

    def copy(self) -> "Answer":
        return Answer(self._matcher.deep_copy(), self.allowed.copy())

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self.look()
        if self._matcher.is_error():
            log.warning("the grammar of an answer failed: %s", self.error)

    def look(self) -> None:
        """Write what may follow to `allowed`: ends of the answer included where it may end."""
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if self._matcher.is_error():  # llguidance would let it end, as if it were whole
            self.allowed[:] = 0


class GrammarCompiler:
    """Makes grammars for one model; threads may share it. Reads the tokenizer when the first one is wanted."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Iterable[int]):
        """`vocab`: of the model, padding included. `end_ids`: tokens that end an answer."""
        self._tokenizer, self._vocab, self._end_ids = tokenizer, vocab, sorted(end_ids)
        self._lock = threading.Lock()
        self._known: llguidance.LLTokenizer | None = None
        self.compiled = lru_cache(maxsize=_REMEMBERED)(self._compile)

    def compile(self, **wish: Any) -> CompiledGrammar:
        """From what `source_of` takes: one of `json`, `regex`, `lark` and `choice`.

        UsageError says what is wrong or not supported, UnsupportedModel that this model cannot have grammars, and
        EnvironmentProblem that llguidance is missing or too old.
        """
        source = source_of(**wish)
        return self._named(*wish, source)

    def calls(
        self, tools: Sequence[Mapping[str, Any]], only: str | None = None, several: bool = False
    ) -> CompiledGrammar:
        """Of answers that are one call, or with `several` one or more, of `tools`, or of the one that is called `only`,
        in the form in which the checkpoint writes calls; `tools` are OpenAI's. Raises as `compile` does."""
        if self._form is None:
            raise UsageError("this checkpoint writes calls in a form that is not known", "leave tools out")
        wanted = []
        for index, tool in enumerate(tools):
            function, where = tool["function"], f"tools[{index}].function.parameters"
            if only in (None, function["name"]):
                wanted.append((where, function["name"], arguments_of(function.get("parameters"))))
        if not wanted:
            raise UsageError("there is no such tool to call" if only else "there is no tool to call")
        source = source_of_calls(self._form.layout, wanted, several, self._spelled)
        try:
            return self.compiled(source)
        except UsageError:
            for where, _, schema in wanted:  # which one it is
                self._named(where, source_of(json=schema))
            raise

    def _named(self, name: str, source: Source) -> CompiledGrammar:
        try:
            return self.compiled(source)
        except UsageError as error:
            raise UsageError(f"{name} is no usable grammar: {error}") from None

    def _compile(self, source: Source) -> CompiledGrammar:
        tokens = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        make = {"json": LLMatcher.grammar_from_json_schema, "regex": LLMatcher.grammar_from_regex}
        try:
            grammar = make.get(source.kind, LLMatcher.grammar_from_lark)(source.text)
        except ValueError as error:
            raise UsageError(_line(str(error))) from None
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise UsageError(_line(matcher.get_error()))
        compiled = CompiledGrammar(source, matcher, -(-self._vocab // 32))
        if compiled.problem:
            raise UsageError(compiled.problem)
        return compiled

    def _spelled(self, text: str) -> str:
        """As Lark has it: the token of that name, if it is one that text never becomes, or else the text."""
        token = self._tokenizer.token_id(text)
        special = token is not None and self._tokens().is_special_token(token)
        return text if special else json.dumps(text)

    @cached_property
    def _form(self) -> type[MarkedCalls] | type[BareCalls] | None:
        return parser_of(self._tokenizer)

    def _tokens(self) -> "llguidance.LLTokenizer":
        with self._lock:
            if self._known is None:
                self._known = self._read_tokens()
            return self._known

    def _read_tokens(self) -> "llguidance.LLTokenizer":
        try:
            from llguidance import LLTokenizer

            found = importlib.metadata.version("llguidance")
        except ImportError as error:
            raise EnvironmentProblem(f"grammars need llguidance: {error}", _INSTALL) from None
        if _numbers(found) < _numbers(_OLDEST):
            raise EnvironmentProblem(f"grammars need llguidance {_OLDEST} or newer; found {found}", _INSTALL)
        if not self._end_ids:
            raise UnsupportedModel("this checkpoint names no token that ends an answer; grammars need one")
        try:
            return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab, eos_token=self._end_ids)
        except ValueError as error:
            raise UnsupportedModel(f"llguidance cannot use this checkpoint's tokenizer: {_line(str(error))}") from None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor: (1, 9) for "1.9.0rc1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _line(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
