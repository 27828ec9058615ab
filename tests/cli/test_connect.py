"""The chat with a server instead of a model: what is sent, what is said when things go wrong (a scripted server)."""

import io
import json

import pytest

from lite_llm.cli import chat_main, commands, report
from lite_llm.cli.chat import Chat
from lite_llm.cli.client import Client
from lite_llm.cli.remote import Remote
from lite_llm.cli.screen import Screen
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import SourceProblem, UsageError
from tests.cli.scripted import GONE, OK, answer, chunk, failure, scripted

USAGE = {"prompt_tokens": 20, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}
CUT = (200, OK, [chunk("half an ")])


@pytest.fixture
def server():
    with scripted() as found:
        yield found


@pytest.fixture
def talk(server):
    """A session with the model that says its context, and what it was told."""
    notes: list[str] = []
    with Remote(Client(server[1], None), "two", None, notes.append) as remote:
        yield Session(remote, SamplingParams()), notes


def ask(session: Session, text: str = "hi", **options):
    said: list[str] = []
    output = session.ask(text, said.append, **options)
    assert "".join(said) == output.text
    return output


def test_an_answer_comes_in_pieces_with_its_numbers(server, talk):
    state, (session, notes) = server[0], talk
    state.script = [(200, OK, [b": hello\n\n", chunk("Par"), chunk("is"), chunk("!", "stop", usage=USAGE),
                               b"data: [DONE]\n\n"])]  # fmt: skip
    session.system = "be brief"
    output = ask(session)
    assert (output.text, output.finish_reason, session.used, session.context) == ("Paris!", "stop", 23, 512)
    assert output.usage.cached_tokens == 7 and session.messages[-1] == {"role": "assistant", "content": "Paris!"}
    assert "20 prompt tokens (7 cached), 3 answer" in report.statistics(output, session.used, session.context)
    assert state.asked == [{
        "model": "two", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    }]  # fmt: skip
    assert notes == [f"{server[1]}  model two, context 512 tokens"]


def test_wishes_are_sent_and_what_is_ignored_is_told_once(server, talk):
    state, (session, notes) = server[0], talk
    state.script = [(200, OK | {"x_ignored_fields": "min_p, top_k"}, answer("a")[2])] * 2
    session.set(temperature=0.5, min_p=0.1, top_k=3, max_tokens=9, seed=4, stop=("x", "y"))
    ask(session)
    ask(session)
    sent = {name: state.asked[0][name] for name in ("temperature", "min_p", "top_k", "max_tokens", "seed", "stop")}
    assert sent == {"temperature": 0.5, "min_p": 0.1, "top_k": 3, "max_tokens": 9, "seed": 4, "stop": ["x", "y"]}
    assert notes[1:] == ["the server ignores: min_p, top_k"]
    assert "temperature 0.5" in report.sampling(session.params, None) and "top_p" not in state.asked[0]


def test_a_server_that_counts_nothing_and_says_no_context(server):
    state, url = server
    state.script = [answer("a", "b"), (200, OK, [chunk("a", "length"), b"data: [DONE]\n\n"])]
    with Remote(Client(url, None), None, None, str) as remote:
        session = Session(remote, SamplingParams())
        output = ask(session)
        assert remote.name == "one" and session.context is None and session.used == 0
        words = report.statistics(output, session.used, session.context)
        assert words.startswith("prompt not counted, 2 answer") and words.endswith("0.0k")
        assert "cut by the server after 1 tokens" in report.ending(ask(session), session.context)
    assert state.asked[0]["stream_options"] == {"include_usage": True}


def test_an_answer_that_has_ended_is_whole_without_its_last_line(server, talk):
    server[0].script = [(200, OK, [chunk("a", "stop")])]
    assert ask(talk[0]).text == "a"


def test_later_is_waited_for_and_told_once(server, talk):
    state, (session, notes) = server[0], talk
    later = failure(429, "9 answers are waiting", "queue_full", retry_after="0")
    state.script = [later, later, answer("there")]
    assert ask(session).text == "there" and len(state.asked) == 3
    assert len(notes) == 2 and "429: 9 answers are waiting; asked again every" in notes[1]
    state.models = [failure(503, "the model is being loaded", "model_loading", retry_after="0")] * 2
    Remote(Client(server[1], None), None, None, notes.append)
    assert not state.models and "503: the model is being loaded; asked again" in notes[2] and len(notes) == 4


def test_no_more_than_the_patience_is_waited(server, talk):
    state, (session, _) = server[0], talk
    for headers, words in ({"retry_after": "9999"}, "429: full: try again later"), ({}, "429: full"):
        state.script = [failure(429, "full", **headers)]
        with pytest.raises(SourceProblem, match=words):
            ask(session)


