"""The slash commands: a table of what there is, and one function for each. They answer with lines for the user."""

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lite_llm.cli import report
from lite_llm.cli.pictures import receipt, source_of
from lite_llm.cli.screen import width
from lite_llm.cli.session import Message, Session
from lite_llm.cli.transcript import pictures_of, text_of
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError

_SETTINGS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "stop": str,
}
_TOPICS = ("model", "plan", "params", "system", "history")


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Again:
    """A command's wish: ask `question` in place of the last one; first let the user change it, if `edit`."""

    question: str
    edit: bool


@dataclass(frozen=True)
class Look:
    """A command's wish: take the picture at `source` for the next question."""

    source: str


@dataclass(frozen=True)
class Watch:
    """A command's wish: show the requests in flight while they run; `still` is one moment, for what is no terminal."""

    still: str


@dataclass(frozen=True)
class Command:
    name: str
    arguments: str
    help: str
    run: Callable[[Session, str], str | Again | Look | Watch]


def run(session: Session, line: str) -> str | Again | Look | Watch:
    """Carry out a line that begins with one slash. UsageError says what is wrong with it; Leave ends the chat."""
    name, _, argument = line[1:].partition(" ")
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, 1)
        nearest = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise UsageError(f"there is no command /{name[:40]}; {nearest} (// sends a line that begins with a slash)")
    command, argument = TABLE[name], argument.strip()
    if argument and not command.arguments:
        raise UsageError(f"/{name} takes no argument")
    return command.run(session, argument)


def _help(session: Session, argument: str) -> str:
    width = max(len(f"{c.name} {c.arguments}") for c in TABLE.values()) + 3
    lines = [f"/{f'{c.name} {c.arguments}':<{width}}{c.help}" for c in TABLE.values()]
    keys = [
        ("Enter, Alt-Enter", "send, new line; pasted lines stay together"),
        ('"""', "begins and ends a message of many lines"),
        ("Ctrl-C", "stops an answer, or clears the line"),
        ("Ctrl-D", "leaves"),
        ("Ctrl-G", "the line in $EDITOR"),
        ("//", "sends a line that begins with a slash"),
    ]
    return "\n".join([*lines, "", *(f"{key:<{width + 1}}{text}" for key, text in keys)])


def _system(session: Session, argument: str) -> str:
    if argument.lower() == "off":
        session.system = None
        return "no system prompt"
    if argument:
        session.system = argument
        return "the system prompt is set; it applies to the whole conversation"
    return f"system: {session.system}" if session.system is not None else "no system prompt; /system TEXT sets one"


def _set(session: Session, argument: str) -> str:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not argument:
        return _settings(session)
    if name not in _SETTINGS:
        near = difflib.get_close_matches(name, _SETTINGS, 1)
        raise UsageError(f"there is no setting {name[:40]}; " + (f"did you mean {near[0]}?" if near else _names()))
    if not value:
        raise UsageError(f"/set {name} needs a value, or: default")
    session.set(**{name: _value(name, value)})
    return report.sampling(session.params, session.llm.generation_config)


def _value(name: str, text: str) -> object:
    if text == "default":
        return getattr(SamplingParams(), name)
    kind = _SETTINGS[name]
    if kind is str:
        try:
            words = shlex.split(text)
        except ValueError:
            raise UsageError(f"stop = {text[:80]}: a quote is not closed") from None
        return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words)
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{name} = {text[:80]}; expected {'a whole number' if kind is int else 'a number'}") from None


def _settings(session: Session) -> str:
    used = report.in_force(session.params, session.llm.generation_config)
    values = {name: getattr(used, name) for name in _SETTINGS}
    values = {name: "as the server has it" if value is None else value for name, value in values.items()}
    values["seed"] = "a fresh one for each answer" if session.params.seed is None else session.params.seed
    if used.max_tokens is None and session.llm.generation_config is not None:
        values["max_tokens"] = "the rest of the context"
    values["stop"] = " ".join(map(repr, used.stop)) or "none"
    mine = {name for name in _SETTINGS if getattr(session.params, name) != getattr(SamplingParams(), name)}
    return "\n".join(f"{name:<20}{value}{'  (set by you)' if name in mine else ''}" for name, value in values.items())


def _names() -> str:
    return "there are " + ", ".join(_SETTINGS)


def _show(session: Session, argument: str) -> str:
    if argument and argument not in _TOPICS:
        raise UsageError(f"/show {argument[:40]}: there are {', '.join(_TOPICS)}")
    turns = sum(message["role"] == "assistant" for message in session.messages)
    parts = {
        "model": f"model: {session.llm.name}",
        "plan": _plan(session),
        "params": report.sampling(session.params, session.llm.generation_config),
        "system": _system(session, ""),
        "history": f"history: {turns} answers, {report.meter(session.used, session.context)} of the context",
    }
    if argument == "params":
        return _settings(session)
    if argument == "history":
        return "\n".join(_said(session, message) for message in session.messages) or "nothing was said yet"
    return parts[argument] if argument else "\n".join(parts.values())


