"""A command from its arguments to its exit code: open the model, choose what to do, and turn errors into one line."""

import argparse
import dataclasses
import errno
import importlib.util
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lite_llm.cli import INTERRUPTED, oneshot, pictures, report, transcript, warmup
from lite_llm.cli.client import Client
from lite_llm.cli.interrupt import whole
from lite_llm.cli.remote import Remote
from lite_llm.cli.screen import LoadingBar, Screen
from lite_llm.cli.serve import KEY
from lite_llm.cli.session import Session
from lite_llm.errors import EnvironmentProblem, LiteLLMError, SourceProblem, UsageError

if TYPE_CHECKING:
    from lite_llm.llm import LLM
    from lite_llm.server.remote import RemoteLLM
    from lite_llm.text.decoders import Decoders
    from lite_llm.text.fetch import Fetcher
    from lite_llm.text.images import Picture

CLOSED_PIPE = 141
_MODEL = ("torch", "transformers", "safetensors", "numpy")
"""Packages without which no model runs in this process."""
_HINTS = "/help lists the commands   Ctrl-C stops an answer   Ctrl-D leaves"


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a chat opens if no model is named: which of the bundled models, and with which picture."""

    name: str
    question: str  # to try
    picture: str | None = None  # a file of the demo's directory

    @property
    def folder(self) -> Path:
        return Path(__file__).parents[1] / self.name

    def __str__(self) -> str:
        return (
            f"{self.name} is a tiny model that comes with lite_llm; --model PATH_OR_HF_ID takes a real one. "
            f"Try: {self.question}"
        )


TEXT = Demo("demo/chat", "What is the capital of France?")
PICTURES = Demo("demo/vision", "What is in the picture?", "picture-1.png")


def chat(options: argparse.Namespace, demo: Demo = TEXT) -> int:
    """Opens `demo` if `options` name no model and no server; its picture too, if they bring neither pictures nor a
    conversation."""
    screen = Screen.of_process(raw=options.raw, quiet=options.quiet)

    def work() -> int:
        _check_installed(options, demo)
        text = oneshot.question(options.prompt, sys.stdin)
        if text is None and options.json:
            raise UsageError("--json gives one answer", "pass --prompt TEXT or pipe a text in")
        _prepare(options, screen)
        from lite_llm.text.decoders import Decoders

        with Decoders() as decoders:
            return _talk(options, screen, demo, text, decoders)

    return _guarded(work, screen, options)


def _talk(options: argparse.Namespace, screen: Screen, demo: Demo, text: str | None, decoders: "Decoders") -> int:
    """Open all that `options` name, and answer `text`, or what is typed if it is None."""
    from lite_llm.text.fetch import Fetcher
    from lite_llm.text.images import open_picture  # Pillow

    bundled, fetcher = _bundled(options), Fetcher()
    open_one = partial(open_picture, fetcher=fetcher, decode=decoders.decode)
    history, names = transcript.load(Path(options.resume), open_one) if options.resume else ([], {})
    seen = pictures.open_all(options.image, open_one, screen)
    if bundled and demo.picture and not seen and not history:
        seen = [(f"{demo.name}/{demo.picture}", open_one(str(demo.folder / demo.picture)))]
        if text is not None:  # a session shows it
            screen.note(f"no --image: the question is about the demo's own picture, {seen[0][0]}", loud=True)
    looks = bool(seen) or any(transcript.pictures_of(message) for message in history)
    with _speaker(options, screen, demo, fetcher, decoders, open_one, looks) as llm:
        session = Session(llm, options.params)
        if options.resume:
            session.resume(Path(options.resume), history, names)
            screen.note(f"{len(history)} messages from {options.resume}; every turn is saved there")
        if options.system is not None:
            session.system = options.system
        screen.note(report.sampling(options.params, llm.generation_config))
        for name, picture in seen:
            pictures.show(session, screen, name, picture)
        if text is not None:
            return oneshot.run(session, screen, text, options.json)
        # prompt_toolkit takes a fifth of a second, and only a dialogue needs it
        from lite_llm.cli.chat import Chat
        from lite_llm.cli.line import LineInput, plain_line

        if bundled:
            screen.note(str(demo))
        screen.note(_HINTS)
        ask = plain_line if os.environ.get("TERM") == "dumb" else LineInput()
        return Chat(session, screen, ask, _debug(options)).run()


def plan(options: argparse.Namespace) -> int:
    screen = Screen.of_process(quiet=options.quiet)

    def work() -> int:
        _prepare(options, screen)
        with whole():
            from lite_llm.llm import plan as plan_of  # torch

        found = plan_of(options.model, **options.engine)
        if options.json:
            sizes = dataclasses.asdict(found) | {"kv": found.kv, "left": found.left}
            oneshot.print_json(screen, {"schema_version": oneshot.SCHEMA_VERSION, "plan": sizes})
        else:
            screen.out.write(f"{found}\n")
        return 0

    return _guarded(work, screen, options)


def warm(options: argparse.Namespace) -> int:
    screen = Screen.of_process(quiet=options.quiet)

    def work() -> int:
        _prepare(options, screen)
        return warmup.run(options, screen)

    return _guarded(work, screen, options)


def serve(options: argparse.Namespace) -> int:
    from lite_llm.cli import serve as serving  # only this command needs what it imports

    screen = Screen.of_process(quiet=options.quiet)
    load = partial(_open, options, screen, find=_engine_process)
    return _guarded(lambda: serving.run(options, screen, load), screen, options)


def watch(options: argparse.Namespace) -> int:
    from lite_llm.cli import top

    screen = Screen.of_process(quiet=options.quiet)
    return _guarded(lambda: top.run(options, screen), screen, options)


def _speaker(
    options: argparse.Namespace, screen: Screen, demo: Demo, fetcher: "Fetcher", decoders: "Decoders",
    open_one: Callable[[str], "Picture"], looks: bool,
) -> "LLM | Remote":  # fmt: skip
    """Who answers: a model in this process, or one in a server, for which torch is not needed. `looks`: there are
    pictures, and a model in this process is refused before it is loaded if it takes none."""
    if options.connect is None:
        return _open(options, screen, demo, fetcher=fetcher, decode=decoders.decode, pictures=looks)
    return Remote(Client(options.connect, os.environ.get(KEY)), options.model, open_one, screen.note)


def _in_this_process(model: str | Path) -> type["LLM"]:
    from lite_llm.text import Tokenizer

    Tokenizer.prepare(model)  # no sooner: a thread that imports torch must not see the process end on a bad picture
    from lite_llm.llm import LLM  # torch: a second or more

    return LLM


def _engine_process(model: str | Path) -> type["RemoteLLM"]:
    from lite_llm.server.remote import RemoteLLM

    return RemoteLLM


def _open(
    options: argparse.Namespace, screen: Screen, demo: Demo = TEXT, bar: LoadingBar | None = None,
    find: Callable[[str | Path], Callable[..., "LLM | RemoteLLM"]] = _in_this_process, **more,
) -> "LLM | RemoteLLM":  # fmt: skip
    """`find` imports what opens the model, and returns it."""
    _prepare(options, screen)
    bar, model = bar or LoadingBar(screen), options.model or demo.folder
    before, pressed = signal.getsignal(signal.SIGINT), []

    def interrupt(*arguments) -> None:
        pressed.append(True)
        before(*arguments)

    signal.signal(signal.SIGINT, interrupt)
    try:
        bar.status("starting ...")
        with whole():
            opened = find(model)

        def say(text: str) -> None:
            bar.clear()
            screen.note(text)

        llm = opened(model, say=say, progress=bar, status=bar.stage, **options.engine, **more)
    finally:
        signal.signal(signal.SIGINT, before)
        bar.clear()
    if pressed:  # a library has swallowed it
        llm.close()
        raise KeyboardInterrupt
    return llm


def _bundled(options: argparse.Namespace) -> bool:
    return options.model is None and options.connect is None


def _check_installed(options: argparse.Namespace, demo: Demo) -> None:
    """That a chat's packages are there, all at once and before anything else can be wrong."""
    needed = [*_MODEL] if options.connect is None else []
    needed += ["PIL"] * bool(options.image or demo.picture and _bundled(options))
    needed += ["prompt_toolkit", "rich"] * (options.prompt is None and sys.stdin is not None and sys.stdin.isatty())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"not installed: {', '.join(missing)}", "pip install -r requirements.txt")