@pytest.mark.parametrize("turn, words", [
    (CUT, "lost in the middle"),
    ((200, OK, [chunk("a"), b'data: {"error": {"message": "step\\nfailed"}}\n\n']), "the answer: step failed"),
    ((200, OK, [b"data: {half\n\n"]), "something else"), ((200, OK, [b'data: {"choices": 5}\n\n']), "something else"),
    ((200, OK, [b"data: []\n\n"]), "has ended the answer"), ((200, OK, [b"x" * (5 << 20)]), "lost in the middle"),
    ((200, {"content-type": "application/json"}, [b"{}"]), "does not stream"),
    (failure(400, "top_k is wrong"), "answers 400: top_k is wrong"), (failure(401, "bad key"), "LITE_LLM_API_KEY"),
    (failure(413, "too large"), "smaller pictures"), (failure(404, "no model"), "OpenAI-compatible server"),
    (failure(400, "too long", "context_length_exceeded"), "too long"), (failure(500, "a step failed"), "a step failed"),
    ((500, {}, [b"<html>oh\n" + b"x" * 9999]), "500: <html>oh x"), ((301, {"location": "/"}, []), "answers 301"),
    ((422, {}, [b'{"detail": [{"msg": "strange"}]}']), "strange"), ((400, {}, [b'{"error": "plain"}']), "plain"),
])  # fmt: skip
def test_what_goes_wrong_is_one_message_and_the_chat_goes_on(server, turn, words):
    state, url = server
    state.script = [turn, answer("and", " again")]
    err, out, lines = io.StringIO(), io.StringIO(), iter(["first", "second"])

    def line(meter: str, prefilled: str) -> str:
        found = next(lines, None)
        if found is None:
            raise EOFError
        return found

    with Remote(Client(url, None), None, None, str) as remote:
        session = Session(remote, SamplingParams())
        assert Chat(session, Screen(out, err, False, False, False, False), line).run() == 0
    assert [message["content"] for message in session.messages] == ["second", "and again"]  # the first left no trace
    errors = [one for one in err.getvalue().splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and words in err.getvalue() and len(errors[0]) < 500, err.getvalue()
    assert "Traceback" not in err.getvalue() and out.getvalue().endswith("and again\n")


@pytest.mark.parametrize("where", ["queue", "prompt", "answer"])
def test_a_stopped_answer_ends_at_once_and_closes_the_connection(server, talk, where):
    state, (session, _) = server[0], talk
    running = {"usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    state.script = [{
        "queue": failure(429, "full", retry_after="60"),
        "prompt": (200, OK, [GONE]),
        "answer": (200, OK, [chunk("one ", **running), chunk("two", **running), GONE]),
    }[where]]  # fmt: skip
    said: list[str] = []
    polls = iter(range(1 << 30))
    output = session.ask("hi", said.append, stopped=lambda: next(polls) > 3 and (where != "answer" or bool(said)))
    assert output.finish_reason == "abort"
    if where == "answer":
        assert output.text.startswith("one two") and session.messages[-1]["content"] == output.text == "".join(said)
        assert output.usage.prompt_tokens == 5 and output.usage.cached_tokens is None
    else:
        assert not session.messages
    assert where == "queue" or state.left.wait(5)
    state.script = [answer("fine")]
    assert ask(session).text == "fine"


def test_commands_that_need_the_model_here_say_so(server, talk):
    state, (session, _) = server[0], talk
    state.script = [answer("fine")]
    assert "no answers yet" in commands.run(session, "/why")
    ask(session)
    with pytest.raises(UsageError, match="runs in a server"):
        commands.run(session, "/why")
    with pytest.raises(SourceProblem, match="404"):  # no server of ours
        commands.run(session, "/top")
    shown = commands.run(session, "/show")
    assert "model: two" in shown and "plan: the model runs in a server" in shown
    assert "sampling: as the server has it" in shown and "seed" not in commands.run(session, "/stats")
    settings = commands.run(session, "/show params")
    assert settings.count("as the server has it") == 6 and "the rest of the context" not in settings
    assert "temperature 0.0" in commands.run(session, "/set temperature 0") and report.greedy(session.params, None)
    assert commands.run(session, "/undo") == "taken back: hi" and session.used == 0


def test_the_key_is_sent_and_the_url_may_be_short(server, monkeypatch, capsys):
    state, url = server
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setenv("LITE_LLM_API_KEY", "secret")
    state.script = [answer("fine")]
    assert chat_main(["--connect", url.removeprefix("http://") + "/v1/", "-p", "hi", "-m", "two"]) == 0
    assert state.headers[0]["authorization"] == "Bearer secret" and capsys.readouterr().out == "fine\n"


def test_what_cannot_be_used_is_said_with_its_exit_code(server, monkeypatch, capsys):
    state, url = server
    monkeypatch.setattr("sys.stdin", None)
    with scripted() as (_, gone):
        pass
    cases = [
        (6, [gone], "cannot be asked: Connection refused"), (6, ["no.such.host.invalid"], "cannot be asked"),
        (2, ["ftp://x"], "no http URL"), (2, ["http://x:port"], "no http URL"), (2, ["http://"], "no http URL"),
        (2, ["http://x/?a"], "no http URL"), (6, [url + "/there"], "404"),
        (2, [url, "-m", "three"], "has no model three: there are: one, two"),
        (2, [url, "--device", "cpu"], "--device is for a model in this process"),
        (2, [url, "--context", "4k"], "--context is for a model"), (2, [url, "--drafts", "3"], "--drafts is for"),
        (2, [url, "--no-cuda-graphs"], "--no-cuda-graphs"),
    ]  # fmt: skip
    for code, argv, words in cases:
        try:
            found = chat_main(["-p", "x", "--connect", *argv])
        except SystemExit as left:
            found = left.code
        out, err = capsys.readouterr()
        assert (found, out) == (code, "") and words in err and len(err.splitlines()) <= 2, (argv, err)
    state.models = [(200, {}, [b"<html>"]), (200, {}, [b'{"data": []}']), failure(401, "no")]
    for code, words in (6, "something else"), (2, "no model at all"), (6, "set LITE_LLM_API_KEY"):
        assert chat_main(["-p", "x", "--connect", url, "--json"]) == code
        out, err = capsys.readouterr()
        assert words in err and json.loads(out)["error"]["message"]
    monkeypatch.setenv("LITE_LLM_API_KEY", "geheimnis-ß")
    assert chat_main(["-p", "x", "--connect", url]) == 2 and "ASCII" in capsys.readouterr().err
