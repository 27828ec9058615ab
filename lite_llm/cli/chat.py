"""The dialogue: read a line, obey or answer it, and go on whatever happens in between."""

import traceback
from collections.abc import Callable

from lite_llm.cli import commands, pictures, report
from lite_llm.cli.interrupt import Interrupt
from lite_llm.cli.screen import Screen
from lite_llm.cli.session import Session
from lite_llm.errors import ContextExceeded, LiteLLMError, UsageError

Ask = Callable[[str, str], str]
"""(context meter, prefilled text) -> the user's line; EOFError when there is no more."""


class Chat:
    def __init__(self, session: Session, screen: Screen, ask: Ask, debug: bool = False):
        self._session, self._screen, self._ask, self._debug = session, screen, ask, debug

    def run(self) -> int:
        """Until the user leaves; returns the exit code."""
        prefilled, replace = "", False
        while True:
            try:
                line = self._ask(report.meter(self._session.used, self._session.context), prefilled)
                prefilled, replacing, replace = "", replace, False
                wish = self._wish(line)
                if isinstance(wish, commands.Again):
                    if wish.edit:
                        escape = "/" if wish.question.startswith("/") else ""
                        prefilled, replace = escape + wish.question, True
                        continue
                    self._answer(wish.question, replace=True)
                elif wish:
                    self._answer(wish, replacing)
            except (EOFError, commands.Leave):
                return 0
            except KeyboardInterrupt:  # between two answers: nothing is running
                continue
            except BrokenPipeError:
                raise
            except ContextExceeded as error:
                pictures = "/image off takes its pictures away, " if self._session.waiting else ""
                self._screen.error(
                    f"{error.message}\n{pictures}/undo and /clear make room, --context N sets it; Up brings the line"
                )
            except LiteLLMError as error:
                self._screen.error(str(error))
                self._trace()
            except Exception as error:  # one answer failed; the conversation is as it was
                self._screen.error(f"internal error: {type(error).__name__}: {str(error)[:300]}; run with --debug")
                self._trace()

    def _wish(self, line: str) -> str | commands.Again:
        """What the line asks for: a question, another answer, or "" if nothing is left to do."""
        if line.startswith("//"):
            return line[1:]
        if line.startswith("/"):
            result = commands.run(self._session, line)
            if isinstance(result, commands.Again):
                return result
            if isinstance(result, commands.Look):
                pictures.add(self._session, self._screen, result.source)
                return ""
            if isinstance(result, commands.Watch):
                if self._screen.err.isatty():
                    from lite_llm.cli.top import watch  # rich

                    watch(self._session.llm)
                    return ""
                result = result.still
            self._screen.note(result, loud=True)
            return ""
        return line if line.strip() else ""

    def _answer(self, question: str, replace: bool = False) -> None:
        session, screen = self._session, self._screen
        same = replace and question == session.last_question()
        if same and report.greedy(session.params, session.llm.generation_config):
            screen.note("temperature is 0: the same settings give the same answer; /set temperature 0.7 varies it")
        output = answer(session, screen, question, replace)
        if output.finish_reason == "error":
            raise UsageError("the model gave no usable numbers, so there is no answer", "try again or /clear")
        if output.finish_reason == "abort" and not output.text:
            screen.note("stopped before the first word; the question is taken back (Up brings it)", loud=True)
            return
        for text in (report.ending(output, session.context), report.fullness(session.used, session.context)):
            if text:
                screen.note(text, loud=True)
        screen.note(report.statistics(output, session.used, session.context))
        session.autosave()

    def _trace(self) -> None:
        if self._debug:
            traceback.print_exc(file=self._screen.err)


def answer(session: Session, screen: Screen, question: str, replace: bool = False):
    """Ask, show the answer as it comes, and end its last line. Ctrl-C ends it within one step."""
    renderer = screen.renderer()
    last = ""

    def say(text: str) -> None:
        nonlocal last
        last = text
        screen.answer(renderer.feed(screen.safe(text)))

    with Interrupt() as interrupt:
        try:
            return session.ask(question, say, stopped=lambda: interrupt.pressed, replace=replace)
        finally:
            screen.answer(renderer.finish() + ("\n" if last and not last.endswith("\n") else ""))