def _prepare(options: argparse.Namespace, screen: Screen) -> None:
    """What libraries must know before they are imported: quiet, and polite to other programs."""
    # OpenMP's threads spin at every barrier by default. Where other programs use the cores too, that costs a hundred
    # times the work: the demo on 4 busy cores went from 1.4 tokens/s to 150 with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not screen.bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"PIL\b")  # of pictures that are refused, or read all the same
    if options.verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("PIL").setLevel(logging.CRITICAL)  # without a handler its warnings would go to stderr


def _guarded(work: Callable[[], int], screen: Screen, options: argparse.Namespace) -> int:
    """The exit code of `work`, whatever happens in it."""
    interrupted = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        code = work()
        screen.out.flush()  # a closed pipe shows here at the latest
        return code
    except BrokenPipeError:
        return _closed_pipe()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if interrupted:  # a library that was being imported has turned the interrupt into an ImportError
            return INTERRUPTED
        try:
            return _report(error, screen, options)
        except BrokenPipeError:
            return _closed_pipe()
    finally:
        signal.signal(signal.SIGINT, before)


def _report(error: Exception, screen: Screen, options: argparse.Namespace) -> int:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ImportError) and not (error.name or "").startswith("lite_llm"):
        error = EnvironmentProblem(f"{error}", "pip install -r requirements.txt")
    elif full:
        error = SourceProblem(f"{error.filename or 'output'}: {error.strerror}", "free some space")
    known = isinstance(error, LiteLLMError)
    message = str(error) if known else f"internal error: {type(error).__name__}: {str(error)[:300]}; run with --debug"
    screen.error("\n".join(message.split("\n")[:6]))
    if _debug(options):
        traceback.print_exception(error, file=screen.err)
    if options.json and not full:  # there is no room for it
        found = (error.code, error.message, error.hint) if known else ("internal", str(error), "run with --debug")
        oneshot.print_json(screen, oneshot.failure(*found))
    return error.exit_code if known else LiteLLMError.exit_code


def _closed_pipe() -> int:
    """Nobody reads stdout any more: say nothing, and let Python's own last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED_PIPE


def _debug(options: argparse.Namespace) -> bool:
    return options.debug or os.environ.get("LITE_LLM_DEBUG", "0") not in ("", "0")
