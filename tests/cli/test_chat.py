"""The dialogue with scripted lines: Ctrl-C, errors, escapes, one answer on stdout (CLI-02 to CLI-06, without a tty)."""

import io
import json
import signal
import sys

import pytest

from lite_llm.cli import oneshot
from lite_llm.cli.chat import Chat
from lite_llm.cli.screen import LoadingBar, Screen
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError
from tests.cli.doubles import FakeLLM
from tests.cli.test_session import echo, roles

HOSTILE = "\x1b[2J \x1b]52;c;aGk=\x07 \x1b]8;;http://x\x1b\\ \u202eabc\u2066 \r\x07\x9b31m \x00\x7f"


def screen(markdown=False, escaped=False, **options) -> Screen:
    options = {"colour": False, "bars": False} | options
    return Screen(io.StringIO(), io.StringIO(), markdown, escaped, **options)


def talk(lines, llm=None, **options) -> tuple[Session, Screen, list[tuple[str, str]]]:
    """A whole dialogue; also returns the prompts: (meter, prefilled text)."""
    session, shown, prompts = Session(llm or FakeLLM(echo), SamplingParams()), screen(**options), []
    waiting = iter(lines)

    def ask(meter: str, prefilled: str) -> str:
        prompts.append((meter, prefilled))
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    assert Chat(session, shown, ask).run() == 0
    return session, shown, prompts


def test_a_dialogue():
    session, shown, prompts = talk(["hi", "", "  ", "//slash"])
    assert shown.out.getvalue() == "you said hi\nyou said /slash\n"
    assert roles(session) == "uaua" and prompts[1][0] == "0.0k/1.0k"
    assert "prompt tokens (0 cached)" in shown.err.getvalue()


def test_ctrl_c_in_an_answer_keeps_the_part_and_the_session():
    def hook(n):
        if n == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    llm = FakeLLM(lambda messages: "a b c d e f g" if len(messages) == 1 else "fine", hook=hook)
    session, shown, _ = talk(["go", "on"], llm)
    assert [message["content"] for message in session.messages] == ["go", "a b c ", "on", "fine"]
    assert shown.out.getvalue() == "a b c \nfine\n" and "stopped" in shown.err.getvalue()
    assert signal.getsignal(signal.SIGINT) is before and not llm.live


def test_ctrl_c_between_lines_does_not_end_the_chat():
    session, shown = Session(FakeLLM(echo), SamplingParams()), screen()
    events = iter([KeyboardInterrupt, "hi", KeyboardInterrupt, EOFError])

    def ask(meter: str, prefilled: str) -> str:
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    assert Chat(session, shown, ask).run() == 0 and roles(session) == "ua"


def test_errors_are_one_line_and_the_dialogue_lives():
    def hook(n):
        if n == 3:
            raise RuntimeError("kernel broke")

    llm = FakeLLM(lambda messages: "x y z" if "bad" in messages[-1]["content"] else "ok", hook=hook)
    session, shown, _ = talk(["/nope", "/set temperature 99999", "bad", "good", "w " * 2000], llm)
    errors = [line for line in shown.err.getvalue().splitlines() if line.startswith("error:")]
    assert len(errors) == 4 and "Traceback" not in shown.err.getvalue()
    assert "internal error: RuntimeError: kernel broke; run with --debug" in errors[2]
    assert errors[3].startswith("error: the prompt has 20") and "/undo and /clear" in shown.err.getvalue()
    assert [message["content"] for message in session.messages] == ["good", "ok"]


def test_edit_prefills_and_replaces_and_may_be_left_alone():
    session, _, prompts = talk(["one", "/edit", "two", "/edit", ""])
    assert prompts[2][1] == "one" and prompts[4][1] == "two"
    assert [message["content"] for message in session.messages] == ["two", "you said two"]


def test_while_editing_commands_are_still_commands():
    session, _, prompts = talk(["//one", "/edit", "/undo", "two"])
    assert prompts[2][1] == "//one"
    assert [message["content"] for message in session.messages] == ["two", "you said two"]


def test_regen_answers_again_and_says_when_that_is_pointless():
    session, shown, _ = talk(["one", "/regen"])
    assert roles(session) == "ua" and len(session.llm.asked) == 2
    assert "temperature is 0" in shown.err.getvalue()
    session, shown, _ = talk(["/set temperature 1", "one", "/regen"])
    assert "temperature is 0" not in shown.err.getvalue()
    seeds = {params.seed for _, params in session.llm.asked}
    assert len(seeds) == 2


def test_the_user_is_warned_before_the_context_is_full():
    _, shown, _ = talk(["a b c", "d e f"], FakeLLM(echo, context=25))
    assert "of 25 context tokens are used" in shown.err.getvalue()


