"""`lite-llm serve`: the OpenAI-compatible server in this process, the model in another."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lite_llm.cli import args
from lite_llm.cli.interrupt import whole
from lite_llm.cli.screen import LoadingBar, Screen
from lite_llm.config import EngineConfig
from lite_llm.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from lite_llm.server.loading import Loading
    from lite_llm.server.options import ServeOptions
    from lite_llm.server.remote import RemoteLLM

KEY = "LITE_LLM_API_KEY"
_WISHES = ("host", "port", "api_key", "name", "max_queue", "max_body", "timeout", "drain")


def parser(prog: str) -> args.Parser:
    parser = args.Parser(
        prog=prog, description="Serve a model over HTTP: OpenAI's API, a page for the browser, metrics."
    )
    args.add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address; any but this machine's own needs a key")
    group.add_argument("--port", type=_count, metavar="N", default=8000, help="default: 8000; 0 takes a free one")
    group.add_argument("--api-key", metavar="KEY", help=f"what clients must send (also {KEY}, which ps does not show)")
    group.add_argument("--name", metavar="NAME", help="what clients call the model; default: as it was opened")
    group.add_argument(
        "--max-requests", metavar="N", type=_count, default=EngineConfig().max_requests,
        help="answers that run together; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--max-slowdown", metavar="X", type=_number, default=2.0,
        help="a step that reads prompts takes at most X times one that does not; default: %(default)g",
    )  # fmt: skip
    group.add_argument(
        "--replicas", metavar="N", type=_count, default=1,
        help="copies of the model that share the requests, each on a GPU of its own; more than 1 needs Ray",
    )  # fmt: skip
    group.add_argument("--max-queue", metavar="N", type=_count, help="answers that may wait; default: 512")
    group.add_argument("--max-body", metavar="BYTES", type=_count, help="of a request; default: 8 MiB")
    group.add_argument(
        "--timeout", metavar="S", type=_number, help="seconds that an answer may take at most; default: any time"
    )
    group.add_argument(
        "--drain", metavar="S", type=_count, help="seconds for running answers to finish after SIGTERM; default: 30"
    )
    group.add_argument(
        "--fetch-from", metavar="HOST", nargs="+", default=[],
        help="hosts from which pictures may be fetched; of what is not public, list the address itself too",
    )  # fmt: skip
    args.add_output(parser)
    parser.set_defaults(json=False)
    return parser


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    found = parser(prog)
    options = args.parse(found, argv)
    options.engine |= {"max_requests": max(options.max_requests, 1), "max_slowdown": options.max_slowdown}
    options.api_key = options.api_key or os.environ.get(KEY) or None
    if not 0 <= options.port < 1 << 16:
        found.error(f"--port: {options.port}; expected 0 to 65535")
    if not 1 <= options.replicas <= 64:
        found.error(f"--replicas: {options.replicas}; expected 1 to 64")
    if options.api_key and not (options.api_key.isascii() and options.api_key.isprintable()):
        found.error("--api-key: expected printable ASCII characters")
    try:
        EngineConfig(**options.engine)
    except UsageError as error:
        found.error(str(error))
    return options


def run(options: argparse.Namespace, screen: Screen, load: Callable[..., AbstractContextManager["RemoteLLM"]]) -> int:
    """`load` opens the model, once the address is taken."""
    try:
        from lite_llm.server.connections import allow_files
        from lite_llm.server.loading import Loading
        from lite_llm.server.options import ServeOptions, fetcher_from, listen
        from lite_llm.text.decoders import Decoders
    except ImportError as error:
        if (error.name or "").startswith("lite_llm"):
            raise
        raise EnvironmentProblem(f"{error}", "pip install -r requirements-serve.txt") from None
    allow_files()
    given = {name: getattr(options, name) for name in _WISHES if getattr(options, name) is not None}
    wishes, fetcher = ServeOptions(**given), fetcher_from(options.fetch_from)
    if options.replicas > 1:
        return _run_replicas(options, wishes, screen)
    with contextlib.ExitStack() as stack:
        listener, decoders = stack.enter_context(listen(wishes)), stack.enter_context(Decoders())
        with Loading(listener) as loading:
            host, port = listener.getsockname()[:2]
            screen.note(f"port {port} of {host} answers 503 until the model is loaded")
            llm = stack.enter_context(load(fetcher=fetcher, decode=decoders.decode, bar=_Announced(screen, loading)))
            with whole():
                from lite_llm.server.run import serve

        return serve(llm, listener, wishes, screen.note)


def _run_replicas(options: argparse.Namespace, wishes: "ServeOptions", screen: Screen) -> int:
    try:
        with whole():
            from lite_llm.server.ray import serve_replicas
    except ImportError as error:
        if (error.name or "").startswith("lite_llm"):
            raise
        raise EnvironmentProblem(f"--replicas: {error}", "pip install -r requirements-ray.txt") from None
    from lite_llm.server.options import listen

    with listen(wishes) as listener:
        return serve_replicas(
            options.model, options.engine, options.fetch_from, options.replicas, listener, wishes, screen.note
        )


class _Announced(LoadingBar):
    """The server's clients are told too."""

    def __init__(self, screen: Screen, loading: "Loading"):
        super().__init__(screen)
        self._loading = loading

    def __call__(self, done: int, total: int) -> None:
        self._loading.progress = f"{done / total if total else 1:.0%} of its weights are here"
        super().__call__(done, total)

    def stage(self, what: str, done: int, total: int) -> None:
        self._loading.progress = f"{what}, {done} of {total}"
        super().stage(what, done, total)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number") from None


def _count(text: str) -> int:
    if not (text.isdigit() and text.isascii() and len(text) < 12):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}; expected a whole number, 0 or more")
    return int(text)