def _plan(session: Session) -> str:
    try:
        return f"plan: {session.llm.plan}"
    except UsageError as error:  # the model is in a server
        return f"plan: {error.message}"


def _said(session: Session, message: Message) -> str:
    shown = [f"[{session.names[picture.digest]}] " for picture in pictures_of(message)]
    return f"{message['role']}: {''.join(shown)}{text_of(message)}"


def _image(session: Session, argument: str) -> str | Look:
    if argument == "off":
        session.waiting = []
        return "no picture goes with the next question"
    if argument:
        return Look(source_of(argument))
    asked = [receipt(session, picture) for picture in session.pictures]
    waiting = [f"{receipt(session, picture)} (with the next question)" for picture in session.waiting]
    return "\n".join(asked + waiting) or "no pictures; /image PATH_OR_URL shows one"


def _clear(session: Session, argument: str) -> str:
    unsaved = f"; later turns are not saved to {session.file}" if session.autosaving else ""
    seen = ", the pictures too" if session.pictures or session.waiting else ""
    session.clear()
    return f"cleared{seen}" + ("; the system prompt stays" if session.system is not None else "") + unsaved


def _undo(session: Session, argument: str) -> str:
    question = session.undo()
    if question is None:
        raise UsageError("there is nothing to undo")
    first = question.split("\n")[0]
    return f"taken back: {first if len(first) <= 60 else first[:57] + '...'}"


def _regen(session: Session, argument: str) -> Again:
    return Again(_last(session), edit=False)


def _edit(session: Session, argument: str) -> Again:
    return Again(_last(session), edit=True)


def _last(session: Session) -> str:
    question = session.last_question()
    if question is None:
        raise UsageError("nothing was asked yet")
    return question


def _save(session: Session, argument: str) -> str:
    words = argument.split()
    force = words[:1] == ["-f"]
    name = argument.removeprefix("-f").strip() if force else argument
    if not name and session.file is None:
        raise UsageError("/save needs a file, such as /save chat.jsonl")
    path = Path(name).expanduser() if name else session.file
    if path.exists() and path != session.file and not force:
        raise UsageError(f"{path} exists; /save -f {path} overwrites it")
    session.save(path)
    return f"{len(session.messages)} messages saved to {path}"


def _load(session: Session, argument: str) -> str:
    if not argument:
        raise UsageError("/load needs a file that /save wrote")
    session.load(Path(argument).expanduser())
    return f"{len(session.messages)} messages loaded, {report.meter(session.used, session.context)} of the context"


def _stats(session: Session, argument: str) -> str:
    total, last = session.totals, session.last
    if last is None:
        return "no answers yet"
    seed = "" if last.params.seed is None else f", seed {last.params.seed}"
    return "\n".join(
        [
            f"last answer: {report.statistics(last, session.used, session.context)}{seed}",
            f"all {total.answers}: {total.prompt_tokens} prompt tokens, {total.cached_tokens} of them cached, "
            f"{total.answer_tokens} answer tokens in {total.seconds:.1f} s",
        ]
    )


def _why(session: Session, argument: str) -> str:
    if session.last is None:
        return "no answers yet"
    cfg, plan = session.llm.cfg, session.llm.plan  # UsageError for a model in a server
    from lite_llm.cli.why import why  # torch; it is here by now, but not when the table of commands is read

    return why(cfg, plan, session.last)


def _top(session: Session, argument: str) -> str | Watch:
    from lite_llm.cli.flight import top  # torch and rich, as above
    from lite_llm.cli.remote import Remote

    still = top(session.llm.in_flight(), session.last, session.context, width() - 1)
    return Watch(still) if isinstance(session.llm, Remote) else still  # here nothing runs while the user types


def _exit(session: Session, argument: str) -> str:
    raise Leave


TABLE = {
    command.name: command
    for command in (
        Command("help", "", "this list", _help),
        Command("image", "[PATH|URL|off]", "show a picture, list them, take back what waits", _image),
        Command("system", "[TEXT|off]", "show, set or drop the system prompt", _system),
        Command("set", "[NAME VALUE]", "sampling, such as: /set temperature 0.7; default takes it back", _set),
        Command("show", "[TOPIC]", "model, plan, params, system or history", _show),
        Command("clear", "", "forget the conversation", _clear),
        Command("undo", "", "take the last question and its answer back", _undo),
        Command("regen", "", "answer the last question again", _regen),
        Command("edit", "", "change the last question and ask it again", _edit),
        Command("save", "[-f] FILE", "the conversation as JSONL of OpenAI messages", _save),
        Command("load", "FILE", "go on with a saved conversation", _load),
        Command("stats", "", "tokens and times so far", _stats),
        Command("why", "", "the last answer's speed against what the memory allows", _why),
        Command("top", "", "the requests in flight, and the slots they hold; live if a server answers", _top),
        Command("exit", "", "leave; Ctrl-D does too", _exit),
    )
}
"""By name, in the order in which /help shows them."""
