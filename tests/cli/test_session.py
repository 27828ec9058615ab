"""Conversations without a terminal: turns, stops, undo, files, commands."""

import json
import os

import pytest

from lite_llm.cli import commands, report, transcript
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import ContextExceeded, UsageError
from tests.cli.doubles import FakeLLM


def echo(messages) -> str:
    return "you said " + messages[-1]["content"]


def session(script=echo, **options) -> Session:
    return Session(FakeLLM(script, **options), SamplingParams(temperature=0.5))


def ask(talk: Session, text: str, **options):
    heard: list[str] = []
    output = talk.ask(text, heard.append, **options)
    assert "".join(heard) == output.text
    return output


def roles(talk: Session) -> str:
    return "".join(message["role"][0] for message in talk.messages)


def test_turns_add_up():
    talk = session()
    talk.system = "be brief"
    ask(talk, "one")
    ask(talk, "two")
    assert roles(talk) == "suaua"
    assert [message["content"] for message in talk.llm.asked[1][0]] == ["be brief", "one", "you said one", "two"]
    assert talk.used == talk.last.usage.prompt_tokens + 3 and talk.totals.answers == 2
    assert not talk.llm.live


def test_a_stopped_answer_keeps_what_was_said():
    talk = session("a b c d e f")
    seen: list[str] = []
    output = talk.ask("go", seen.append, stopped=lambda: len(seen) == 3)
    assert output.finish_reason == "abort" and talk.messages[-1]["content"] == "a b c " == "".join(seen)
    ask(talk, "on")
    assert roles(talk) == "uaua" and not talk.llm.live


def test_an_answer_stopped_before_its_first_word_leaves_no_trace():
    talk = session()
    ask(talk, "one")
    before = list(talk.messages)
    assert talk.ask("two", lambda text: None, stopped=lambda: True).text == ""
    assert talk.messages == before


def test_a_full_context_is_told_and_nothing_is_cut():
    talk = session(context=20)
    ask(talk, "one")
    before = list(talk.messages)
    with pytest.raises(ContextExceeded, match="20 fit"):
        ask(talk, "word " * 20)
    assert talk.messages == before
    output = ask(talk, "now " * 4)
    assert output.finish_reason == "length" and "context is full" in report.ending(output, talk.context)
    assert "/undo" in report.ending(output, talk.context) and "= 20" in report.ending(output, talk.context)


def test_a_failing_step_leaves_the_conversation_as_it_was():
    def hook(n):
        if n == 2:
            raise RuntimeError("boom")

    talk = session(hook=hook)
    with pytest.raises(RuntimeError):
        ask(talk, "one")
    assert talk.messages == [] and not talk.llm.live


def test_undo_regen_edit_and_clear():
    talk = session()
    talk.system = "s"
    for text in ("one", "two"):
        ask(talk, text)
    assert commands.run(talk, "/regen") == commands.Again("two", edit=False)
    assert commands.run(talk, "/edit") == commands.Again("two", edit=True)
    ask(talk, "three", replace=True)
    assert roles(talk) == "suaua" and talk.messages[3]["content"] == "three"
    assert commands.run(talk, "/undo") == "taken back: three" and roles(talk) == "sua"
    assert talk.used == len(talk.llm.encode(talk.messages))
    assert "stays" in commands.run(talk, "/clear") and roles(talk) == "s"
    for line in ("/undo", "/regen", "/edit"):
        with pytest.raises(UsageError):
            commands.run(talk, line)


def test_system_commands():
    talk = session()
    assert "no system prompt" in commands.run(talk, "/system")
    commands.run(talk, "/system Talk like a pirate.")
    assert talk.system == "Talk like a pirate."
    ask(talk, "hi")
    commands.run(talk, "/system off")
    assert talk.system is None and roles(talk) == "ua"


@pytest.mark.parametrize("line, name, value", [
    ("temperature 0.25", "temperature", 0.25), ("top-p=0.5", "top_p", 0.5), ("top_k 7", "top_k", 7),
    ("seed 3", "seed", 3), ("max_tokens 9", "max_tokens", 9), ("temperature default", "temperature", None),
    ('stop "a b" c\\n', "stop", ("a b", "cn")), ('stop "x\\n"', "stop", ("x\n",)), ("stop default", "stop", ()),
])  # fmt: skip
def test_set(line, name, value):
    talk = session()
    assert "sampling:" in commands.run(talk, f"/set {line}")
    assert getattr(talk.params, name) == value


@pytest.mark.parametrize("line", [
    "temperature -1", "temperature nan", "temperature x", "top_p 2", "top_k 1.5", "max_tokens 0", "seed x", "nonsens 1",
    "temprature 1", "temperature", 'stop "a', "stop " + " ".join("abcdefghijklmnopqrstuvwxyz"), "n 4", "= 3",
])  # fmt: skip
def test_set_refuses_without_change(line):
    talk = session()
    before = talk.params
    with pytest.raises(UsageError):
        commands.run(talk, f"/set {line}")
    assert talk.params == before