@pytest.mark.parametrize("markdown", [False, True])
def test_nothing_from_the_model_commands_the_terminal(markdown):
    _, shown, _ = talk(["x", "/show history"], FakeLLM(HOSTILE), markdown=markdown, escaped=True)
    text = shown.out.getvalue() + shown.err.getvalue()
    for code in ("\x1b[2J", "\x1b]", "\u202e", "\u2066", "\r", "\x07", "\x9b", "\x00", "\x7f"):
        assert code not in text
    assert r"\x1b]52" in text and r"\u202e" in text


def test_raw_text_is_untouched():
    _, shown, _ = talk(["x"], FakeLLM(HOSTILE))
    assert shown.out.getvalue() == HOSTILE + "\n"


def test_quiet_shows_answers_only():
    _, shown, _ = talk(["x"], quiet=True)
    assert shown.err.getvalue() == ""


# ---- one answer


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes | None):
        super().__init__(io.BytesIO(content or b""))
        self._tty = content is None

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize("prompt, piped, expected", [
    ("ask", None, "ask"),
    (None, None, None),
    ("ask", b"", "ask"),
    ("ask", b"data\n", "ask\n\ndata"),
    (None, b"data\n", "data"),
    ("-", b"data", "data"),
    ("ask", b"\xffbad", "ask\n\n\ufffdbad"),
])  # fmt: skip
def test_the_question_of_a_single_run(prompt, piped, expected):
    assert oneshot.question(prompt, Stdin(piped)) == expected


@pytest.mark.parametrize("prompt, piped", [("", None), ("", b""), (None, b""), (None, b" \n"), ("-", b"\n")])
def test_an_empty_question_is_refused(prompt, piped):
    with pytest.raises(UsageError, match="empty"):
        oneshot.question(prompt, Stdin(piped))


def test_no_stdin_at_all():
    assert oneshot.question("x", None) == "x" and oneshot.question(None, None) is None


def one_shot(llm, as_json=False, **options) -> tuple[int, Screen]:
    shown = screen(**options)
    return oneshot.run(Session(llm, SamplingParams(seed=5)), shown, "hi", as_json), shown


def test_only_the_answer_is_on_stdout():
    code, shown = one_shot(FakeLLM(echo))
    assert (code, shown.out.getvalue()) == (0, "you said hi\n")
    assert one_shot(FakeLLM("ends with a line\n"))[1].out.getvalue() == "ends with a line\n"
    assert one_shot(FakeLLM(""))[1].out.getvalue() == ""


def test_json_is_one_document():
    code, shown = one_shot(FakeLLM("say \x1b[31m \u202e 中"), as_json=True)
    document = json.loads(shown.out.getvalue())
    assert code == 0 and shown.out.getvalue().isascii()
    assert document["schema_version"] == 1 and document["output"] == "say \x1b[31m \u202e 中"
    assert document["model"] == "fake/model" and document["finish_reason"] == "stop"
    assert document["params"]["seed"] == 5 and document["params"]["temperature"] == 0
    assert document["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 4}
    assert document["timings"].keys() == {"first_token_seconds", "total_seconds", "tokens_per_second"}


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_in_a_single_answer_is_130(as_json):
    llm = FakeLLM("a b c d", hook=lambda n: signal.raise_signal(signal.SIGINT) if n == 2 else None)
    code, shown = one_shot(llm, as_json)
    said = json.loads(shown.out.getvalue())["output"] if as_json else shown.out.getvalue()
    assert code == 130 and said.startswith("a b ")


# ---- screens and bars


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True


def of_process(monkeypatch, *, tty=True, encoding="utf-8", raw=False, **env) -> Screen:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal(encoding) if tty else io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    return Screen.of_process(raw=raw)


def test_what_a_screen_may_show(monkeypatch):
    shown = of_process(monkeypatch)
    assert shown.markdown and shown.escaped and shown.colour and shown.bars
    shown = of_process(monkeypatch, tty=False)
    assert not (shown.markdown or shown.escaped or shown.colour or shown.bars)
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        shown = of_process(monkeypatch, **env)
        assert not shown.markdown and not shown.colour and shown.escaped
    assert not of_process(monkeypatch, TERM="dumb").bars
    assert of_process(monkeypatch, tty=False, FORCE_COLOR="1").markdown
    shown = of_process(monkeypatch, raw=True)
    assert not shown.markdown and not shown.escaped
    shown = of_process(monkeypatch, encoding="latin-1")
    assert not shown.markdown
    shown.answer("中 ok")  # shown as ?, never an error


def test_the_loading_bar_leaves_nothing_behind(monkeypatch):
    shown = screen(bars=True)
    bar = LoadingBar(shown)
    for done in range(0, 101, 10):
        bar(done * 10**7, 10**9)
    bar.clear()
    text = shown.err.getvalue()
    assert "100% of 1.0 GB" in text and text.endswith("\r\x1b[K") and "\n" not in text
    silent = screen()
    LoadingBar(silent)(1, 2)
    assert silent.err.getvalue() == ""
