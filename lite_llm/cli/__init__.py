"""The commands. Importing this costs nothing: each command imports what it needs when it runs."""

import functools
import sys
from collections.abc import Callable, Sequence

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

_USAGE = """\
usage: lite-llm COMMAND ...

  chat [MODEL]   chat in this terminal, or answer one --prompt
  plan [MODEL]   say what a model needs in memory and whether it fits
  warmup [MODEL] compile a model's kernels now, so that it starts fast from then on
  serve [MODEL]  an OpenAI-compatible server, with a page for the browser
  top URL        watch the requests in a server

lite-llm COMMAND --help tells more; lite-llm --version.
"""


def _quiet(command: Callable[..., int]) -> Callable[..., int]:
    """Without a traceback if Ctrl-C comes before the command is imported: from then on it answers for itself."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            return INTERRUPTED

    return run


@_quiet
def main(argv: Sequence[str] | None = None, prog: str = "lite-llm") -> int:
    """The command `lite-llm`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv else ""
    if command == "chat":
        return chat_main(argv[1:], f"{prog} chat")
    if command == "plan":
        return plan_main(argv[1:], f"{prog} plan")
    if command == "warmup":
        return warmup_main(argv[1:], f"{prog} warmup")
    if command == "serve":
        return serve_main(argv[1:], f"{prog} serve")
    if command == "top":
        return top_main(argv[1:], f"{prog} top")
    if command == "--version":
        import lite_llm

        print(f"lite_llm {lite_llm.__version__}")
        return 0
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    found = f"there is no command {command[:80]!r}" if command else "a command is missing"
    print(f"error: {found}; there are chat, plan, warmup, serve and top\n{prog} --help tells more", file=sys.stderr)
    return 2


@_quiet
def chat_main(argv: Sequence[str] | None = None, prog: str = "cli.py") -> int:
    """`lite-llm chat`, and cli.py."""
    from lite_llm.cli import args

    options = args.parse(args.chat_parser(prog), sys.argv[1:] if argv is None else argv)
    from lite_llm.cli import app

    return app.chat(options)


@_quiet
def llava_main(argv: Sequence[str] | None = None, prog: str = "cli_llava.py") -> int:
    """cli_llava.py: the same chat, with another demo."""
    from lite_llm.cli import args

    options = args.parse(args.llava_parser(prog), sys.argv[1:] if argv is None else argv)
    from lite_llm.cli import app

    return app.chat(options, app.PICTURES)


def plan_main(argv: Sequence[str], prog: str) -> int:
    from lite_llm.cli import args

    options = args.parse(args.plan_parser(prog), argv)
    from lite_llm.cli import app

    return app.plan(options)


def warmup_main(argv: Sequence[str], prog: str) -> int:
    from lite_llm.cli import args

    options = args.parse(args.warmup_parser(prog), argv)
    from lite_llm.cli import app

    return app.warm(options)


def serve_main(argv: Sequence[str], prog: str) -> int:
    from lite_llm.cli import serve

    options = serve.parse(argv, prog)
    from lite_llm.cli import app

    return app.serve(options)


def top_main(argv: Sequence[str], prog: str) -> int:
    from lite_llm.cli import top

    options = top.parse(argv, prog)
    from lite_llm.cli import app

    return app.watch(options)