@pytest.mark.parametrize("line, near", [("/sve x", "/save"), ("/hlep", "/help"), ("/", "/help"), ("/usr/bin", "//")])
def test_unknown_commands_name_the_nearest(line, near):
    with pytest.raises(UsageError, match=near):
        commands.run(session(), line)


def test_show_help_and_stats():
    talk = session(generation_config={"do_sample": True, "temperature": 0.7, "top_k": 20})
    ask(talk, "hello")
    assert "fake/model" in commands.run(talk, "/show") and "a plan" in commands.run(talk, "/show plan")
    assert "you said hello" in commands.run(talk, "/show history")
    assert "set by you" in commands.run(talk, "/show params")
    assert all(f"/{name}" in commands.run(talk, "/help") for name in commands.TABLE)
    assert "seed" in commands.run(talk, "/stats")
    with pytest.raises(UsageError):
        commands.run(talk, "/show me")
    with pytest.raises(UsageError):
        commands.run(talk, "/clear all")
    with pytest.raises(commands.Leave):
        commands.run(talk, "/exit")


def test_the_sampling_line_says_where_values_come_from():
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    line = report.sampling(SamplingParams(), config)
    assert line == "sampling: temperature 0.7, top_k 20 (generation_config.json)"
    assert "greedy" in report.sampling(SamplingParams(), {})
    assert "temperature as you set" in report.sampling(SamplingParams(temperature=0.3), config)


def test_the_warning_at_80_percent():
    assert report.fullness(799, 1000) is None
    assert "80%" in report.fullness(800, 1000) and "800 of 1000" in report.fullness(800, 1000)
    assert report.fullness(1000, 1000) is None  # then the answer's end says so


@pytest.mark.parametrize("used, context, text", [
    (0, 512, "0.0k/0.5k"), (410, 32768, "0.4k/32k"), (1024, 131072, "1k/128k"), (130000, 131072, "127k/128k")
])  # fmt: skip
def test_the_meter(used, context, text):
    assert report.meter(used, context) == text


# ---- files


def test_save_and_load(tmp_path):
    talk, path = session(), tmp_path / "chat.jsonl"
    talk.system = "sys"
    ask(talk, 'line\nbreak "quoted" 中 \u2028 end')
    said = list(talk.messages)
    commands.run(talk, f"/save {path}")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")] == said
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == ["chat.jsonl"]
    other = session()
    assert "3 messages loaded" in commands.run(other, f"/load {path}")
    assert other.messages == said
    ask(other, "more")
    commands.run(other, "/save")  # its own file
    assert len(transcript.load(path)[0]) == 5


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "mine"
    path.write_text("precious")
    talk = session()
    ask(talk, "x")
    with pytest.raises(UsageError, match="-f"):
        commands.run(talk, f"/save {path}")
    assert path.read_text() == "precious"
    commands.run(talk, f"/save -f {path}")
    assert len(transcript.load(path)[0]) == 2
    commands.run(talk, "/clear")
    ask(talk, "another conversation")
    with pytest.raises(UsageError):
        commands.run(talk, f"/save {path}")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "chat"
    transcript.save(path, [{"role": "user", "content": "old"}])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        transcript.save(path, [{"role": "user", "content": "new"}])
    assert transcript.load(path)[0][0]["content"] == "old" and os.listdir(tmp_path) == ["chat"]


def test_resume_saves_every_turn(tmp_path):
    path = tmp_path / "chat"
    transcript.save(path, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    talk = session()
    talk.resume(path, *transcript.load(path))
    ask(talk, "c")
    talk.autosave()
    assert [message["content"] for message in transcript.load(path)[0]] == ["a", "b", "c", "you said c"]
    talk.clear()
    ask(talk, "new")
    talk.autosave()
    assert len(transcript.load(path)[0]) == 4


@pytest.mark.parametrize("content", [
    b"not json", b"[1]", b'{"role": "user"}', b'{"role": "robot", "content": "x"}', b'{"role": "user", "content": 3}',
    b"\xff\xfe", b"[" * 100_000, b'{"role": "user", "content": "x"}\n{"role": "system", "content": "x"}', b"\x00",
])  # fmt: skip
def test_bad_files_are_refused_and_change_nothing(content, tmp_path):
    path = tmp_path / "bad"
    path.write_bytes(content)
    talk = session()
    ask(talk, "x")
    before = list(talk.messages)
    with pytest.raises(UsageError, match="bad"):
        commands.run(talk, f"/load {path}")
    assert talk.messages == before


def test_missing_files_directories_and_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "", "pipe"):
        with pytest.raises(UsageError):
            commands.run(session(), f"/load {tmp_path / name}")
    with pytest.raises(UsageError, match="cannot be written"):
        commands.run(session(), f"/save {tmp_path / 'no' / 'where'}")
